"""Position logits `query . r[offset]` of global attention on a map, from a table per axis.

The tables hold a vector per offset, so that what a position says depends on the query (arXiv
1904.09925, section 3.2; 2101.11605, figure 4). No array is made of a vector per query and key.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def _shift(logits: Float[Array, '*b q offset']) -> Float[Array, '*b q k']:
  """Returns `out[..., q, k] = logits[..., q, k - q + size - 1]`, by padding and reshapes alone.

  A zero behind every row, then rows one element shorter: each begins one offset earlier.
  """
  *outer, size, offsets = logits.shape
  pad = [(0, 0)] * len(outer)
  flat = jnp.pad(logits, [*pad, (0, 0), (0, 1)]).reshape(*outer, -1)
  flat = jnp.pad(flat, [*pad, (0, size - 1)])
  return flat.reshape(*outer, size + 1, offsets)[..., :size, size - 1 :]


def relative_logits_2d(
  query: Float[Array, 'b h w n d'],
  height_table: Float[Array, 'y d'],
  width_table: Float[Array, 'x d'],
) -> Float[Array, 'b n q k']:
  """Returns the logits of every query and key of a map, in float32.

  `out[b, n, (i, j), (i', j')] = query[b, i, j, n] . (height_table[i' - i + h - 1] +
  width_table[j' - j + w - 1])`: key minus query, row-major. Whatever scales the query scales them.

  Args:
    query: `n` heads of `d` channels on a map.
    height_table: a vector per vertical offset, `[2 h - 1, d]`, shared by the heads.
    width_table: a vector per horizontal offset, `[2 w - 1, d]`.

  Raises:
    ValueError: if the tables are not made for a map of this size.
  """
  batch, height, width, heads, _ = query.shape
  offsets = height_table.shape[0], width_table.shape[0]
  if offsets != (2 * height - 1, 2 * width - 1):
    raise ValueError(
      f'tables of {offsets[0]} and {offsets[1]} offsets belong to a map of '
      f'{(offsets[0] + 1) / 2:g}x{(offsets[1] + 1) / 2:g}, not {height}x{width}: resize them'
    )

  def products(table: Float[Array, 'o d'], order: str) -> Float[Array, 'b n ... o']:
    table = table.astype(query.dtype)
    return jnp.einsum(f'bhwnd,od->{order}', query, table, preferred_element_type=jnp.float32)

  columns = _shift(products(width_table, 'bnhwo'))  # b n h w k_w
  rows = _shift(products(height_table, 'bnwho')).swapaxes(2, 3)  # b n h w k_h
  total = rows[..., :, None] + columns[..., None, :]
  return total.reshape(batch, heads, height * width, height * width)


def resize_offsets(table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Resizes `[offsets, d]` linearly; offset 0 stays in the centre. The papers give no rule."""
  return np.asarray(jax.image.resize(table, shape, 'linear', antialias=False))
