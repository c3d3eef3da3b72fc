"""Faults: a run ends as if nothing had happened, or with one message, and nothing saved is lost."""

import concurrent.futures
import contextlib
import json
import pathlib
import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest

import vision_attention as va
from tests import faults, launcher
from vision_attention import checkpoint, folders, planning, runs
from vision_attention.data import builders

pytestmark = pytest.mark.slow
STEPS = 110
SHORT = 18
KILLS = 26  # of each of two runs


def _config(data_dir, **changes):
  """With dropped paths, mixing and averages."""
  values = {
    'total': f'{STEPS} steps',
    'eval.every': '40 steps',
    'model.options.drop_path': 0.2,
    'mixing.prob': 1.0,
    'mixing.mixup_alpha': 0.2,
  }
  return launcher.tiny_config(data_dir, **(values | changes))


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  builders.write('digits', builders.digits(), folder)
  return folder


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def start(cache):
  server = launcher.Launcher(cache, {})
  yield server.start
  server.close()


@pytest.fixture(scope='module')
def whole(start, data_dir, tmp_path_factory):
  """Everything that an unbroken run ends in."""
  workdir = tmp_path_factory.mktemp('whole') / 'run'
  run = start(_config(data_dir), workdir)
  assert run.wait() == 0, run.output()[-3000:]
  return _final(workdir, STEPS)


def _short(data_dir, **changes):
  return _config(data_dir, **{'total': f'{SHORT} steps', 'eval.every': '9 steps', **changes})


@pytest.fixture(scope='module')
def short(start, data_dir, tmp_path_factory):
  """What an unbroken run of fewer steps ends in."""
  workdir = tmp_path_factory.mktemp('short') / 'run'
  run = start(_short(data_dir), workdir)
  assert run.wait() == 0, run.output()[-3000:]
  return _final(workdir, SHORT)


def _final(workdir, step):
  """Returns the last state, the lines of metrics, and the steps that are kept."""
  state = checkpoint.load_state(workdir, step=step)
  return state, (workdir / 'metrics.jsonl').read_text(), checkpoint.steps_of(workdir)


def _assert_same(found, expected):
  (state, lines, steps), (expected_state, expected_lines, expected_steps) = found, expected
  assert state.keys() == expected_state.keys()
  for key, value in state.items():
    np.testing.assert_array_equal(value, expected_state[key], err_msg=key, strict=True)
  assert lines == expected_lines
  assert steps == expected_steps


def _is_saving(workdir):
  return any((workdir / checkpoint.CHECKPOINTS).glob('*tmp*'))


def _kill_often(cache, data_dir, workdir, seed):
  """Kills a run again and again; returns how, having looked at what was saved each time."""
  server = launcher.Launcher(cache, {})
  rng, kills, saved = random.Random(seed), [], 0
  try:
    for i in range(KILLS):
      number = signal.SIGTERM if rng.random() < 0.2 else signal.SIGKILL
      run = server.start(_config(data_dir), workdir)
      if i % 3 == 0:
        # While a checkpoint is half-written: its temporary folder is there.
        what = 'during a save'
        begun = run.until(lambda run=run, saved=saved: run.step() > saved and _is_saving(workdir))
      else:
        goal = min(saved + rng.randint(1, 6), STEPS - 2)
        what = f'after step {goal}'
        begun = run.until(lambda run=run, goal=goal: run.step() >= goal)
      assert begun, run.output()[-3000:]
      code = run.kill(number)
      assert code == (143 if number == signal.SIGTERM else -9), run.output()[-3000:]
      kills.append(f'{number.name} {what}')
      steps = checkpoint.steps_of(workdir)
      assert not steps or steps[-1] >= saved, f'{kills[-1]} lost step {saved}: {steps}'
      if number == signal.SIGTERM:
        assert f'saved step {steps[-1]} of {STEPS} after SIGTERM' in run.output()
      saved = steps[-1] if steps else saved
    run = server.start(_config(data_dir), workdir)
    assert run.wait() == 0, run.output()[-3000:]
  finally:
    server.close()
  return kills


@pytest.mark.timeout(1800)
def test_fifty_kills_change_nothing(whole, cache, data_dir, tmp_path):
  """At chance steps and in the middle of saves; the end is the unbroken run's, to the last bit."""
  folders = [tmp_path / name for name in ('one', 'two')]
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    jobs = [
      pool.submit(_kill_often, cache, data_dir, folder, seed) for seed, folder in enumerate(folders)
    ]
    kills = [kill for job in jobs for kill in job.result()]
  assert len(kills) >= 50
  assert {kill.split()[0] for kill in kills} == {'SIGKILL', 'SIGTERM'}
  for folder in folders:
    _assert_same(_final(folder, STEPS), whole)


