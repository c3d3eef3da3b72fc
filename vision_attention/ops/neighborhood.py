"""Neighbourhood attention (arXiv 2204.07143, 2209.15001): every pixel sees its nearest pixels.

A query attends to `kernel x kernel` keys around it, `dilation` pixels apart. At the border that
square is shifted into the map, so that every query has as many keys. With a dilation, pixels of
equal position modulo `dilation` are a map of their own.

One copy of keys per query would need `kernel^2` times their memory. Here a tile of queries shares
the rectangle of keys that its queries see, and those that a query does not see are masked.
Rectangles are slices: no gather, whose gradient is a scatter.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from vision_attention.ops import cost

# Finite, so that no difference of two is undefined.
_HIDDEN = -1e30


@dataclasses.dataclass(frozen=True, eq=False)
class _Axis:
  """Tiles along one axis, of each of the `r` maps that a dilation makes of one.

  Attributes:
    size: pixels of the longest of these maps.
    padded: the same, with what fills the last tile.
    tile: queries of a tile.
    starts: first key of every tile's rectangle, `[g]`.
    keys: keys of a rectangle.
    seen: whether a query sees a key, `[r, g, q, k]`, `r` 1 if it is the same in all.
    rows: row of the table of offsets, `[g, q, k]`.
  """

  size: int
  padded: int
  tile: int
  starts: np.ndarray
  keys: int
  seen: np.ndarray
  rows: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
  """What is static about attention on maps of one size."""

  size: tuple[int, int]
  dilation: int
  scale: float
  axes: tuple[_Axis, _Axis]

  @property
  def counts(self) -> tuple[int, int]:
    """Rows and columns of tiles."""
    rows, columns = (axis.padded // axis.tile for axis in self.axes)
    return rows, columns


def _windows(place: np.ndarray, size: np.ndarray, kernel: int) -> np.ndarray:
  """Returns the first key that the query at `place` sees on an axis without dilation."""
  return np.clip(place - kernel // 2, 0, size - kernel)


def _axis(size: int, kernel: int, dilation: int, block: int) -> _Axis:
  """Returns tiles of at most `block` queries of an axis of `size` pixels."""
  sizes = -(-(size - np.arange(dilation)) // dilation)[:, None]
  longest = int(sizes.max())
  count = -(-longest // block)
  tile = -(-longest // count)
  place = np.arange(count * tile)
  # A query that fills the last tile sees what the last pixel sees: its softmax is defined.
  first = _windows(np.minimum(place, sizes - 1), sizes, kernel).reshape(dilation, count, tile)
  starts = first.min((0, 2))
  keys = int((first.max((0, 2)) + kernel - starts).max())
  starts = np.minimum(starts, longest - keys)
  key = (starts[:, None] + np.arange(keys))[:, None]
  seen = (key >= first[..., None]) & (key < first[..., None] + kernel)
  if (seen == seen[:1]).all():
    seen = seen[:1]
  offset = place.reshape(count, tile, 1) - key
  rows = np.clip(offset + kernel - 1, 0, 2 * kernel - 2)
  return _Axis(longest, count * tile, tile, starts, keys, seen, rows)


def neighbours(size: int, kernel: int, dilation: int = 1) -> tuple[np.ndarray, np.ndarray]:
  """Returns, per pixel of an axis, its neighbours and their rows of the table of offsets.

  Both are `[size, kernel]`. Rows count from the offset `query - key = dilation (1 - kernel)`.
  """
  check_size((size, size), kernel, dilation)
  pixel = np.arange(size)
  residue, place = pixel % dilation, pixel // dilation
  first = _windows(place, -(-(size - residue) // dilation), kernel)
  taps = first[:, None] + np.arange(kernel)
  return residue[:, None] + dilation * taps, place[:, None] - taps + kernel - 1


def check_size(size: tuple[int, int], kernel: int, dilation: int) -> None:
  """Raises ValueError unless neighbourhoods are odd and fit into the map."""
  if kernel < 3 or kernel % 2 == 0:
    raise ValueError(f'kernel {kernel} has no centre and neighbours: pass {max(3, kernel | 1)}')
  if dilation < 1:
    raise ValueError(f'dilation {dilation} must be positive: pass 1 for none')
  if min(size) < kernel * dilation:
    raise ValueError(
      f'kernel {kernel} with dilation {dilation} needs a map of {kernel * dilation} pixels a side, '
      f'not {size[0]}x{size[1]}: pad it, or pass a dilation of at most {min(size) // kernel}'
    )


def _products(pairs: Sequence[int]) -> list[int]:
  return [math.prod(pairs[i : i + 2]) for i in range(0, len(pairs), 2)]


def _residues(x: Float[Array, 'b h w n d'], dilation: int) -> Float[Array, 'b n r s i j d']:
  """Returns the maps of pixels of equal position modulo `dilation`, heads first."""
  batch, height, width, heads, dim = x.shape
  bottom, right = -height % dilation, -width % dilation
  if bottom or right:
    x = jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0), (0, 0)))
  x = x.reshape(batch, -1, dilation, (width + right) // dilation, dilation, heads, dim)
  return x.transpose(0, 5, 2, 4, 1, 3, 6)


def _join(x: Float[Array, 'b n r s i j d'], size: tuple[int, int]) -> Float[Array, 'b h w n d']:
  """Undoes `_residues`, and cuts what lies outside the map."""
  x = x.transpose(0, 4, 2, 5, 3, 1, 6)
  x = x.reshape(len(x), x.shape[1] * x.shape[2], -1, *x.shape[5:])
  return x[:, : size[0], : size[1]]


# Products have `n r s` and `g h` as one axis each: XLA's CPU backend takes no more than seven.
def _fold(x: Float[Array, 'b n r s g h y x d']) -> Float[Array, 'b n m t q d']:
  batch, heads, *pairs, dim = x.shape
  return x.reshape(batch, heads, *_products(pairs), dim)


def _tiles(x: Float[Array, 'b h w n d'], plan: _Plan) -> Float[Array, 'b n m t q d']:
  """Cuts a map into tiles of queries."""
  x = _residues(x, plan.dilation)
  pads = [(0, axis.padded - axis.size) for axis in plan.axes]
  x = jnp.pad(x, ((0, 0),) * 4 + (*pads, (0, 0)))
  sides = [side for axis in plan.axes for side in (axis.padded // axis.tile, axis.tile)]
  return _fold(x.reshape(*x.shape[:4], *sides, x.shape[-1]).swapaxes(5, 6))


def _untile(x: Float[Array, 'b n m t q d'], plan: _Plan) -> Float[Array, 'b h w n d']:
  """Undoes `_tiles`."""
  (batch, heads), dim, dilation = x.shape[:2], x.shape[-1], plan.dilation
  (y, x_), (down, right) = plan.counts, [axis.tile for axis in plan.axes]
  x = x.reshape(batch, heads, dilation, dilation, y, x_, down, right, dim).swapaxes(5, 6)
  return _join(x.reshape(*x.shape[:4], y * down, x_ * right, dim), plan.size)


def _rectangles(x: Float[Array, 'b h w n d'], plan: _Plan) -> Float[Array, 'b n m t k d']:
  """Returns every tile's keys."""
  x = _residues(x, plan.dilation)
  for i, axis in enumerate(plan.axes):
    at = 4 + 2 * i
    x = jnp.stack([lax.slice_in_dim(x, s, s + axis.keys, axis=at) for s in axis.starts], 4 + i)
  return _fold(x)


