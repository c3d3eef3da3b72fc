"""Runs side by side: means and deviations per cell, and paired tests against a baseline.

A *cell* is what is compared (a module in a backbone); its runs differ in what is repeated (the
seed, the fold). Runs of the same seed and fold in two cells make a pair.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vision_attention import errors, runs

# What repeats a cell.
PAIRS = ('seed', 'data.train_split', 'data.eval_split')
# What follows from others, beside `runs.VOLATILE`, in which runs of one cell may differ too.
IGNORED = ('data.num_train',)
TESTS = ('t', 'wilcoxon')
Key = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Score:
  """One metric of one cell.

  Attributes:
    values: of its runs, by what they are paired by.
    mean: of the values.
    std: with n - 1 in the denominator; NaN for a single run.
    difference: mean of the paired differences to the baseline; None for the baseline itself.
    p: of the two-sided paired test, not corrected; NaN with fewer than two pairs.
    corrected: by Holm's method, over all cells of the table.
    pairs: number of them.
  """

  values: Mapping[Key, float]
  mean: float
  std: float
  difference: float | None = None
  p: float = math.nan
  corrected: float = math.nan
  pairs: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
  """A cell: what is particular to it, one of its runs, and its scores by metric."""

  cell: Key
  run: runs.Run
  scores: Mapping[str, Score]


def varying(found: Sequence[runs.Run], pairs: Sequence[str] = PAIRS) -> list[str]:
  """Returns the keys of the config in which runs differ, without those that repeat a cell."""
  flats = [run.flat for run in found]
  keys = sorted({key for flat in flats for key in flat})
  return [
    key
    for key in keys
    if key not in pairs
    and key not in IGNORED
    and not runs.is_volatile(key)
    and any(flat.get(key) != flats[0].get(key) for flat in flats)
  ]


def holm(values: Sequence[float]) -> list[float]:
  """Returns p-values corrected for their number by Holm's method; NaN is not counted.

  The i-th smallest of m is multiplied by m - i + 1, is at least the one before, and at most 1.
  """
  order = [i for i in np.argsort(values, kind='stable') if not math.isnan(values[i])]
  corrected = [math.nan] * len(values)
  highest = 0.0
  for rank, i in enumerate(order):
    highest = max(highest, min(1.0, (len(order) - rank) * values[i]))
    corrected[i] = highest
  return corrected


def paired_test(first: Sequence[float], second: Sequence[float], kind: str = 't') -> float:
  """Returns the two-sided p-value of paired values being alike.

  NaN for fewer than two pairs, and where Student's test has no deviation to measure by: of few runs
  on few images, the same difference throughout is chance rather than certainty.

  Args:
    first: of one cell.
    second: of the other, in the same order.
    kind: `t`, Student's test of the differences, or `wilcoxon`, the signed ranks.
  """
  from scipy import stats

  errors.check_choice('test', kind, TESTS)
  differences = np.asarray(first, np.float64) - np.asarray(second, np.float64)
  if len(differences) < 2:
    return math.nan
  if not differences.any():
    return 1.0
  if kind == 'wilcoxon':
    result: Any = stats.wilcoxon(differences)
  elif np.ptp(differences) < 1e-9 * np.abs(differences).max():
    return math.nan
  else:
    result = stats.ttest_1samp(differences, 0.0)
  return float(result.pvalue)


def baseline_of(cell: Key, baseline: Mapping[str, str]) -> dict[str, str]:
  """Returns the cell, as text, that one is compared with: itself, but for the baseline's keys."""
  return {key: str(value) for key, value in cell} | dict(baseline)


def compare(
  found: Sequence[runs.Run],
  metrics: Sequence[str],
  *,
  by: Sequence[str] = (),
  pairs: Sequence[str] = PAIRS,
  baseline: Mapping[str, str] | None = None,
  test: str = 't',
) -> list[Row]:
  """Returns a row per cell, in order of their keys, each baseline before what is compared with it.

  Args:
    found: finished runs.
    metrics: names such as `top1` or `recall/mel`.
    by: keys of the config that make a cell; those that vary unless given.
    pairs: keys that repeat a cell.
    baseline: values of keys of `by`. Every cell is compared with the one that has these values and
      otherwise its own, so that `{'model.options.module': 'None'}` compares within each backbone.
    test: see `paired_test`.

  Raises:
    ValueError: for an unknown key or metric, two runs of one seed in one cell, or no such baseline.
  """
  by = list(by) or varying(found, pairs)
  groups: dict[Key, dict[Key, runs.Run]] = {}
  for run in found:
    flat = run.flat
    cell, pair = (tuple((key, flat.get(key)) for key in keys) for keys in (by, pairs))
    if pair in groups.setdefault(cell, {}):
      raise ValueError(
        f'{run.workdir} and {groups[cell][pair].workdir} are the same cell and seed: name the keys '
        f'in which they differ by --by (it was {", ".join(by) or "nothing"})'
      )
    groups[cell][pair] = run
  base_cells = _baselines(groups, by, baseline)
  rows = {cell: {} for cell in groups}
  for metric in metrics:
    values = {
      cell: {pair: _value(run, metric) for pair, run in members.items()}
      for cell, members in groups.items()
    }
    scores = {
      cell: _score(values[cell], values.get(base_cells.get(cell, ())), test) for cell in groups
    }
    corrected = holm([score.p for score in scores.values()])
    for (cell, score), p in zip(scores.items(), corrected, strict=True):
      rows[cell][metric] = dataclasses.replace(score, corrected=p)
  text = lambda cell: [str(value) for _, value in cell]
  order = sorted(
    groups, key=lambda c: (text(base_cells.get(c, c)), c in base_cells if baseline else 0, text(c))
  )
  return [Row(cell, next(iter(groups[cell].values())), rows[cell]) for cell in order]


def _baselines(
  groups: Mapping[Key, Any], by: Sequence[str], baseline: Mapping[str, str] | None
) -> dict[Key, Key]:
  """Returns the cell that each one, but for the baselines, is compared with."""
  if baseline is None:
    return {}
  for key in baseline:
    errors.check_choice('baseline key', key, by)
  texts = {tuple(str(value) for _, value in cell): cell for cell in groups}
  found = {}
  for cell in groups:
    wanted = baseline_of(cell, baseline)
    base = texts.get(tuple(wanted[key] for key in by))
    if base is None:
      described = ', '.join(f'{key}={value}' for key, value in wanted.items())
      raise ValueError(f'no finished run has {described}, which others are to be compared with')
    if base != cell:
      found[cell] = base
  return found


def _value(run: runs.Run, metric: str) -> float:
  if metric not in run.metrics:
    raise ValueError(
      f'{run.workdir} has no metric {metric!r}: {errors.nearest(metric, run.metrics)}'
    )
  return float(run.metrics[metric])


def _score(mine: Mapping[Key, float], base: Mapping[Key, float] | None, test: str) -> Score:
  values = list(mine.values())
  std = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
  score = Score(mine, float(np.mean(values)), std)
  if base is None:
    return score
  shared = [pair for pair in mine if pair in base]
  first, second = [mine[pair] for pair in shared], [base[pair] for pair in shared]
  difference = float(np.mean(np.subtract(first, second))) if shared else math.nan
  p = paired_test(first, second, test)
  return dataclasses.replace(score, difference=difference, p=p, pairs=len(shared))
