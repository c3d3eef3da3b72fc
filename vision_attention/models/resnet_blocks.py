"""The residual skeleton that `resnet.py` and the papers with attention in a ResNet share.

A block's spatial layer is a 3x3 convolution or an operator; the residual branch may end in a
module, and a module may follow a whole block. What is put where is data: nested sequences, per
stage and per block.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.attention import operators
from vision_attention.layers import conv, drop_path, norm, stage
from vision_attention.ops import activation, convolution

ModuleDef = Callable[..., nn.Module]
# A stem by name, or a module.
Stemlike = str | ModuleDef
STEMS = ('7x7', 'deep', 'deep_tiered', 'deep_conv', 'small')


def halve(x: Float[Array, 'b h w c']) -> Float[Array, 'b p q c']:
  """Averages 2x2 pixels; at odd sizes the last window holds one row or column, and only that."""
  return convolution.avg_pool(x, window=2, stride=2, padding='same', count_include_pad=False)


class Shortcut(nn.Module):
  """The identity, or a projection where the shape changes: 1x1 convolution and BatchNorm.

  Attributes:
    dim: output channels.
    stride: of the block.
    average: the -D form, which averages 2x2 pixels and then projects without a stride.
    activation: after the norm of a projection (BoTNet), or None.
  """

  dim: int
  stride: int
  average: bool
  conv: ModuleDef
  norm: ModuleDef
  activation: str | None = None

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    if x.shape[-1] == self.dim and self.stride == 1:
      return x
    stride = self.stride
    if self.average and stride > 1:
      x, stride = halve(x), 1
    y = self.conv(self.dim, kernel_size=1, stride=stride, name='conv')(x)
    y = self.norm(name='norm')(y, train=train)
    return y if self.activation is None else activation.by_name(self.activation)(y)


class Block(nn.Module):
  """Two 3x3 convolutions, or the bottleneck 1x1 - 3x3 - 1x1; then a module, addition, activation.

  Attributes:
    dim: output channels.
    inner_dim: channels of the 3x3 convolutions.
    stride: in the (first) 3x3 convolution.
    bottleneck: whether the block is the bottleneck.
    average_shortcut: see `Shortcut`.
    attn: an operator in place of the (first) 3x3 convolution, called with `dim` and a name, or
      None. One with a field `stride` gets the block's; the result of any other is averaged over
      2x2 pixels where the block has a stride (arXiv 2101.11605). The norm after it is left out for
      an operator with `norm_after = False`, the activation for one with `act_after = False`.
    module: ends the residual branch (SE and its relatives), called with a name, or None.
    shortcut_activation: after a projected shortcut, or None.
    drop_path: rate of stochastic depth.
    last_scale_init: of the branch's last norm.
    groups: of the 3x3 convolution of a bottleneck (ResNeXt).
  """

  dim: int
  inner_dim: int
  stride: int
  bottleneck: bool
  average_shortcut: bool
  attn: ModuleDef | None
  module: ModuleDef | None
  drop_path: float
  activation: str
  last_scale_init: nn.initializers.Initializer
  conv: ModuleDef
  norm: ModuleDef
  shortcut_activation: str | None = None
  groups: int = 1

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    act = activation.by_name(self.activation)
    if self.bottleneck:
      layers = [(self.inner_dim, 1, 1), (self.inner_dim, 3, self.stride), (self.dim, 1, 1)]
    else:
      layers = [(self.inner_dim, 3, self.stride), (self.dim, 3, 1)]
    spatial = 2 if self.bottleneck else 1
    y = x
    for i, (dim, kernel_size, stride) in enumerate(layers, 1):
      last = i == len(layers)
      norm_after = act_after = True
      if self.attn is not None and i == spatial:
        y = self._operate(y, dim, stride, train)
        norm_after = operators.trait(self.attn, 'norm_after', True)
        act_after = operators.trait(self.attn, 'act_after', True)
      else:
        groups = self.groups if i == spatial else 1
        y = self.conv(dim, kernel_size, stride, groups, name=f'conv{i}')(y)
      if norm_after:
        init = self.last_scale_init if last else nn.initializers.ones
        y = self.norm(scale_init=init, name=f'norm{i}')(y, train=train)
      y = act(y) if act_after and not last else y
    if self.module is not None:
      y = self.module(name='module')(y, train=train)
    y = drop_path.DropPath(self.drop_path, name='drop_path')(y, train=train)
    shortcut = Shortcut(
      self.dim,
      self.stride,
      self.average_shortcut,
      self.conv,
      self.norm,
      self.shortcut_activation,
      name='shortcut',
    )
    return act(y + shortcut(x, train=train))

  def _operate(
    self, y: Float[Array, 'b h w c'], dim: int, stride: int, train: bool
  ) -> Float[Array, 'b p q d']:
    """Applies the operator, with the block's stride one way or the other."""
    assert self.attn is not None
    if operators.has_field(self.attn, 'stride'):
      return self.attn(dim=dim, stride=stride, name='attn')(y, train=train)
    y = self.attn(dim=dim, name='attn')(y, train=train)
    return halve(y) if stride > 1 else y


