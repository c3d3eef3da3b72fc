"""AA-Wide-ResNet (arXiv 1904.09925, Table 1): every block's first convolution is augmented.

The Wide-ResNet is that of Google's AutoAugment code (`wide_resnet.py`), at 32x32 without any
pooling of the attention. Two printed numbers do not come out of this or any other reading that was
tried: 36.2M parameters (here 36.06M) and 10.9 billion operations, two to a multiply-add, which
leave no room for attention over 32x32 positions with 160 channels (here 12.4).
"""

import functools

from jax.typing import DTypeLike

from vision_attention.attention import augmented
from vision_attention.models import base, wide_resnet
from vision_attention.ops import relative_logits

RESIZE = {r'params/backbone/.*/attn/(height|width)_offsets': relative_logits.resize_offsets}


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  depth: int,
  width: int,
  shortcut: str = 'pad',
  kappa: float = 0.2,
  upsilon: float = 0.1,
  num_heads: int = 8,
  min_head_dim: int = 20,
  position: str = 'relative',
  table_init: str = 'intended',
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
    kappa: channels of all queries relative to the convolution's.
    upsilon: channels of all values likewise.
    num_heads: of every attention.
    min_head_dim: least channels of a head's queries.
    position: `relative`, `absolute`, `coordinates` or `none`.
    table_init: `intended` or `literal`, see `augmented.Augmentation`.
    remat: whether blocks are computed again in the backward pass.
  """
  operator = functools.partial(
    augmented.AugmentedConv,
    kappa=kappa,
    upsilon=upsilon,
    min_head_dim=min_head_dim,
    position=position,
    table_init=table_init,
    padding='same' if shortcut == 'pad' else 'symmetric',
    kernel_init=wide_resnet.CONV_INIT,
  )
  return wide_resnet.build(
    num_classes=num_classes,
    image_size=image_size,
    dtype=dtype,
    param_dtype=param_dtype,
    depth=depth,
    width=width,
    shortcut=shortcut,
    attn=operator,
    num_heads=num_heads,
    remat=remat,
  )


VARIANTS = {
  'aa_wide_resnet_28_10': base.Variant(
    {'depth': 28, 'width': 10},
    image_size=32,
    num_classes=100,
    params=36_058_836,
    flops=6.19e9,
    source='arXiv 1904.09925, Table 1 (top-1 there 81.6 on CIFAR-100); sizes counted here',
  ),
}
