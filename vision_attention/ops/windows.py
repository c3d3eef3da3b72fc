"""Attention within windows that tile a map, shifted (arXiv 2103.14030, section 3.2) and padded.

A `Tiling` says where the windows lie. With a shift `s` and a window `m`, pixel `i` of an axis is in
window `floor((i - s) / m)`: the first window is cut by the border, and what of it lies outside is
shared with the last one by rolling the map, so that no window is added. Labels tell them apart.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vision_attention import errors
from vision_attention.ops import attention

PADDINGS = ('mask', 'attend', 'attend_late')
FITS = ('axis', 'square')
# Far below any logit, and finite: the difference of two must not be undefined.
_HIDDEN = -1e9


class Tiling(NamedTuple):
  """Windows over a map; make it with `tile` or `lattice`. All of it is static.

  Attributes:
    size: height and width of the map.
    window: height and width of a window.
    shift: rows and columns of the map before the first whole window.
    padding: see `tile`.
    grid: whether windows are the lattices of `grid_partition`.
  """

  size: tuple[int, int]
  window: tuple[int, int]
  shift: tuple[int, int]
  padding: str = 'mask'
  grid: bool = False

  @property
  def padded(self) -> tuple[int, int]:
    """Height and width with what makes them multiples of the window, at bottom and right."""
    (height, width), (rows, columns) = self.size, self.window
    return -(-height // rows) * rows, -(-width // columns) * columns


def pair(value: int | Sequence[int]) -> tuple[int, int]:
  """Returns height and width of either one number or two."""
  height, width = (value, value) if isinstance(value, int) else value
  return height, width


def tile(
  size: Sequence[int],
  window: int | Sequence[int],
  shift: int | Sequence[int] = 0,
  *,
  fit: str = 'axis',
  padding: str = 'mask',
) -> Tiling:
  """Returns the windows of a map of any size.

  Args:
    size: height and width of the map.
    window: height and width of a window.
    shift: rows and columns before the first whole window, less than a window.
    fit: what becomes of windows larger than the map. `axis`: along an axis on which the map is no
      larger than a window, the window is as large as the map and not shifted (timm). `square`:
      where the map's shorter side is no larger than a window, windows are squares of that side and
      shifted along no axis (Swin's own code, which needs that they tile the map).
    padding: of a map that windows do not tile. `mask`: what is padded is no key. `attend`: it is
      a zero pixel like any other, added before the map is rolled (Swin's detection code).
      `attend_late`: the same, added after the map is rolled, while labels are those of a map that
      was rolled as a whole (timm).

  Raises:
    ValueError: for an unknown choice, a window of no pixel, or a shift of a window or more.
  """
  errors.check_choice('fit', fit, FITS)
  errors.check_choice('padding', padding, PADDINGS)
  height, width = size
  sides, window, shift = (height, width), pair(window), pair(shift)
  if min(window) < 1 or min(sides) < 1:
    raise ValueError(f'window {window} and map {sides} must have at least one pixel per axis')
  if min(shift) < 0 or any(s >= m for s, m in zip(shift, window, strict=True)):
    raise ValueError(f'shift {shift} must lie between 0 and the window {window}, exclusive')
  inside = [side <= m for side, m in zip(sides, window, strict=True)]
  if fit == 'square' and any(inside):
    short = min(sides)
    return Tiling(sides, (short, short), (0, 0), padding)
  rows, columns = (min(side, m) for side, m in zip(sides, window, strict=True))
  down, right = (0 if whole else s for whole, s in zip(inside, shift, strict=True))
  return Tiling(sides, (rows, columns), (down, right), padding)


def lattice(size: Sequence[int], grid: int | Sequence[int]) -> Tiling:
  """Returns the lattices of `grid` pixels that span a map of any size; see `grid_partition`.

  Along an axis of no more pixels than the grid, a lattice has all of them. What makes an axis a
  multiple of the grid is padded at its end and masked; every lattice keeps pixels of the map.

  Raises:
    ValueError: for a grid of no pixel.
  """
  return tile(size, grid)._replace(grid=True)


def partition(x: Float[Array, 'b h w c'], window: int | Sequence[int]) -> Float[Array, 'b g q c']:
  """Cuts a map into windows that do not overlap, both windows and their pixels row by row.

  Raises:
    ValueError: if windows do not tile the map; `split` pads it.
  """
  rows, columns = pair(window)
  batch, height, width, dim = x.shape
  _check_tiles((height, width), (rows, columns))
  cells = x.reshape(batch, height // rows, rows, width // columns, columns, dim)
  return cells.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, rows * columns, dim)


def merge(
  x: Float[Array, 'b g q c'], window: int | Sequence[int], size: Sequence[int]
) -> Float[Array, 'b h w c']:
  """Undoes `partition` of a map of height and width `size`."""
  rows, columns = pair(window)
  height, width = size
  _check_tiles((height, width), (rows, columns))
  cells = x.reshape(len(x), height // rows, width // columns, rows, columns, x.shape[-1])
  return cells.transpose(0, 1, 3, 2, 4, 5).reshape(len(x), height, width, x.shape[-1])


def grid_partition(
  x: Float[Array, 'b h w c'], grid: int | Sequence[int]
) -> Float[Array, 'b g q c']:
  """Cuts a map into lattices of `grid` pixels that span it (arXiv 2204.01697, section 3.2).

  A lattice has the pixels at one place of all `h / grid x w / grid` cells.

  Raises:
    ValueError: if the grid does not divide the map.
  """
  rows, columns = pair(grid)
  batch, height, width, dim = x.shape
  _check_tiles((height, width), (rows, columns))
  cells = x.reshape(batch, rows, height // rows, columns, width // columns, dim)
  return cells.transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, rows * columns, dim)


def grid_merge(
  x: Float[Array, 'b g q c'], grid: int | Sequence[int], size: Sequence[int]
) -> Float[Array, 'b h w c']:
  """Undoes `grid_partition` of a map of height and width `size`."""
  rows, columns = pair(grid)
  height, width = size
  _check_tiles((height, width), (rows, columns))
  cells = x.reshape(len(x), height // rows, width // columns, rows, columns, x.shape[-1])
  return cells.transpose(0, 3, 1, 4, 2, 5).reshape(len(x), height, width, x.shape[-1])


def _check_tiles(size: tuple[int, int], window: tuple[int, int]) -> None:
  for side, m in zip(size, window, strict=True):
    if m < 1 or side % m:
      nearest = side // m * m if m > 0 else side
      raise ValueError(
        f'windows of {window[0]}x{window[1]} do not tile a map of {size[0]}x{size[1]}: the nearest '
        f'sides are {nearest or m} and {nearest + m}'
      )


def split(x: Float[Array, 'b h w c'], tiling: Tiling) -> Float[Array, 'b g q c']:
  """Pads, rolls and cuts a map into the windows of a tiling."""
  down, right = tiling.shift
  late = tiling.padding == 'attend_late'
  x = x if late else _pad(x, tiling)
  if down or right:
    x = jnp.roll(x, (-down, -right), (1, 2))
  cut = grid_partition if tiling.grid else partition
  return cut(_pad(x, tiling) if late else x, tiling.window)


def join(x: Float[Array, 'b g q c'], tiling: Tiling) -> Float[Array, 'b h w c']:
  """Undoes `split`."""
  (height, width), (down, right) = tiling.size, tiling.shift
  x = (grid_merge if tiling.grid else merge)(x, tiling.window, tiling.padded)
  if tiling.padding == 'attend_late':
    x = x[:, :height, :width]
  if down or right:
    x = jnp.roll(x, (down, right), (1, 2))
  return x[:, :height, :width]


def _pad(x: Float[Array, 'b h w c'], tiling: Tiling) -> Float[Array, 'b p q c']:
  (bottom, right) = (p - side for p, side in zip(tiling.padded, x.shape[1:3], strict=True))
  return jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0))) if bottom or right else x


def labels(tiling: Tiling) -> Int[np.ndarray, 'g q'] | None:
  """Returns numbers of which a query sees those keys of its window that have its own.

  None where every query sees all keys of its window.
  """
  parts = []
  for side, padded, shift in zip(tiling.size, tiling.padded, tiling.shift, strict=True):
    place = np.arange(padded)
    outside = (place + shift) % padded >= side  # of a map that was padded and then rolled
    rolled = place >= padded - shift
    parts.append(np.where(outside & (tiling.padding == 'mask'), 2, rolled))
  if not any(part.any() for part in parts):
    return None
  both = 3 * parts[0][:, None] + parts[1]
  (height, width), (rows, columns) = tiling.padded, tiling.window
  if tiling.grid:
    cells = both.reshape(rows, height // rows, columns, width // columns).transpose(1, 3, 0, 2)
  else:
    cells = both.reshape(height // rows, rows, width // columns, columns).transpose(0, 2, 1, 3)
  return cells.reshape(-1, rows * columns).astype(np.int32)


def visible(tiling: Tiling) -> Bool[Array, 'g q k'] | None:
  """Returns which keys of its window a query sees, or None if all."""
  marks = labels(tiling)
  if marks is None:
    return None
  # Compared in the program: a mask of 64 windows of 12x12 pixels would be a constant of megabytes.
  marks = jnp.asarray(marks)
  return marks[:, :, None] == marks[:, None, :]


def window_logits(
  query: Float[Array, 'b g q n d'],
  key: Float[Array, 'b g k n d'],
  bias: Float[Array, 'n q k'] | None = None,
  seen: Bool[Array, 'g q k'] | None = None,
  *,
  scale: float | None = None,
) -> Float[Array, 'b g n q k']:
  """Returns `scale * query . key + bias` within windows in float32, far below zero if not seen.

  Args:
    query: `g` windows of `q` queries, `n` heads of `d` channels.
    key: keys of the same windows.
    bias: added in every window, such as a relative position bias.
    seen: the keys that a query sees, of `visible`.
    scale: factor of the products, `d ** -0.5` unless given.
  """
  batch, windows = query.shape[:2]
  shared = None if bias is None else bias[None]
  logits = attention.attention_logits(fold(query), fold(key), shared, scale=scale)
  logits = logits.reshape(batch, windows, *logits.shape[1:])
  return logits if seen is None else logits + jnp.where(seen, 0.0, _HIDDEN)[:, None]


def window_attention(
  logits: Float[Array, 'b g n q k'], value: Float[Array, 'b g k n e']
) -> Float[Array, 'b g q n e']:
  """Returns `softmax(logits) value` of every window."""
  mixed = attention.attend(fold(logits), fold(value))
  return mixed.reshape(*value.shape[:2], *mixed.shape[1:])


def fold(x: jax.Array) -> jax.Array:
  """Joins the axes of images and windows, images first."""
  return x.reshape(-1, *x.shape[2:])
