"""The stem of hierarchical transformers: patches that do not overlap, and a norm."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

ModuleDef = Callable[..., nn.Module]


class PatchEmbed(nn.Module):
  """`p x p` convolution of stride `p` with bias, then a norm.

  Attributes:
    dim: output channels.
    patch: side of a patch.
    pad: what becomes of an image that patches do not tile: zeros at bottom and right, or pixels
      there are left out.
  """

  dim: int
  patch: int
  pad: bool
  conv: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    if self.pad:
      bottom, right = (-side % self.patch for side in x.shape[1:3])
      x = jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0)))
    x = self.conv(self.dim, self.patch, self.patch, padding='valid', use_bias=True, name='conv')(x)
    return self.norm(name='norm')(x, train=train)
