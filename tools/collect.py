"""Makes a table of finished runs: means, deviations over seeds, paired tests against a baseline.

  python tools/collect.py runs/modules --baseline module=None --metrics top1 balanced_accuracy

Cells are made by the keys of the configs in which runs differ, or by those of `--by`; runs of one
cell differ in seed and fold (`--pairs`). With `--baseline`, every cell is compared with the one
that has these values and otherwise its own: the plain backbone of each. The p-values are two-sided,
of Student's paired test (or Wilcoxon's signed ranks), corrected by Holm's method over all cells.
Keys may be shortened to their last word. The metrics are those of the last evaluation, of averaged
weights where a run has them. `--cost` adds parameters and multiply-adds. `--out` takes `.md` or
`.csv`; the latter has every number, uncorrected p-values too. `--plot curves.png` draws the metrics
through training, a line per cell with a band of one deviation over its runs; `--curves` names
others, such as train/loss.
"""

import argparse
import csv
import io
import math
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from vision_attention import checkpoint, comparison, convert, errors, folders, macs, runs
from vision_attention.models import registry

METRICS = ('top1', 'balanced_accuracy', 'macro_f1', 'macro_auc')


def full_key(key: str, keys: Iterable[str]) -> str:
  """Returns the key of a config that `key` is, or is the last word of.

  Raises:
    ValueError: if there is none, or there are several.
  """
  keys = sorted(set(keys))
  found = [k for k in keys if k == key] or [k for k in keys if k.endswith(f'.{key}')]
  if not found:
    errors.check_choice('config key', key, keys)
  if len(found) > 1:
    raise ValueError(f'config key {key!r} could be any of {", ".join(found)}: write it out')
  return found[0]


def cost(run: runs.Run) -> tuple[int, float]:
  """Returns the parameters of a run's model and the multiply-adds of one image, in 1e9."""
  config: Any = ml_collections.ConfigDict(dict(run.config))
  model = checkpoint.create_model(config)
  info = registry.create_model(config.model.name, image_size=config.image_size)[1]
  shapes = convert.abstract_variables(model, info)['params']
  count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
  return count, macs.count_macs(model, image_size=info.image_size) / 1e9


def _number(value: float | None, digits: int = 2) -> str:
  return '-' if value is None or math.isnan(value) else f'{value:.{digits}f}'


def _p(value: float) -> str:
  return '-' if math.isnan(value) else '<0.001' if value < 0.001 else f'{value:.3f}'


def _digits(metric: str) -> int:
  """Areas lie between 0 and 1, all else is in percent."""
  return 4 if 'auc' in metric or metric == 'loss' else 2


def markdown(rows: Sequence[comparison.Row], costs: Mapping[Any, tuple[int, float]] = {}) -> str:
  """Returns the table; differences and corrected p-values stand beside each metric."""
  metrics = list(rows[0].scores)
  compared = any(s.difference is not None for row in rows for s in row.scores.values())
  header = [key.rpartition('.')[2] for key, _ in rows[0].cell] + ['n']
  header += ['parameters', 'GMACs'] if costs else []
  for metric in metrics:
    header += [metric, 'difference', 'p (Holm)'] if compared else [metric]
  lines = [header, ['---'] * len(header)]
  for row in rows:
    first = next(iter(row.scores.values()))
    line = [str(value) for _, value in row.cell] + [str(len(first.values))]
    if costs:
      count, multiply_adds = costs[row.cell]
      line += [f'{count:,}', f'{multiply_adds:.3f}']
    for metric, score in row.scores.items():
      digits = _digits(metric)
      mean, std = _number(score.mean, digits), _number(score.std, digits)
      line.append(f'{mean} ± {std}')
      if compared:
        sign = '+' if score.difference is not None and score.difference > 0 else ''
        line += [sign + _number(score.difference, digits), _p(score.corrected)]
    lines.append(line)
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines) + '\n'


def as_csv(rows: Sequence[comparison.Row], costs: Mapping[Any, tuple[int, float]] = {}) -> str:
  """Returns a line per cell and metric with every number."""
  out = io.StringIO()
  keys = [key for key, _ in rows[0].cell]
  fields = ['metric', 'n', 'mean', 'std', 'difference', 'pairs', 'p', 'p_holm']
  writer = csv.writer(out, lineterminator='\n')
  writer.writerow([*keys, *(['parameters', 'gmacs'] if costs else []), *fields])
  for row in rows:
    for metric, s in row.scores.items():
      line: list[Any] = [value for _, value in row.cell] + list(costs.get(row.cell, ()))
      line += [metric, len(s.values), s.mean, s.std, s.difference, s.pairs, s.p, s.corrected]
      writer.writerow(['' if v is None or v != v else v for v in line])
  return out.getvalue()


