"""Many devices and many processes compute what one does, and end together."""

import concurrent.futures
import itertools
import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from tests import compilation, faults, launcher
from vision_attention import checkpoint
from vision_attention.data import builders, pipeline
from vision_attention.training import rendezvous, sharding

ROOT = pathlib.Path(__file__).parents[1]
_MESHES = """
  import os, sys
  sys.path.insert(0, 'tests')
  import jax, numpy as np
  import test_train as t
  from vision_attention.models import tree
  from vision_attention.training import sharding
  assert jax.device_count() == 8
  sharding.MIN_SIZE = 64
  # No Adam: it divides by the gradient's size, and magnifies the rounding of other sums.
  options = {'optimizer.name': 'sgd', 'optimizer.learning_rate': 0.1}
  mesh = lambda *sizes: dict(zip(('mesh.data', 'mesh.fsdp', 'mesh.tensor'), sizes))
  make_mesh = sharding.make_mesh

  def one_device(make):
    sharding.make_mesh = lambda *sizes: make_mesh(1, 1, 1, jax.devices()[:1])
    found, _ = t._run(make(**options))
    sharding.make_mesh = make_mesh
    return found

  def difference(a, b):
    a, b = tree.flatten(a), tree.flatten(b)
    return max(float(np.abs(np.asarray(a[k]) - np.asarray(b[k])).max()) for k in a)

  def axes_of(tree):
    return {axis for x in jax.tree.leaves(tree) for axis in x.sharding.spec if axis}

  FAMILIES = (
    (t._vit, ((1, 8, 1), (4, 1, 2), (2, 2, 2))),
    (t._coatnet, ((8, 1, 1), (2, 4, 1), (2, 2, 2))),
  )
  for make, meshes in FAMILIES:
    one = one_device(make)
    for sizes in meshes:
      got, _ = t._run(make(**mesh(*sizes), **options))
      wanted = {a for a, n in zip(('data', 'fsdp', 'tensor'), sizes) if n > 1 and a != 'data'}
      assert axes_of(got.params) == wanted, (sizes, axes_of(got.params))
      for key in ('params', 'batch_stats', 'ema_params', 'ema_batch_stats'):
        if getattr(one, key) is None:
          continue
        t._assert_close(getattr(got, key), getattr(one, key), rtol=1e-3, atol=1e-5)
      print(make.__name__, sizes, 'differs by', difference(got.params, one.params))
    mlp = next(k for k in tree.flatten(one.params) if k.endswith('mlp/expand/kernel'))
    last = tree.flatten(got.params)[mlp]
    assert last.addressable_shards[0].data.size * 4 == last.size, 'fsdp and tensor split it both'
  rules = (('classifier/kernel', ('fsdp', None)), ('stage', (None,)))
  got, _ = t._run(t._coatnet(**mesh(2, 4, 1), sharding_rules=rules, **options))
  assert got.params['head']['classifier']['kernel'].addressable_shards[0].data.shape == (4, 10)
  stage = jax.tree.leaves(got.params['backbone']['stage1'])
  assert all(x.is_fully_replicated for x in stage)
  t._assert_close(got.params, one.params, rtol=1e-3, atol=1e-5)
"""


@pytest.mark.slow
def test_every_mesh_computes_the_same():
  """BatchNorm included: its statistics are those of the global batch."""
  done = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(_MESHES)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env=os.environ
    | {
      'XLA_FLAGS': compilation.flags(8),
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    },
  )
  assert done.returncode == 0, done.stderr[-3000:]
  print(done.stdout)


@pytest.mark.fast
@pytest.mark.parametrize(
  ('values', 'message'),
  [
    (('h:1', '2', ''), 'JAX_PROCESS_ID is not set: set all of'),
    (('h', '2', '0'), "JAX_COORDINATOR_ADDRESS 'h' does not read like host:port"),
    (('h:99999', '2', '0'), 'does not read like host:port'),
    (('h:1', 'two', '0'), "JAX_NUM_PROCESSES 'two' is no whole number"),
    (('h:1', '0', '0'), 'JAX_NUM_PROCESSES 0 is not at least 1'),
    (('h:1', '2', '2'), 'JAX_PROCESS_ID 2 is not between 0 and 1'),
  ],
)
def test_variables_that_say_nothing_are_refused(values, message):
  names = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
  with pytest.raises(ValueError, match=message):
    sharding.coordinator(dict(zip(names, values, strict=True)))


