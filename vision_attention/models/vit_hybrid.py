"""The convolutional stem of ViT's hybrids: a ResNet with group norm and weight standardisation.

arXiv 2010.11929, section 3.1, as Google's `models_resnet.py` has it (the AugReg paper says batch
norm; its models have group norm).
"""

from collections.abc import Callable, Sequence

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from vision_attention.layers import stage
from vision_attention.ops import convolution

ModuleDef = Callable[..., nn.Module]


class Unit(nn.Module):
  """Bottleneck `1x1 - 3x3 - 1x1`, the stride in the 3x3, four times as wide outside as inside."""

  inner_dim: int
  stride: int
  conv: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    dim = 4 * self.inner_dim
    shortcut = x
    if self.stride > 1 or x.shape[-1] != dim:
      shortcut = self.conv(dim, kernel_size=1, stride=self.stride, name='conv_proj')(x)
      shortcut = self.norm(name='norm_proj')(shortcut, train=train)
    y = self.conv(self.inner_dim, kernel_size=1, name='conv1')(x)
    y = jax.nn.relu(self.norm(name='norm1')(y, train=train))
    y = self.conv(self.inner_dim, kernel_size=3, stride=self.stride, name='conv2')(y)
    y = jax.nn.relu(self.norm(name='norm2')(y, train=train))
    y = self.conv(dim, kernel_size=1, name='conv3')(y)
    y = self.norm(scale_init=nn.initializers.zeros, name='norm3')(y, train=train)
    return jax.nn.relu(shortcut + y)


class ResNetStem(nn.Module):
  """Root (7x7 convolution and max-pool, both of stride 2) and stages of bottleneck units.

  Attributes:
    depths: units per stage; all stages but the first halve the map. Empty for the root alone.
  """

  depths: Sequence[int]
  conv: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    x = self.conv(64, kernel_size=7, stride=2, name='conv_root')(x)
    x = jax.nn.relu(self.norm(name='norm_root')(x, train=train))
    x = convolution.max_pool(x, window=3, stride=2, padding='same')
    for i, depth in enumerate(self.depths):
      units = [self._unit(64 * 2**i, 2 if i > 0 and j == 0 else 1) for j in range(depth)]
      x = stage.Stage(units, name=f'stage{i + 1}')(x, train=train)
    return x

  def _unit(self, inner_dim: int, stride: int) -> ModuleDef:
    def make(name: str) -> nn.Module:
      return Unit(inner_dim, stride, self.conv, self.norm, name=name)

    return make


def stride_of(depths: Sequence[int]) -> int:
  """Returns by how much the stem shrinks an image."""
  return 4 * 2 ** max(len(depths) - 1, 0)
