"""What runs left in their folders, read without JAX arrays: the config and the last evaluation."""

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from vision_attention import folders
from vision_attention.training import schedule

logger = logging.getLogger('vision_attention')
CONFIG = 'config.json'
METRICS = 'metrics.jsonl'
# Config keys that do not change what is computed, so that a run may go on with other values.
VOLATILE = (
  'checkpoint',
  'compile_cache',
  'data.data_dir',
  'data.label_maps',
  'data.num_threads',
  'data.num_workers',
  'data.prefetch',
  'eval.kshot',
  'eval.shots',
  'eval.suites',
  'eval.throughput',
  'log_every',
  'mesh',
  'profile',
  'wandb',
)


def is_volatile(key: str) -> bool:
  """Whether a config's dotted key is one of `VOLATILE`, or below one."""
  return any(key == v or key.startswith(f'{v}.') for v in VOLATILE)


@dataclasses.dataclass(frozen=True)
class Run:
  """A run as its folder tells it.

  Attributes:
    workdir: the folder.
    config: nested, with what the data set said filled in.
    total: steps of the whole run.
    step: of the last evaluation, 0 if there was none.
    metrics: of the last evaluation, without their prefix: the averaged weights' where there are
      any. Never the best of several evaluations, which would be chosen by the test images.
  """

  workdir: folders.Folder
  config: Mapping[str, Any]
  total: int
  step: int
  metrics: Mapping[str, float]

  @property
  def finished(self) -> bool:
    return self.step >= self.total

  @property
  def flat(self) -> dict[str, Any]:
    """The config by dotted keys; lists are tuples, as they were."""
    return dict(_flatten(self.config))


def _flatten(value: Any, prefix: str = '') -> Iterable[tuple[str, Any]]:
  if isinstance(value, Mapping):
    for key, sub in value.items():
      yield from _flatten(sub, f'{prefix}.{key}' if prefix else key)
  else:
    yield prefix, _tuples(value)


def _tuples(value: Any) -> Any:
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def read(workdir: folders.Folder) -> Run | None:
  """Reads a run's folder; None if no run began in it.

  A `config.json` of something else is passed over with a warning.
  """
  path = workdir / CONFIG
  if not path.exists():
    return None
  try:
    config = json.loads(path.read_text())
    total = schedule.steps(
      config['total'], num_examples=config['data']['num_train'], batch_size=config['batch_size']
    )
  except (KeyError, TypeError, ValueError) as error:
    logger.warning('%s is not the config of a run: %r', path, error)
    return None
  step, metrics = 0, {}
  lines = (workdir / METRICS).read_text().splitlines() if (workdir / METRICS).exists() else []
  for line in lines:
    try:
      row = json.loads(line)
    except json.JSONDecodeError:
      continue  # a kill cut it short
    for prefix in ('eval_ema/', 'eval/'):
      found = {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix)}
      if found:
        step, metrics = row['step'], found
        break
  return Run(workdir, config, total, step, metrics)


def curve(run: Run, metric: str) -> list[tuple[int, float]]:
  """Returns steps and values of a metric through a run, such as `top1` or `train/loss`.

  Of an evaluation's metric, those of the averaged weights where there are any.
  """
  path = run.workdir / METRICS
  found: dict[str, list[tuple[int, float]]] = {}
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      row = json.loads(line)
    except json.JSONDecodeError:
      continue  # a kill cut it short
    for key in (f'eval_ema/{metric}', f'eval/{metric}', metric):
      if key in row:
        found.setdefault(key, []).append((row['step'], row[key]))
  return next(
    (found[k] for k in (f'eval_ema/{metric}', f'eval/{metric}', metric) if k in found), []
  )


def find(tops: Iterable[folders.Folder]) -> list[Run]:
  """Returns every run in or below the folders, in order of their paths.

  Raises:
    FileNotFoundError: if there is none.
  """
  tops = list(tops)
  paths = {path.parent for top in tops for path in folders.find(top, CONFIG)}
  found = [run for path in sorted(paths) if (run := read(path)) is not None]
  if not found:
    raise FileNotFoundError(f'no run lies in {", ".join(map(str, tops))}')
  return found
