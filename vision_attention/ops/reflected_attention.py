"""Softmax attention of every pixel to its neighbourhood on a map that is reflected at its edges.

As in ACmix (arXiv 2111.14556) and SAN (2004.13621), the map is continued by its mirror image, the
edge itself not repeated: near an edge some pixels take part twice. The computation is that of
`local_attention`: queries of a block share a window of keys, of which each sees its own part. Keys
and values are copied `(1 + (kernel - 1) / block)^2` times, and not `kernel^2` times.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from vision_attention import errors
from vision_attention.ops import cost
from vision_attention.ops.local_attention import flatten

# A matter of speed and memory alone: most keys of a smaller block are copies, most products of a
# larger one are with keys that the query does not see.
_BLOCK = 8
_MASKED = -1e30


def reflect(x: Float[Array, 'b h w *c'], margin: int) -> Float[Array, 'b y x *c']:
  """Continues a map by `margin` pixels on every side; a map smaller than that, by mirroring on."""
  return jnp.pad(
    x, [(0, 0), (margin, margin), (margin, margin), *[(0, 0)] * (x.ndim - 3)], 'reflect'
  )


def _split(size: int, stride: int) -> tuple[int, int]:
  """Returns number and length of the blocks of `size` queries."""
  count = -(-size // max(1, _BLOCK // stride))
  return count, -(-size // count)


def _windows(
  x: Float[Array, 'b h w n d'],
  kernel: int,
  stride: int,
  rows: tuple[int, int],
  columns: tuple[int, int],
) -> Float[Array, 'b n i j x y d']:
  """Returns, per block of queries, the reflected map that they see."""
  x = reflect(x, kernel // 2)
  for axis, (count, length) in ((1, rows), (3, columns)):
    step, window = stride * length, stride * (length - 1) + kernel
    missing = max(0, (count - 1) * step + window - x.shape[axis])
    x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
    cuts = [lax.slice_in_dim(x, i * step, i * step + window, axis=axis) for i in range(count)]
    x = jnp.stack(cuts, axis)
  return x.transpose(0, 5, 1, 3, 2, 4, 6)


def _seen(kernel: int, stride: int, length: int) -> Bool[np.ndarray, 'q k']:
  offset = np.arange(stride * (length - 1) + kernel) - stride * np.arange(length)[:, None]
  return (offset >= 0) & (offset < kernel)


def _logits(
  query: Float[Array, 'b p q n d'],
  key: Float[Array, 'b h w n d'],
  kernel: int,
  stride: int,
  scale: float,
) -> Float[Array, 'b n i j rs xy']:
  batch, height, width, heads, dim = query.shape
  (m, p), (n, q) = rows, columns = _split(height, stride), _split(width, stride)
  query = jnp.pad(query, ((0, 0), (0, m * p - height), (0, n * q - width), (0, 0), (0, 0)))
  blocks = query.reshape(batch, m, p, n, q, heads, dim).transpose(0, 5, 1, 3, 2, 4, 6)
  logits = jnp.einsum(
    'bnijqd,bnijkd->bnijqk',
    flatten(blocks * scale),
    flatten(_windows(key, kernel, stride, rows, columns)),
    preferred_element_type=jnp.float32,
  )
  seen = _seen(kernel, stride, p)[:, None, :, None] & _seen(kernel, stride, q)[:, None, :]
  return jnp.where(seen.reshape(p * q, -1), logits, _MASKED)


def _unblock(
  x: Float[Array, 'b n i j p q d'], height: int, width: int
) -> Float[Array, 'b h w n d']:
  batch, heads, m, n, p, q, dim = x.shape
  x = x.transpose(0, 2, 4, 3, 5, 1, 6).reshape(batch, m * p, n * q, heads, dim)
  return x[:, :height, :width]


# Only queries, keys and values are kept for the backward pass.
@functools.partial(jax.checkpoint, static_argnums=(3, 4, 5))
def _attend(
  query: Float[Array, 'b p q n d'],
  key: Float[Array, 'b h w n d'],
  value: Float[Array, 'b h w n e'],
  kernel: int,
  stride: int,
  scale: float,
) -> Float[Array, 'b p q n e']:
  height, width = query.shape[1:3]
  rows, columns = _split(height, stride), _split(width, stride)
  logits = _logits(query, key, kernel, stride, scale)
  weights = jnp.exp(logits - lax.stop_gradient(logits.max(-1, keepdims=True)))
  mixed = jnp.einsum(
    'bnijqk,bnijkd->bnijqd',
    weights.astype(value.dtype),
    flatten(_windows(value, kernel, stride, rows, columns)),
    preferred_element_type=jnp.float32,
  )
  mixed = (mixed / weights.sum(-1, keepdims=True)).astype(value.dtype)
  mixed = mixed.reshape(*mixed.shape[:4], rows[1], columns[1], -1)
  return _unblock(mixed, height, width)


@functools.cache
def _compiled(kernel: int, stride: int, scale: float, macs: int):
  def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return _attend(query, key, value, kernel, stride, scale)

  # Products with keys that a query does not see are a price of the form.
  return cost.declare(attend, macs)


def reflected_attention(
  query: Float[Array, 'b p q n d'],
  key: Float[Array, 'b h w n d'],
  value: Float[Array, 'b h w n e'],
  *,
  kernel: int,
  stride: int = 1,
  scale: float = 1.0,
) -> Float[Array, 'b p q n e']:
  """Returns `softmax(scale query . key) value` over `kernel x kernel` pixels around every query.

  The softmax runs in float32.

  Args:
    query: `n` heads of `d` channels at every `stride`-th pixel, beginning with the first.
    key: keys at every pixel.
    value: values at every pixel.
    kernel: side of the neighbourhood, odd.
    stride: distance of the queries.
    scale: factor of the logits.

  Raises:
    ValueError: for an even kernel, or queries that are not those of such a map.
  """
  _check(query, key, kernel, stride)
  macs = query.size // query.shape[-1] * kernel**2 * (key.shape[-1] + value.shape[-1])
  return _compiled(kernel, stride, scale, macs)(query, key, value)


def reflected_attention_weights(
  query: Float[Array, 'b p q n d'],
  key: Float[Array, 'b h w n d'],
  *,
  kernel: int,
  stride: int = 1,
  scale: float = 1.0,
) -> Float[Array, 'b n p q taps']:
  """Returns the attention map, the taps row by row; see `reflected_attention`."""
  _check(query, key, kernel, stride)
  sides = [_split(size, stride)[1] for size in query.shape[1:3]]
  windows = [stride * (side - 1) + kernel for side in sides]
  weights = jax.nn.softmax(_logits(query, key, kernel, stride, scale))
  weights = weights.reshape(*weights.shape[:4], *sides, *windows)
  p, q, x, y = np.ix_(*(np.arange(n) for n in (*weights.shape[4:6], kernel, kernel)))
  weights = weights[:, :, :, :, p, q, stride * p + x, stride * q + y]
  weights = weights.reshape(*weights.shape[:6], -1)
  return _unblock(weights, query.shape[1], query.shape[2]).transpose(0, 3, 1, 2, 4)


def _check(query: jax.Array, key: jax.Array, kernel: int, stride: int) -> None:
  errors.check_odd('kernel', kernel)
  expected = tuple(-(-n // stride) for n in key.shape[1:3])
  if query.shape[1:3] != expected:
    raise ValueError(
      f'queries are {query.shape[1]}x{query.shape[2]}, but a map of {key.shape[1]}x{key.shape[2]} '
      f'has {expected[0]}x{expected[1]} of them at stride {stride}'
    )