@pytest.mark.fast
def test_variables_name_a_process():
  assert sharding.coordinator({}) is None
  names = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
  found = sharding.coordinator(dict(zip(names, ('10.0.0.2:8476', '4', '3'), strict=True)))
  assert found == ('10.0.0.2:8476', 4, 3)


_STEP = {
  'SLURM_JOB_ID': '5000',
  'SLURM_STEP_ID': '0',
  'SLURM_STEP_NODELIST': 'node[003-008,010],big1',
  'SLURM_STEP_NUM_TASKS': '4',
  'SLURM_PROCID': '2',
}


@pytest.mark.fast
def test_variables_of_slurm_name_a_task(caplog):
  step = lambda **changes: sharding.slurm_step(_STEP | changes)
  assert step() == (f'node003:{61440 + 5000 % 4096}', 4, 2)
  assert step(SLURM_STEP_ID='1') == (f'node003:{61440 + 5509 % 4096}', 4, 2)
  assert step(JAX_COORDINATOR_PORT='8476') == ('node003:8476', 4, 2)
  for nodes, first in (
    ('node001', 'node001'),
    ('gpu-1.lab,gpu-2.lab', 'gpu-1.lab'),
    ('rack[2-3]n[07,09]-ib,x', 'rack2n07-ib'),
  ):
    assert sharding.first_node(nodes) == first
  # A process of an srun of one task, on a machine without Slurm, in a batch script and its like.
  for alone in ({'SLURM_STEP_NUM_TASKS': '1', 'SLURM_NTASKS': '1'}, {}):
    assert sharding.slurm_step(alone) is None
  assert not caplog.records
  assert (
    sharding.slurm_step({'SLURM_JOB_ID': '5', 'SLURM_NTASKS': '4', 'SLURM_PROCID': '0'}) is None
  )
  assert 'has 4 tasks, but this process is none of them and trains alone' in caplog.text


@pytest.mark.fast
@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'SLURM_PROCID': ''}, 'SLURM_PROCID is not set, though SLURM_STEP_NUM_TASKS=4 is'),
    ({'SLURM_PROCID': '4'}, 'SLURM_PROCID 4 is not between 0 and 3, as SLURM_STEP_NUM_TASKS 4'),
    ({'SLURM_STEP_NUM_TASKS': 'all'}, "SLURM_STEP_NUM_TASKS 'all' is no whole number"),
    ({'SLURM_JOB_ID': '12_3'}, "SLURM_JOB_ID '12_3' is no whole number"),
    ({'SLURM_STEP_NODELIST': 'node[3'}, r"SLURM_STEP_NODELIST 'node\[3' does not read like"),
    ({'JAX_COORDINATOR_PORT': '0'}, "JAX_COORDINATOR_PORT '0' is no port"),
  ],
)
def test_variables_of_slurm_that_say_nothing_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    sharding.slurm_step(_STEP | changes)


@pytest.mark.fast
def test_a_task_of_slurm_that_does_not_come_is_named(monkeypatch):
  port = _free_address().rpartition(':')[2]
  variables = {
    'SLURM_PROCID': '0',
    'SLURM_STEP_NODELIST': 'localhost',
    'JAX_COORDINATOR_PORT': port,
  }
  for name, value in (_STEP | variables).items():
    monkeypatch.setenv(name, value)
  with pytest.raises(TimeoutError, match=r'processes \[1, 2, 3\] of 4 did not come within 0.3 s'):
    sharding.join_processes(join_seconds=0.3)
  monkeypatch.setenv('SLURM_PROCID', '2')
  with pytest.raises(TimeoutError, match=f'did not reach process 0 at localhost:{port}'):
    sharding.join_processes(join_seconds=0.3)


@pytest.mark.fast
def test_machines_of_no_slice_are_refused():
  sharding.check_joined(4, 4)
  with pytest.raises(ValueError, match='made one by one cannot be joined to a slice'):
    sharding.check_joined(2, 1)


def _free_address():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{free.getsockname()[1]}'


