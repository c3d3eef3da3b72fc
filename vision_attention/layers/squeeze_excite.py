"""Squeeze-and-excitation (arXiv 1709.01507, equations 2-4)."""

from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.layers import conv
from vision_attention.ops import activation


def squeezed_dim(dim: int, ratio: float, divisor: int) -> int:
  """Returns the width of a squeeze: `dim * ratio`, cut to an integer of at least one.

  With a divisor (timm's 8) it is the nearest multiple, of at least one divisor.
  """
  if divisor == 1:
    return max(1, int(dim * ratio))
  return max(divisor, int(dim * ratio + divisor / 2) // divisor * divisor)


class SqueezeExcite(nn.Module):
  """`x * gate(W2 act(W1 mean(x)))`: a gate per channel from the mean over the map.

  Attributes:
    hidden_dim: width of the squeeze; by `ratio` and `divisor` unless given.
    ratio: width of the squeeze relative to the map's.
    divisor: see `squeezed_dim`.
    activation: a name of `ops.activation`, after the squeeze.
    gate: a name of `ops.activation`, after the excitation.
  """

  placement: ClassVar[str] = 'branch'
  hidden_dim: int | None = None
  ratio: float = 1 / 16
  divisor: int = 1
  activation: str = 'relu'
  gate: str = 'sigmoid'
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool = False) -> Float[Array, 'b h w c']:
    del train
    hidden_dim = self.hidden_dim or squeezed_dim(x.shape[-1], self.ratio, self.divisor)

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
    hidden = activation.by_name(self.activation)(pointwise(hidden_dim, 'squeeze')(mean))
    return x * activation.by_name(self.gate)(pointwise(x.shape[-1], 'excite')(hidden))