def _sum_rectangles(x: Float[Array, 'b n m t k d'], plan: _Plan) -> Float[Array, 'b h w n d']:
  """Adds up what the rectangles say of every pixel: the transpose of `_rectangles`."""
  (batch, heads), dim = x.shape[:2], x.shape[-1]
  keys = [axis.keys for axis in plan.axes]
  x = x.reshape(batch, heads, plan.dilation, plan.dilation, *plan.counts, *keys, dim)
  for i in (1, 0):
    x = _overlay(x, plan.axes[i], 4 + i, 5 + 2 * i)
  return _join(x, plan.size)


def _overlay(x: Array, axis: _Axis, tiles: int, pixels: int) -> Array:
  """Adds overlapping pieces of an axis, segment by segment of what the same pieces cover.

  Sums of pieces padded to the whole axis would read every pixel once per tile.
  """
  starts = [int(start) for start in axis.starts]
  cuts = sorted({0, axis.size, *starts, *(start + axis.keys for start in starts)})
  segments = []
  for a, b in itertools.pairwise(cuts):
    parts = [
      lax.slice_in_dim(lax.index_in_dim(x, i, tiles, False), a - s, b - s, axis=pixels - 1)
      for i, s in enumerate(starts)
      if s <= a and b <= s + axis.keys
    ]
    segments.append(functools.reduce(jnp.add, parts))
  return jnp.concatenate(segments, pixels - 1)