def _meet(*processes, seconds=1.0):
  """What became of processes that say (count, index)."""
  address = _free_address()

  def one(process):
    try:
      rendezvous.meet(address, *process, seconds)
    except (ValueError, TimeoutError) as error:
      return error
    return None

  with concurrent.futures.ThreadPoolExecutor() as pool:
    return list(pool.map(one, processes))


@pytest.mark.fast
def test_processes_meet_or_say_why_not():
  assert _meet((3, 0), (3, 2), (3, 1), seconds=10) == [None] * 3
  for error in _meet((2, 0), (3, 1), seconds=10):
    assert isinstance(error, ValueError)
    assert 'process 1 knows of 3 processes and process 0 of 2' in str(error)
  for error in _meet((3, 0), (3, 1), (3, 1), seconds=10):
    assert 'two processes have number 1' in str(error)
  began = time.monotonic()
  late, early = _meet((3, 0), (3, 2), seconds=0.5)
  assert isinstance(late, TimeoutError)
  assert 'processes [1] of 3 did not come within 0.5 s' in str(late)
  assert 'processes [1] of 3 did not come' in str(early)  # as the first one tells it
  (alone,) = _meet((2, 1), seconds=0.5)
  assert 'did not reach process 0' in str(alone)
  with socket.create_server(('', 0)) as other:
    address = f'localhost:{other.getsockname()[1]}'
    with pytest.raises(ValueError, match=r'cannot listen at port .* in use'):
      rendezvous.meet(address, 2, 0, 0.5)
  assert time.monotonic() - began < 5


@pytest.mark.fast
def test_who_came_early_hears_the_verdict_of_a_first_process_that_began_later():
  address = _free_address()
  with concurrent.futures.ThreadPoolExecutor() as pool:
    early = pool.submit(rendezvous.meet, address, 3, 2, 1.0)
    time.sleep(0.6)
    late = pool.submit(rendezvous.meet, address, 3, 0, 1.0)
    with pytest.raises(ValueError, match=r'processes \[1\] of 3 did not come'):
      early.result()
    with pytest.raises(TimeoutError, match=r'processes \[1\] of 3 did not come'):
      late.result()


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  builders.write('digits', builders.digits(), folder)
  return folder


def _config(data_dir, **changes):
  """With chance that depends on a place in the batch: pairs, rectangles, dropped paths."""
  values = {
    'total': '12 steps',
    'eval.every': '12 steps',
    'model.options.drop_path': 0.3,
    'mixing.prob': 1.0,
    'mixing.cutmix_alpha': 1.0,
    'mixing.per': 'example',
    'erasing.prob': 0.25,
    'optimizer.name': 'sgd',
    'optimizer.learning_rate': 0.1,
    'mesh.join_seconds': 60,
    'mesh.heartbeat_seconds': 10,
  }
  return launcher.tiny_config(data_dir, **(values | changes))


class _Device:
  """As much of a device as a mesh reads."""

  platform = device_kind = 'cpu'

  def __init__(self, number, process):
    self.id, self.process_index = number, process