def _parents():
  """Returns the parent of every process that runs."""
  found = {}
  for status in pathlib.Path('/proc').glob('[0-9]*/stat'):
    with contextlib.suppress(OSError):  # ended while we looked
      state, parent = status.read_text().rpartition(')')[2].split()[:2]
      if state != 'Z':
        found[int(status.parent.name)] = int(parent)
  return found


@pytest.mark.skipif(not pathlib.Path('/proc/self/stat').exists(), reason='reads /proc of Linux')
def test_no_worker_outlives_a_run(start, data_dir, tmp_path):
  run = start(_config(data_dir, **{'data.num_workers': 1}), tmp_path / 'run')
  assert run.until(lambda: run.step() > 1), run.output()[-3000:]
  workers = {pid for pid, parent in _parents().items() if parent == run.pid}
  assert workers
  run.kill()
  end = time.monotonic() + 30
  while left := workers & _parents().keys():
    assert time.monotonic() < end, f'{left} go on'
    time.sleep(0.05)


def test_an_evaluation_that_was_ended_is_made_up_for(start, data_dir, tmp_path):
  """Twice in a row; its scores then count among the checkpoints that are kept as the best."""
  config = _short(data_dir, **{'checkpoint.keep_best': 2})
  run = start(config, tmp_path / 'whole')
  assert run.wait() == 0, run.output()[-3000:]
  workdir = tmp_path / 'run'
  for _ in range(2):
    run = start(config, workdir, patch='terminated_in_evaluation')
    assert run.wait() == 143, run.output()[-3000:]
    assert checkpoint.steps_of(workdir)[-1] == 9
  run = start(config, workdir)
  assert run.wait() == 0, run.output()[-3000:]
  whole = _final(tmp_path / 'whole', SHORT)
  assert whole[2] == [9, 18]
  _assert_same(_final(workdir, SHORT), whole)


def test_a_folder_takes_one_run_at_a_time(start, data_dir, tmp_path):
  first = start(_config(data_dir), tmp_path / 'run')
  assert first.until(lambda: first.step() > 1), first.output()[-3000:]
  second = start(_config(data_dir), tmp_path / 'run')
  assert second.wait() == 2, second.output()[-3000:]
  message = f'{tmp_path}/run is held by another run (process {first.pid} of '
  assert message in second.output().split('\nerror: ')[-1]
  first.kill()
  third = start(_config(data_dir), tmp_path / 'run')
  assert third.until(lambda: third.step() > 2), third.output()[-3000:]
  third.kill()


def test_a_full_disk_ends_the_run_and_keeps_what_was_saved(start, short, data_dir, tmp_path):
  config = _short(data_dir)
  run = start(config, tmp_path / 'run', patch='disk_full', environment={faults.STEP: '9'})
  assert run.wait() == 74, run.output()[-3000:]
  run.until(lambda: '\nerror: ' in run.output())
  message = run.output().split('\nerror: ')[-1]
  assert message.startswith('the checkpoint of step 9 could not be written')
  assert 'the last whole checkpoint is step 6' in message
  assert checkpoint.steps_of(tmp_path / 'run')[-1] == 6
  run = start(config, tmp_path / 'run')
  assert run.wait() == 0, run.output()[-3000:]
  _assert_same(_final(tmp_path / 'run', SHORT), short)


