"""ResNet (arXiv 1512.03385), also SE (1709.01507), -D (1812.01187), RS (2103.07579) and wide.

The stride of a bottleneck sits in its 3x3 convolution ("v1.5"), as in every public implementation.
Tables and other people's names for the weights: `resnet_variants.py`.
"""

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.layers import conv, drop_path, heads, norm, squeeze_excite, stage
from vision_attention.models import base, resnet_variants
from vision_attention.ops import activation, convolution

VARIANTS = resnet_variants.VARIANTS
REFERENCES = resnet_variants.REFERENCES
ModuleDef = Callable[..., nn.Module]
STEMS = ('7x7', 'deep', 'deep_conv', 'small')


def squeezed_dim(dim: int, ratio: float, divisor: int) -> int:
  """Returns the width of an SE squeeze: `dim * ratio`, cut to an integer of at least one.

  With a divisor (timm's 8) it is the nearest multiple, of at least one divisor.
  """
  if divisor == 1:
    return max(1, int(dim * ratio))
  return max(divisor, int(dim * ratio + divisor / 2) // divisor * divisor)


def _halve(x: Float[Array, 'b h w c']) -> Float[Array, 'b p q c']:
  """Averages 2x2 pixels; at odd sizes the last window holds one row or column, and only that."""
  return convolution.avg_pool(x, window=2, stride=2, padding='same', count_include_pad=False)


class Shortcut(nn.Module):
  """The identity, or a projection where the shape changes: 1x1 convolution and BatchNorm.

  Attributes:
    dim: output channels.
    stride: of the block.
    average: the -D form, which averages 2x2 pixels and then projects without a stride.
  """

  dim: int
  stride: int
  average: bool
  conv: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    if x.shape[-1] == self.dim and self.stride == 1:
      return x
    stride = self.stride
    if self.average and stride > 1:
      x, stride = _halve(x), 1
    y = self.conv(self.dim, kernel_size=1, stride=stride, name='conv')(x)
    return self.norm(name='norm')(y, train=train)


class Block(nn.Module):
  """Two 3x3 convolutions, or the bottleneck 1x1 - 3x3 - 1x1; then SE, addition, activation.

  Attributes:
    dim: output channels.
    inner_dim: channels of the 3x3 convolutions.
    stride: in the (first) 3x3 convolution.
    bottleneck: whether the block is the bottleneck.
    attn: an operator in place of the bottleneck's 3x3 convolution, called with `dim` and a name,
      or None; a stride becomes the average of 2x2 pixels after it (arXiv 2101.11605).
    attend: a module applied to the branch before the addition (SE and its relatives), or None.
    drop_path: rate of stochastic depth.
  """

  dim: int
  inner_dim: int
  stride: int
  bottleneck: bool
  average_shortcut: bool
  attn: ModuleDef | None
  attend: ModuleDef | None
  drop_path: float
  activation: str
  last_scale_init: nn.initializers.Initializer
  conv: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    act = activation.by_name(self.activation)
    if self.bottleneck:
      layers = [(self.inner_dim, 1, 1), (self.inner_dim, 3, self.stride), (self.dim, 1, 1)]
    else:
      layers = [(self.inner_dim, 3, self.stride), (self.dim, 3, 1)]
    y = x
    for i, (dim, kernel_size, stride) in enumerate(layers, 1):
      last = i == len(layers)
      if self.attn is not None and i == 2:
        y = self.attn(dim=dim, name='attn')(y, train=train)
        y = _halve(y) if stride > 1 else y
      else:
        y = self.conv(dim, kernel_size=kernel_size, stride=stride, name=f'conv{i}')(y)
      init = self.last_scale_init if last else nn.initializers.ones
      y = self.norm(scale_init=init, name=f'norm{i}')(y, train=train)
      y = y if last else act(y)
    if self.attend is not None:
      y = self.attend(self.dim, name='attend')(y)
    y = drop_path.DropPath(self.drop_path, name='drop_path')(y, train=train)
    shortcut = Shortcut(
      self.dim, self.stride, self.average_shortcut, self.conv, self.norm, name='shortcut'
    )
    return act(y + shortcut(x, train=train))


class Stem(nn.Module):
  """From the image to a quarter of its size (`small`: to its own size).

  Attributes:
    kind: `7x7` and max-pool; `deep`, three 3x3 convolutions and max-pool (-D); `deep_conv`, the
      same with a strided convolution in place of the pool (RS); `small`, one 3x3 convolution.
    dim: output channels; the deep stems have half of it inside.
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
    if self.kind in ('7x7', 'deep'):
      x = convolution.max_pool(x, window=3, stride=2, padding=self.pool_padding)
    return x


class ResNet(nn.Module):
  """Stem and four stages; the first block of every stage but the first halves the map.

  Attributes:
    depths: blocks per stage.
    attn: per stage, the operator in place of 3x3 convolutions, or None.
    drop_path: rate of stochastic depth per stage and block.
    width: channels inside the first stage's blocks, doubled from stage to stage.
    wide: factor of the channels inside bottlenecks (2 in Wide-ResNet-50-2).
  """

  depths: Sequence[int]
  bottleneck: bool
  width: int
  wide: int
  stem: str
  average_shortcut: bool
  attn: Sequence[ModuleDef | None]
  attend: ModuleDef | None
  drop_path: Sequence[Sequence[float]]
  activation: str
  pool_padding: str
  zero_init_last: bool
  norm_epsilon: float
  norm_momentum: float
  remat: bool
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, images: Float[Array, 'b h w c'], *, train: bool
  ) -> dict[str, Float[Array, 'b p q d']]:
    types = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    layer = functools.partial(conv.Conv, padding='symmetric', **types)
    batch_norm = functools.partial(
      norm.BatchNorm, epsilon=self.norm_epsilon, momentum=self.norm_momentum, **types
    )
    stem = Stem(
      self.stem, self.width, self.activation, self.pool_padding, layer, batch_norm, name='stem'
    )
    x = stem(images.astype(self.dtype), train=train)
    features = {}
    for i, depth in enumerate(self.depths):
      inner_dim = self.width * 2**i
      blocks = [
        functools.partial(
          Block,
          dim=4 * inner_dim if self.bottleneck else inner_dim,
          inner_dim=self.wide * inner_dim,
          stride=2 if i > 0 and j == 0 else 1,
          bottleneck=self.bottleneck,
          average_shortcut=self.average_shortcut,
          attn=self.attn[i],
          attend=self.attend,
          drop_path=self.drop_path[i][j],
          activation=self.activation,
          last_scale_init=nn.initializers.zeros if self.zero_init_last else nn.initializers.ones,
          conv=layer,
          norm=batch_norm,
        )
        for j in range(depth)
      ]
      name = f'stage{i + 1}'
      x = features[name] = stage.Stage(blocks, self.remat, name=name)(x, train=train)
    return features


def _drop_path_rates(rate: float, rule: str, depths: Sequence[int]) -> list[list[float]]:
  errors.check_choice('drop_path_rule', rule, ('block', 'stage'))
  if rule == 'block':
    return drop_path.linear_rates(rate, depths)
  return [[rate * (i + 2) / 5] * depth for i, depth in enumerate(depths)]


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  depths: Sequence[int],
  block: str = 'bottleneck',
  width: int = 64,
  wide: int = 1,
  stem: str = '7x7',
  shortcut: str = 'conv',
  se_ratio: float = 0.0,
  se_divisor: int = 1,
  attn: ModuleDef | None = None,
  attn_stages: Sequence[int] = (4,),
  num_heads: int = 4,
  activation: str = 'relu',
  pool_padding: str = 'symmetric',
  drop_path: float = 0.0,
  drop_path_rule: str = 'stage',
  dropout: float = 0.0,
  zero_init_last: bool = True,
  norm_epsilon: float = 1e-5,
  norm_momentum: float = 0.9,
  remat: bool = False,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    num_classes: outputs of the head.
    image_size: height and width; any.
    dtype: of activations.
    param_dtype: of parameters.
    depths: blocks per stage.
    block: `bottleneck` or `basic`.
    width: channels inside the blocks of the first stage.
    wide: factor of the channels inside bottlenecks.
    stem: `7x7`, `deep`, `deep_conv` or `small`; see `Stem`.
    shortcut: `conv`, or `avg` for the -D form.
    se_ratio: width of the SE squeeze relative to the block's output, 0 for no SE.
    se_divisor: the squeeze is rounded to a multiple of this.
    attn: an operator in place of the 3x3 convolutions of bottlenecks in `attn_stages`, or None.
    attn_stages: stages with the operator, counted from 1.
    num_heads: of the operator.
    activation: a name of `ops.activation`.
    pool_padding: of the stem's max-pool; `same` is that of Google's TPU code.
    drop_path: nominal rate of stochastic depth.
    drop_path_rule: `stage`, Google's `rate * g / 5` for the groups c2..c5, or `block`, growing
      linearly over the blocks.
    dropout: rate before the classifier.
    zero_init_last: whether each residual branch starts at zero.
    norm_epsilon: of BatchNorm.
    norm_momentum: of BatchNorm's running statistics.
    remat: whether blocks are computed again in the backward pass, to save memory.

  Raises:
    ValueError: for an unknown choice, or an option that the block cannot take.
  """
  del image_size
  errors.check_choice('block', block, ('bottleneck', 'basic'))
  errors.check_choice('stem', stem, STEMS)
  errors.check_choice('shortcut', shortcut, ('conv', 'avg'))
  if wide != 1 and block == 'basic':
    raise ValueError(f'wide={wide} widens bottlenecks; basic blocks take width')
  if attn is not None and block == 'basic':
    raise ValueError("attn takes the place of a bottleneck's 3x3 convolution: block='bottleneck'")
  if attn is not None and not set(attn_stages) <= set(range(1, len(depths) + 1)):
    raise ValueError(f'attn_stages {attn_stages} must lie within 1..{len(depths)}')
  if attn is not None:
    attn = functools.partial(attn, num_heads=num_heads, dtype=dtype, param_dtype=param_dtype)
  attend: ModuleDef | None = None
  if se_ratio:

    def squeeze(dim: int, name: str) -> nn.Module:
      hidden = squeezed_dim(dim, se_ratio, se_divisor)
      return squeeze_excite.SqueezeExcite(hidden, dtype=dtype, param_dtype=param_dtype, name=name)

    attend = squeeze

  backbone = functools.partial(
    ResNet,
    depths=tuple(depths),
    bottleneck=block == 'bottleneck',
    width=width,
    wide=wide,
    stem=stem,
    average_shortcut=shortcut == 'avg',
    attn=[attn if i in attn_stages else None for i in range(1, len(depths) + 1)],
    attend=attend,
    drop_path=_drop_path_rates(drop_path, drop_path_rule, depths),
    activation=activation,
    pool_padding=pool_padding,
    zero_init_last=zero_init_last,
    norm_epsilon=norm_epsilon,
    norm_momentum=norm_momentum,
    remat=remat,
    dtype=dtype,
    param_dtype=param_dtype,
  )
  head = functools.partial(
    heads.LinearHead,
    num_classes=num_classes,
    feature=f'stage{len(depths)}',
    dropout=dropout,
    kernel_init=nn.initializers.normal(0.01),
    dtype=dtype,
    param_dtype=param_dtype,
  )
  return base.Parts(backbone, head)
