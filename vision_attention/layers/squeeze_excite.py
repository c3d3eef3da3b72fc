"""Squeeze-and-excitation (arXiv 1709.01507, equations 2-4)."""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.layers import conv
from vision_attention.ops import activation


class SqueezeExcite(nn.Module):
  """`x * gate(W2 act(W1 mean(x)))`: a gate per channel from the mean over the map.

  Attributes:
    hidden_dim: width of the squeeze.
    activation: a name of `ops.activation`, after the squeeze.
    gate: a name of `ops.activation`, after the excitation.
  """

  hidden_dim: int
  activation: str = 'relu'
  gate: str = 'sigmoid'
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h w c']:
    def pointwise(dim: int, name: str) -> conv.Conv:
      return conv.Conv(
        dim,
        kernel_size=1,
        use_bias=True,
        kernel_init=self.kernel_init,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=name,
      )

    mean = x.astype(jnp.float32).mean((1, 2), keepdims=True).astype(self.dtype)
    hidden = activation.by_name(self.activation)(pointwise(self.hidden_dim, 'squeeze')(mean))
    return x * activation.by_name(self.gate)(pointwise(x.shape[-1], 'excite')(hidden))