def _damage(folder, how):
  files = sorted((p for p in folder.rglob('*') if p.is_file()), key=lambda p: -p.stat().st_size)
  largest = files[0]
  content = largest.read_bytes()
  if how == 'truncated':
    largest.write_bytes(content[: len(content) // 2])
  elif how == 'flipped':
    middle = len(content) // 2
    largest.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
  else:
    largest.unlink()


@pytest.mark.parametrize('how', ['truncated', 'flipped', 'deleted'])
def test_a_damaged_checkpoint_is_named_and_not_passed_over(start, short, data_dir, tmp_path, how):
  """What to do is the user's to say: another checkpoint would silently undo steps."""
  workdir = tmp_path / 'run'
  config = _short(data_dir, **{'checkpoint.keep_latest': 2})
  run = start(config, workdir)
  run.until(lambda: len(checkpoint.steps_of(workdir)) > 1)
  run.kill(signal.SIGTERM)
  earlier, latest = checkpoint.steps_of(workdir)[-2:]
  _damage(workdir / checkpoint.CHECKPOINTS / str(latest) / 'state', how)
  run = start(config, workdir)
  assert run.wait() == 2, run.output()[-3000:]
  message = run.output().split('\nerror: ')[-1]
  assert f'checkpoint of step {latest}' in message
  assert f'an earlier one is step {earlier}' in message
  shutil.rmtree(workdir / checkpoint.CHECKPOINTS / str(latest))
  run = start(config, workdir)
  assert run.wait() == 0, run.output()[-3000:]
  _assert_same(_final(workdir, SHORT), (*short[:2], [SHORT - 3, SHORT]))


def test_a_step_that_is_not_finite_is_named(start, short, data_dir, tmp_path):
  workdir = tmp_path / 'run'
  run = start(_short(data_dir), workdir, patch='not_a_number', environment={faults.STEP: '8'})
  assert run.wait() == 2
  message = run.output().splitlines()[-1]
  assert 'step 8 are not finite; the last good checkpoint is step 6' in message
  run = start(_short(data_dir), workdir)
  assert run.wait() == 0
  _assert_same(_final(workdir, SHORT), short)


def test_a_run_in_a_bucket_is_killed_and_ends_as_one_on_a_disk(
  start, short, store, data_dir, tmp_path
):
  address = 'gs://bucket/runs/one'
  where, log = folders.folder(address), tmp_path / 'log'
  # Killed while its second checkpoint has everything but the marker.
  store.hold = f'{checkpoint.CHECKPOINTS}/6/commit_success.txt'
  more = {'log': log, 'environment': store.environment}
  run = start(_short(data_dir), where, **more)
  assert run.until(store.held.is_set), run.output()[-3000:]
  assert run.kill() == -9
  store.hold = ''
  assert store.names(f'bucket/runs/one/{checkpoint.CHECKPOINTS}/6/state')
  assert checkpoint.steps_of(where) == [3]
  run = start(_short(data_dir), where, **more)
  assert run.wait() == 0, run.output()[-3000:]
  assert f'resumed at step 3 of {SHORT} from {address}' in run.output()
  _assert_same(_final(where, SHORT), short)
  model, variables, config = va.load(address)
  images = jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32)
  logits = jax.eval_shape(lambda x: model.apply(variables, x, train=False), images)
  assert logits.shape == (1, config.data.num_classes)
  (found,) = runs.find([folders.folder('gs://bucket/runs')])
  assert (str(found.workdir), found.finished) == (address, True)
  config.optimizer.learning_rate = 0.5
  with pytest.raises(ValueError, match=f'{address} holds a run of another config'):
    planning.check_same_run(config, where)


def test_data_that_cannot_be_reached_are_named(start, short, data_dir, tmp_path):
  workdir = tmp_path / 'run'
  run = start(_short(tmp_path / 'nowhere'), tmp_path / 'never')
  assert run.wait() == 2
  assert f"data set 'digits' is not in {tmp_path}/nowhere/digits" in run.output()
  assert not (tmp_path / 'never').exists()
  run = start(_short(data_dir), workdir, patch='data_gone', environment={faults.STEP: '10'})
  assert run.wait() == 74, run.output()[-3000:]
  assert f'{data_dir}/digits' in run.output().split('\nerror: ')[-1]
  run = start(_short(data_dir), workdir)
  assert run.wait() == 0
  _assert_same(_final(workdir, SHORT), short)


def test_a_clock_that_goes_wrong_changes_nothing(start, short, data_dir, tmp_path):
  """A day ahead, then back again: which checkpoint is the latest is no matter of time."""
  workdir = tmp_path / 'run'
  for seconds in (86_400, 0):
    run = start(
      _short(data_dir), workdir, patch='clock_ahead', environment={faults.SKEW: str(seconds)}
    )
    if seconds:
      run.until(lambda run=run: run.step() >= 10)
      run.kill()
  assert run.wait() == 0, run.output()[-3000:]
  _assert_same(_final(workdir, SHORT), short)


def test_corrupt_records_are_refused_or_counted(start, tmp_path):
  """One record whose image is cut short; what stands in for it is counted, resumed or not."""
  raw = builders.digits()
  train = list(raw.splits['train'])
  train[100] = (train[100][0][:60], train[100][1])
  splits = {'train': train, 'test': raw.splits['test']}
  builders.write(
    'digits', builders.Raw(splits, raw.label_names, raw.shape, 'one is cut'), tmp_path / 'data'
  )
  changes = {'total': '1 epochs', 'eval.every': '1 epochs', 'checkpoint.every': '20 steps'}
  run = start(_config(tmp_path / 'data', **changes), tmp_path / 'refused')
  assert run.wait() == 2
  assert 'is no whole image' in run.output().splitlines()[-1]
  changes['data.on_corrupt'] = 'skip'
  found = []
  for name in ('whole', 'killed'):
    run = start(_config(tmp_path / 'data', **changes), tmp_path / name)
    if name == 'killed':
      run.until(lambda run=run: run.step() > 45)
      run.kill()
      run = start(_config(tmp_path / 'data', **changes), tmp_path / name)
    assert run.wait() == 0, run.output()[-3000:]
    found.append(_final(tmp_path / name, 1442 // 16))
  _assert_same(*found)
  rows = map(json.loads, found[0][1].splitlines())
  assert sum(row.get('train/corrupt', 0) for row in rows) >= 1
