"""What breaks in a run's own process, for `tests.launcher`."""

import os
import resource
import signal
import subprocess
import time

import numpy as np

SKEW = 'FAULT_CLOCK_SECONDS'
STEP = 'FAULT_STEP'


def clock_ahead() -> None:
  """Lets the wall clock of this process run ahead."""
  seconds = float(os.environ[SKEW])
  true_time, true_time_ns = time.time, time.time_ns
  time.time = lambda: true_time() + seconds
  time.time_ns = lambda: true_time_ns() + int(seconds * 1e9)


def disk_full() -> None:
  """From the save of a step on, no file may grow beyond some kilobytes; but the log may."""
  from vision_attention import checkpoint

  log = subprocess.Popen(['cat'], stdin=subprocess.PIPE)
  assert log.stdin
  for number in (1, 2):
    os.dup2(log.stdin.fileno(), number)
  save = checkpoint.Manager.save

  def limited(self, step, *args, **kwargs):
    if step >= int(os.environ[STEP]):
      self.wait()
      resource.setrlimit(resource.RLIMIT_FSIZE, (2**13, resource.RLIM_INFINITY))
    return save(self, step, *args, **kwargs)

  checkpoint.Manager.save = limited


def data_gone() -> None:
  """From a record on, the files of the data cannot be read, as when a mount is lost."""
  from vision_attention.data import source

  read, seen = source.Source.__getitem__, []

  def lost(self, index):
    seen.append(index)
    if len(seen) > 16 * int(os.environ[STEP]):
      raise OSError(5, 'Input/output error', str(self.folder))
    return read(self, index)

  source.Source.__getitem__ = lost


def terminated_in_evaluation() -> None:
  """SIGTERM comes when an evaluation begins."""
  from vision_attention import evaluation

  evaluate = evaluation.Evaluator.__call__

  def terminated(self, *args):
    os.kill(os.getpid(), signal.SIGTERM)
    return evaluate(self, *args)

  evaluation.Evaluator.__call__ = terminated


def not_a_number() -> None:
  """The images of one step are such that no gradient of theirs is finite."""
  from vision_attention.training import sharding

  to_devices, steps = sharding.to_devices, []

  def poisoned(mesh, batch):
    if 'mask' not in batch:
      steps.append(None)
      if len(steps) == int(os.environ[STEP]):
        batch = {**batch, 'image': np.full(batch['image'].shape, np.nan, np.float32)}
    return to_devices(mesh, batch)

  sharding.to_devices = poisoned