def _bias(table: Float[Array, 'n y x'] | None, plan: _Plan) -> Float[Array, 'l m t q k']:
  """Returns what is added to logits: the table's entries, and masks."""
  rows, columns = plan.axes
  total = jnp.zeros((1,) * 9, jnp.float32)
  if table is not None:
    # Products with one-hot matrices: an index would have a scatter as its gradient.
    one_hot = np.eye(table.shape[-1], dtype=np.float32)
    expand = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    along = expand('nyx,hsvx->nyhsv', table.astype(jnp.float32), one_hot[columns.rows])
    total = expand('nyhsv,gtwy->nghtswv', along, one_hot[rows.rows])[:, None, None]
  for axis, others in ((rows, (1, 3, 5, 7)), (columns, (0, 2, 4, 6))):
    mask = np.where(axis.seen, 0.0, _HIDDEN).astype(np.float32)
    total = total + np.expand_dims(mask, others)
  heads, *maps = total.shape[:3]
  sides = (*plan.counts, rows.tile, columns.tile, rows.keys, columns.keys)
  maps = [max(maps)] * 2  # 1 if all maps of the dilation have the same masks
  total = jnp.broadcast_to(total, (heads, *maps, *sides))
  return total.reshape(heads, *_products((*maps, *sides)))


def _product(spec: str, a: Array, b: Array) -> Array:
  return jnp.einsum(spec, a, b.astype(a.dtype), preferred_element_type=jnp.float32)


def _swap(x: Array) -> Array:
  return x.swapaxes(-1, -2)


# Every product is `[i, j] [j, k]`, last axes as written: others are up to three times slower on
# CPU, and the operands that are transposed for it are small beside the logits.
_MATMUL = 'bnmtij,bnmtjk->bnmtik'


def _logits(query: Array, key: Array, table: Array | None, plan: _Plan) -> Array:
  """Returns logits `[b, n, m, t, q, k]` in float32."""
  queries, keys = _tiles(query * plan.scale, plan), _rectangles(key, plan)
  return _product(_MATMUL, queries, _swap(keys)) + _bias(table, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
  query: Array, key: Array, value: Array, table: Array | None, plan: _Plan
) -> Float[Array, 'b h w n e']:
  return _attend_fwd(query, key, value, table, plan)[0]


def _attend_fwd(query: Array, key: Array, value: Array, table: Array | None, plan: _Plan):
  logits = _logits(query, key, table, plan)
  highest = logits.max(-1, keepdims=True)
  weights = jnp.exp(logits - highest)
  total = jnp.einsum('bnmtqk->bnmtq', weights)[..., None]
  mixed = _product(_MATMUL, weights.astype(value.dtype), _rectangles(value, plan)) / total
  out = _untile(mixed.astype(value.dtype), plan)
  return out, (query, key, value, table, out, highest + jnp.log(total))


def _attend_bwd(plan: _Plan, saved: Any, g: Array) -> tuple[Array, Array, Array, Array | None]:
  """Computes the weights again: they are larger than all that is saved."""
  query, key, value, table, out, log_total = saved
  dtype = value.dtype
  weights = jnp.exp(_logits(query, key, table, plan) - log_total)
  grads = _tiles(g, plan)
  values = _product(_MATMUL, _swap(grads), weights)
  inner = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
  dots = _product(_MATMUL, grads, _swap(_rectangles(value, plan)))
  dlogits = weights * (dots - _tiles(inner, plan))
  narrow = dlogits.astype(dtype)
  queries = _product(_MATMUL, narrow, _rectangles(key, plan))
  keys = _product(_MATMUL, _swap(_tiles(query * plan.scale, plan)), narrow)
  dtable = None
  if table is not None:
    dbias = lax.platform_dependent(dlogits, cpu=_sum_by_halves, default=lambda x: x.sum(0))
    dtable = jax.vjp(lambda t: jnp.broadcast_to(_bias(t, plan), dbias.shape), table)[1](dbias)[0]
  return (
    (_untile(queries, plan) * plan.scale).astype(query.dtype),
    _sum_rectangles(_swap(keys), plan).astype(key.dtype),
    _sum_rectangles(_swap(values), plan).astype(dtype),
    dtable,
  )


