"""Local attention whose map is modulated per channel by static matrices: ELSA's ghost head.

`y_c(p) = sum_t (M_c[t] a_n[p, t] + A_c[t]) v_c(p + t)` (arXiv 2112.12786, section 3.3), with zeros
outside the map, where the softmax that `a` comes from may well have put its weight. The second
summand is a depthwise convolution. The first is computed row of taps by row of taps, and again in
the backward pass: values are never copied for every tap.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from vision_attention.ops import convolution


# Traced once per shape, however many layers have it.
@functools.partial(jax.jit, static_argnames=('stride', 'dilation'))
def _mix(
  weights: Float[Array, 'b p q n taps'],
  value: Float[Array, 'b h w n d'],
  mul: Float[Array, 'taps n d'] | None,
  *,
  stride: int,
  dilation: int,
) -> Float[Array, 'b p q n d']:
  batch, height, width, heads, taps = weights.shape
  kernel = math.isqrt(taps)
  margin = kernel // 2 * dilation
  padded = jnp.pad(value, ((0, 0), (margin, margin), (margin, margin), (0, 0), (0, 0)))
  rows = weights.reshape(*weights.shape[:4], kernel, kernel).transpose(4, 0, 1, 2, 3, 5)
  factors = None if mul is None else mul.reshape(kernel, kernel, *mul.shape[1:])
  down, right = stride * (height - 1) + 1, stride * (width - 1) + 1

  @jax.checkpoint
  def row(padded: Array, i: Array, weights: Array, factors: Array | None) -> Array:
    seen = lax.dynamic_slice_in_dim(padded, i * dilation, down, axis=1)[:, ::stride]
    total = jnp.zeros((), jnp.float32)
    for j in range(kernel):
      tap = seen[:, :, j * dilation : j * dilation + right : stride].astype(jnp.float32)
      tap = tap if factors is None else tap * factors[j]
      total = total + tap * weights[..., j, None]
    return total

  def step(total: Array, turn: tuple[Array, Array, Array | None]) -> tuple[Array, None]:
    return total + row(padded, *turn), None

  start = jnp.zeros((batch, height, width, heads, value.shape[-1]), jnp.float32)
  total, _ = lax.scan(step, start, (jnp.arange(kernel), rows, factors))
  return total.astype(value.dtype)


def ghost_attention(
  weights: Float[Array, 'b p q n taps'],
  value: Float[Array, 'b h w n d'],
  mul: Float[Array, 'k k n d'] | None = None,
  add: Float[Array, 'k k n d'] | None = None,
  *,
  stride: int = 1,
  dilation: int = 1,
) -> Float[Array, 'b p q n d']:
  """Returns `sum_t (mul[t] weights[t] + add[t]) value[t]`; products of the first run in float32.

  Args:
    weights: per pixel and head, those of the `k x k` taps around it, row by row.
    value: `n` heads of `d` channels at every pixel.
    mul: a factor per tap and channel, or None for 1.
    add: a summand per tap and channel, or None for 0.
    stride: results are for every `stride`-th pixel, from the first.
    dilation: distance of the taps.

  Raises:
    ValueError: for taps that are no square with a centre, or weights of another map.
  """
  batch, height, width, heads, dim = value.shape
  kernel = math.isqrt(weights.shape[-1])
  if kernel**2 != weights.shape[-1] or kernel % 2 == 0:
    raise ValueError(f'{weights.shape[-1]} taps are no square with a centre: pass 9, 25, 49, ...')
  expected = (batch, -(-height // stride), -(-width // stride), heads)
  if weights.shape[:4] != expected:
    raise ValueError(
      f'weights {weights.shape} are not those of a map {value.shape}: at stride {stride} they '
      f'begin with {expected}'
    )
  factors = None if mul is None else mul.reshape(kernel**2, heads, dim).astype(jnp.float32)
  y = _mix(weights.astype(jnp.float32), value, factors, stride=stride, dilation=dilation)
  if add is None:
    return y
  static = convolution.conv(
    value.reshape(batch, height, width, heads * dim),
    add.reshape(kernel, kernel, 1, heads * dim).astype(value.dtype),
    stride=stride,
    padding='symmetric',
    groups=heads * dim,
    dilation=dilation,
  )
  return y + static.reshape(y.shape)
