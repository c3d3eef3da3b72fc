"""Multi-head attention pooling: one learned query gathers all tokens."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.layers import mlp, norm
from vision_attention.ops import attention


class MapPool(nn.Module):
  """The MAP head of scaled ViTs (arXiv 2106.04560): `z + MLP(LN(z))` of `z = MHA(probe, tokens)`.

  Attributes:
    num_heads: number of heads.
    hidden_dim: width inside the MLP.
    activation: a name of `ops.activation`.
    norm_epsilon: of LayerNorm.
  """

  num_heads: int
  hidden_dim: int
  activation: str
  norm_epsilon: float
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b ... c'], *, train: bool) -> Float[Array, 'b c']:
    batch, dim = x.shape[0], x.shape[-1]
    tokens = x.reshape(batch, -1, dim)
    init = nn.initializers.xavier_uniform()
    types: dict[str, Any] = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    probe = self.param('probe', init, (1, dim), self.param_dtype).astype(self.dtype)

    def heads(y: Float[Array, 'b q c'], name: str) -> Float[Array, 'b q n d']:
      y = nn.Dense(dim, kernel_init=init, name=name, **types)(y)
      return y.reshape(*y.shape[:2], self.num_heads, -1)

    query = heads(jnp.broadcast_to(probe, (batch, 1, dim)), 'query')
    mixed = attention.dot_product_attention(query, heads(tokens, 'key'), heads(tokens, 'value'))
    z = nn.Dense(dim, kernel_init=init, name='proj', **types)(mixed.reshape(batch, 1, dim))
    y = norm.LayerNorm(self.norm_epsilon, name='norm', **types)(z)
    layer = mlp.Mlp(
      self.hidden_dim,
      self.activation,
      kernel_init=init,
      bias_init=nn.initializers.normal(1e-6),
      name='mlp',
      **types,
    )
    return (z + layer(y, train=train))[:, 0]
