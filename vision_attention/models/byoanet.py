"""timm's ResNets with attention: BoTNet, HaloNet, Lambda and global context, as timm combines them.

Only timm defines these models (github.com/huggingface/pytorch-image-models, timm/models/byoanet.py
and byobnet.py), practical relatives of the papers' (arXiv 2101.11605, 2103.12731, 2102.08602,
1904.11492) with weights. A bottleneck has a 3x3 convolution, which may have groups and a channel
gate after it, or an operator of attention. Which block is which is data: `byoanet_variants.py`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.attention import operators
from vision_attention.layers import conv, drop_path, heads, norm, stage
from vision_attention.models import base, byoanet_variants, resnet_blocks
from vision_attention.ops import activation, convolution, relative_logits, relative_position

VARIANTS = byoanet_variants.VARIANTS
REFERENCES = byoanet_variants.REFERENCES
RESIZE = {
  r'params/backbone/.*/attn/relative_(height|width)': relative_logits.resize_offsets,
  r'params/backbone/.*/attn/relative_position': relative_position.resize_table,
}
ModuleDef = Callable[..., nn.Module]
STEMS = ('tiered', '7x7', '3x3')
SHORTCUTS = ('conv', 'none')
CONV_INIT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class Block(nn.Module):
  """`1x1 - 3x3 - gate - 1x1`, or with attention `1x1 - attention - 1x1`, added to the shortcut.

  A norm and an activation follow every layer but the last 1x1, which has a norm only.

  Attributes:
    dim: output channels.
    inner_dim: channels inside.
    stride: of the 3x3 convolution or of the operator; an operator without a field `stride` is
      averaged over 2x2 pixels.
    group_size: input channels of a group of the 3x3 convolution, 0 for one group.
    attn: the operator in place of the 3x3 convolution, or None.
    gate: a module after the 3x3 convolution, or None.
    shortcut: whether a shortcut that changes the shape is projected; otherwise it is left out.
    linear: whether nothing follows the addition.
    drop_path: rate of stochastic depth.
    last_scale_init: of the last norm.
  """

  dim: int
  inner_dim: int
  stride: int
  group_size: int
  attn: ModuleDef | None
  gate: ModuleDef | None
  shortcut: bool
  linear: bool
  drop_path: float
  activation: str
  last_scale_init: nn.initializers.Initializer
  conv: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    act = activation.by_name(self.activation)
    y = self.conv(self.inner_dim, kernel_size=1, name='conv1')(x)
    y = act(self.norm(name='norm1')(y, train=train))
    if self.attn is None:
      groups = self.inner_dim // self.group_size if self.group_size else 1
      y = self.conv(self.inner_dim, stride=self.stride, groups=groups, name='conv2')(y)
    elif operators.has_field(self.attn, 'stride'):
      y = self.attn(dim=self.inner_dim, stride=self.stride, name='attn')(y, train=train)
    else:
      y = self.attn(dim=self.inner_dim, name='attn')(y, train=train)
      y = resnet_blocks.halve(y) if self.stride > 1 else y
    y = act(self.norm(name='norm2')(y, train=train))
    if self.gate is not None and self.attn is None:
      y = self.gate(name='gate')(y, train=train)
    y = self.conv(self.dim, kernel_size=1, name='conv3')(y)
    residual = self.shortcut or (x.shape[-1] == self.dim and self.stride == 1)
    # Without a shortcut, a scale of zero would end the signal.
    init = self.last_scale_init if residual else nn.initializers.ones
    y = self.norm(scale_init=init, name='norm3')(y, train=train)
    if residual:
      shortcut = resnet_blocks.Shortcut(
        self.dim, self.stride, False, self.conv, self.norm, name='shortcut'
      )
      y = drop_path.DropPath(self.drop_path, name='drop_path')(y, train=train)
      y = y + shortcut(x, train=train)
    return y if self.linear else act(y)


class Stem(nn.Module):
  """`tiered` (three 3x3 convolutions of growing width), `7x7` or `3x3`, and perhaps a max-pool.

  The first convolution halves the map; without a pool the last of the tiered ones does too.
  """

  kind: str
  dim: int
  pool: bool
  activation: str
  conv: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    act = activation.by_name(self.activation)
    dims = (3 * self.dim // 8, self.dim // 2, self.dim) if self.kind == 'tiered' else (self.dim,)
    last = 1 if self.pool else 2
    strides = (2, 1, last) if self.kind == 'tiered' else (2,)
    kernel_size = 7 if self.kind == '7x7' else 3
    for i, (dim, stride) in enumerate(zip(dims, strides, strict=True), 1):
      x = self.conv(dim, kernel_size=kernel_size, stride=stride, name=f'conv{i}')(x)
      x = act(self.norm(name=f'norm{i}')(x, train=train))
    return convolution.max_pool(x, window=3, stride=2, padding='symmetric') if self.pool else x


class ByoaNet(nn.Module):
  """Stem, stages, and perhaps a 1x1 convolution (feature `final`).

  Attributes:
    image_size: height and width that tables of positions are made for, or None if there are none.
    stem: the stem, but for its name.
    stages: per stage, its blocks.
    final: what follows the last stage, or None.
  """

  image_size: tuple[int, int] | None
  stem: ModuleDef
  stages: Sequence[Sequence[ModuleDef]]
  final: ModuleDef | None
  remat: bool = False
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, images: Float[Array, 'b h w c'], *, train: bool
  ) -> dict[str, Float[Array, 'b p q d']]:
    if self.image_size is not None:
      base.check_image_size(images, self.image_size)
    x = self.stem(name='stem')(images.astype(self.dtype), train=train)
    features = {}
    for i, blocks in enumerate(self.stages, 1):
      x = stage.Stage(blocks, self.remat, name=f'stage{i}')(x, train=train)
      features[f'stage{i}'] = x
    if self.final is not None:
      features['final'] = self.final(name='final')(x, train=train)
    return features


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  layout: Sequence[str],
  dims: Sequence[int],
  strides: Sequence[int] = (1, 2, 2, 2),
  ratio: float | Sequence[float] = 0.25,
  ratio_of: str = 'output',
  group_size: int = 0,
  attn: operators.Spec | Sequence[Any] | None = None,
  num_heads: int = 4,
  gate: operators.Spec | None = None,
  stem: str = 'tiered',
  stem_dim: int = 64,
  stem_pool: bool = True,
  shortcut: str = 'conv',
  linear: bool = False,
  final_dim: int = 0,
  activation: str = 'relu',
  drop_path: float = 0.0,
  dropout: float = 0.0,
  zero_init_last: bool = True,
  norm_epsilon: float = 1e-5,
  norm_momentum: float = 0.9,
  remat: bool = False,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    num_classes: outputs of the head.
    image_size: height and width.
    dtype: of activations.
    param_dtype: of parameters.
    layout: per stage, a letter per block: `C` for a convolution, `A` for attention.
    dims: output channels per stage.
    strides: per stage, of its first block.
    ratio: channels inside blocks relative to their output, one number or one per stage.
    ratio_of: `output`, or `input` for blocks that are wider inside (RegNetZ).
    group_size: input channels of a group of the 3x3 convolutions, 0 for one group.
    attn: the operator of all blocks `A`, or one per stage, or one per stage and block.
    num_heads: of operators that do not give their own.
    gate: a module of channel attention after 3x3 convolutions (`se`, `eca`, `gc`), or None.
    stem: `tiered`, `7x7` or `3x3`.
    stem_dim: channels of the stem.
    stem_pool: whether a max-pool ends the stem.
    shortcut: `conv`, or `none` to leave out those that change the shape.
    linear: whether blocks end without an activation.
    final_dim: channels of a 1x1 convolution before the head, 0 for none.
    activation: a name of `ops.activation`.
    drop_path: rate of stochastic depth, growing linearly over the blocks.
    dropout: rate before the classifier.
    zero_init_last: whether each residual branch starts at zero.
    norm_epsilon: of BatchNorm.
    norm_momentum: of BatchNorm's running statistics.
    remat: whether blocks are computed again in the backward pass, to save memory.

  Raises:
    ValueError: for an unknown choice, or a block of attention without an operator.
  """
  errors.check_choice('stem', stem, STEMS)
  errors.check_choice('shortcut', shortcut, SHORTCUTS)
  errors.check_choice('ratio_of', ratio_of, ('output', 'input'))
  types: dict[str, Any] = {'dtype': dtype, 'param_dtype': param_dtype}

  def bound(spec: operators.Spec | None) -> ModuleDef | None:
    if spec is None:
      return None
    return operators.bind(operators.operator(spec), num_heads=num_heads, **types)

  placed = [[bound(spec) for spec in row] for row in byoanet_variants.spread(layout, attn)]
  inner = byoanet_variants.inner_dims(
    layout, dims, ratio, stem_dim=stem_dim, of_input=ratio_of == 'input'
  )
  if len(strides) != len(layout):
    raise ValueError(f'{strides=} and {layout=} must have one entry per stage')
  layer = functools.partial(conv.Conv, padding='symmetric', kernel_init=CONV_INIT, **types)
  batch_norm = functools.partial(
    norm.BatchNorm, epsilon=norm_epsilon, momentum=norm_momentum, **types
  )
  shared = functools.partial(
    Block,
    group_size=group_size,
    gate=None if gate is None else operators.bind(operators.module(gate), **types),
    shortcut=shortcut == 'conv',
    linear=linear,
    activation=activation,
    last_scale_init=nn.initializers.zeros if zero_init_last else nn.initializers.ones,
    conv=layer,
    norm=batch_norm,
  )
  rates = drop_path_rates(drop_path, [len(row) for row in layout])
  stages = [
    [
      functools.partial(
        shared,
        dim=dims[i],
        inner_dim=inner[i][j],
        stride=strides[i] if j == 0 else 1,
        attn=placed[i][j],
        drop_path=rates[i][j],
      )
      for j in range(len(row))
    ]
    for i, row in enumerate(layout)
  ]
  final = functools.partial(resnet_blocks.Final, final_dim, activation, layer, batch_norm)
  backbone = functools.partial(
    ByoaNet,
    image_size=image_size if byoanet_variants.has_tables(layout, attn) else None,
    stem=functools.partial(Stem, stem, stem_dim, stem_pool, activation, layer, batch_norm),
    stages=stages,
    final=final if final_dim else None,
    remat=remat,
    dtype=dtype,
  )
  head = functools.partial(
    heads.LinearHead,
    num_classes=num_classes,
    feature='final' if final_dim else f'stage{len(layout)}',
    dropout=dropout,
    kernel_init=nn.initializers.normal(0.01),
    **types,
  )
  return base.Parts(backbone, head)


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
  """Returns the rate of every block; see `layers.drop_path.linear_rates`."""
  return drop_path.linear_rates(rate, depths)