@pytest.mark.fast
@pytest.mark.parametrize('sizes', [(-1, 1, 1), (2, 4, 1), (2, 2, 2), (1, 4, 2), (4, 1, 2)])
def test_every_mesh_has_the_processes_blocks_in_their_order(sizes):
  """Also where the devices are not numbered process by process, as on a TPU slice."""
  devices = [_Device(number, number // 2 % 2) for number in range(8)]
  mesh = sharding.make_mesh(*sizes, devices=devices)
  for device, (part,) in sharding.batch_sharding(mesh).devices_indices_map((16,)).items():
    start, stop, _ = part.indices(16)
    assert start // 8 == (stop - 1) // 8 == device.process_index


@pytest.mark.slow
def test_processes_share_every_epoch_exactly(data_dir, monkeypatch):
  """Record numbers of the real chain, also if the number of processes changes in mid-epoch."""

  def number(self, index):
    return {'image': np.zeros((16, 16, 3), np.uint8), 'label': np.int32(index)}

  monkeypatch.setattr(pipeline.Decoded, '__getitem__', number)
  size = 100
  config = _config(data_dir, **{'data.train_split': f'train[:{size}]', 'data.train_ops': ()}).data

  def read(count, first, end):
    shares = [
      pipeline.train_batches(
        config, seed=1, batch_size=16, start_step=first, process_index=i, process_count=count
      )
      for i in range(count)
    ]
    steps = [[batch['label'] for batch in itertools.islice(s, end - first)] for s in shares]
    assert all(len(label) == 16 // count for share in steps for label in share)
    return [list(np.concatenate(labels)) for labels in zip(*steps, strict=True)]

  # 25 steps of 16 are 4 epochs of 100 records, whose ends lie within batches.
  whole = read(1, 0, 25)
  numbers, counts = np.unique(np.concatenate(whole), return_counts=True)
  assert list(numbers) == list(range(size))
  assert set(counts) == {4}
  for count in (2, 4):
    assert read(count, 0, 25) == whole
  assert read(4, 0, 3) + read(2, 3, 9) + read(1, 9, 16) + read(4, 16, 25) == whole


@pytest.fixture(scope='module')
def start(tmp_path_factory):
  server = launcher.Launcher(tmp_path_factory.mktemp('cache'), {})

  def several(config, workdir, count, patch_last=None, slurm=False, **variables):
    host, _, port = _free_address().rpartition(':')

    def place(index):
      if not slurm:
        names = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
        return dict(zip(names, (f'{host}:{port}', str(count), str(index)), strict=True))
      numbers = {'SLURM_STEP_NUM_TASKS': str(count), 'SLURM_NTASKS': str(count)}
      numbers |= {'SLURM_PROCID': str(index), 'SLURM_LOCALID': str(index)}
      return _STEP | numbers | {'SLURM_STEP_NODELIST': host, 'JAX_COORDINATOR_PORT': port}

    return [
      server.start(
        config,
        workdir,
        index,
        patch=patch_last if index == count - 1 else None,
        environment=place(index) | variables,
      )
      for index in range(count)
    ]

  yield several
  server.close()


def _finish(runs):
  for run in runs:
    assert run.wait() == 0, run.output()[-3000:]


@pytest.fixture(scope='module')
def whole(start, data_dir, tmp_path_factory):
  """What one process ends in."""
  workdir = tmp_path_factory.mktemp('whole') / 'run'
  _finish(start(_config(data_dir), workdir, 1))
  return checkpoint.load_state(workdir, step=12)


def _assert_close(workdir, expected, what):
  found = checkpoint.load_state(workdir, step=12)
  assert found.keys() == expected.keys()
  worst = 0.0
  for key, value in expected.items():
    np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-6, err_msg=key)
    worst = max(worst, float(np.abs(np.asarray(found[key], float) - value).max(initial=0)))
  print(f'{what}: differs by {worst:.2g} from one process')


@pytest.mark.slow
@pytest.mark.parametrize('count', [2, 4])
def test_processes_compute_what_one_does(count, start, data_dir, whole, tmp_path):
  """The last one's clock is a day ahead, which is the same; two are tasks of Slurm."""
  began = time.monotonic()
  variables = {faults.SKEW: '86400'}
  runs = start(_config(data_dir), tmp_path / 'run', count, 'clock_ahead', count == 2, **variables)
  _finish(runs)
  _assert_close(tmp_path / 'run', whole, f'{count} processes, {time.monotonic() - began:.1f} s')


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_fewer_go_on(start, data_dir, whole, tmp_path):
  """Of 4 the last one is killed; of the 2 that go on the first; one ends the run."""
  workdir = tmp_path / 'run'
  for count, victim, goal in ((4, 3, 4), (2, 0, 8)):
    runs = start(_config(data_dir), workdir, count)
    assert runs[0].until(lambda runs=runs, goal=goal: runs[0].step() >= goal), runs[0].output()
    runs[victim].kill(signal.SIGKILL)
    began = time.monotonic()
    codes = [run.wait(40) for i, run in enumerate(runs) if i != victim]
    seconds = time.monotonic() - began
    print(f'{count} processes, {victim} killed: the others end after {seconds:.1f} s by {codes}')
    for i, run in enumerate(runs):
      assert i == victim or 'lost another one' in run.output(), run.output()[-3000:]
    assert set(codes) == {sharding.LOST}
  last = start(_config(data_dir), workdir, 1)
  _finish(last)
  assert 'resumed at step' in last[0].output()
  _assert_close(workdir, whole, '4, then 2, then 1 processes')
