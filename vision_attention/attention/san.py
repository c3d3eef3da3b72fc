"""SAN: self-attention whose weights are vectors, one per group of channels."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.attention import acmix
from vision_attention.layers import norm
from vision_attention.ops import vector_attention

HE_INIT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class VectorAttention(nn.Module):
  """What both forms of SAN share (arXiv 2004.13621, section 3).

  Queries and keys (`dim / 4` channels) give a weight per pixel, neighbour and `dim / share`
  channels, by a small network; the values are summed with these weights. The map is continued by
  reflection. The weights `[b, dim / share, h, w, taps]` are sown as `attention` when the collection
  `intermediates` is mutable.

  Attributes:
    dim: output width, a multiple of 4 and of `share`.
    num_heads: without effect, as there are none.
    kernel: side of the neighbourhood, odd.
    share: channels that share a weight; they lie `dim / share` apart.
    conv: own reading of ACmix-SAN (arXiv 2111.14556, Table 1, without code): queries, keys and the
      values cut into four are six maps of ACmix's convolution branch, and learned scalars weigh
      it against the attention.
    dropout: rate after the layer.
    norm_epsilon: of BatchNorm.
  """

  needs_map: ClassVar[bool] = True
  dim: int
  num_heads: int = 4
  kernel: int = 7
  share: int = 8
  conv: bool = False
  dropout: float = 0.0
  kernel_init: nn.initializers.Initializer = HE_INIT
  norm_epsilon: float = 1e-5
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b h w d']:
    if self.dim % 4 or self.dim % self.share:
      raise ValueError(
        f'width {self.dim} must be a multiple of 4 and of share={self.share}, the channels that '
        'share a weight'
      )
    errors.check_odd('kernel', self.kernel)
    query = self._dense('query', self.dim // 4)(x)
    key = self._dense('key', self.dim // 4)(x)
    value = self._dense('value', self.dim)(x)
    weights = self.weigh(query, key, train)
    if self.is_mutable_collection('intermediates'):
      self.sow('intermediates', 'attention', weights.transpose(0, 4, 1, 2, 3))
    y = vector_attention.aggregate(value, weights)
    if self.conv:
      y = self._mix(y, query, key, value)
    return nn.Dropout(self.dropout, deterministic=not train)(y)

  def _mix(self, y: jax.Array, *maps: jax.Array) -> jax.Array:
    narrow = jnp.concatenate(maps, -1).reshape(*y.shape[:3], 6, self.dim // 4)
    convolved = acmix.ShiftConvolution(self.dim, name='conv', **self._types())(narrow)
    half = nn.initializers.constant(0.5)
    rates = [
      self.param(f'{name}_rate', half, (), self.param_dtype) for name in ('attention', 'conv')
    ]
    attention_rate, conv_rate = (jnp.asarray(rate).astype(self.dtype) for rate in rates)
    return attention_rate * y + conv_rate * convolved

  def _types(self) -> dict[str, Any]:
    return {'dtype': self.dtype, 'param_dtype': self.param_dtype}

  def _dense(self, name: str, dim: int, use_bias: bool = True) -> nn.Dense:
    return nn.Dense(
      dim, use_bias=use_bias, kernel_init=self.kernel_init, name=name, **self._types()
    )

  def _activate(self, name: str, x: Float[Array, '*b c'], train: bool) -> Float[Array, '*b c']:
    return jax.nn.relu(
      norm.BatchNorm(self.norm_epsilon, name=name, **self._types())(x, train=train)
    )

  def weigh(
    self, query: Float[Array, 'b h w r'], key: Float[Array, 'b h w r'], train: bool
  ) -> Float[Array, 'b h w taps m']:
    """Returns the weights."""
    raise NotImplementedError


class PairwiseAttention(VectorAttention):
  """Each weight is made of one pair of pixels alone (equation 2), with a softmax over the taps.

  The network sees `query - key`, and the difference of the pixels' coordinates after a linear map.
  """

  def weigh(
    self, query: Float[Array, 'b h w r'], key: Float[Array, 'b h w r'], train: bool
  ) -> Float[Array, 'b h w taps m']:
    place = self._dense('position', 2)(acmix.coordinates(*query.shape[1:3]))[None]
    pair = query[:, :, :, None] - vector_attention.neighbours(key, self.kernel)
    apart = place[:, :, :, None] - vector_attention.neighbours(place, self.kernel)
    pair = jnp.concatenate([pair, jnp.broadcast_to(apart, (*pair.shape[:-1], 2))], -1)
    y = self._activate('norm1', pair, train)
    y = self._dense('hidden', query.shape[-1], use_bias=False)(y)
    y = self._dense('weights', self.dim // self.share)(self._activate('norm2', y, train))
    return jax.nn.softmax(y.astype(jnp.float32), axis=3)


class PatchwiseAttention(VectorAttention):
  """The weights of a patch are made of all its pixels together (equation 4), without a softmax."""

  def weigh(
    self, query: Float[Array, 'b h w r'], key: Float[Array, 'b h w r'], train: bool
  ) -> Float[Array, 'b h w taps m']:
    taps, shared = self.kernel**2, self.dim // self.share
    patch = vector_attention.neighbours(key, self.kernel).reshape(*key.shape[:3], -1)
    y = self._activate('norm1', jnp.concatenate([query, patch], -1), train)
    y = self._activate('norm2', self._dense('hidden', shared, use_bias=False)(y), train)
    y = self._dense('weights', taps * shared)(y)
    return y.reshape(*y.shape[:3], taps, shared).astype(jnp.float32)


OPERATORS = {'san_pairwise': PairwiseAttention, 'san_patchwise': PatchwiseAttention}
