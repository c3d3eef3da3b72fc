"""ResNet (arXiv 1512.03385), also SE (1709.01507), -D (1812.01187), RS (2103.07579) and wide.

The stride of a bottleneck sits in its 3x3 convolution ("v1.5"), as in every public implementation.
Any operator takes the place of the 3x3 convolutions (`attn`), and any module of channel or spatial
attention goes where it belongs (`module`). Blocks: `resnet_blocks.py`; tables and other people's
names for the weights: `resnet_variants.py`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from flax import linen as nn
from jax.typing import DTypeLike

from vision_attention import errors
from vision_attention.attention import operators
from vision_attention.layers import drop_path, heads, squeeze_excite
from vision_attention.models import base, resnet_blocks, resnet_variants

VARIANTS = resnet_variants.VARIANTS
REFERENCES = resnet_variants.REFERENCES
ModuleDef = Callable[..., nn.Module]
PerBlock = Sequence[Sequence[operators.Spec | None]]
CONV_INIT = nn.initializers.lecun_normal()


def _drop_path_rates(rate: float, rule: str, depths: Sequence[int]) -> list[list[float]]:
  errors.check_choice('drop_path_rule', rule, ('block', 'stage'))
  if rule == 'block':
    return drop_path.linear_rates(rate, depths)
  return [[rate * (i + 2) / 5] * depth for i, depth in enumerate(depths)]


def _check_stages(what: str, stages: Sequence[int], depths: Sequence[int]) -> Sequence[int]:
  if not set(stages) <= set(range(1, len(depths) + 1)):
    raise ValueError(f'{what} {stages} must lie within 1..{len(depths)}')
  return stages


def _sites(placement: str, depths: Sequence[int]) -> list[tuple[int, int]]:
  """Returns the blocks that a module of this placement follows, as stage and block from 0."""
  errors.check_choice('placement', placement, operators.PLACEMENTS)
  ends = [(i, depth - 1) for i, depth in enumerate(depths)]
  if placement == 'between':
    return ends[:-1]
  if placement == 'top':
    return ends[-1:]
  third = min(2, len(depths) - 1)
  return [(third, j) for j in range(depths[third]) if j % 2 == 0]


def _place(
  module: operators.Spec | None, stages: Sequence[int] | None, depths: Sequence[int], types: Any
) -> tuple[PerBlock, PerBlock, ModuleDef | None]:
  """Returns what ends branches, what follows blocks, and what takes the place of convolutions."""
  inside = resnet_blocks.per_block(None, depths, ())
  after = resnet_blocks.per_block(None, depths, ())
  if module is None:
    return inside, after, None
  made = operators.module(module)
  placement = operators.trait(made, 'placement', None)
  if placement is None:
    return inside, after, made
  made = operators.bind(made, **types)
  if placement == 'branch':
    everywhere = range(1, len(depths) + 1)
    chosen = everywhere if stages is None else _check_stages('module_stages', stages, depths)
    return resnet_blocks.per_block(made, depths, chosen), after, None
  if stages is not None:
    raise ValueError(
      f'module_stages is for modules inside blocks; the placement of {module!r} is {placement!r}'
    )
  for i, j in _sites(placement, depths):
    after[i][j] = made
  return inside, after, None


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  depths: Sequence[int],
  block: str = 'bottleneck',
  width: int = 64,
  wide: float = 1,
  groups: int = 1,
  expansion: float = 4,
  strides: Sequence[int] | None = None,
  stem: resnet_blocks.Stemlike = '7x7',
  shortcut: str = 'conv',
  shortcut_activation: bool = False,
  se_ratio: float = 0.0,
  se_divisor: int = 1,
  attn: operators.Spec | PerBlock | None = None,
  attn_stages: Sequence[int] | None = None,
  num_heads: int | Sequence[int] = 4,
  module: operators.Spec | PerBlock | None = None,
  module_stages: Sequence[int] | None = None,
  after: PerBlock | None = None,
  final_dim: int = 0,
  activation: str = 'relu',
  pool_padding: str = 'symmetric',
  drop_path: float = 0.0,
  drop_path_rule: str = 'stage',
  dropout: float = 0.0,
  zero_init_last: bool = True,
  conv_init: nn.initializers.Initializer = CONV_INIT,
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
    groups: of the 3x3 convolutions of bottlenecks (arXiv 1611.05431).
    expansion: output channels of a bottleneck relative to the stage's width.
    strides: per stage, of its first block; 1 and then 2 unless given.
    stem: `7x7`, `deep`, `deep_tiered`, `deep_conv` or `small` (see `resnet_blocks.Stem`), or a
      module.
    shortcut: `conv`, or `avg` for the -D form.
    shortcut_activation: whether an activation follows a projected shortcut beside an operator.
    se_ratio: width of the SE squeeze relative to the block's output, 0 for no SE.
    se_divisor: the squeeze is rounded to a multiple of this.
    attn: an operator (a name such as `halo`, `{'name': ..., field: value}` or a module class) in
      place of the 3x3 convolutions of bottlenecks, or the first of basic blocks, in `attn_stages`;
      or one per stage and block; or None.
    attn_stages: stages with the operator, counted from 1; those it was made for unless given.
    num_heads: of the operator, one number or one per stage.
    module: a module of channel or spatial attention (`cbam`, `bam`, ...), which goes where its
      class says, or an operator, as `attn`; or one per stage and block, at the end of the branch.
    module_stages: stages with a module inside blocks; all unless given.
    after: per stage and block, a module that follows the block, or None.
    final_dim: channels of a 1x1 convolution before the head, 0 for none.
    activation: a name of `ops.activation`.
    pool_padding: of the stem's max-pool; `same` is that of Google's TPU code.
    drop_path: nominal rate of stochastic depth.
    drop_path_rule: `stage`, Google's `rate * g / 5` for the groups c2..c5, or `block`, growing
      linearly over the blocks.
    dropout: rate before the classifier.
    zero_init_last: whether each residual branch starts at zero.
    conv_init: of convolutions.
    norm_epsilon: of BatchNorm.
    norm_momentum: of BatchNorm's running statistics.
    remat: whether blocks are computed again in the backward pass, to save memory.

  Raises:
    ValueError: for an unknown choice, or an option that the block cannot take.
  """
  del image_size
  errors.check_choice('block', block, ('bottleneck', 'basic'))
  errors.check_choice('shortcut', shortcut, ('conv', 'avg'))
  if isinstance(stem, str):
    errors.check_choice('stem', stem, resnet_blocks.STEMS)
  if block == 'basic' and wide != 1:
    raise ValueError(f'wide={wide} widens bottlenecks; basic blocks take width')
  if block == 'basic' and groups != 1:
    raise ValueError(f'groups={groups} is for bottlenecks; basic blocks have one group')
  strides = (1, *[2] * (len(depths) - 1)) if strides is None else tuple(strides)
  heads_of = [num_heads] * len(depths) if isinstance(num_heads, int) else list(num_heads)
  if not len(depths) == len(strides) == len(heads_of):
    raise ValueError(f'{depths=}, {strides=} and {num_heads=} must have one entry per stage')
  types: dict[str, Any] = {'dtype': dtype, 'param_dtype': param_dtype}

  if resnet_blocks.is_nested(module):
    inside, behind, operator = resnet_blocks.spread(module, depths), None, None
    inside = [
      [made and operators.bind(operators.module(made), **types) for made in stage]
      for stage in inside
    ]
  else:
    inside, behind, operator = _place(module, module_stages, depths, types)  # pyright: ignore
  if operator is not None:
    if attn is not None:
      raise ValueError(
        f'module={module!r} is an operator, and attn={attn!r} is given too: pass one'
      )
    attn = operator
  if after is not None:
    behind = resnet_blocks.spread(after, depths)
  if se_ratio:
    if any(any(stage) for stage in inside):
      raise ValueError(f'se_ratio={se_ratio} and module={module!r} end the same branches: pass one')
    squeeze = functools.partial(
      squeeze_excite.SqueezeExcite, ratio=se_ratio, divisor=se_divisor, **types
    )
    inside = resnet_blocks.per_block(squeeze, depths, range(1, len(depths) + 1))

  if resnet_blocks.is_nested(attn):
    spatial = [
      [made and operators.operator(made) for made in stage]
      for stage in resnet_blocks.spread(attn, depths)
    ]
  elif attn is None:
    spatial = resnet_blocks.per_block(None, depths, ())
  else:
    made = operators.operator(attn)  # pyright: ignore
    stages = attn_stages
    if stages is None:
      own = operators.trait(made, 'stages', range(1, len(depths) + 1))
      stages = [i for i in own if i <= len(depths)] or [len(depths)]
    _check_stages('attn_stages', stages, depths)
    spatial = resnet_blocks.per_block(made, depths, stages)
  spatial = [
    [made and operators.bind(made, num_heads=heads_of[i], **types) for made in stage]
    for i, stage in enumerate(spatial)
  ]

  backbone = functools.partial(
    resnet_blocks.ResNet,
    depths=tuple(depths),
    strides=strides,
    bottleneck=block == 'bottleneck',
    width=width,
    wide=wide,
    groups=groups,
    expansion=expansion,
    stem=stem,
    average_shortcut=shortcut == 'avg',
    attn=spatial,
    module=inside,
    after=behind or resnet_blocks.per_block(None, depths, ()),
    shortcut_activation=shortcut_activation,
    final_dim=final_dim,
    drop_path=_drop_path_rates(drop_path, drop_path_rule, depths),
    activation=activation,
    pool_padding=pool_padding,
    conv_init=conv_init,
    zero_init_last=zero_init_last,
    norm_epsilon=norm_epsilon,
    norm_momentum=norm_momentum,
    remat=remat,
    **types,
  )
  head = functools.partial(
    heads.LinearHead,
    num_classes=num_classes,
    feature='final' if final_dim else f'stage{len(depths)}',
    dropout=dropout,
    kernel_init=nn.initializers.normal(0.01),
    **types,
  )
  return base.Parts(backbone, head)