class Stem(nn.Module):
  """From the image to a quarter of its size (`small`: to its own size).

  Attributes:
    kind: `7x7` and max-pool; `deep`, three 3x3 convolutions and max-pool (-D); `deep_tiered`, the
      same in growing width (timm's "t"); `deep_conv`, with a strided convolution in place of the
      pool (RS); `small`, one 3x3 convolution.
    dim: output channels; the deep stems have half of it inside, `deep_tiered` 3/8 and 1/2.
    pool_padding: of the max-pool: `symmetric` (PyTorch) or `same` (TensorFlow).
  """

  kind: str
  dim: int
  activation: str
  pool_padding: str
  conv: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    act = activation.by_name(self.activation)
    layers = {
      '7x7': [(self.dim, 7, 2)],
      'deep': [(self.dim // 2, 3, 2), (self.dim // 2, 3, 1), (self.dim, 3, 1)],
      'deep_tiered': [(3 * self.dim // 8, 3, 2), (self.dim // 2, 3, 1), (self.dim, 3, 1)],
      'deep_conv': [
        (self.dim // 2, 3, 2),
        (self.dim // 2, 3, 1),
        (self.dim, 3, 1),
        (self.dim, 3, 2),
      ],
      'small': [(self.dim, 3, 1)],
    }[self.kind]
    for i, (dim, kernel_size, stride) in enumerate(layers, 1):
      x = self.conv(dim, kernel_size=kernel_size, stride=stride, name=f'conv{i}')(x)
      x = act(self.norm(name=f'norm{i}')(x, train=train))
    if self.kind in ('7x7', 'deep', 'deep_tiered'):
      x = convolution.max_pool(x, window=3, stride=2, padding=self.pool_padding)
    return x


class ResNet(nn.Module):
  """Stem and stages; the first block of a stage carries the stage's stride.

  Attributes:
    depths: blocks per stage.
    strides: per stage.
    bottleneck: kind of the blocks.
    width: channels inside the first stage's blocks, doubled from stage to stage.
    wide: factor of the channels inside bottlenecks (2 in Wide-ResNet-50-2).
    groups: of the 3x3 convolutions of bottlenecks (32 in ResNeXt).
    expansion: a bottleneck's output channels relative to the stage's width.
    stem: a name of `Stem`, or a module called with its name.
    average_shortcut: see `Shortcut`.
    attn: per stage and block, the operator in place of the 3x3 convolution, or None.
    module: per stage and block, what ends the residual branch, or None.
    after: per stage and block, what follows the whole block (named `after00`, ...), or None.
    shortcut_activation: whether a projected shortcut of a block with an operator has one.
    final_dim: channels of a 1x1 convolution after the last stage (named `final`), or 0 for none.
    drop_path: rate of stochastic depth per stage and block.
  """

  depths: Sequence[int]
  strides: Sequence[int]
  bottleneck: bool
  width: int
  wide: float
  expansion: float
  stem: Stemlike
  average_shortcut: bool
  attn: Sequence[Sequence[ModuleDef | None]]
  module: Sequence[Sequence[ModuleDef | None]]
  after: Sequence[Sequence[ModuleDef | None]]
  shortcut_activation: bool
  final_dim: int
  drop_path: Sequence[Sequence[float]]
  activation: str
  pool_padding: str
  conv_init: nn.initializers.Initializer
  zero_init_last: bool
  norm_epsilon: float
  norm_momentum: float
  remat: bool
  groups: int = 1
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, images: Float[Array, 'b h w c'], *, train: bool
  ) -> dict[str, Float[Array, 'b p q d']]:
    types: dict[str, Any] = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    layer = functools.partial(conv.Conv, padding='symmetric', kernel_init=self.conv_init, **types)
    batch_norm = functools.partial(
      norm.BatchNorm, epsilon=self.norm_epsilon, momentum=self.norm_momentum, **types
    )
    stem = self.stem
    if isinstance(stem, str):
      stem = functools.partial(
        Stem, stem, self.width, self.activation, self.pool_padding, layer, batch_norm
      )
    x = stem(name='stem')(images.astype(self.dtype), train=train)
    features = {}
    for i, depth in enumerate(self.depths):
      inner_dim = self.width * 2**i
      blocks = []
      for j in range(depth):
        attn = self.attn[i][j]
        block = functools.partial(
          Block,
          dim=int(self.expansion * inner_dim) if self.bottleneck else inner_dim,
          inner_dim=int(self.wide * inner_dim),
          stride=self.strides[i] if j == 0 else 1,
          bottleneck=self.bottleneck,
          average_shortcut=self.average_shortcut,
          attn=attn,
          module=self.module[i][j],
          drop_path=self.drop_path[i][j],
          activation=self.activation,
          last_scale_init=nn.initializers.zeros if self.zero_init_last else nn.initializers.ones,
          conv=layer,
          norm=batch_norm,
          shortcut_activation=(
            self.activation if self.shortcut_activation and attn is not None else None
          ),
          groups=self.groups if self.bottleneck else 1,
        )
        blocks.append(block)
      name = f'stage{i + 1}'
      x = stage.Stage(blocks, self.remat, self.after[i], name=name)(x, train=train)
      features[name] = x
    if self.final_dim:
      final = Final(self.final_dim, self.activation, layer, batch_norm, name='final')
      features['final'] = final(x, train=train)
    return features


class Final(nn.Module):
  """A 1x1 convolution with norm and activation before the head (HaloNet's `d_f`)."""

  dim: int
  activation: str
  conv: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b h w d']:
    y = self.norm(name='norm')(self.conv(self.dim, kernel_size=1, name='conv')(x), train=train)
    return activation.by_name(self.activation)(y)


def per_block(value: Any, depths: Sequence[int], stages: Sequence[int]) -> list[list[Any]]:
  """Returns `value` for every block of the stages (counted from 1), None for all others."""
  return [
    [value if i in stages else None for _ in range(depth)] for i, depth in enumerate(depths, 1)
  ]


def spread(value: Any, depths: Sequence[int]) -> list[list[Any]]:
  """Checks nested sequences, per stage and block, against the depths.

  Raises:
    ValueError: if their lengths differ.
  """
  lengths = [len(stage) for stage in value]
  if lengths != list(depths):
    raise ValueError(f'{lengths} blocks per stage are given, but depths are {list(depths)}')
  return [list(stage) for stage in value]


def is_nested(value: Any) -> bool:
  """Whether a value is given per stage and block, and not once for all."""
  return isinstance(value, Sequence) and not isinstance(value, str | Mapping)
