"""Wide-ResNet for small images (arXiv 1605.07146), in the form of Google's AutoAugment code.

Pre-activation blocks without any bias. In that form shortcuts have no parameters (pool, then zeros
for the new channels), and two more of them span each group and the whole network
(github.com/tensorflow/models, research/autoaugment/wrn.py); it is what "36.3M" in arXiv 1904.09925,
Table 1, counts. `shortcut='conv'` is the original form with 1x1 convolutions.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.attention import operators
from vision_attention.layers import conv, heads, norm, stage
from vision_attention.models import base, resnet_blocks
from vision_attention.ops import convolution

ModuleDef = Callable[..., nn.Module]
CONV_INIT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
# Uniform within +-1 / sqrt(num_classes).
DENSE_INIT = nn.initializers.variance_scaling(1 / 3, 'fan_out', 'uniform')


def pad_shortcut(x: Float[Array, 'b h w c'], dim: int, stride: int) -> Float[Array, 'b p q d']:
  """Averages `stride x stride` pixels and adds zero channels, half of them on either side."""
  if stride > 1:
    x = convolution.avg_pool(x, window=stride, stride=stride)
  missing = dim - x.shape[-1]
  return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))


class PreActBlock(nn.Module):
  """`norm - relu - 3x3 - norm - relu - 3x3`, added to the shortcut.

  Attributes:
    dim: output channels.
    stride: of the first convolution.
    shared: whether the shortcut starts after the first activation.
    projected: whether a shortcut that changes channels is a 1x1 convolution.
    attn: an operator in place of the first convolution, or None; see `resnet_blocks.Block`.
  """

  dim: int
  stride: int
  shared: bool
  projected: bool
  conv: ModuleDef
  norm: ModuleDef
  attn: ModuleDef | None = None

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    y = jax.nn.relu(self.norm(name='norm1')(x, train=train))
    changes = x.shape[-1] != self.dim
    shortcut = y if self.shared or (self.projected and changes) else x
    if self.projected and changes:
      shortcut = self.conv(self.dim, 1, self.stride, name='shortcut')(shortcut)
    else:
      shortcut = pad_shortcut(shortcut, self.dim, self.stride)
    y = self._first(y, train)
    y = jax.nn.relu(self.norm(name='norm2')(y, train=train))
    return shortcut + self.conv(self.dim, 3, name='conv2')(y)

  def _first(self, y: Float[Array, 'b h w c'], train: bool) -> Float[Array, 'b p q d']:
    if self.attn is None:
      return self.conv(self.dim, 3, self.stride, name='conv1')(y)
    if operators.has_field(self.attn, 'stride'):
      return self.attn(dim=self.dim, stride=self.stride, name='attn')(y, train=train)
    y = self.attn(dim=self.dim, name='attn')(y, train=train)
    return resnet_blocks.halve(y) if self.stride > 1 else y


class WideResNet(nn.Module):
  """Stem of 16 channels and three groups of blocks, of strides 1, 2, 2.

  Attributes:
    depth: `6 n + 4` layers.
    width: factor on the channels 16, 32, 64.
    padded: whether shortcuts have no parameters, and span groups and network too.
    attn: an operator in place of every block's first convolution, or None.
    remat: whether blocks are computed again in the backward pass.
  """

  depth: int
  width: int
  padded: bool
  attn: ModuleDef | None = None
  remat: bool = False
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, images: Float[Array, 'b h w c'], *, train: bool
  ) -> dict[str, Float[Array, 'b p q d']]:
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    # TensorFlow and PyTorch put the odd pixel of a strided convolution on different sides.
    padding = 'same' if self.padded else 'symmetric'
    layer = functools.partial(conv.Conv, padding=padding, kernel_init=CONV_INIT, **types)
    batch_norm = functools.partial(norm.BatchNorm, epsilon=1e-5, momentum=0.9, **types)
    x = stem = layer(16, 3, name='stem')(images.astype(self.dtype))
    features = {}
    for i, dim in enumerate((16, 32, 64)):
      start, name = x, f'stage{i + 1}'
      blocks = [
        functools.partial(
          PreActBlock,
          dim * self.width,
          stride=2 if i and not j else 1,
          shared=self.padded and i == j == 0,
          projected=not self.padded,
          conv=layer,
          norm=batch_norm,
          attn=self.attn,
        )
        for j in range((self.depth - 4) // 6)
      ]
      x = stage.Stage(blocks, self.remat, name=name)(x, train=train)
      if self.padded:
        x = x + pad_shortcut(start, x.shape[-1], 2 if i else 1)
      features[name] = x
    if self.padded:
      x = x + pad_shortcut(stem, x.shape[-1], 4)
    features['final'] = jax.nn.relu(batch_norm(name='norm')(x, train=train))
    return features


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  depth: int,
  width: int,
  shortcut: str = 'pad',
  attn: operators.Spec | None = None,
  num_heads: int = 4,
  remat: bool = False,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    num_classes: outputs of the head.
    image_size: height and width, multiples of 4.
    dtype: of activations.
    param_dtype: of parameters.
    depth: `6 n + 4` layers.
    width: factor on the channels 16, 32, 64.
    shortcut: `pad` (no parameters) or `conv`.
    attn: an operator in place of every block's first convolution, or None.
    num_heads: of the operator.
    remat: whether blocks are computed again in the backward pass.
  """
  errors.check_choice('shortcut', shortcut, ('pad', 'conv'))
  if (depth - 4) % 6 or depth < 10:
    lower = max(10, (depth - 4) // 6 * 6 + 4)
    raise ValueError(f'depth {depth} is not 6 n + 4: the nearest are {lower} and {lower + 6}')
  if any(side % 4 for side in image_size):
    raise ValueError(f'image_size {image_size} must be multiples of 4')
  types: dict = {'dtype': dtype, 'param_dtype': param_dtype}
  operator = None
  if attn is not None:
    operator = operators.bind(operators.operator(attn), num_heads=num_heads, **types)
  backbone = functools.partial(
    WideResNet, depth, width, shortcut == 'pad', operator, remat=remat, **types
  )
  head = functools.partial(
    heads.LinearHead, num_classes=num_classes, feature='final', kernel_init=DENSE_INIT, **types
  )
  return base.Parts(backbone, head)


VARIANTS = {
  'wide_resnet_28_10': base.Variant(
    {'depth': 28, 'width': 10},
    image_size=32,
    num_classes=100,
    params=36_278_324,
    flops=5.215e9,
    source='arXiv 1904.09925, Table 1 (CIFAR-100; top-1 there 80.3 on CIFAR-100)',
  ),
}
