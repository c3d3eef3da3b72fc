"""Attention to a map of fewer keys (PVT), and an own reading of ACmix in it."""

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.attention import acmix
from vision_attention.layers import conv, initializers, norm
from vision_attention.ops import attention


class SpatialReductionAttention(nn.Module):
  """Spatial-reduction attention (arXiv 2102.12122, equations 1 and 2).

  Queries are those of the whole map. Keys and values are made of the map after a convolution whose
  kernel and stride are `reduction`, and LayerNorm. The attention map `[b, n, q, k]` is sown as
  `attention` when the collection `intermediates` is mutable.

  Attributes:
    dim: output width.
    num_heads: number of heads.
    reduction: side of the patches that become one key; 1 for all positions.
    conv: own reading of ACmix-PVT (arXiv 2111.14556, Table 2, without code): ACmix's convolution
      branch takes queries, keys and values of the whole map, by the same projections; learned
      scalars weigh it against the attention after its projection.
    qkv_bias: whether query, key and value have biases.
    norm_epsilon: of LayerNorm on keys.
    dropout: rate after the layer.
  """

  needs_map: ClassVar[bool] = True
  dim: int
  num_heads: int
  reduction: int = 2
  conv: bool = False
  qkv_bias: bool = True
  norm_epsilon: float = 1e-5
  dropout: float = 0.0
  kernel_init: nn.initializers.Initializer = nn.initializers.truncated_normal(0.02)
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b h w d']:
    if self.dim % self.num_heads:
      raise ValueError(f'{self.num_heads} heads do not divide width {self.dim}: pass a divisor')
    batch, height, width, channels = x.shape
    if self.reduction > min(height, width):
      raise ValueError(
        f'reduction {self.reduction} leaves no key of a {height}x{width} map: pass at most '
        f'{min(height, width)}'
      )
    types: dict[str, Any] = {'dtype': self.dtype, 'param_dtype': self.param_dtype}

    def dense(name: str, use_bias: bool = True) -> nn.Dense:
      return nn.Dense(self.dim, use_bias=use_bias, kernel_init=self.kernel_init, name=name, **types)

    def split(y: Float[Array, 'b y x d']) -> Float[Array, 'b y x n r']:
      return y.reshape(*y.shape[:3], self.num_heads, -1)

    def tokens(y: Float[Array, 'b y x n r']) -> Float[Array, 'b q n r']:
      return y.reshape(batch, -1, *y.shape[3:])

    key, value = dense('key', self.qkv_bias), dense('value', self.qkv_bias)
    query = split(dense('query', self.qkv_bias)(x))
    reduced = x
    if self.reduction > 1:
      side = self.reduction
      reduced = conv.Conv(
        channels,
        side,
        side,
        padding='valid',
        use_bias=True,
        kernel_init=initializers.TORCH_KERNEL,
        bias_init=initializers.torch_bias(side**2 * channels),
        name='reduce',
        **types,
      )(x)
      reduced = norm.LayerNorm(self.norm_epsilon, name='reduce_norm', **types)(reduced)
    keys, values = split(key(reduced)), split(value(reduced))
    arrays = tokens(query), tokens(keys), tokens(values)
    if self.is_mutable_collection('intermediates'):
      self.sow('intermediates', 'attention', attention.attention_weights(*arrays[:2]))
    mixed = attention.dot_product_attention(*arrays).reshape(batch, height, width, self.dim)
    y = dense('proj')(mixed)
    if self.conv:
      if self.reduction > 1:
        keys, values = split(key(x)), split(value(x))
      maps = jnp.concatenate([query, keys, values], 3)
      convolved = acmix.ShiftConvolution(self.dim, use_bias=True, name='conv', **types)(maps)
      half = nn.initializers.constant(0.5)
      rates = [
        self.param(f'{name}_rate', half, (), self.param_dtype) for name in ('attention', 'conv')
      ]
      attention_rate, conv_rate = (jnp.asarray(rate).astype(self.dtype) for rate in rates)
      y = attention_rate * y + conv_rate * convolved
    return nn.Dropout(self.dropout, deterministic=not train)(y)


OPERATORS = {'spatial_reduction': SpatialReductionAttention}
