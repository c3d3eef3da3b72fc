"""Query and attend (arXiv 2112.11435): local attention whose queries are learned, not computed.

All windows share the queries, so that a pixel has one score per query, whatever window it is in.
With `E = exp(score)`, softmax over a window is a quotient of two depthwise convolutions:

  sum_window exp(bias) scale E value / sum_window exp(bias) E

No array is larger for a larger window.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vision_attention.ops import convolution

# Scores further below the largest of an image count as this far below it, so that a window of
# nothing else still has weights. The gradient has the square of their sum, which float32 must hold.
_LEAST = -40.0


def normalize(query: Float[Array, 'i n d']) -> Float[Array, 'i n d']:
  """Returns queries of length one, in float32; their gradient is across them."""
  wide = query.astype(jnp.float32)
  return wide / (jnp.linalg.norm(wide, axis=-1, keepdims=True) + 1e-6)


def scores(
  x: Float[Array, 'b h w c'], key: Float[Array, 'c n d'], query: Float[Array, 'i n d']
) -> Float[Array, 'b h w i n']:
  """Returns `key(x) . query / sqrt(d)` in float32 without computing keys.

  Args:
    x: the map.
    key: projection to keys of `n` heads.
    query: `i` learned queries.
  """
  scaled = (query.astype(jnp.float32) * query.shape[-1] ** -0.5).astype(x.dtype)
  both = jnp.einsum('cnd,ind->cin', key, scaled)
  return jnp.einsum('bhwc,cin->bhwin', x, both, preferred_element_type=jnp.float32)


def query_and_attend(
  score: Float[Array, 'b h w i n'],
  value: Float[Array, 'b h w n d'],
  bias: Float[Array, 'k k i n'],
  scale: Float[Array, 'k k i n'] | None = None,
  *,
  stride: int = 1,
  groups: int = 1,
) -> Float[Array, 'b p q g n d']:
  """Returns, per window and head, `sum_queries sum_window scale softmax(score + bias) value`.

  A window has its pixel in the centre; what lies outside the map is no key. The quotient is
  unchanged by constants per image, query and head: the largest score and bias are subtracted.

  Args:
    score: of every pixel by every query and head, of `scores`.
    value: of every pixel and head.
    bias: added to the scores by position in the window.
    scale: factor of the weights by position in the window, after the softmax.
    stride: distance of the windows; there are `ceil(h / stride)` rows of them.
    groups: queries are summed within `groups` equal parts.
  """
  batch, height, width, queries, heads = score.shape
  dim, kernel = value.shape[-1], bias.shape[0]
  top = jax.lax.stop_gradient(score.max((1, 2), keepdims=True))
  weight = jnp.exp(jnp.maximum(score.astype(jnp.float32) - top, _LEAST))
  bias = bias.astype(jnp.float32)
  place = jnp.exp(bias - jax.lax.stop_gradient(bias.max((0, 1))))

  def total(x: Float[Array, 'b h w c'], kernel: Float[Array, 'k k i n']) -> Array:
    kernel = kernel.reshape(*kernel.shape[:2], 1, -1).astype(x.dtype)
    return convolution.conv(x, kernel, stride=stride, padding='symmetric', groups=kernel.shape[-1])

  below = total(weight.reshape(batch, height, width, -1), place)
  weighted = weight.astype(value.dtype)[..., None] * value[:, :, :, None]
  above = place if scale is None else place * scale.astype(jnp.float32)
  above = jnp.broadcast_to(above[..., None], (kernel, kernel, queries, heads, dim))
  mixed = total(
    weighted.reshape(batch, height, width, -1), above.reshape(kernel, kernel, queries, -1)
  )
  size = mixed.shape[1:3]
  # Few axes: XLA's CPU backend fails on sums over one of seven.
  mixed = mixed.reshape(-1, queries, heads, dim).astype(jnp.float32)
  y = (mixed / below.reshape(-1, queries, heads, 1)).reshape(-1, queries // groups, heads * dim)
  parts = [y[:, i] for i in range(queries // groups)]
  y = functools.reduce(jnp.add, parts).astype(value.dtype)
  return y.reshape(batch, *size, groups, heads, dim)


def attention_weights(
  score: Float[Array, 'b h w i n'], bias: Float[Array, 'k k i n'], *, stride: int = 1
) -> Float[Array, 'b m p q taps']:
  """Returns the attention maps: per query and head (`m`, queries first) and window its taps.

  Weights of taps outside the map are zero; the scale of `query_and_attend` is not in them.
  """
  kernel, (height, width) = bias.shape[0], score.shape[1:3]
  before = kernel // 2
  padded = jnp.pad(
    score,
    ((0, 0), (before, before), (before, before), (0, 0), (0, 0)),
    constant_values=-jnp.inf,
  )
  taps = [
    padded[:, y : y + height : stride, x : x + width : stride] + bias[y, x]
    for y in range(kernel)
    for x in range(kernel)
  ]
  weights = jax.nn.softmax(jnp.stack(taps, -1).astype(jnp.float32), -1)
  return weights.reshape(*weights.shape[:3], -1, kernel**2).transpose(0, 3, 1, 2, 4)


def depth_to_space(x: Float[Array, 'b h w g c'], factor: int) -> Float[Array, 'b p q c']:
  """Writes `factor^2` pixels in place of one, row by row."""
  batch, height, width, _, dim = x.shape
  x = x.reshape(batch, height, width, factor, factor, dim).swapaxes(2, 3)
  return x.reshape(batch, height * factor, width * factor, dim)
