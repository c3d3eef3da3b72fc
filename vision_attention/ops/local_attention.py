"""Softmax attention of every pixel to its neighbourhood, block by block.

A block of queries shares one window of keys: the block with a halo around it (arXiv 2103.12731,
section 3). Windows overlap, so keys and values are copied `(1 + 2 halo / block)^2` times, where one
neighbourhood per pixel (arXiv 1906.05909, equation 3) would copy them `kernel^2` times. That one
is the same computation with the keys masked that are further than `kernel // 2` from the query.

Windows are put together from slices of the neighbouring blocks: neither a gather, whose gradient
is a scatter, nor a convolution with one-hot kernels.

Logits have the pixels of a block in one axis and those of a window in another. Axes of 8 or 14
pixels would be padded to tiles of 128 on a TPU, at nine times the memory.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.ops import cost

INDICES = ('offset', 'subsampled')
# Finite, so that the gradient of a row without any key (of a padded query) is zero and not NaN.
_MASKED = -1e30


class Neighbourhood(NamedTuple):
  """Which keys a query attends to.

  Attributes:
    block: height and width of the blocks of queries.
    halo: how far the window of keys reaches beyond its block on every side.
    kernel: if not 0, only keys within `kernel // 2` of the query in both directions count; odd.
    stride: queries are every `stride`-th pixel of a block.
    mask_padding: whether keys outside the map are left out of the softmax. Otherwise the map is
      padded by `halo` zeros on every side, and these keys take part.
    index: row of a table for a key and a query. `offset`: their true distance, `key - query`,
      offset 0 in the middle of the table. `subsampled`: what timm computes from a table of
      `2 window - 1` rows, the key's index in the window minus the query's among the block's
      queries, 0 in the middle.
  """

  block: tuple[int, int]
  halo: int
  kernel: int = 0
  stride: int = 1
  mask_padding: bool = True
  index: str = 'offset'

  @property
  def window(self) -> tuple[int, int]:
    """Height and width of the windows of keys."""
    return self.block[0] + 2 * self.halo, self.block[1] + 2 * self.halo


def halo(
  block: int, halo: int, *, stride: int = 1, mask_padding: bool = True, index: str = 'offset'
) -> Neighbourhood:
  """Returns HaloNet's neighbourhood: all queries of a block see the same window.

  Raises:
    ValueError: for a stride that does not divide the block.
  """
  errors.check_choice('index', index, INDICES)
  if block < 1 or halo < 0:
    raise ValueError(f'block {block} must be positive and halo {halo} must not be negative')
  if block % stride:
    raise ValueError(f'stride {stride} does not divide block {block}: pass a multiple of {stride}')
  return Neighbourhood((block, block), halo, 0, stride, mask_padding, index)


def centred(
  kernel: int, size: tuple[int, int], *, block: int = 8, mask_padding: bool = True
) -> Neighbourhood:
  """Returns the `kernel x kernel` neighbourhood that has the query in its centre.

  Args:
    kernel: side of the neighbourhood, odd.
    size: height and width of the map, which the blocks are made to fit.
    block: the largest block, a matter of speed and memory alone.
    mask_padding: see `Neighbourhood`.

  Raises:
    ValueError: for an even kernel.
  """
  errors.check_odd('kernel', kernel)
  height, width = (-(-n // -(-n // block)) for n in size)
  return Neighbourhood((height, width), kernel // 2, kernel, 1, mask_padding)


def _keys(size: int, block: int, near: Neighbourhood) -> tuple[np.ndarray, np.ndarray]:
  """Returns the positions of queries `[g, q, 1]` and keys `[g, 1, k]` along one axis."""
  start = block * np.arange(-(-size // block))[:, None, None]
  queries = start + near.stride * np.arange(block // near.stride)[None, :, None]
  return queries, start - near.halo + np.arange(block + 2 * near.halo)


def axis_mask(size: int, block: int, near: Neighbourhood) -> np.ndarray:
  """Returns, per block, query and key along one axis, whether the query sees the key."""
  queries, keys = _keys(size, block, near)
  margin = 0 if near.mask_padding else near.halo
  seen = (keys >= -margin) & (keys < size + margin)
  if near.kernel:
    seen = seen & (np.abs(keys - queries) <= near.kernel // 2)
  return np.broadcast_to(seen, (len(keys), queries.shape[1], keys.shape[2]))


def table_rows(rows: int, block: int, near: Neighbourhood) -> np.ndarray:
  """Returns, per query and key of a block along one axis, the row of a table of `rows` rows."""
  queries, keys = _keys(1, block, near)
  offset = (keys - queries)[0]
  if near.index == 'subsampled':
    offset = np.arange(keys.shape[-1]) - np.arange(queries.shape[1])[:, None]
  # Masked keys have no row of their own.
  return np.clip(offset + rows // 2, 0, rows - 1)


def table_size(near: Neighbourhood) -> int:
  """Returns how many rows a table needs for one axis of square blocks."""
  if near.kernel:
    return near.kernel
  return (
    2 * near.window[0] - 1 if near.index == 'subsampled' else near.window[0] + near.block[0] - 1
  )


def _blocks(x: Float[Array, 'b h w n d'], block: tuple[int, int]) -> Float[Array, 'b n i j p q d']:
  """Cuts a map into blocks, with zeros at bottom and right where the block does not divide it."""
  batch, height, width, heads, dim = x.shape
  rows, columns = -(-height // block[0]), -(-width // block[1])
  bottom, right = rows * block[0] - height, columns * block[1] - width
  x = jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0), (0, 0)))
  x = x.reshape(batch, rows, block[0], columns, block[1], heads, dim)
  return x.transpose(0, 5, 1, 3, 2, 4, 6)


def _unblock(x: Float[Array, 'b n i j p q d'], size: tuple[int, int]) -> Float[Array, 'b h w n d']:
  """Puts blocks together to a map and cuts what was padded."""
  batch, heads, rows, columns, height, width, dim = x.shape
  x = x.transpose(0, 2, 4, 3, 5, 1, 6)
  x = x.reshape(batch, rows * height, columns * width, heads, dim)
  return x[:, : size[0], : size[1]]


def _extend(x: Array, grid: int, axis: int, halo: int) -> Array:
  """Extends the blocks along `axis` by their neighbours' edges; `grid` counts the blocks."""
  block, count = x.shape[axis], x.shape[grid]
  reach = min(-(-halo // block), count - 1)
  pieces = []
  for step in range(-reach, reach + 1):
    start = max(-halo, step * block) - step * block
    stop = min(block + halo, (step + 1) * block) - step * block
    piece = lax.slice_in_dim(x, start, stop, axis=axis)
    shift = [(0, 0, 0)] * x.ndim
    shift[grid] = (-step, step, 0)
    pieces.append(lax.pad(piece, jnp.zeros((), x.dtype), shift))
  windows = jnp.concatenate(pieces, axis) if len(pieces) > 1 else pieces[0]
  # Beyond the outermost blocks there are only zeros.
  missing = max(0, halo - reach * block)
  outside = [(0, 0)] * x.ndim
  outside[axis] = (missing, missing)
  return jnp.pad(windows, outside) if missing else windows


def _windows(x: Float[Array, 'b h w n d'], near: Neighbourhood) -> Float[Array, 'b n i j x y d']:
  """Returns the window of every block."""
  blocks = _blocks(x, near.block)
  return _extend(_extend(blocks, 2, 4, near.halo), 3, 5, near.halo)


def flatten(x: Float[Array, 'b n i j h w d']) -> Float[Array, 'b n i j hw d']:
  """Returns the pixels of every block or window in one axis."""
  return x.reshape(*x.shape[:4], -1, x.shape[-1])


def _position_logits(
  query: Float[Array, 'b n i j p q d'],
  table: Float[Array, '*n offset r'],
  near: Neighbourhood,
  axis: int,
) -> Float[Array, 'b n i j p q k']:
  """Returns `query . table[offset]` along one axis; a table of half the width sees one half."""
  if table.shape[-1] != query.shape[-1]:
    query = jnp.split(query, 2, -1)[axis]
  rows = table_rows(table.shape[-2], near.block[axis], near)
  vectors = jnp.take(table.astype(query.dtype), rows, axis=-2)
  own = 'pq'[axis] + 'kd'
  heads = 'n' if table.ndim == 3 else ''
  return jnp.einsum(
    f'bnijpqd,{heads}{own}->bnijpqk', query, vectors, preferred_element_type=jnp.float32
  )


def _logits(
  query: Float[Array, 'b n i j p q d'],
  key: Float[Array, 'b n i j x y d'] | None,
  height_table: Float[Array, '*n s r'] | None,
  width_table: Float[Array, '*n t r'] | None,
  near: Neighbourhood,
  size: tuple[int, int],
  scale: float,
  position_scale: float,
) -> Float[Array, 'b n i j pq xy']:
  """Returns the logits of every query and key of its window in float32, masked.

  What depends on a key's row or column alone extends the query, and a one-hot row or column the
  key: one product has it all, where a sum would write the logits thrice.
  """
  grid, window, dtype = query.shape[:4], near.window, query.dtype
  queries, keys = [], []
  if key is not None:
    queries.append(flatten(query * scale))
    keys.append(flatten(key))
  for axis, table in enumerate((height_table, width_table)):
    along = jnp.zeros((1,) * 7, dtype)
    if table is not None:
      along = _position_logits(query * position_scale, table, near, axis).astype(dtype)
    seen = axis_mask(size[axis], near.block[axis], near)
    if table is None and seen.all():
      continue
    # Two such logits may add up.
    masked = max(_MASKED, float(jnp.finfo(dtype).min) / 4)
    mask = jnp.asarray(np.where(seen, 0.0, masked), dtype)
    along = along + jnp.expand_dims(mask, (1, 3) if axis == 0 else (0, 2))
    queries.append(flatten(jnp.broadcast_to(along, (*query.shape[:6], window[axis]))))
    one_hot = jnp.asarray(np.eye(window[axis])[np.indices(window)[axis].ravel()], dtype)
    keys.append(jnp.broadcast_to(one_hot, (*grid, *one_hot.shape)))
  return jnp.einsum(
    'bnijqd,bnijkd->bnijqk',
    jnp.concatenate(queries, -1),
    jnp.concatenate(keys, -1),
    preferred_element_type=jnp.float32,
  )


def _attend(
  query: Float[Array, 'b p q n d'],
  key: Float[Array, 'b h w n d'] | None,
  value: Float[Array, 'b h w n e'],
  height_table: Float[Array, '*n s r'] | None,
  width_table: Float[Array, '*n t r'] | None,
  *,
  near: Neighbourhood,
  scale: float,
  position_scale: float,
) -> Float[Array, 'b p q n e']:
  height, width = value.shape[1:3]
  blocks = _blocks(query, (near.block[0] // near.stride, near.block[1] // near.stride))
  keys = None if key is None else _windows(key, near)
  logits = _logits(
    blocks, keys, height_table, width_table, near, (height, width), scale, position_scale
  )
  weights = jnp.exp(logits - lax.stop_gradient(logits.max(-1, keepdims=True)))
  mixed = jnp.einsum(
    'bnijqk,bnijkd->bnijqd',
    weights.astype(value.dtype),
    flatten(_windows(value, near)),
    preferred_element_type=jnp.float32,
  )
  mixed = (mixed / weights.sum(-1, keepdims=True)).astype(value.dtype)
  mixed = mixed.reshape(*blocks.shape[:6], -1)
  return _unblock(mixed, (query.shape[1], query.shape[2]))


@functools.cache
def _compiled(near: Neighbourhood, scale: float, position_scale: float, macs: int):
  attend = functools.partial(_attend, near=near, scale=scale, position_scale=position_scale)
  return cost.declare(attend, macs)


def local_attention(
  query: Float[Array, 'b p q n d'],
  key: Float[Array, 'b h w n d'] | None,
  value: Float[Array, 'b h w n e'],
  height_table: Float[Array, '*n s r'] | None = None,
  width_table: Float[Array, '*n t r'] | None = None,
  *,
  near: Neighbourhood,
  scale: float = 1.0,
  position_scale: float = 1.0,
) -> Float[Array, 'b p q n e']:
  """Returns `softmax(scale q.k + position_scale q.r) v` over the neighbourhood of every query.

  `r` is `height_table[row offset] + width_table[column offset]` for tables as wide as the query,
  and their concatenation for tables of half that width. The softmax runs in float32.

  Args:
    query: `n` heads of `d` channels at every `near.stride`-th pixel.
    key: keys at every pixel; None for attention by position alone.
    value: values at every pixel.
    height_table: a vector per vertical offset, `[offsets, d]` or `[n, offsets, d]`, or `d / 2`;
      None for no positions.
    width_table: the same for horizontal offsets.
    near: the neighbourhood.
    scale: factor of the content logits.
    position_scale: factor of the position logits.

  Raises:
    ValueError: if the queries are not those of a map of this size and stride.
  """
  expected = tuple(-(-n // near.stride) for n in value.shape[1:3])
  if query.shape[1:3] != expected:
    raise ValueError(
      f'queries are {query.shape[1]}x{query.shape[2]}, but a map of {value.shape[1]}x'
      f'{value.shape[2]} has {expected[0]}x{expected[1]} of them at stride {near.stride}'
    )
  # One-hot keys, and with a kernel products with masked keys, are a price of the form.
  rows, columns = (near.kernel,) * 2 if near.kernel else near.window
  pairs = rows * columns * (value.shape[-1] + (0 if key is None else key.shape[-1]))
  for length, table in ((rows, height_table), (columns, width_table)):
    pairs += 0 if table is None else length * table.shape[-1]
  macs = query.size // query.shape[-1] * pairs
  run = _compiled(near, scale, position_scale, macs)
  return run(query, key, value, height_table, width_table)


def local_attention_weights(
  query: Float[Array, 'b p q n d'],
  key: Float[Array, 'b h w n d'] | None,
  height_table: Float[Array, '*n s r'] | None = None,
  width_table: Float[Array, '*n t r'] | None = None,
  *,
  size: tuple[int, int],
  near: Neighbourhood,
  scale: float = 1.0,
  position_scale: float = 1.0,
) -> Float[Array, 'b n p q taps']:
  """Returns the attention map: per query its window or `kernel x kernel` taps, row by row.

  Args:
    query: see `local_attention`, as `key`, the tables, `near` and the scales.
    size: height and width of the map.
  """
  blocks = _blocks(query, (near.block[0] // near.stride, near.block[1] // near.stride))
  keys = None if key is None else _windows(key, near)
  logits = _logits(blocks, keys, height_table, width_table, near, size, scale, position_scale)
  weights = jax.nn.softmax(logits)
  weights = weights.reshape(*blocks.shape[:6], *near.window)
  if near.kernel:
    taps = np.arange(near.kernel)
    p = np.arange(near.block[0])[:, None, None, None]
    q = np.arange(near.block[1])[:, None, None]
    weights = weights[:, :, :, :, p, q, p + taps[:, None], q + taps]
  rows, columns = query.shape[1:3]
  maps = _unblock(weights.reshape(*weights.shape[:6], -1), (rows, columns))
  return maps.transpose(0, 3, 1, 2, 4)
