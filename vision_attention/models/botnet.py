"""Bottleneck Transformers (BoTNet, arXiv 2101.11605): global attention in ResNet's last stage.

All 3x3 convolutions of stage 4 become multi-head self-attention with relative positions. In a block
with a stride, attention sees the larger map and the result is averaged. The family T3 to T7 keeps
the last stage at stride 1 ("S1") and adds squeeze-and-excitation and SiLU. Its published sizes come
from a script that puts squeeze-and-excitation into the attention blocks too (`se_in_bot=True`) and
leaves out norms and tables; the text (section 4.8.4) has it beside convolutions only.

The authors' code of the block, without weights: gist.github.com/aravindsrinivas,
56359b79f0ce4449bcb04ab4b56a57a2. SENet baselines of the same tables: `resnet.py`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import linen as nn
from jax.typing import DTypeLike

from vision_attention.attention import operators
from vision_attention.layers import squeeze_excite
from vision_attention.models import base, resnet, resnet_blocks
from vision_attention.ops import relative_logits

ModuleDef = Callable[..., nn.Module]
CONV_INIT = nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')
RESIZE = {
  r'params/backbone/.*/attn/(relative|absolute)_(height|width)': relative_logits.resize_offsets
}


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  depths: Sequence[int],
  last_stride: int = 2,
  attn: operators.Spec | resnet.PerBlock | None = 'bottleneck',
  attn_stages: Sequence[int] = (4,),
  num_heads: int | Sequence[int] = 4,
  shortcut_activation: bool = True,
  se_ratio: float = 0.0,
  se_in_bot: bool = False,
  se_activation: str = 'silu',
  activation: str = 'relu',
  width: int = 64,
  stem: str = '7x7',
  pool_padding: str = 'same',
  drop_path: float = 0.0,
  dropout: float = 0.0,
  norm_momentum: float = 0.9,
  remat: bool = False,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    num_classes: outputs of the head.
    image_size: height and width.
    dtype: of activations.
    param_dtype: of parameters.
    depths: blocks per stage.
    last_stride: of the last stage; 1 is "S1".
    attn: the operator, or one per stage and block; None leaves the convolutions (SENet).
    attn_stages: stages with the operator, counted from 1.
    num_heads: of the operator.
    shortcut_activation: whether an activation follows projected shortcuts beside attention, as in
      the authors' code.
    se_ratio: width of the squeeze relative to the block's output, 0 for none.
    se_in_bot: whether blocks with attention have squeeze-and-excitation too.
    se_activation: after the squeeze. Not published; `relu` in Google's ResNet.
    activation: a name of `ops.activation`.
    width: channels inside the blocks of the first stage.
    stem: see `resnet_blocks.Stem`.
    pool_padding: of the stem's max-pool.
    drop_path: nominal rate of stochastic depth, growing by stage.
    dropout: rate before the classifier.
    norm_momentum: of BatchNorm's running statistics.
    remat: whether blocks are computed again in the backward pass, to save memory.

  Raises:
    ValueError: for an unknown choice.
  """
  placed = _place(attn, attn_stages, depths)
  module = None
  if se_ratio:
    squeeze = functools.partial(
      squeeze_excite.SqueezeExcite,
      ratio=se_ratio,
      activation=se_activation,
      dtype=dtype,
      param_dtype=param_dtype,
    )
    module = [[None if made and not se_in_bot else squeeze for made in row] for row in placed]
  return resnet.build(
    num_classes=num_classes,
    image_size=image_size,
    dtype=dtype,
    param_dtype=param_dtype,
    depths=depths,
    width=width,
    strides=(1, *[2] * (len(depths) - 2), last_stride),
    stem=stem,
    shortcut_activation=shortcut_activation,
    attn=placed,
    module=module,
    num_heads=num_heads,
    activation=activation,
    pool_padding=pool_padding,
    drop_path=drop_path,
    dropout=dropout,
    conv_init=CONV_INIT,
    norm_momentum=norm_momentum,
    remat=remat,
  )


def _place(
  attn: operators.Spec | resnet.PerBlock | None, stages: Sequence[int], depths: Sequence[int]
) -> list[list[ModuleDef | None]]:
  """Returns the operator of every block, or None for a convolution."""
  if resnet_blocks.is_nested(attn):
    return resnet_blocks.spread(attn, depths)
  made = None if attn is None else operators.operator(attn)  # pyright: ignore
  last = len(depths)
  if not set(stages) <= set(range(1, last + 1)):
    raise ValueError(f'attn_stages {tuple(stages)} must lie within 1..{last}')
  return resnet_blocks.per_block(made, depths, stages)


_S1: Mapping[str, Any] = {'last_stride': 1, 'se_ratio': 1 / 16, 'activation': 'silu'}


def _bot(depths, params) -> base.Variant:
  source = 'arXiv 2101.11605, for detection; parameters with tables for 224 pixels'
  return base.Variant({'depths': depths}, params=params, source=source)


def _t(depths, size, params, gmacs, top1) -> base.Variant:
  return base.Variant(
    {'depths': depths, **_S1},
    image_size=size,
    params=params,
    flops=gmacs * 1e9,
    top1=top1,
    source='arXiv 2101.11605, section 4.8; parameters without SE beside attention',
  )


VARIANTS = {
  'botnet_50': _bot((3, 4, 6, 3), 20_852_008),
  'botnet_101': _bot((3, 4, 23, 3), 39_844_136),
  'botnet_152': _bot((3, 8, 36, 3), 55_487_784),
  'botnet_200': _bot((3, 24, 36, 3), 59_968_808),
  'botnet_t3': _t((3, 4, 6, 6), 224, 30_500_696, 7.3, 81.7),
  'botnet_t4': _t((3, 4, 23, 6), 224, 51_739_544, 10.9, 82.8),
  'botnet_t5': _t((3, 4, 23, 12), 256, 69_131_672, 19.3, 83.5),
  'botnet_t6': _t((3, 4, 6, 12), 320, 47_917_400, 23.3, 84.0),
  'botnet_t7': _t((3, 4, 23, 12), 384, 69_180_824, 45.8, 84.7),
}
