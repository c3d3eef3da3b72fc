"""AA-MnasNet (arXiv 1904.09925, Table 3): MnasNet-A1 (1807.11626) with augmented expansions.

Attention takes a share of the channels of the 1x1 convolution that expands an inverted bottleneck,
in the blocks whose input is at most 28x28; there it works on 14x14. 4 heads, without a least number
of channels each. `augmented=False` is MnasNet-A1 itself.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.attention import augmented as augmented_conv
from vision_attention.layers import conv, heads, norm, squeeze_excite, stage
from vision_attention.layers import drop_path as stochastic_depth
from vision_attention.models import base
from vision_attention.ops import relative_logits

ModuleDef = Callable[..., nn.Module]
CONV_INIT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
RESIZE = {r'params/backbone/.*/attn/(height|width)_offsets': relative_logits.resize_offsets}


class Group(NamedTuple):
  """Blocks of one shape, as arXiv 1807.11626, figure 7 gives them."""

  repeats: int
  kernel_size: int
  stride: int
  expansion: int
  dim: int
  se_ratio: float = 0.0


A1 = (
  Group(1, 3, 1, 1, 16),
  Group(2, 3, 2, 6, 24),
  Group(3, 5, 2, 3, 40, 0.25),
  Group(4, 3, 2, 6, 80),
  Group(2, 3, 1, 6, 112, 0.25),
  Group(3, 5, 2, 6, 160, 0.25),
  Group(1, 3, 1, 6, 320),
)


def scaled(dim: int, width: float) -> int:
  """Returns `dim * width` to the nearest multiple of 8, never less than nine tenths of it."""
  exact = dim * width
  rounded = max(8, int(exact + 4) // 8 * 8)
  return rounded if rounded >= 0.9 * exact else rounded + 8


class InvertedBottleneck(nn.Module):
  """`1x1 - norm - relu - depthwise - norm - relu - SE - 1x1 - norm`, added where shapes agree.

  Attributes:
    dim: output channels.
    kernel_size: of the depthwise convolution, which has the stride.
    expansion: inner width relative to the input; at 1 the first convolution is left out.
    se_ratio: width of the squeeze relative to the block's input; 0 for none.
    residual: whether the input is added, if the shape is the same.
    attn: an operator in place of the first 1x1 convolution, or None.
    drop_path: rate of stochastic depth.
  """

  dim: int
  kernel_size: int
  stride: int
  expansion: int
  se_ratio: float
  residual: bool
  attn: ModuleDef | None
  drop_path: float
  conv: ModuleDef
  norm: ModuleDef
  squeeze: ModuleDef

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    inputs = x.shape[-1]
    inner_dim = inputs * self.expansion
    y = x
    if self.attn is not None:
      y = self.attn(dim=inner_dim, name='attn')(y, train=train)
    elif self.expansion > 1:
      y = self.conv(inner_dim, kernel_size=1, name='expand')(y)
    if self.expansion > 1:
      y = jax.nn.relu(self.norm(name='norm1')(y, train=train))
    y = self.conv(
      inner_dim,
      kernel_size=self.kernel_size,
      stride=self.stride,
      groups=inner_dim,
      name='depthwise',
    )(y)
    y = jax.nn.relu(self.norm(name='norm2')(y, train=train))
    if self.se_ratio:
      y = self.squeeze(max(1, int(inputs * self.se_ratio)), name='se')(y)
    y = self.norm(name='norm3')(self.conv(self.dim, kernel_size=1, name='project')(y), train=train)
    if not self.residual or self.stride > 1 or inputs != self.dim:
      return y
    return x + stochastic_depth.DropPath(self.drop_path, name='drop_path')(y, train=train)


class MnasNet(nn.Module):
  """Stem, groups of blocks and a last 1x1 convolution.

  Attributes:
    stem_dim: channels of the stem, a 3x3 convolution of stride 2.
    groups: per group, its blocks.
    strides: of the groups.
    final_dim: channels of the last convolution.
  """

  stem_dim: int
  groups: Sequence[Sequence[ModuleDef]]
  strides: Sequence[int]
  final_dim: int
  conv: ModuleDef
  norm: ModuleDef
  remat: bool = False
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, images: Float[Array, 'b h w c'], *, train: bool
  ) -> dict[str, Float[Array, 'b p q d']]:
    x = self.conv(self.stem_dim, stride=2, name='stem')(images.astype(self.dtype))
    x = jax.nn.relu(self.norm(name='stem_norm')(x, train=train))
    features, level = {}, 1
    for i, (blocks, stride) in enumerate(zip(self.groups, self.strides, strict=True), 1):
      x = stage.Stage(blocks, self.remat, name=f'group{i}')(x, train=train)
      level += stride == 2
      features[f'stage{level}'] = x
    x = self.conv(self.final_dim, kernel_size=1, name='final')(x)
    features['final'] = jax.nn.relu(self.norm(name='final_norm')(x, train=train))
    return features


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  width: float = 1.0,
  augmented: bool = True,
  kappa: float = 0.1,
  upsilon: float = 0.05,
  num_heads: int = 4,
  min_head_dim: int = 1,
  position: str = 'relative',
  table_init: str = 'intended',
  groups: Sequence[Sequence[float]] = A1,
  stem_dim: int = 32,
  final_dim: int = 1280,
  drop_path: float = 0.0,
  dropout: float = 0.2,
  norm_momentum: float = 0.99,
  remat: bool = False,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    num_classes: outputs of the head.
    image_size: height and width.
    dtype: of activations.
    param_dtype: of parameters.
    width: factor on all widths but the last; 0.75, 1, 1.25 and 1.4 are published.
    augmented: whether there is attention at all.
    kappa: channels of all queries relative to the expanded width.
    upsilon: channels of all values likewise.
    num_heads: of every attention.
    min_head_dim: least channels of a head's queries.
    position: `relative`, `absolute`, `coordinates` or `none`.
    table_init: `intended` or `literal`, see `augmented.Augmentation`.
    groups: of blocks, each with the fields of `Group`.
    stem_dim: channels of the stem before `width`.
    final_dim: channels of the last convolution.
    drop_path: rate of stochastic depth of the last block, growing linearly from 0.
    dropout: rate before the classifier.
    norm_momentum: of BatchNorm's running statistics.
    remat: whether blocks are computed again in the backward pass.

  Raises:
    ValueError: for a width that leaves nothing.
  """
  del image_size
  if width <= 0:
    raise ValueError(f'width {width} must be positive; published are 0.75, 1, 1.25 and 1.4')
  table = [group if isinstance(group, Group) else Group(*group) for group in groups]  # pyright: ignore
  types: dict[str, Any] = {'dtype': dtype, 'param_dtype': param_dtype}
  layer = functools.partial(conv.Conv, kernel_init=CONV_INIT, **types)
  batch_norm = functools.partial(norm.BatchNorm, epsilon=1e-3, momentum=norm_momentum, **types)
  squeeze = functools.partial(squeeze_excite.SqueezeExcite, kernel_init=CONV_INIT, **types)
  rates = stochastic_depth.linear_rates(drop_path, [group.repeats for group in table])
  blocks, level = [], 1
  for i, group in enumerate(table):
    made = []
    for j in range(group.repeats):
      attn = None
      # Inputs at an eighth of the image or less; those at an eighth attend to pooled maps.
      if augmented and level >= 3 and group.expansion > 1:
        attn = functools.partial(
          augmented_conv.AugmentedConv,
          num_heads=num_heads,
          kernel_size=1,
          kappa=kappa,
          upsilon=upsilon,
          min_head_dim=min_head_dim,
          downsample=2 if level == 3 else 1,
          position=position,
          table_init=table_init,
          kernel_init=CONV_INIT,
          **types,
        )
      stride = group.stride if j == 0 else 1
      block = functools.partial(
        InvertedBottleneck,
        scaled(group.dim, width),
        kernel_size=group.kernel_size,
        stride=stride,
        expansion=group.expansion,
        se_ratio=group.se_ratio,
        # The first group has no shortcut, though its shape stays in narrow models.
        residual=i > 0,
        attn=attn,
        drop_path=rates[i][j],
        conv=layer,
        norm=batch_norm,
        squeeze=squeeze,
      )
      made.append(block)
      level += stride == 2
    blocks.append(made)
  backbone = functools.partial(
    MnasNet,
    scaled(stem_dim, width),
    groups=blocks,
    strides=[group.stride for group in table],
    final_dim=final_dim,
    conv=layer,
    norm=batch_norm,
    remat=remat,
    dtype=dtype,
  )
  head = functools.partial(
    heads.LinearHead,
    num_classes=num_classes,
    feature='final',
    dropout=dropout,
    kernel_init=nn.initializers.normal(0.01),
    **types,
  )
  return base.Parts(backbone, head)


VARIANTS = {
  'aa_mnasnet': base.Variant(
    {'width': 1.0},
    params=4_062_670,
    flops=0.3555e9,
    top1=75.7,
    source='arXiv 1904.09925, Table 3 (recalled); multiply-adds counted layer by layer',
  ),
}
