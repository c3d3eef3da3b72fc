"""ELSA-VOLO: enhanced local self-attention (arXiv 2112.12786) in place of outlook attention.

The paper reports ELSA-VOLO-D5 with 87.2 % top-1 on ImageNet-1k, without further training images;
neither code nor numbers of parameters were published. This is a reading: VOLO with the defaults
of the released block of ELSA, whose kernel is 5.
"""

import functools
from collections.abc import Sequence

from jax.typing import DTypeLike

from vision_attention.attention import elsa, mhsa, operators
from vision_attention.models import base, volo

RESIZE = volo.RESIZE


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  depths: Sequence[int],
  dims: Sequence[int],
  num_heads: Sequence[int],
  kernel: int = 5,
  dilation: int = 1,
  group_width: int = 8,
  mul_power: int = 1,
  add_scale: float = 1.0,
  mlp_ratio: float = 3,
  stem_dim: int = 64,
  patch: int = 8,
  class_depth: int = 2,
  pool: str = 'cls',
  aux_head: bool = True,
  qkv_bias: bool = False,
  attn: operators.Spec = mhsa.MultiHeadAttention,
  activation: str = 'gelu_exact',
  norm_epsilon: float = 1e-5,
  norm_momentum: float = 0.9,
  mix_token: float = 0.0,
  dropout: float = 0.0,
  drop_path: float = 0.0,
  remat: bool = False,
) -> base.Parts:
  """Builds backbone and head; for what is not listed see `volo.build`.

  Args:
    num_classes: outputs of the head.
    image_size: height and width.
    dtype: of activations.
    param_dtype: of parameters.
    depths: blocks per stage.
    dims: width of the first stage, and of all others.
    num_heads: of the first stage, and of all others.
    kernel: side of the neighbourhood, odd.
    dilation: distance of its taps.
    group_width: channels of a group of the convolution that makes the attention map.
    mul_power: exponent of what multiplies attention maps, 0 for none (`attention.elsa`).
    add_scale: factor of what is added to them, 0 for none.
    mlp_ratio: see `volo.build`, as everything below.
    stem_dim: channels of the stem.
    patch: side of a patch.
    class_depth: blocks of the class token.
    pool: what the head classifies.
    aux_head: whether it also classifies tokens.
    qkv_bias: whether queries, keys and values have biases.
    attn: the operator of the later stages.
    activation: a name of `ops.activation`.
    norm_epsilon: of all norms.
    norm_momentum: of the stem's BatchNorm.
    mix_token: in training, exponent of the distribution of the share of mixed tokens.
    dropout: after positions.
    drop_path: rate of stochastic depth of the last block.
    remat: whether blocks are computed again in the backward pass, to save memory.
  """
  return volo.build(
    num_classes=num_classes,
    image_size=image_size,
    dtype=dtype,
    param_dtype=param_dtype,
    depths=depths,
    dims=dims,
    num_heads=num_heads,
    mlp_ratio=mlp_ratio,
    stem_dim=stem_dim,
    patch=patch,
    class_depth=class_depth,
    pool=pool,
    aux_head=aux_head,
    qkv_bias=qkv_bias,
    local_attn=functools.partial(
      elsa.EnhancedLocalAttention,
      kernel=kernel,
      dilation=dilation,
      group_width=group_width,
      mul_power=mul_power,
      add_scale=add_scale,
    ),
    attn=attn,
    activation=activation,
    norm_epsilon=norm_epsilon,
    norm_momentum=norm_momentum,
    mix_token=mix_token,
    dropout=dropout,
    drop_path=drop_path,
    remat=remat,
  )


def _variant(host: str, params: int, gmacs: float) -> base.Variant:
  return base.Variant(
    volo.VARIANTS[host].options,
    params=params,
    flops=gmacs * 1e9,
    source='own reading of arXiv 2112.12786; counts are those of its layers',
  )


VARIANTS = {
  'elsa_volo_d1': _variant('volo_d1', 26_672_168, 7.14),
  'elsa_volo_d2': _variant('volo_d2', 58_721_248, 14.87),
  'elsa_volo_d3': _variant('volo_d3', 86_382_288, 21.49),
  'elsa_volo_d4': _variant('volo_d4', 192_722_672, 45.73),
  'elsa_volo_d5': _variant('volo_d5', 295_097_312, 74.49),
}
