"""Class attention: the class token alone asks, itself and all tokens answer."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.ops import attention


class ClassAttention(nn.Module):
  """Attention of the first token to all (arXiv 2103.17239, section 3.2).

  The map `[b, n, 1, k]` is sown as `attention` where `intermediates` is mutable.

  Attributes:
    dim: output width.
    num_heads: number of heads.
    qkv_bias: whether query, key and value have biases.
    dropout: rate after the output projection.
  """

  dim: int
  num_heads: int
  qkv_bias: bool = False
  dropout: float = 0.0
  kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b k c'], *, train: bool) -> Float[Array, 'b d']:
    if self.dim % self.num_heads:
      raise ValueError(f'{self.num_heads} heads do not divide width {self.dim}: pass a divisor')
    types: dict[str, Any] = {'dtype': self.dtype, 'param_dtype': self.param_dtype}

    def heads(y: Float[Array, 'b q c'], name: str) -> Float[Array, 'b q n d']:
      project = nn.Dense(
        self.dim, use_bias=self.qkv_bias, kernel_init=self.kernel_init, name=name, **types
      )
      return project(y).reshape(*y.shape[:2], self.num_heads, -1)

    query, key, value = heads(x[:, :1], 'query'), heads(x, 'key'), heads(x, 'value')
    if self.is_mutable_collection('intermediates'):
      self.sow('intermediates', 'attention', attention.attention_weights(query, key))
    mixed = attention.dot_product_attention(query, key, value)
    y = nn.Dense(self.dim, kernel_init=self.kernel_init, name='proj', **types)(
      mixed.reshape(len(x), self.dim)
    )
    return nn.Dropout(self.dropout, deterministic=not train)(y)
