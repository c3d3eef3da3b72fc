"""Runs as processes of their own that start quickly: forked by one that has imported everything.

Nothing that forks has touched a device, so that every child begins as a fresh process does. The
children share a cache of compiled programs.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from configs import coatnet0
from vision_attention import folders

ROOT = pathlib.Path(__file__).parents[1]
# Seconds given to a process that takes a few on a machine with nothing else to do.
PATIENCE = 400


def tiny_config(data_dir: pathlib.Path, **changes: Any) -> Any:
  """Returns a run on digits whose step compiles in seconds: convolution, attention, BatchNorm."""
  config = coatnet0.get_config('local')
  config.update_from_flattened_dict(
    {
      'batch_size': 16,
      'eval.batch_size': 64,
      'image_size': 16,
      'model.options.layout': 'CT',
      'model.options.depths': (1, 1),
      'model.options.dims': (8, 16),
      'model.options.strides': (2, 2),
      'model.options.stem_dim': 8,
      'schedule.warmup': '4 steps',
      'log_every': '1 steps',
      'checkpoint.every': '3 steps',
      'data.eval_split': 'test[:64]',
      'data.data_dir': str(data_dir),
      'compile_cache': '',
      **changes,
    }
  )
  return config


class Launcher:
  """Starts runs of one kind of set-up: environment and cache.

  Args:
    cache: folder of compiled programs.
    environment: variables of every run.
  """

  def __init__(self, cache: pathlib.Path, environment: Mapping[str, str]):
    variables = {
      'JAX_PLATFORMS': 'cpu',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
      'JAX_COMPILATION_CACHE_DIR': str(cache),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '0',
      'OMP_NUM_THREADS': '1',
    }
    self._process = subprocess.Popen(
      [sys.executable, '-m', 'tests.launcher'],
      cwd=ROOT,
      env={**os.environ, **variables, **environment},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def ask(self, **request: Any) -> Any:
    """Sends a request to the forking process and returns its answer."""
    assert self._process.stdin
    assert self._process.stdout
    self._process.stdin.write(json.dumps(request) + '\n')
    self._process.stdin.flush()
    return json.loads(self._process.stdout.readline())

  def start(
    self,
    config: Any,
    workdir: folders.Folder,
    index: int = 0,
    log: pathlib.Path | None = None,
    **more: Any,
  ) -> 'Run':
    """Begins a run of a config, or its process `index`; see `_child` for what more there is."""
    log = log or pathlib.Path(workdir.with_name(f'{workdir.name}{index or ""}.log'))
    run = Run(self, 0, workdir, log)
    run.pid = self.ask(config=config.to_dict(), workdir=str(workdir), log=str(log), **more)
    return run

  def close(self) -> None:
    """Ends the forking process."""
    self._process.kill()
    self._process.communicate()


class Run:
  """One child: a training run that may be killed."""

  def __init__(self, launcher: Launcher, pid: int, workdir: folders.Folder, log: pathlib.Path):
    self._launcher, self.pid, self.workdir, self._log = launcher, pid, workdir, log
    self._before = log.stat().st_size if log.exists() else 0

  def poll(self) -> int | None:
    """Returns how the run ended, -9 for SIGKILL, or None while it goes on."""
    return self._launcher.ask(poll=self.pid)

  def kill(self, number: int = signal.SIGKILL) -> int:
    """Sends a signal and returns how the run ended."""
    os.kill(self.pid, number)
    return self.wait()

  def wait(self, seconds: float = PATIENCE) -> int:
    """Returns how the run ended; fails if it does not."""
    end = time.monotonic() + seconds
    while (code := self.poll()) is None:
      if time.monotonic() > end:
        os.kill(self.pid, signal.SIGKILL)
        pytest.fail(f'the run goes on after {seconds} s: {self.output()[-3000:]}')
      time.sleep(0.005)
    return code

  def output(self) -> str:
    """What the run has written to the terminal."""
    return self._log.read_text()[self._before :] if self._log.exists() else ''

  def step(self) -> int:
    """The last step that this run itself has logged, 0 before the first."""
    steps = re.findall(r'^step (\d+)/', self.output(), re.M)
    return int(steps[-1]) if steps else 0

  def until(self, condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    """Waits for a condition; whether it came true before the run ended."""
    end = time.monotonic() + seconds
    while not condition():
      if self.poll() is not None:
        return False
      if time.monotonic() > end:
        os.kill(self.pid, signal.SIGKILL)
        pytest.fail(f'nothing happened for {seconds} s: {self.output()[-3000:]}')
      time.sleep(0.001)
    return True


def _tuples(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _tuples(item) for key, item in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _child(request: dict[str, Any]) -> None:
  """Trains as `main.py` does: what it refuses is one line and exit code 2.

  `patch` names a function of `tests.faults` that breaks something first; `environment` sets
  variables.
  """
  import functools
  import logging

  import jax
  import ml_collections

  import train
  from tests import faults
  from vision_attention import errors
  from vision_attention.training import sharding

  file = os.open(request['log'], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  os.dup2(file, 1)
  os.dup2(file, 2)
  os.environ.update(request.get('environment', {}))
  logger = logging.getLogger('vision_attention')
  logger.addHandler(logging.StreamHandler())
  logger.setLevel(logging.INFO)
  logger.propagate = False
  config = ml_collections.ConfigDict(_tuples(request['config']))
  if request.get('patch'):
    getattr(faults, request['patch'])()
  mesh = config.mesh
  errors.run(lambda: sharding.join_processes(mesh.join_seconds, mesh.heartbeat_seconds))
  where = folders.folder(request['workdir'])
  job = functools.partial(train.train_and_evaluate, config, where)
  errors.run(lambda: sharding.end_if_others_are_lost(job))
  if jax.process_count() > 1:
    jax.distributed.shutdown()


def _serve() -> None:
  """Forks a child for every request, and answers how each ended."""
  import train  # noqa: F401  # all that a run needs, once
  from vision_attention.data import pipeline
  from vision_attention.models import registry

  registry.modules()
  del pipeline
  import tensorflow_datasets as tfds  # noqa: F401
  from tensorflow_datasets.proto import tf_example_pb2  # noqa: F401

  ended: dict[int, int] = {}
  for line in sys.stdin:
    request = json.loads(line)
    if 'poll' in request:
      pid = request['poll']
      if pid not in ended:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
          ended[pid] = os.waitstatus_to_exitcode(status)
      answer = ended.get(pid)
    else:
      answer = os.fork()
      if not answer:
        code = 1
        try:
          _child(request)
          code = 0
        except SystemExit as stop:
          code = int(stop.code or 0)
        except BaseException:  # a traceback belongs into the log
          import traceback

          traceback.print_exc()
        finally:
          sys.stderr.flush()
          os._exit(code)
    print(json.dumps(answer), flush=True)


if __name__ == '__main__':
  _serve()
