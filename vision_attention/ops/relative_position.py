"""Relative position biases from tables of offsets."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def toeplitz(table: Float[Array, '... offset'], size: int) -> Float[Array, '... q k']:
  """Returns `out[..., q, k] = table[..., q - k + size - 1]`, by reshapes alone.

  Rows of one padded table, cut one element short, shift by one from row to row. This needs neither
  a gather (whose gradient is a scatter) nor products with one-hot matrices.
  """
  flipped = jnp.flip(table, -1)
  padded = jnp.pad(flipped, [(0, 0)] * (table.ndim - 1) + [(0, 1)])
  rows = jnp.broadcast_to(padded[..., None, :], (*table.shape[:-1], size, 2 * size))
  flat = rows.reshape(*table.shape[:-1], -1)[..., : size * (2 * size - 1)]
  return flat.reshape(*table.shape[:-1], size, 2 * size - 1)[..., size - 1 :]


def relative_bias(table: Float[Array, 'n y x'], height: int, width: int) -> Float[Array, 'n q k']:
  """Expands a table of offsets to a bias for every query and key of a map.

  `out[n, (i, j), (i', j')] = table[n, i - i' + height - 1, j - j' + width - 1]`: query minus key
  (arXiv 2106.04803, appendix A.1; counted from zero).

  Args:
    table: a scalar per head and offset, `[n, 2 height - 1, 2 width - 1]`.
    height: of the map.
    width: of the map.

  Raises:
    ValueError: if the table is not made for a map of this size.
  """
  heads, *offsets = table.shape
  if offsets != [2 * height - 1, 2 * width - 1]:
    raise ValueError(
      f'a table of {offsets[0]}x{offsets[1]} offsets belongs to a map of '
      f'{(offsets[0] + 1) / 2:g}x{(offsets[1] + 1) / 2:g}, not {height}x{width}: resize it'
    )
  columns = toeplitz(table, width)  # n y q_w k_w
  full = toeplitz(jnp.moveaxis(columns, 1, -1), height)  # n q_w k_w q_h k_h
  return full.transpose(0, 3, 1, 4, 2).reshape(heads, height * width, height * width)


def interpolate(table: Float[Array, 'n y x'], rows: int, columns: int) -> Float[Array, 'n r c']:
  """Resizes a table bilinearly with half-pixel centres, as MaxViT's code does."""
  return jax.image.resize(table, (len(table), rows, columns), 'bilinear', antialias=False)


def resize_table(table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """`interpolate` of stored variables, to the last two axes of `shape`."""
  return np.asarray(interpolate(jnp.asarray(table), *shape[1:]))
