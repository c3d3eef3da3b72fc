"""ResNets without spatial convolutions (arXiv 1906.05909): every 3x3 is stand-alone attention.

No code was ever published. The model keeps ResNet's structure; an attention layer in the first
block of a stage works at full resolution and is averaged over 2x2 pixels before its norm. By
default the stem is the convolution that the paper calls "conv-stem + attention"; `stem='attention'`
gives "full attention".
"""

import functools
from collections.abc import Sequence

from jax.typing import DTypeLike

from vision_attention import errors
from vision_attention.attention import sasa
from vision_attention.models import base, resnet, resnet_blocks

# By name, what makes the values of an attention stem; Table 7.
STEMS = {
  'conv': '',
  'attention': 'mixture',
  'attention_plain': 'plain',
  'attention_convvalue': 'conv',
}


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  depths: Sequence[int],
  stem: str = 'conv',
  kernel: int = 7,
  num_heads: int = 8,
  width: float = 1.0,
  conv_stages: Sequence[int] = (),
  position: str = 'relative',
  content: bool = True,
  scale: str = 'none',
  border: str = 'mask',
  shared: bool = True,
  mixtures: int = 4,
  drop_path: float = 0.0,
  dropout: float = 0.0,
  pool_padding: str = 'symmetric',
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
    stem: `conv`; `attention`, with values that know their position; `attention_plain`, without;
      or `attention_convvalue`, with values of a convolution.
    kernel: side of the neighbourhoods, odd.
    num_heads: of the stages; attention stems have 4.
    width: factor of all widths.
    conv_stages: stages that keep their 3x3 convolutions, counted from 1 (Table 3).
    position: `relative`, `absolute` or `none` (Table 5).
    content: whether logits have `q.k` (Table 6).
    scale: of logits, `none` or `rsqrt`.
    border: `mask` or `zero`, see `attention.sasa.StandAloneAttention`.
    shared: whether all heads share the tables of relative positions.
    mixtures: of the stem's values.
    drop_path: nominal rate of stochastic depth.
    dropout: rate before the classifier.
    pool_padding: of the convolutional stem's max-pool.
    norm_epsilon: of BatchNorm.
    norm_momentum: of BatchNorm's running statistics.
    remat: whether blocks are computed again in the backward pass, to save memory.

  Raises:
    ValueError: for an unknown choice, or a width that the heads do not divide.
  """
  errors.check_choice('stem', stem, STEMS)
  channels = round(64 * width)
  if channels % (2 * num_heads):
    raise ValueError(
      f'width {width} gives {channels} channels, which {num_heads} heads do not split into even '
      f'parts: the nearest factors are multiples of {num_heads / 32:g}'
    )
  outside = set(conv_stages) - set(range(1, len(depths) + 1))
  if outside:
    raise ValueError(f'conv_stages {tuple(conv_stages)} must lie within 1..{len(depths)}')
  attn = functools.partial(
    sasa.StandAloneAttention,
    kernel=kernel,
    position=position,
    content=content,
    scale=scale,
    border=border,
    shared=shared,
  )
  attention_stem = functools.partial(
    sasa.AttentionStem,
    channels,
    values=STEMS[stem],
    mixtures=mixtures,
    scale=scale,
    norm_epsilon=norm_epsilon,
    norm_momentum=norm_momentum,
    dtype=dtype,
    param_dtype=param_dtype,
  )
  stages = [i for i in range(1, len(depths) + 1) if i not in conv_stages]
  return resnet.build(
    num_classes=num_classes,
    image_size=image_size,
    dtype=dtype,
    param_dtype=param_dtype,
    depths=depths,
    width=channels,
    stem='7x7' if stem == 'conv' else attention_stem,
    attn=resnet_blocks.per_block(attn, depths, stages),
    num_heads=num_heads,
    pool_padding=pool_padding,
    drop_path=drop_path,
    dropout=dropout,
    norm_epsilon=norm_epsilon,
    norm_momentum=norm_momentum,
    remat=remat,
  )


def _variant(depths: Sequence[int], params: int, gmacs: float, top1: float) -> base.Variant:
  return base.Variant(
    {'depths': depths},
    params=params,
    flops=gmacs * 1e9,
    top1=top1,
    source='arXiv 1906.05909, Table 1, conv-stem + attention; multiply-adds counted',
  )


# Table 1 prints 4.5, 5.7 and 7.0 billion operations, two per multiply-add: a few per cent more than
# convolutions, products and position logits add up to.
VARIANTS = {
  'sasa_resnet_26': _variant((1, 2, 4, 1), 10_331_264, 2.195, 75.8),
  'sasa_resnet_38': _variant((2, 3, 5, 2), 14_173_384, 2.80, 77.1),
  'sasa_resnet_50': _variant((3, 4, 6, 3), 18_015_504, 3.405, 77.4),
}
