"""The two-layer perceptron of transformer blocks."""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.ops import activation, fusion


class Mlp(nn.Module):
  """`Dense(hidden_dim) -> activation -> Dense(out_dim)` with biases, on the last axis.

  Attributes:
    hidden_dim: width between the layers.
    activation: a name of `ops.activation`.
    dropout: rate after the activation and after the second layer.
    out_dim: width of the result; the input's unless given.
  """

  hidden_dim: int
  activation: str
  dropout: float = 0.0
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  bias_init: nn.initializers.Initializer = nn.initializers.zeros
  out_dim: int | None = None
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, '*b c'], *, train: bool) -> Float[Array, '*b d']:
    def dense(dim: int, name: str) -> nn.Dense:
      return nn.Dense(
        dim,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        kernel_init=self.kernel_init,
        bias_init=self.bias_init,
        dot_general=fusion.dot_general,
        name=name,
      )

    drop = nn.Dropout(self.dropout, deterministic=not train)
    y = activation.by_name(self.activation)(dense(self.hidden_dim, 'expand')(x))
    return drop(dense(self.out_dim or x.shape[-1], 'project')(drop(y)))
