"""Attention biases from tables of absolute offsets (arXiv 2104.01136, section 4.2)."""

from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vision_attention.ops import bicubic, relative_position


def _mirrored(table: Any, xp: ModuleType) -> Any:
  """`[n, h, w]` of distances to `[n, 2 h - 1, 2 w - 1]` of signed offsets."""
  down = xp.concatenate([table[:, :0:-1], table], 1)
  return xp.concatenate([down[:, :, :0:-1], down], 2)


def distance_bias(table: Float[Array, 'n h w'], stride: int = 1) -> Float[Array, 'n q k']:
  """Expands a table of distances to a bias for queries and all keys of a map.

  `out[n, (i, j), (i', j')] = table[n, |i - i'|, |j - j'|]`, where queries are every `stride`-th
  pixel along both axes, from the first. Nothing is gathered: no gradient is a scatter.

  Args:
    table: a scalar per head and distance, of the map's size.
    stride: distance of the queries.
  """
  heads, height, width = table.shape
  full = relative_position.relative_bias(_mirrored(table, jnp), height, width)
  if stride == 1:
    return full
  rows = full.reshape(heads, height, width, height * width)[:, ::stride, ::stride]
  return rows.reshape(heads, -1, height * width)


def resize(table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Resizes `[n, h, w]` by distance: mirrored, so that none stays none, and bicubically.

  What Swin does with its signed offsets. LeViT's paper and code give no rule.
  """
  rows, columns = shape[-2:]
  resized = bicubic.resize(_mirrored(table, np), (2 * rows - 1, 2 * columns - 1))
  return resized[:, rows - 1 :, columns - 1 :]
