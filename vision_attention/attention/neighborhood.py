"""Neighbourhood attention (arXiv 2204.07143) and its dilated form (arXiv 2209.15001)."""

from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.ops import neighborhood


class NeighborhoodAttention(nn.Module):
  """Self-attention of every pixel to its `kernel x kernel` nearest, `dilation` pixels apart.

  `softmax(q k / sqrt(d) + B) v`, where `B` is a scalar per head and offset, query minus key, from a
  table `relative_position` of `[heads, 2 kernel - 1, 2 kernel - 1]`. At the border the square of
  neighbours is shifted into the map; half of the table is used there alone.

  A map of fewer than `kernel * dilation` pixels a side gets zeros at bottom and right before it is
  projected, as in the authors' code: these pixels are keys like any other.

  The attention map `[b, n, h, w, kernel^2]` is sown as `attention` where `intermediates` is
  mutable.

  Attributes:
    dim: output width.
    num_heads: number of heads.
    head_dim: channels of a head; `dim / num_heads` unless given.
    kernel: side of the neighbourhood, odd.
    dilation: distance of the neighbours.
    position: whether there is a table of offsets.
    qkv_bias: whether query, key and value have biases.
    dropout: rate after the output projection.
    block: largest side of the tiles that are computed together; no effect on the result.
    table_init: of the table.
  """

  needs_map: ClassVar[bool] = True
  dim: int
  num_heads: int = 4
  head_dim: int | None = None
  kernel: int = 7
  dilation: int = 1
  position: bool = True
  qkv_bias: bool = True
  dropout: float = 0.0
  block: int = 7
  kernel_init: nn.initializers.Initializer = nn.initializers.truncated_normal(0.02)
  table_init: nn.initializers.Initializer = nn.initializers.truncated_normal(0.02)
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b h w d']:
    if self.head_dim is None and self.dim % self.num_heads:
      raise ValueError(
        f'{self.num_heads} heads do not divide width {self.dim}: pass a divisor or head_dim'
      )
    head_dim = self.head_dim or self.dim // self.num_heads
    height, width = x.shape[1:3]
    side = self.kernel * self.dilation
    bottom, right = max(0, side - height), max(0, side - width)
    if bottom or right:
      x = jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0)))

    def dense(dim: int, name: str, use_bias: bool = True) -> nn.Dense:
      return nn.Dense(
        dim,
        use_bias=use_bias,
        kernel_init=self.kernel_init,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=name,
      )

    def heads(name: str) -> Float[Array, 'b h w n d']:
      y = dense(self.num_heads * head_dim, name, self.qkv_bias)(x)
      return y.reshape(*y.shape[:3], self.num_heads, head_dim)

    query, key, value = heads('query'), heads('key'), heads('value')
    table = None
    if self.position:
      shape = (self.num_heads, 2 * self.kernel - 1, 2 * self.kernel - 1)
      table = self.param('relative_position', self.table_init, shape, self.param_dtype)
      table = jnp.asarray(table)
    if self.is_mutable_collection('intermediates'):
      weights = neighborhood.neighborhood_weights(
        query, key, table, kernel=self.kernel, dilation=self.dilation
      )
      self.sow('intermediates', 'attention', weights[:, :, :height, :width])
    mixed = neighborhood.neighborhood_attention(
      query, key, value, table, kernel=self.kernel, dilation=self.dilation, block=self.block
    )
    mixed = mixed[:, :height, :width].reshape(*mixed.shape[:1], height, width, -1)
    y = dense(self.dim, 'proj')(mixed)
    return nn.Dropout(self.dropout, deterministic=not train)(y)


OPERATORS = {'neighborhood': NeighborhoodAttention}
