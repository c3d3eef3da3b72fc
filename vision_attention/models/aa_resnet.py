"""AA-ResNet (arXiv 1904.09925): a tenth of the 3x3 convolutions' channels attends globally.

There is no official repository; the paper's appendix lists the layer. Every block of the last three
stages has an augmented convolution with 8 heads of at least 20 channels. In the 28x28 stage
attention works on 14x14: with it the published sizes and costs come out.
"""

import functools
from collections.abc import Sequence

from jax.typing import DTypeLike

from vision_attention import errors
from vision_attention.attention import augmented
from vision_attention.models import base, resnet
from vision_attention.ops import relative_logits

RESIZE = {r'params/backbone/.*/attn/(height|width)_offsets': relative_logits.resize_offsets}


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  depths: Sequence[int],
  block: str = 'bottleneck',
  width: int = 64,
  stem: str = '7x7',
  kappa: float = 0.2,
  upsilon: float = 0.1,
  num_heads: int | Sequence[int] = 8,
  min_head_dim: int = 20,
  position: str = 'relative',
  table_init: str = 'intended',
  attn_stages: Sequence[int] = (2, 3, 4),
  pooled_stages: Sequence[int] = (2,),
  pool_padding: str = 'same',
  drop_path: float = 0.0,
  dropout: float = 0.0,
  zero_init_last: bool = True,
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
    block: `bottleneck` or `basic`, whose first convolution is augmented.
    width: channels inside the blocks of the first stage.
    stem: see `resnet.build`.
    kappa: channels of all queries relative to the convolution's.
    upsilon: channels of all values likewise; 0 gives the ResNet.
    num_heads: one number or one per stage.
    min_head_dim: least channels of a head's queries.
    position: `relative`, `absolute`, `coordinates` or `none`.
    table_init: `intended` or `literal`, see `augmented.Augmentation`.
    attn_stages: stages with augmented convolutions, counted from 1.
    pooled_stages: those of them whose attention works at half the resolution.
    pool_padding: of the stem's max-pool.
    drop_path: nominal rate of stochastic depth.
    dropout: rate before the classifier.
    zero_init_last: whether each residual branch starts at zero.
    norm_momentum: of BatchNorm's running statistics.
    remat: whether blocks are computed again in the backward pass.

  Raises:
    ValueError: for stages that the model does not have, or an unknown choice.
  """
  errors.check_choice('position', position, augmented.POSITIONS)
  errors.check_choice('table_init', table_init, augmented.TABLE_INITS)
  chosen = {i for i in attn_stages if i <= len(depths)}

  def operator(stage: int) -> base.ModuleDef | None:
    if stage not in chosen or not upsilon:
      return None
    return functools.partial(
      augmented.AugmentedConv,
      kappa=kappa,
      upsilon=upsilon,
      min_head_dim=min_head_dim,
      position=position,
      table_init=table_init,
      downsample=2 if stage in pooled_stages else 1,
    )

  return resnet.build(
    num_classes=num_classes,
    image_size=image_size,
    dtype=dtype,
    param_dtype=param_dtype,
    depths=depths,
    block=block,
    width=width,
    stem=stem,
    attn=[[operator(i)] * depth for i, depth in enumerate(depths, 1)],
    num_heads=num_heads,
    pool_padding=pool_padding,
    drop_path=drop_path,
    dropout=dropout,
    zero_init_last=zero_init_last,
    norm_momentum=norm_momentum,
    remat=remat,
  )


def _variant(depths, params, gmacs, top1, **options) -> base.Variant:
  return base.Variant(
    {'depths': depths, **options},
    params=params,
    flops=gmacs * 1e9,
    top1=top1,
    source='arXiv 1904.09925, Table 2; multiply-adds counted layer by layer',
  )


# Printed there: 20.7M, 25.8M, 45.4M, 61.6M parameters and 7.1, 8.3, 16.1, 23.8 billion operations,
# two to a multiply-add.
VARIANTS = {
  'aa_resnet_34': _variant(
    (3, 4, 6, 3), 20_751_024, 3.59, 74.7, block='basic', kappa=0.25, upsilon=0.25
  ),
  'aa_resnet_50': _variant((3, 4, 6, 3), 25_814_192, 4.2, 77.7),
  'aa_resnet_101': _variant((3, 4, 23, 3), 45_397_784, 8.2, 78.7),
  'aa_resnet_152': _variant((3, 8, 36, 3), 61_630_720, 12.15, 79.1),
}
