"""Multi-head self-attention over all positions."""

from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.ops import attention, fusion


class MultiHeadAttention(nn.Module):
  """Multi-head self-attention (arXiv 1706.03762, section 3.2.2) over a token list or a map.

  Subclasses add a bias to the logits by overriding `logit_bias`. The attention map `[b, n, q, k]`
  is sown as `attention` when the collection `intermediates` is mutable.

  Attributes:
    dim: output width.
    num_heads: number of heads.
    head_dim: channels of a head; `dim / num_heads` unless given.
    qkv_bias: whether query, key and value have biases.
    dropout: rate after the output projection.
  """

  stages: ClassVar[tuple[int, ...]] = (4,)
  dim: int
  num_heads: int
  head_dim: int | None = None
  qkv_bias: bool = True
  dropout: float = 0.0
  kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b ... c'], *, train: bool) -> Float[Array, 'b ... d']:
    if self.head_dim is None and self.dim % self.num_heads:
      raise ValueError(
        f'{self.num_heads} heads do not divide width {self.dim}: pass a divisor or head_dim'
      )
    head_dim = self.head_dim or self.dim // self.num_heads
    batch, *positions, _ = x.shape
    tokens = x.reshape(batch, -1, x.shape[-1])

    def dense(dim: int, name: str, use_bias: bool = True) -> nn.Dense:
      return nn.Dense(
        dim,
        use_bias=use_bias,
        kernel_init=self.kernel_init,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        dot_general=fusion.dot_general,
        name=name,
      )

    def heads(name: str) -> Float[Array, 'b k n d']:
      y = dense(self.num_heads * head_dim, name, self.qkv_bias)(tokens)
      return y.reshape(*y.shape[:2], self.num_heads, head_dim)

    query, key, value = heads('query'), heads('key'), heads('value')
    bias = self.logit_bias(tuple(positions))
    if self.is_mutable_collection('intermediates'):
      self.sow('intermediates', 'attention', attention.attention_weights(query, key, bias))
    mixed = attention.dot_product_attention(query, key, value, bias)
    y = dense(self.dim, 'proj')(mixed.reshape(*mixed.shape[:2], -1))
    y = nn.Dropout(self.dropout, deterministic=not train)(y)
    return y.reshape(batch, *positions, self.dim)

  def logit_bias(self, positions: tuple[int, ...]) -> Float[Array, '#b n q k'] | None:
    """Returns what is added to the logits of a list or map of the given extent, or None."""
    del positions
    return None


OPERATORS = {'mhsa': MultiHeadAttention}
