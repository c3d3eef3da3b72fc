"""Heads taken out of trained attention networks (arXiv 1911.03584), which are trained on then.

Networks with the non-isotropic encoding learn heads that look everywhere, or along a line, alike;
the authors remove these and train for a third as long again. `create_model` makes what is left by
`num_heads`, one number per layer.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from vision_attention.models import tree
from vision_attention.ops import quadratic_attention

Heads = dict[int, tuple[int, ...]]
_LAYER = re.compile(r'params/backbone/stage1/block(\d+)/attn/(.+)')
# The axis along which an array has a share for every head, one after the other.
_AXES = {
  'centers': 0,
  'spreads': 0,
  'proj/kernel': 0,
  'height_key': 1,
  'width_key': 1,
  'query/kernel': 1,
  'query/bias': 0,
  'key/kernel': 1,
  'key/bias': 0,
}


def _layers(variables: Mapping[str, Any]) -> dict[int, dict[str, np.ndarray]]:
  """Returns the arrays of attention by layer and name.

  Raises:
    ValueError: if there are none whose heads can be told apart.
  """
  found: dict[int, dict[str, np.ndarray]] = {}
  for path, value in tree.flatten(variables).items():
    if match := _LAYER.fullmatch(path):
      found.setdefault(int(match[1]), {})[match[2]] = np.asarray(value)
  if not found or any('centers' not in a and 'height_key' not in a for a in found.values()):
    raise ValueError(
      'the variables have no heads that attend by position: only those of conv_attention_* with '
      'the operators quadratic and learned_position have'
    )
  return dict(sorted(found.items()))


def _count(arrays: Mapping[str, np.ndarray]) -> int:
  return len(arrays['centers']) if 'centers' in arrays else arrays['height_key'].shape[1]


def num_heads(variables: Mapping[str, Any]) -> tuple[int, ...]:
  """Returns how many heads every layer has, as `create_model(num_heads=...)` takes it.

  Raises:
    ValueError: for variables of another family.
  """
  return tuple(_count(arrays) for arrays in _layers(variables).values())


def degenerate(variables: Mapping[str, Any]) -> Heads:
  """Returns by layer the heads that `ops.quadratic_attention.degenerate_heads` calls so.

  Raises:
    ValueError: for variables without Gaussians.
  """
  layers = _layers(variables)
  if any('spreads' not in arrays for arrays in layers.values()):
    raise ValueError('only heads of the operator quadratic can be degenerate: name those to remove')
  flags = {
    layer: np.asarray(quadratic_attention.degenerate_heads(jnp.asarray(arrays['spreads'])))
    for layer, arrays in layers.items()
  }
  return {layer: tuple(np.flatnonzero(f).tolist()) for layer, f in flags.items() if f.any()}


def prune(
  variables: Mapping[str, Any], heads: Mapping[int, Iterable[int]]
) -> tuple[dict[str, Any], tuple[int, ...]]:
  """Removes heads: their centres and widths or keys, and their rows of the values' matrix.

  What is left answers as if those rows were zero.

  Args:
    variables: of a `conv_attention_*` model.
    heads: by layer, counted from zero, the heads to remove.

  Returns:
    The variables of the smaller model, and how many heads each of its layers has.

  Raises:
    ValueError: for variables of another family, a layer or head that there is not, or a layer that
      would keep no head.
  """
  layers = _layers(variables)
  if other := sorted(heads.keys() - layers.keys()):
    raise ValueError(f'there is no layer {other[0]} to prune: they are 0 to {max(layers)}')
  flat = tree.flatten(variables)
  left = []
  for layer, arrays in layers.items():
    count, removed = _count(arrays), set(heads.get(layer, ()))
    if wrong := sorted(removed - set(range(count))):
      raise ValueError(f'layer {layer} has no head {wrong[0]}: they are 0 to {count - 1}')
    kept = [head for head in range(count) if head not in removed]
    if not kept:
      raise ValueError(f'layer {layer} would keep none of its {count} heads: leave it at least one')
    left.append(len(kept))
    for name, axis in _AXES.items():
      if name in arrays:
        path = f'params/backbone/stage1/block{layer:02d}/attn/{name}'
        flat[path] = _take(arrays[name], count, kept, axis)
  return tree.unflatten(flat), tuple(left)


def _take(array: np.ndarray, count: int, kept: list[int], axis: int) -> np.ndarray:
  """Keeps the shares of some of `count` heads, which lie one after the other along an axis."""
  before, after = array.shape[:axis], array.shape[axis + 1 :]
  shares = array.reshape(*before, count, -1, *after).take(kept, axis)
  return shares.reshape(*before, -1, *after)
