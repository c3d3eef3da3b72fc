"""Forms of convolution and pooling that XLA's CPU backend runs fast.

Its own depthwise convolution and max-pooling are tens of times slower than sums of shifted slices,
its 1x1 convolution than a matrix product, its 3x3 convolution than Winograd's form of matrix
products (arXiv 1509.09308). On accelerators all of these are worse; `ops.convolution` chooses.

All functions take maps that are padded already, `[b, h, w, c]`, and a stride along both axes.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_Size = tuple[int, ...]
# A weight gradient sums the taps of this many columns in one unrolled expression: enough terms for
# the compiler to keep the rows that it reads in a small copy, few enough to compile quickly.
_COLUMNS = 56
# Products `x^T g` of more rows than this are split: XLA runs very tall ones slowly.
_TALL = 16_384


def window(x: jax.Array, i: int, j: int, out: _Size, stride: int) -> jax.Array:
  """Returns what tap (i, j) of a kernel sees at every output position."""
  rows, columns = (stride * (n - 1) + 1 for n in out)
  return x[:, i : i + rows : stride, j : j + columns : stride]


def out_size(x: jax.Array, size: _Size, stride: int) -> _Size:
  """Returns height and width of the output."""
  return tuple((n - k) // stride + 1 for n, k in zip(x.shape[1:3], size, strict=True))


def scatter_taps(
  tap: Callable[[int, int], jax.Array],
  size: _Size,
  out: _Size,
  padded: _Size,
  stride: int,
) -> jax.Array:
  """The transpose of taking windows: `sum_ij` of `tap(i, j)` added where tap (i, j) had looked.

  Positions of one remainder modulo the stride get a map of their own, and the maps are interleaved
  by stack and reshape, so that nothing is scattered.

  Args:
    tap: what tap (i, j) adds, `[b, *out, c]`.
    size: of the kernel.
    out: size of the output.
    padded: size of the padded input, and of the result.
    stride: step.
  """
  spans = [o + (k - 1) // stride for o, k in zip(out, size, strict=True)]

  def phase(a: int, b: int) -> jax.Array | None:
    total = None
    for i in range(a, size[0], stride):
      for j in range(b, size[1], stride):
        edges = [
          (m // stride, s - o - m // stride) for m, s, o in zip((i, j), spans, out, strict=True)
        ]
        term = jnp.pad(tap(i, j), [(0, 0), *edges, (0, 0)])
        total = term if total is None else total + term
    return total

  phases = [[phase(a, b) for b in range(stride)] for a in range(stride)]
  some = next(p for row in phases for p in row if p is not None)
  phases = [[jnp.zeros_like(some) if p is None else p for p in row] for row in phases]
  if stride == 1:
    whole = phases[0][0]
  else:
    rows = [jnp.stack(row, 3) for row in phases]
    whole = jnp.stack(rows, 2).reshape(some.shape[0], spans[0] * stride, spans[1] * stride, -1)
  fill = [(0, max(0, p - n)) for p, n in zip(padded, whole.shape[1:3], strict=True)]
  return jnp.pad(whole, [(0, 0), *fill, (0, 0)])[:, : padded[0], : padded[1]]


def tall_product(x: jax.Array, g: jax.Array) -> jax.Array:
  """Returns `x^T g` of `[rows, c]` and `[rows, o]`."""
  rows, narrow = len(x), g.shape[1] < x.shape[1]
  if rows >= _TALL and narrow and rows % 8 == 0:
    parts = [a.reshape(8, rows // 8, -1) for a in (g, x)]
    return lax.dot_general(parts[0], parts[1], (((1,), (1,)), ((0,), (0,)))).sum(0).T
  return lax.dot_general(x, g, (((0,), (0,)), ((), ())))


# -- 1x1 -------------------------------------------------------------------------------------------


def pointwise(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  return x[:, ::stride, ::stride] @ kernel[0, 0]


def pointwise_dx(g: jax.Array, kernel: jax.Array, padded: _Size, stride: int) -> jax.Array:
  product = g @ kernel[0, 0].T
  if stride == 1:
    return product
  return scatter_taps(lambda i, j: product, (1, 1), g.shape[1:3], padded, stride)


def pointwise_dw(x: jax.Array, g: jax.Array, size: _Size, stride: int) -> jax.Array:
  del size
  seen = x[:, ::stride, ::stride]
  product = tall_product(seen.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]))
  return product[None, None]


# -- Depthwise -------------------------------------------------------------------------------------


def depthwise(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """Shifted multiply-adds, summed by kernel row."""
  height, width = kernel.shape[:2]
  out = out_size(x, (height, width), stride)
  rows = [
    functools.reduce(
      jnp.add, (window(x, i, j, out, stride) * kernel[i, j, 0] for j in range(width))
    )
    for i in range(height)
  ]
  return functools.reduce(jnp.add, rows)


def depthwise_dx(g: jax.Array, kernel: jax.Array, padded: _Size, stride: int) -> jax.Array:
  size = kernel.shape[:2]
  if stride == 1:
    edges = [(k - 1, p - n) for k, p, n in zip(size, padded, g.shape[1:3], strict=True)]
    return depthwise(jnp.pad(g, [(0, 0), *edges, (0, 0)]), kernel[::-1, ::-1], 1)
  return scatter_taps(lambda i, j: g * kernel[i, j, 0], size, g.shape[1:3], padded, stride)


def depthwise_dw(x: jax.Array, g: jax.Array, size: _Size, stride: int) -> jax.Array:
  """Loops over rows of the output; within one, every column's taps are summed in registers."""
  batch, height, width, dim = g.shape
  rows = 1 if width >= 28 else 2
  if height % rows:
    g = jnp.pad(g, ((0, 0), (0, 1), (0, 0), (0, 0)))
    x = jnp.pad(x, ((0, 0), (0, stride), (0, 0), (0, 0)))
    height += 1
  total = jnp.zeros((batch, *size, dim), x.dtype)
  for start in range(0, width, _COLUMNS):
    count = min(_COLUMNS, width - start)

    def body(n: jax.Array, acc: jax.Array, start: int = start, count: int = count) -> jax.Array:
      seen = lax.dynamic_slice(
        x,
        (0, n * rows * stride, start * stride, 0),
        (batch, size[0] + (rows - 1) * stride, size[1] + (count - 1) * stride, dim),
      )
      here = lax.dynamic_slice(g, (0, n * rows, start, 0), (batch, rows, count, dim))
      terms = (
        seen[:, stride * r : stride * r + size[0], stride * c : stride * c + size[1]]
        * here[:, r, None, None, c]
        for r in range(rows)
        for c in range(count)
      )
      return acc + functools.reduce(jnp.add, terms)

    total = lax.fori_loop(0, height // rows, body, total)
  # A product with one row would be a scalar loop: eight rows of ones, of which one is kept.
  ones = jnp.ones((8, batch), x.dtype)
  return (ones @ total.reshape(batch, -1))[0].reshape(*size, 1, dim)


# -- Dense 3x3, stride 1: Winograd -----------------------------------------------------------------

_Matrix = Sequence[Sequence[int | float]]
_BT2: _Matrix = [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]
_G2: _Matrix = [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]
_AT2: _Matrix = [[1, 1, 1, 0], [0, 1, -1, -1]]
_BT4: _Matrix = [
  [4, 0, -5, 0, 1, 0],
  [0, -4, -4, 1, 1, 0],
  [0, 4, -4, -1, 1, 0],
  [0, -2, -1, 2, 1, 0],
  [0, 2, -1, -2, 1, 0],
  [0, 4, 0, -5, 0, 1],
]
_G4: _Matrix = [
  [1 / 4, 0, 0],
  [-1 / 6, -1 / 6, -1 / 6],
  [-1 / 6, 1 / 6, -1 / 6],
  [1 / 24, 1 / 12, 1 / 6],
  [1 / 24, -1 / 12, 1 / 6],
  [0, 0, 1],
]
_AT4: _Matrix = [
  [1, 1, 1, 1, 1, 0],
  [0, 1, -1, 2, -2, 0],
  [0, 1, 1, 4, 4, 0],
  [0, 1, -1, 8, -8, 1],
]
_Grid = list[list[jax.Array]]


def _combine(matrix: _Matrix, xs: Sequence[jax.Array]) -> list[jax.Array]:
  """Multiplies a small constant matrix with a list of arrays, by additions."""

  def row(weights: Sequence[int | float]) -> jax.Array:
    terms = [
      x if w == 1 else -x if w == -1 else x * w for w, x in zip(weights, xs, strict=True) if w
    ]
    return functools.reduce(jnp.add, terms)

  return [row(weights) for weights in matrix]


def _sandwich(matrix: _Matrix, grid: _Grid) -> _Grid:
  """Returns `M grid M^T` of a grid of arrays."""
  columns = [_combine(matrix, [row[j] for row in grid]) for j in range(len(grid[0]))]
  rows = [[column[i] for column in columns] for i in range(len(matrix))]
  return [_combine(matrix, row) for row in rows]


def _transposed(matrix: _Matrix) -> _Matrix:
  return np.transpose(matrix).tolist()


def _tiles(x: jax.Array, out: _Size, step: int) -> tuple[_Grid, _Size]:
  """Returns the (step + 2)^2 positions of overlapping tiles, each for all tiles, and a count."""
  count = tuple(-(-n // step) for n in out)
  fill = [(0, max(0, step * n + 2 - s)) for n, s in zip(count, x.shape[1:3], strict=True)]
  x = jnp.pad(x, [(0, 0), *fill, (0, 0)])
  side = range(step + 2)
  return [[window(x, i, j, count, step) for j in side] for i in side], count


def _winograd(x: jax.Array, taps: _Grid, contract: int) -> jax.Array:
  """F(2x2, 3x3): 16 products for 4 outputs. `contract` is the kernel's axis that is summed."""
  out = out_size(x, (3, 3), 1)
  tiles, count = _tiles(x, out, 2)
  v, u = _sandwich(_BT2, tiles), _sandwich(_G2, taps)
  product = lambda a, b: lax.dot_general(a, b, (((3,), (contract,)), ((), ())))
  m = [[product(v[i][j], u[i][j]) for j in range(4)] for i in range(4)]
  y = _sandwich(_AT2, m)
  whole = jnp.stack([jnp.stack(row, 3) for row in y], 2)
  return whole.reshape(len(x), 2 * count[0], 2 * count[1], -1)[:, : out[0], : out[1]]


def winograd(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  del stride
  return _winograd(x, [[kernel[i, j] for j in range(3)] for i in range(3)], 0)


def winograd_dx(g: jax.Array, kernel: jax.Array, padded: _Size, stride: int) -> jax.Array:
  """The kernel is turned by indexing and summed over its outputs: transposing it is far slower."""
  del padded, stride
  taps = [[kernel[2 - i, 2 - j] for j in range(3)] for i in range(3)]
  return _winograd(jnp.pad(g, ((0, 0), (2, 2), (2, 2), (0, 0))), taps, 1)


def winograd_dw(x: jax.Array, g: jax.Array, size: _Size, stride: int) -> jax.Array:
  """F(4x4, 3x3) on large maps, F(2x2, 3x3) on small ones."""
  del size, stride
  step, bt, mg, at = (4, _BT4, _G4, _AT4) if g.shape[1] >= 28 else (2, _BT2, _G2, _AT2)
  out = (g.shape[1], g.shape[2])
  tiles, count = _tiles(x, out, step)
  fill = [(0, step * n - s) for n, s in zip(count, out, strict=True)]
  g = jnp.pad(g, [(0, 0), *fill, (0, 0)])
  phases = [[g[:, i::step, j::step] for j in range(step)] for i in range(step)]
  v, e = _sandwich(bt, tiles), _sandwich(_transposed(at), phases)
  flat = lambda a: a.reshape(-1, a.shape[-1])
  product = lambda a, b: tall_product(flat(a), flat(b))
  u = [[product(v[i][j], e[i][j]) for j in range(step + 2)] for i in range(step + 2)]
  return jnp.stack([jnp.stack(row) for row in _sandwich(_transposed(mg), u)])


# -- Other dense kernels ---------------------------------------------------------------------------


def dense_dx(g: jax.Array, kernel: jax.Array, padded: _Size, stride: int) -> jax.Array:
  """One matrix product per tap."""
  return scatter_taps(
    lambda i, j: g @ kernel[i, j].T, kernel.shape[:2], g.shape[1:3], padded, stride
  )


def dense_dw(x: jax.Array, g: jax.Array, size: _Size, stride: int) -> jax.Array:
  """One matrix product with all taps side by side."""
  out = (g.shape[1], g.shape[2])
  taps = [window(x, i, j, out, stride) for i in range(size[0]) for j in range(size[1])]
  columns = jnp.concatenate(taps, -1).reshape(-1, len(taps) * x.shape[-1])
  return tall_product(columns, g.reshape(-1, g.shape[-1])).reshape(*size, x.shape[-1], -1)


def _patches(x: jax.Array, size: _Size, out: _Size) -> jax.Array:
  batch, dim = x.shape[0], x.shape[-1]
  x = x[:, : out[0] * size[0], : out[1] * size[1]]
  x = x.reshape(batch, out[0], size[0], out[1], size[1], dim).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(batch, *out, size[0] * size[1] * dim)


def patch(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """Windows that do not overlap: a reshape and one product."""
  size = kernel.shape[:2]
  flat = kernel.reshape(-1, kernel.shape[-1])
  return _patches(x, size, out_size(x, size, stride)) @ flat


def patch_dw(x: jax.Array, g: jax.Array, size: _Size, stride: int) -> jax.Array:
  del stride
  columns = _patches(x, size, (g.shape[1], g.shape[2]))
  flat = columns.reshape(-1, columns.shape[-1])
  return tall_product(flat, g.reshape(-1, g.shape[-1])).reshape(*size, x.shape[-1], -1)


# -- Pooling ---------------------------------------------------------------------------------------


def max_pool(x: jax.Array, size: _Size, stride: int) -> jax.Array:
  """The maximum of shifted slices."""
  out = out_size(x, size, stride)
  taps = (window(x, i, j, out, stride) for i in range(size[0]) for j in range(size[1]))
  return functools.reduce(jnp.maximum, taps)


def max_pool_dx(x: jax.Array, y: jax.Array, g: jax.Array, size: _Size, stride: int) -> jax.Array:
  """The first tap that equals the maximum gets the gradient, as in XLA's own form."""
  out = (g.shape[1], g.shape[2])
  shares, done = {}, jnp.zeros(y.shape, bool)
  for i in range(size[0]):
    for j in range(size[1]):
      equal = window(x, i, j, out, stride) == y
      shares[i, j] = jnp.where(equal & ~done, g, jnp.zeros_like(g))
      done = done | equal
  return scatter_taps(lambda i, j: shares[i, j], size, out, x.shape[1:3], stride)


def sum_pool(x: jax.Array, size: _Size, stride: int) -> jax.Array:
  """The sum of shifted slices."""
  out = out_size(x, size, stride)
  taps = (window(x, i, j, out, stride) for i in range(size[0]) for j in range(size[1]))
  return functools.reduce(jnp.add, taps)


def sum_pool_dx(g: jax.Array, padded: _Size, size: _Size, stride: int) -> jax.Array:
  return scatter_taps(lambda i, j: g, size, g.shape[1:3], padded, stride)


def _valid(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  layout = ('NHWC', 'HWIO', 'NHWC')
  return lax.conv_general_dilated(x, kernel, (stride,) * 2, 'VALID', dimension_numbers=layout)


def grouped(x: jax.Array, kernel: jax.Array, stride: int, *, groups: int) -> jax.Array:
  """Convolves every channel group on its own; the gradient of XLA's form is 50 times slower."""
  parts = zip(jnp.split(x, groups, -1), jnp.split(kernel, groups, -1), strict=True)
  return jnp.concatenate([_valid(a, b, stride) for a, b in parts], -1)


def grouped_dx(
  g: jax.Array, kernel: jax.Array, padded: _Size, stride: int, *, groups: int
) -> jax.Array:
  """Returns the gradient with respect to the padded input."""
  like = jax.ShapeDtypeStruct((len(g), *padded, groups * kernel.shape[2]), g.dtype)
  return jax.linear_transpose(lambda x: grouped(x, kernel, stride, groups=groups), like)(g)[0]


def grouped_dw(x: jax.Array, g: jax.Array, size: _Size, stride: int, *, groups: int) -> jax.Array:
  """Returns the gradient with respect to the kernel."""
  like = jax.ShapeDtypeStruct((*size, x.shape[-1] // groups, g.shape[-1]), x.dtype)
  return jax.linear_transpose(lambda k: grouped(x, k, stride, groups=groups), like)(g)[0]