def plot(
  path: pathlib.Path,
  rows: Sequence[comparison.Row],
  found: Sequence[runs.Run],
  curves: Sequence[str],
) -> None:
  """Draws a panel per metric: the mean of every cell's runs at the steps that all of them have.

  Raises:
    ValueError: without matplotlib, or if no run has a metric.
  """
  try:
    from matplotlib import figure
  except ModuleNotFoundError:
    raise ValueError('--plot needs matplotlib: pip install matplotlib') from None
  drawing = figure.Figure(figsize=(6 * len(curves), 4), layout='constrained')
  panels = drawing.subplots(1, len(curves), squeeze=False)[0]
  for panel, metric in zip(panels, curves, strict=True):
    for row in rows:
      mine = [run for run in found if all(run.flat.get(key) == value for key, value in row.cell)]
      series = [dict(runs.curve(run, metric)) for run in mine]
      steps = sorted(set.intersection(*map(set, series)))
      if not steps:
        continue
      values = np.array([[one[step] for step in steps] for one in series])
      mean, std = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0 * values[0]
      label = ', '.join(f'{key.rpartition(".")[2]}={value}' for key, value in row.cell)
      # A single point makes no line.
      marker = 'o' if len(steps) == 1 else ''
      panel.plot(steps, mean, marker=marker, label=label or f'{len(mine)} runs')
      panel.fill_between(steps, mean - std, mean + std, alpha=0.2)
    if not panel.lines:
      raise ValueError(f'no run has {metric!r} at a step that its others have too')
    panel.set(xlabel='step', ylabel=metric)
    panel.legend()
  drawing.savefig(path, dpi=150)


def collect(args: argparse.Namespace) -> str:
  """Returns the table that the command line asks for, as Markdown or, for a `.csv`, as CSV."""
  for path in (args.out, args.plot):
    if path is not None and not path.parent.is_dir():
      raise ValueError(f'{path} lies in no folder: make {path.parent} first')
  found = runs.find(map(folders.folder, args.folders))
  finished = [run for run in found if run.finished]
  for run in found:
    if not run.finished:
      print(f'left out: {run.workdir} stands at {run.step} of {run.total} steps', file=sys.stderr)
  if not finished:
    raise ValueError(f'none of the {len(found)} runs is finished')
  keys = {key for run in finished for key in run.flat}
  baseline = None
  if args.baseline is not None:
    items = [text.partition('=') for text in args.baseline]
    baseline = {full_key(key, keys): value for key, _, value in items}
  pairs = [full_key(key, keys) for key in args.pairs] if args.pairs else comparison.PAIRS
  wanted = args.metrics or [m for m in METRICS if all(m in run.metrics for run in finished)]
  if not wanted:
    common = set.intersection(*(set(run.metrics) for run in finished))
    raise ValueError(
      f'not every run has one of {", ".join(METRICS)}: pass --metrics; all have '
      f'{", ".join(sorted(common)) or "nothing in common"}'
    )
  rows = comparison.compare(
    finished,
    wanted,
    by=[full_key(key, keys) for key in args.by],
    pairs=pairs,
    baseline=baseline,
    test=args.test,
  )
  if args.plot:
    plot(args.plot, rows, finished, args.curves or list(rows[0].scores))
  costs = {row.cell: cost(row.run) for row in rows} if args.cost else {}
  make = as_csv if args.out and args.out.suffix == '.csv' else markdown
  return make(rows, costs)


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('folders', nargs='+', help='of runs, or above them')
  parser.add_argument('--metrics', nargs='+', default=[], help='such as top1 or recall/mel')
  parser.add_argument('--by', nargs='+', default=[], help='keys of the config that make a cell')
  parser.add_argument('--pairs', nargs='+', default=[], help='keys that repeat a cell')
  parser.add_argument('--baseline', nargs='+', metavar='KEY=VALUE', help='what to compare with')
  parser.add_argument('--test', choices=comparison.TESTS, default='t')
  parser.add_argument('--cost', action='store_true', help='add parameters and multiply-adds')
  parser.add_argument('--plot', type=pathlib.Path, help='a .png file of curves')
  parser.add_argument(
    '--curves', nargs='+', default=[], help='of the plot; the metrics if not given'
  )
  parser.add_argument('--out', type=pathlib.Path, help='a .md or .csv file; printed if not given')
  args = parser.parse_args(argv)
  try:
    text = collect(args)
  except (FileNotFoundError, ValueError) as error:
    print(error, file=sys.stderr)
    return 2
  if args.out:
    args.out.write_text(text)
  else:
    print(text, end='')
  return 0


if __name__ == '__main__':
  sys.exit(main())