def _sum_by_halves(x: Float[Array, 'b ...']) -> Float[Array, '...']:
  """Sums over images: XLA's CPU backend is slow to reduce a leading axis.

  Elsewhere every half of a batch that devices share would be sent from one to another.
  """
  odd = []
  while len(x) > 1:
    half = len(x) // 2
    if len(x) % 2:
      odd.append(x[-1])
    x = x[:half] + x[half : 2 * half]
  return functools.reduce(jnp.add, odd, x[0])


_attend.defvjp(_attend_fwd, _attend_bwd)


@functools.cache
def _compiled(
  size: tuple[int, int], kernel: int, dilation: int, scale: float, block: int, macs: int
) -> Callable[..., Array]:
  rows, columns = (_axis(side, kernel, dilation, block) for side in size)
  plan = _Plan(size, dilation, scale, (rows, columns))
  return cost.declare(lambda *arrays: _attend(*arrays, plan), macs)


def neighborhood_attention(
  query: Float[Array, 'b h w n d'],
  key: Float[Array, 'b h w n d'],
  value: Float[Array, 'b h w n e'],
  table: Float[Array, 'n y x'] | None = None,
  *,
  kernel: int,
  dilation: int = 1,
  scale: float | None = None,
  block: int = 7,
) -> Float[Array, 'b h w n e']:
  """Returns `softmax(scale q.k + table[offset]) v` over every query's neighbourhood.

  The softmax runs in float32.

  Args:
    query: `n` heads of `d` channels.
    key: as many.
    value: `n` heads of `e` channels.
    table: a scalar per head and offset, `[n, 2 kernel - 1, 2 kernel - 1]`, query minus key in
      steps of `dilation`; None for no positions.
    kernel: side of the neighbourhood, odd.
    dilation: distance of the neighbours.
    scale: factor of the products, `d ** -0.5` unless given.
    block: largest side of a tile of queries, a matter of speed and memory alone.

  Raises:
    ValueError: for an even kernel, or a map of fewer than `kernel * dilation` pixels a side.
  """
  check_size((query.shape[1], query.shape[2]), kernel, dilation)
  factor = query.shape[-1] ** -0.5 if scale is None else scale
  # Products with masked keys are a price of the form, and not of the operator.
  macs = kernel**2 * (query.size + value.size)
  size = (query.shape[1], query.shape[2])
  return _compiled(size, kernel, dilation, factor, block, macs)(query, key, value, table)


def neighborhood_weights(
  query: Float[Array, 'b h w n d'],
  key: Float[Array, 'b h w n d'],
  table: Float[Array, 'n y x'] | None = None,
  *,
  kernel: int,
  dilation: int = 1,
  scale: float | None = None,
) -> Float[Array, 'b n h w taps']:
  """Returns the attention map: per query its `kernel x kernel` neighbours, row by row.

  See `neighborhood_attention`. Every query gets a copy of its keys: not for training.
  """
  height, width = query.shape[1:3]
  check_size((height, width), kernel, dilation)
  factor = query.shape[-1] ** -0.5 if scale is None else scale
  (down, y), (right, x) = (neighbours(side, kernel, dilation) for side in (height, width))
  keys = key[:, down[:, None, :, None], right[None, :, None]]
  logits = jnp.einsum(
    'bhwnd,bhwyxnd->bnhwyx', query * factor, keys, preferred_element_type=jnp.float32
  )
  if table is not None:
    logits = logits + table[:, y[:, None, :, None], x[None, :, None]]
  return jax.nn.softmax(logits.reshape(*logits.shape[:4], -1))
