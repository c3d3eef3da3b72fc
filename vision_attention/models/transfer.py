"""Variables trained at one resolution and on other classes, taken over to a model of our own."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vision_attention.models import registry, stacking, tree
from vision_attention.ops import distance_bias, global_filter, relative_logits, relative_position

# Tables of operators that go into any backbone; a model file's own `RESIZE` comes first.
OPERATOR_TABLES = {
  r'params/.*/attn/relative_position': relative_position.resize_table,
  r'params/.*/attn/attention_bias': distance_bias.resize,
  r'params/.*/attn/(relative|absolute)_(height|width)': relative_logits.resize_offsets,
  r'params/.*/attn/(height|width)_offsets': relative_logits.resize_offsets,
  r'params/.*/attn/depthwise/filter': global_filter.resize,
}

# What gives a number to every class; some heads have several.
_CLASSIFIER = re.compile(r'params/head/(\w*classifier|distilled)/(linear/)?(kernel|bias)')


@dataclasses.dataclass(frozen=True)
class Report:
  """Paths by what became of them, to be shown to the user."""

  loaded: tuple[str, ...]
  resized: tuple[str, ...]
  picked: tuple[str, ...]
  reinitialised: tuple[str, ...]
  dropped: tuple[str, ...]

  def __str__(self) -> str:
    parts = [f'{len(self.loaded)} loaded']
    for what in ('resized', 'picked', 'reinitialised', 'dropped'):
      paths = getattr(self, what)
      if paths:
        parts.append(f'{len(paths)} {what} ({", ".join(paths)})')
    return '; '.join(parts)


def transfer(
  name: str,
  loaded: Mapping[str, Any],
  init: Mapping[str, Any],
  reinit: Sequence[str] = ('head',),
  fresh_paths: Sequence[str] = (),
  classes: Sequence[int] | None = None,
) -> tuple[dict[str, Any], Report]:
  """Fits loaded variables to a model's freshly initialised ones.

  An array of the same shape is taken over; a table that depends on the resolution is resized by
  the model file's `RESIZE`; a submodule in `reinit` in which any shape differs keeps its fresh
  values throughout.

  Args:
    name: registered name of the model.
    loaded: variables to take from.
    init: variables of the new model.
    reinit: top-level submodules (`head`) that may differ.
    fresh_paths: patterns; a path in which one is found may be missing, and keeps its fresh value,
      or be left over.
    classes: for each of the new model's classes its number among those of the weights, or -1 for
      one that they lack, which keeps its fresh values. The head is taken over by it, not made anew.

  Raises:
    ValueError: listing every array that is missing, left over or of a wrong shape elsewhere.
  """
  resizers = {**getattr(registry.module_of(name), 'RESIZE', {}), **OPERATOR_TABLES}
  # Blocks may be scanned on one side and not on the other.
  source, target = tree.flatten(stacking.stack(loaded, init)), tree.flatten(init)
  # A model remembers whose convention its weights follow.
  source = {path: value for path, value in source.items() if not path.startswith('convention/')}
  fresh = set()
  picked = [] if classes is None else _pick(source, target, np.asarray(classes))
  for module in reinit:
    mine = {path for path in target if path.split('/')[1] == module}
    theirs = {path for path in source if path.split('/')[1] == module}
    if mine != theirs or any(np.shape(source[path]) != np.shape(target[path]) for path in mine):
      fresh |= mine | theirs
  unpaired = target.keys() ^ source.keys()
  fresh |= {path for path in unpaired if any(re.search(p, path) for p in fresh_paths)}
  values, resized, problems = {}, [], []
  for path, value in target.items():
    if path in fresh:
      values[path] = value
    elif path not in source:
      problems.append(f'{path} {np.shape(value)} is missing')
    elif np.shape(source[path]) == np.shape(value):
      values[path] = source[path]
    else:
      resize = next((fn for pattern, fn in resizers.items() if re.fullmatch(pattern, path)), None)
      if resize is None:
        problems.append(f'{path} has shape {np.shape(source[path])}, needed {np.shape(value)}')
      else:
        values[path] = resize(np.asarray(source[path]), tuple(np.shape(value)))
        resized.append(path)
  problems += [
    f'{path} is left over' for path in source if path not in target and path not in fresh
  ]
  if problems:
    raise ValueError(f'variables do not fit {name}:\n  ' + '\n  '.join(sorted(problems)))
  report = Report(
    loaded=tuple(sorted(set(values) - fresh - {*resized, *picked})),
    resized=tuple(sorted(resized)),
    picked=tuple(sorted(picked)),
    reinitialised=tuple(sorted(path for path in fresh if path in target)),
    dropped=tuple(sorted(path for path in fresh if path not in target)),
  )
  return tree.unflatten(values), report


def _pick(source: dict[str, Any], target: Mapping[str, Any], classes: np.ndarray) -> list[str]:
  """Replaces the classifiers of the weights by the columns of our classes; returns their paths.

  Raises:
    ValueError: if the weights have no classifier, or one of fewer classes than the map names.
  """
  picked = [path for path in target if path in source and _CLASSIFIER.fullmatch(path)]
  if not picked:
    raise ValueError('the weights have no classifier from which to pick classes')
  for path in picked:
    theirs, ours = np.asarray(source[path]), np.asarray(target[path])
    if classes.max() >= theirs.shape[-1] or ours.shape[-1] != len(classes):
      raise ValueError(
        f'a class map of {len(classes)} classes, up to number {classes.max()}, does not lead from '
        f'{path} {theirs.shape} of the weights to {ours.shape}: it is the map of other classes'
      )
    if theirs.shape[:-1] == ours.shape[:-1]:
      source[path] = np.where(classes >= 0, theirs[..., classes], ours)
  return picked
