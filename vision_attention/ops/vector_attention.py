"""Aggregation with a weight per pixel, tap and channel (SAN, arXiv 2004.13621, equation 4)."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from vision_attention.ops import reflected_attention


def neighbours(x: Float[Array, 'b h w c'], kernel: int) -> Float[Array, 'b h w taps c']:
  """Returns the `kernel x kernel` pixels around every pixel of a reflected map, row by row.

  This copies the map `kernel^2` times: meant for maps of few channels.
  """
  batch, height, width, channels = x.shape
  x = reflected_attention.reflect(x, kernel // 2)
  x = jnp.stack([x[:, i : i + height] for i in range(kernel)], 3)
  x = jnp.stack([x[:, :, j : j + width] for j in range(kernel)], 4)
  return x.reshape(batch, height, width, kernel**2, channels)


def aggregate(
  value: Float[Array, 'b h w c'], weights: Float[Array, 'b h w taps m']
) -> Float[Array, 'b h w c']:
  """Returns `out[c] = sum_t weights[t, c mod m] value_t[c]` over the taps of a reflected map.

  Values are shifted row of taps by row of taps, and shifted again in the backward pass: no copy of
  them is kept for every tap.

  Args:
    value: a map whose channels `c` are a multiple of `m`.
    weights: per pixel and tap, the taps being `k x k`; channels that are `m` apart share one.
  """
  batch, height, width, channels = value.shape
  kernel, shared = round(weights.shape[3] ** 0.5), weights.shape[-1]
  padded = reflected_attention.reflect(value, kernel // 2)
  padded = padded.reshape(*padded.shape[:3], channels // shared, shared)
  rows = weights.reshape(batch, height, width, kernel, kernel, shared).transpose(3, 0, 1, 2, 4, 5)

  @jax.checkpoint
  def row(padded: jax.Array, i: jax.Array, weights: jax.Array) -> jax.Array:
    seen = lax.dynamic_slice_in_dim(padded, i, height, axis=1).astype(jnp.float32)
    taps = (seen[:, :, j : j + width] * weights[..., j, None, :] for j in range(kernel))
    return sum(taps, jnp.zeros((), jnp.float32))

  def step(total: jax.Array, turn: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    return total + row(padded, *turn), None

  start = jnp.zeros((batch, height, width, channels // shared, shared), jnp.float32)
  total, _ = lax.scan(step, start, (jnp.arange(kernel), rows))
  return total.reshape(value.shape).astype(value.dtype)
