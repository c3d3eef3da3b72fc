"""ELSA-VOLO: enhanced local self-attention (arXiv 2112.12786) in place of outlook attention.

The paper reports ELSA-VOLO-D5 with 87.2 % top-1 on ImageNet-1k, without further training images;
neither code nor numbers of parameters were published. This is a reading: VOLO with the defaults
of the released block of ELSA, whose kernel is 5.
"""

import functools
from typing import Any

from vision_attention.attention import elsa
from vision_attention.models import base, volo

RESIZE = volo.RESIZE


@base.extends(volo.build, 'local_attn', 'step')
def build(
  *,
  kernel: int = 5,
  dilation: int = 1,
  group_width: int = 8,
  mul_power: int = 1,
  add_scale: float = 1.0,
  **options: Any,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    kernel: side of the neighbourhood, odd.
    dilation: distance of its taps.
    group_width: channels of a group of the convolution that makes the attention map.
    mul_power: exponent of what multiplies attention maps, 0 for none (`attention.elsa`).
    add_scale: factor of what is added to them, 0 for none.
    **options: of `volo.build`.
  """
  enhanced = functools.partial(
    elsa.EnhancedLocalAttention,
    kernel=kernel,
    dilation=dilation,
    group_width=group_width,
    mul_power=mul_power,
    add_scale=add_scale,
  )
  return volo.build(local_attn=enhanced, **options)


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
