"""A run that is killed anywhere ends as if it had not been, to the last bit."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import vision_attention as va
from tests import compilation, launcher
from vision_attention import checkpoint
from vision_attention.data import builders
from vision_attention.models import tree

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 24
# One device is the subject of test_faults.py.
DEVICES = 4
OVERRIDES = (
  f'--config.total={STEPS} steps',
  '--config.batch_size=16',
  '--config.eval.batch_size=64',
  '--config.image_size=32',
  '--config.model.options.depths=(1, 1, 1, 1)',
  '--config.model.options.dims=(8, 8, 16, 16)',
  '--config.model.options.stem_dim=8',
  '--config.model.options.drop_path=0.2',
  '--config.mixing.prob=1.0',
  '--config.schedule.warmup=4 steps',
  '--config.log_every=3 steps',
  '--config.eval.every=8 steps',
  '--config.checkpoint.every=5 steps',
  '--config.data.eval_split=test[:100]',
  '--config.compile_cache=',
)


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  builders.write('digits', builders.digits(), folder)
  return folder


def _start(workdir, data_dir, devices, *more, **variables):
  environment = os.environ | {
    'TFDS_DATA_DIR': str(data_dir),
    'JAX_PLATFORMS': 'cpu',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',  # programs this short cost most to compile
    'XLA_FLAGS': compilation.flags(devices),
    **variables,
  }
  command = [sys.executable, 'main.py', '--config=configs/coatnet0.py:local', *OVERRIDES]
  return subprocess.Popen(
    [*command, f'--workdir={workdir}', *more],
    cwd=ROOT,
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def _finish(process):
  output, _ = process.communicate(timeout=launcher.PATIENCE)
  assert process.returncode == 0, output[-3000:]
  return output


def _final(workdir):
  """Everything that a run leaves: the whole state, and the metrics file."""
  state = {}
  for ema in (False, True):
    flat = tree.flatten(va.load_variables(workdir, ema=ema, step=STEPS))
    state |= {f'{ema}/{key}': value for key, value in flat.items()}
  opt_state = checkpoint.load_state(workdir, step=STEPS)
  state |= {f'state/{key}': value for key, value in opt_state.items()}
  return state, (workdir / 'metrics.jsonl').read_text()


def _assert_same(workdir, expected):
  state, lines = _final(workdir)
  expected_state, expected_lines = expected
  assert state.keys() == expected_state.keys()
  for key, value in state.items():
    np.testing.assert_array_equal(value, expected_state[key], err_msg=key, strict=True)
  assert lines == expected_lines


def _step_reached(workdir):
  path = workdir / 'metrics.jsonl'
  lines = path.read_text().splitlines() if path.exists() else []
  return max((json.loads(line)['step'] for line in lines if line.endswith('}')), default=0)


def _wait_for(condition, process, what):
  for _ in range(6000):
    if condition():
      return
    if process.poll() is not None:
      break
    time.sleep(0.02)
  pytest.fail(f'{what} did not happen: {process.communicate()[0][-3000:]}')


@pytest.fixture(scope='module')
def whole(data_dir, tmp_path_factory):
  """An uninterrupted run to compare with."""
  workdir = tmp_path_factory.mktemp('whole')
  output = _finish(_start(workdir, data_dir, DEVICES))
  assert 'of 100 test images' in output
  assert 'ETA' in output
  return workdir, _final(workdir)


@pytest.mark.slow
def test_kills_change_nothing(whole, data_dir, tmp_path):
  _, expected = whole
  rng = random.Random(0)
  kills = []
  # SIGKILL while a checkpoint is half-written: the temporary folder is there.
  process = _start(tmp_path, data_dir, DEVICES)
  folder = tmp_path / checkpoint.CHECKPOINTS
  _wait_for(lambda: any(folder.glob('*tmp*')), process, 'a save')
  process.kill()
  process.communicate()
  kills.append('SIGKILL during a save')
  # SIGKILL and SIGTERM at a random step.
  for number in (signal.SIGKILL, signal.SIGTERM):
    goal = min(_step_reached(tmp_path) + rng.randint(1, 6), STEPS - 4)
    process = _start(tmp_path, data_dir, DEVICES)
    _wait_for(lambda goal=goal: _step_reached(tmp_path) >= goal, process, f'step {goal}')
    process.send_signal(number)
    output, _ = process.communicate(timeout=launcher.PATIENCE)
    kills.append(f'{number.name} near step {goal}')
    if number == signal.SIGTERM:
      assert process.returncode == 143, output[-2000:]
      assert 'after SIGTERM' in output
      saved = int(output.split('saved step ')[1].split()[0])
      assert checkpoint.steps_of(tmp_path)[-1] == saved, 'SIGTERM saves before it ends'
  output = _finish(_start(tmp_path, data_dir, DEVICES))
  assert 'resumed at step' in output
  print(f'{DEVICES} devices survived: {", ".join(kills)}')
  _assert_same(tmp_path, expected)


@pytest.mark.slow
def test_a_finished_run_started_again_does_nothing(whole, data_dir):
  workdir, expected = whole
  _finish(_start(workdir, data_dir, DEVICES))
  _assert_same(workdir, expected)


@pytest.mark.slow
def test_another_config_in_the_same_folder_is_refused(whole, data_dir):
  workdir, _ = whole
  process = _start(workdir, data_dir, DEVICES, '--config.optimizer.learning_rate=0.5')
  output, _ = process.communicate(timeout=launcher.PATIENCE)
  assert process.returncode == 2
  assert 'optimizer.learning_rate: 0.002 -> 0.5' in output


@pytest.mark.slow
def test_a_run_of_any_devices_loads_and_evaluates_here(whole, data_dir):
  """One process with one device loads it without naming the model, and finds the same accuracy."""
  workdir, (_, lines) = whole
  model, variables, config = va.load(workdir)
  images = np.zeros((2, config.image_size, config.image_size, 3), np.float32)
  assert model.apply(variables, images, train=False).shape == (2, config.data.num_classes)
  output = _finish(_start(workdir, data_dir, 1, '--mode=eval'))
  last = [json.loads(line) for line in lines.splitlines() if 'eval/top1' in line][-1]
  for name in ('eval', 'eval_ema'):
    assert f'{name}: top-1 {last[f"{name}/top1"]:.3f} %' in output
  assert output.count('100 test images') == 2


def _start_pair(workdir, data_dir):
  """Two processes of two devices each, which train one model."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  return [
    _start(
      workdir,
      data_dir,
      2,
      JAX_COORDINATOR_ADDRESS=address,
      JAX_NUM_PROCESSES='2',
      JAX_PROCESS_ID=str(i),
    )
    for i in range(2)
  ]


@pytest.mark.slow
def test_processes_stop_together_and_continue(data_dir, tmp_path):
  """The signal reaches one of two processes: both save the same step and end."""
  for process in _start_pair(tmp_path / 'whole', data_dir):
    _finish(process)
  workdir = tmp_path / 'stopped'
  pair = _start_pair(workdir, data_dir)
  _wait_for(lambda: _step_reached(workdir) >= 3, pair[0], 'step 3')
  pair[1].terminate()
  for process in pair:
    output, _ = process.communicate(timeout=launcher.PATIENCE)
    assert process.returncode == 143, output[-3000:]
  assert checkpoint.steps_of(workdir)[-1] < STEPS
  for process in _start_pair(workdir, data_dir):
    assert 'resumed at step' in _finish(process)
  _assert_same(workdir, _final(tmp_path / 'whole'))
