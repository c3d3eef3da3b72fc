"""Attention by relative position that can be any convolution (arXiv 1911.03584).

A head of the quadratic encoding is a discrete Gaussian over the offsets of keys from their query
(key minus query, vertical first). Scores are tables over offsets; nothing depends on the image, so
weights have no batch axis. A Gaussian without correlation, or a learned score per axis, factorises:
the softmax over the map is the product of one over rows and one over columns.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from vision_attention.ops import relative_position


def offsets(size: int) -> Float[Array, 'offset']:
  """Returns the offsets `1 - size .. size - 1` of an axis."""
  return jnp.arange(1 - size, size, dtype=jnp.float32)


def axis_scores(
  centers: Float[Array, 'n'], spreads: Float[Array, 'n'], size: int
) -> Float[Array, 'n offset']:
  """Returns `-1/2 s^2 (d - mu)^2` for every head and offset of an axis: the isotropic head.

  Args:
    centers: the offset `mu` that each head looks at.
    spreads: the inverse standard deviation `s`.
    size: of the axis.
  """
  distance = offsets(size) - centers[:, None]
  return -0.5 * jnp.square(spreads[:, None] * distance)


def joint_scores(
  centers: Float[Array, 'n 2'], factors: Float[Array, 'n 2 2'], height: int, width: int
) -> Float[Array, 'n y x']:
  """Returns `-1/2 (d - mu)^T G G^T (d - mu)`: the generalised head, whose axes may correlate.

  Args:
    centers: the offset `mu` (vertical, horizontal) that each head looks at.
    factors: `G`, a root of the inverse covariance.
    height: of the map.
    width: of the map.
  """
  grid = jnp.stack(jnp.meshgrid(offsets(height), offsets(width), indexing='ij'), -1)
  distance = grid - centers[:, None, None]
  return -0.5 * jnp.square(jnp.einsum('nyxi,nij->nyxj', distance, factors)).sum(-1)


def encoding(height: int, width: int) -> Float[Array, 'y x 3']:
  """Returns the quadratic encoding `r_d = (|d|^2, d_1, d_2)` of every offset (section 3.1)."""
  grid = jnp.stack(jnp.meshgrid(offsets(height), offsets(width), indexing='ij'), -1)
  return jnp.concatenate([jnp.square(grid).sum(-1, keepdims=True), grid], -1)


def encoding_vectors(centers: Float[Array, 'n 2'], alpha: float) -> Float[Array, 'n 3']:
  """Returns `v = -alpha (1, -2 D_1, -2 D_2)`, whose scores are `v . r_d` (section 3.1).

  They are those of `axis_scores` with `s^2 = 2 alpha`, but for a constant per head.
  """
  return -alpha * jnp.concatenate([jnp.ones((len(centers), 1)), -2 * centers], -1)


def truncate(scores: Float[Array, '... offset'], window: int) -> Float[Array, '... offset']:
  """Leaves keys further than half of an odd `window` along the last axis out of the softmax.

  A normalised window of a Gaussian is a depthwise convolution that divides by what it sees at
  borders, which the authors' code calls the blur trick.
  """
  size = (scores.shape[-1] + 1) // 2
  return jnp.where(jnp.abs(offsets(size)) <= window // 2, scores, -jnp.inf)


def expand_axis(scores: Float[Array, 'n offset']) -> Float[Array, 'n q k']:
  """Returns `out[q, k] = scores[k - q + size - 1]` for every query and key of an axis."""
  size = (scores.shape[-1] + 1) // 2
  return relative_position.relative_bias(scores[:, None, ::-1], 1, size)


def expand(scores: Float[Array, 'n y x']) -> Float[Array, 'n h w i j']:
  """Returns the scores of every query `(h, w)` and key `(i, j)` of a map."""
  height, width = ((n + 1) // 2 for n in scores.shape[1:])
  full = relative_position.relative_bias(scores[:, ::-1, ::-1], height, width)
  return full.reshape(scores.shape[0], height, width, height, width)


def joint_weights(
  rows: Float[Array, 'n h i'], columns: Float[Array, 'n w j']
) -> Float[Array, 'n h w i j']:
  """Returns the weights over the map whose factors are those over rows and over columns."""
  return rows[:, :, None, :, None] * columns[:, None, :, None]


def mix_axes(
  rows: Float[Array, 'n h i'], columns: Float[Array, 'n w j'], x: Float[Array, 'b i j c']
) -> Float[Array, 'b h w n c']:
  """Returns the mean of the map for every query and head, first along rows, then along columns.

  `n c i w (j + h)` multiply-adds in place of `n c h w i j` with the joint weights.
  """
  rows, columns = rows.astype(x.dtype), columns.astype(x.dtype)
  y = jnp.einsum('nwj,bijc->biwnc', columns, x, preferred_element_type=jnp.float32)
  y = jnp.einsum('nhi,biwnc->bhwnc', rows, y.astype(x.dtype), preferred_element_type=jnp.float32)
  return y.astype(x.dtype)


def mix(
  weights: Float[Array, '#b n h w i j'], x: Float[Array, 'b i j c']
) -> Float[Array, 'b h w n c']:
  """Returns the mean of the map for every query and head; the weights may differ by image."""
  shared, batch = weights.shape[0] == 1, 'b'
  weights = weights.astype(x.dtype)
  if shared:
    weights, batch = weights[0], ''
  y = jnp.einsum(f'{batch}nhwij,bijc->bhwnc', weights, x, preferred_element_type=jnp.float32)
  return y.astype(x.dtype)


class AsAttention(NamedTuple):
  """Parameters of quadratic attention that is a convolution.

  Attributes:
    centers: per head, the offset of its tap.
    spreads: per head, the inverse standard deviation.
    kernel: from the means of all heads, `n c`, to the outputs.
    margin: zeros around the map with which the convolution's padding is zeros. Without them the
      softmax falls on the nearest pixel there is, and the padding repeats the border.
  """

  centers: Float[Array, 'n 2']
  spreads: Float[Array, 'n']
  kernel: Float[Array, 'nc d']
  margin: int


def conv_to_attention(
  kernel: Float[Array, 'y x i o'],
  *,
  alpha: float = 30.0,
  dilation: int | Sequence[int] = 1,
  groups: int = 1,
) -> AsAttention:
  """Turns the weights of a convolution into those of quadratic attention (theorem 1, lemma 2).

  One head per tap; its Gaussian has precision `2 alpha` and lies on the tap's offset. The weight of
  any other key is at most `exp(-alpha)`, and so is the relative error.

  Args:
    kernel: `[height, width, inputs / groups, outputs]`.
    alpha: of the construction.
    dilation: distance of the taps along height and width.
    groups: channel groups of the convolution.

  Raises:
    ValueError: if alpha is not positive, or the groups do not divide the outputs.
  """
  if alpha <= 0:
    raise ValueError(f'alpha {alpha} must be positive: 30 leaves errors of 1e-13')
  height, width, inputs, outputs = kernel.shape
  if outputs % groups:
    raise ValueError(f'{groups} groups do not divide {outputs} outputs: pass a divisor')
  step = (dilation, dilation) if isinstance(dilation, int) else tuple(dilation)
  rows, columns = (
    (jnp.arange(size) - (size - 1) // 2) * distance
    for size, distance in zip((height, width), step, strict=True)
  )
  centers = jnp.stack(jnp.meshgrid(rows, columns, indexing='ij'), -1).reshape(-1, 2)
  # A group's outputs see its own inputs only; everything else is zero.
  split = kernel.reshape(height * width, inputs, groups, outputs // groups)
  dense = jnp.einsum('tigo,gf->tfigo', split, jnp.eye(groups, dtype=kernel.dtype))
  return AsAttention(
    centers.astype(jnp.float32),
    jnp.full(height * width, (2 * alpha) ** 0.5, jnp.float32),
    dense.reshape(height * width * groups * inputs, outputs),
    max(height // 2 * step[0], width // 2 * step[1]),
  )


def degenerate_heads(spreads: Float[Array, 'n *matrix']) -> Float[Array, 'n']:
  """Returns 1 for heads that look everywhere, or along one line, alike, and 0 for others.

  An isotropic head with `s^2 < 1e-5`; a generalised one whose inverse covariance `G G^T` has a
  condition number above 1000 or no eigenvalue above 1e-5 (the authors' code).
  """
  if spreads.ndim == 1:
    return (jnp.square(spreads) < 1e-5).astype(jnp.float32)
  values = jnp.linalg.eigvalsh(jnp.einsum('nij,nkj->nik', spreads, spreads))
  small, large = values[:, 0], values[:, -1]
  return ((large < 1e-5) | (large > 1000 * jnp.maximum(small, 0.0))).astype(jnp.float32)
