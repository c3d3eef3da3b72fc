"""Metrics to JSON lines, TensorBoard and the log, and the clock that says how the run is going."""

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from tensorboardX import SummaryWriter

from vision_attention import folders
from vision_attention.training import tracking

# A logger of our own: the libraries below speak through absl's, and too much.
logger = logging.getLogger('vision_attention')
METRICS = 'metrics.jsonl'
TIMING = 'timing.jsonl'


def _truncate(lines: folders.Lines, step: int) -> None:
  """Drops what was written after `step`, and a last line that a kill cut short."""
  text, kept = lines.text, []
  if not text:
    return
  for line in text.splitlines():
    try:
      if json.loads(line)['step'] <= step:
        kept.append(line + '\n')
    except (json.JSONDecodeError, KeyError):
      continue
  lines.replace(''.join(kept))


class Writer:
  """Writes metrics of one run; only the first process of several does.

  `metrics.jsonl` holds what is a function of the run alone, and is the same file, byte for byte,
  whether or not the run was interrupted. Speeds go to `timing.jsonl`.

  Args:
    workdir: folder of the run.
    step: the restored step; what an interrupted run wrote after it is dropped.
    active: whether this process writes.
    config: of the run, for Weights & Biases if it names a project there.
  """

  def __init__(self, workdir: folders.Folder, step: int, active: bool, config: Any = None):
    self._bucket = folders.is_bucket(workdir)
    self._lines = {name: folders.Lines(workdir / name) for name in (METRICS, TIMING)}
    self._board = self._tracker = None
    if active:
      folders.make(workdir)
      for lines in self._lines.values():
        _truncate(lines, step)
      self._events = folders.Staging(workdir / 'tensorboard')
      self._board = SummaryWriter(str(self._events.path), purge_step=step + 1)
      if config is not None and config.wandb.project:
        self._tracker = tracking.Tracker(config.wandb, workdir, config)

  def write(self, step: int, values: Mapping[str, float], *, timing: bool = False) -> None:
    """Appends one line, which on a disk is there at once, in a bucket after `flush`."""
    if self._board is None:
      return
    self._lines[TIMING if timing else METRICS].add(json.dumps({'step': step, **values}))
    for key, value in values.items():
      self._board.add_scalar(key, value, step)
    if self._tracker is not None:
      self._tracker.write(step, values)

  def row(self, step: int, key: str) -> dict[str, float]:
    """Returns what was written with a metric at a step, also before a restart; or nothing."""
    rows = map(json.loads, self._lines[METRICS].text.splitlines())
    return next((row for row in rows if row['step'] == step and key in row), {})

  def flush(self) -> None:
    """Brings into a bucket what it does not have yet; a folder on a disk has everything."""
    for lines in self._lines.values():
      lines.flush()
    if self._board is not None and self._bucket:
      self._board.flush()
      self._events.upload()

  def close(self) -> None:
    """Writes what is left of TensorBoard's file, and of Weights & Biases' run."""
    if self._board is not None:
      self.flush()
      self._board.close()
      self._events.upload()
    if self._tracker is not None:
      self._tracker.close()


class Clock:
  """Speed and remaining time, without the time spent in evaluation and checkpoints."""

  def __init__(self, step: int, total: int, batch_size: int, devices: int):
    self._total, self._batch_size, self._devices = total, batch_size, devices
    self._began = self._mark = time.monotonic()
    self._mark_step = self._first_step = step
    self._paused = self._waited = self._all_paused = 0.0

  def pause(self, seconds: float) -> None:
    """Takes time out of the account: evaluation, checkpoints."""
    self._paused += seconds
    self._all_paused += seconds

  def wait(self, seconds: float) -> None:
    """Counts time spent waiting for data."""
    self._waited += seconds

  def lap(self, step: int) -> dict[str, float]:
    """Returns speeds since the last lap, and the estimated rest of the run in seconds."""
    now = time.monotonic()
    spent = max(now - self._mark - self._paused, 1e-9)
    count = step - self._mark_step
    active = now - self._began - self._all_paused
    per_step = active / max(step - self._first_step, 1)
    values = {
      'images_per_second': count * self._batch_size / spent,
      'images_per_second_per_device': count * self._batch_size / spent / self._devices,
      'step_ms': 1e3 * spent / max(count, 1),
      'data_wait_percent': 100 * min(self._waited / spent, 1.0),
      'core_hours': (now - self._began) * self._devices / 3600,
      'eta_seconds': per_step * (self._total - step),
    }
    self._mark, self._mark_step, self._paused, self._waited = now, step, 0.0, 0.0
    return values


def log_progress(
  step: int, total: int, values: Mapping[str, float], speed: Mapping[str, Any]
) -> None:
  """Writes one line of progress to the log."""
  eta = int(speed['eta_seconds'])
  shown = '  '.join(f'{key} {value:.4g}' for key, value in values.items())
  logger.info(
    'step %d/%d  %s  %.0f img/s  data wait %.0f %%  %.2f core-h  ETA %d:%02d:%02d',
    step,
    total,
    shown,
    speed['images_per_second'],
    speed['data_wait_percent'],
    speed['core_hours'],
    eta // 3600,
    eta // 60 % 60,
    eta % 60,
  )
