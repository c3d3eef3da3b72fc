"""ResNets with one module of channel or spatial attention, as its authors trained them.

ECA (arXiv 1910.03151), CBAM (1807.06521), BAM (1807.06514), triplet attention (2010.03045), SRM
(1903.10829), and SKNet (1903.06586), a ResNeXt-50 32x4d with selective kernels. Any other pair is
an option of a plain ResNet: `create_model('resnet_34', module='coordinate')`. The authors' residual
branches do not start at zero.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vision_attention.models import base, reference, resnet, resnet_variants

_DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
_DEPTHS[152] = (3, 8, 36, 3)
_ECA = 'github.com/BangguWu/ECANet'
_CBAM = 'github.com/Jongchan/attention-module'
_TRIPLET = 'github.com/landskape-ai/triplet-attention'
_SRM = 'github.com/hyunjaelee410/style-based-recalibration-module'
_SK = 'github.com/implus/SKNet'

build = resnet.build


def _variant(
  depth: int,
  params: int,
  top1: float | None,
  source: str,
  gmacs: float | None = None,
  **options: Any,
) -> base.Variant:
  kind = 'basic' if depth < 50 else 'bottleneck'
  return base.Variant(
    {'depths': _DEPTHS[depth], 'block': kind, 'zero_init_last': False, **options},
    params=params,
    flops=None if gmacs is None else gmacs * 1e9,
    top1=top1,
    source=source,
  )


def _eca(depth: int, taps: str, params: int, top1: float) -> base.Variant:
  """The released networks have numbers of taps by stage, not by equation 12 of the paper."""
  module = [
    [{'name': 'eca', 'kernel_size': int(k)}] * blocks for k, blocks in zip(taps, _DEPTHS[depth])
  ]
  return _variant(depth, params, top1, _ECA, module=module)


VARIANTS = {
  'eca_resnet_18': _eca(18, '3577', 11_689_556, 70.92),
  'eca_resnet_34': _eca(34, '3357', 21_797_744, 74.21),
  'eca_resnet_50': _eca(50, '3557', 25_557_112, 77.42),
  'eca_resnet_101': _eca(101, '3357', 44_549_317, 78.65),
  'eca_resnet_152': _eca(152, '3357', 60_193_042, 78.92),
  'cbam_resnet_18': _variant(18, 11_779_392, None, _CBAM, module='cbam'),
  'cbam_resnet_34': _variant(34, 21_960_468, None, _CBAM, module='cbam'),
  'cbam_resnet_50': _variant(50, 28_089_624, 77.622, _CBAM, module='cbam'),
  'cbam_resnet_101': _variant(101, 49_330_172, None, _CBAM, module='cbam'),
  'bam_resnet_18': _variant(18, 11_712_503, None, _CBAM, module='bam'),
  'bam_resnet_34': _variant(34, 21_820_663, None, _CBAM, module='bam'),
  'bam_resnet_50': _variant(50, 25_915_099, 76.860, _CBAM, module='bam'),
  'bam_resnet_101': _variant(101, 44_907_227, None, _CBAM, module='bam'),
  'triplet_resnet_18': _variant(18, 11_691_912, 71.09, _TRIPLET, 1.825, module='triplet'),
  'triplet_resnet_50': _variant(50, 25_561_832, 77.48, _TRIPLET, 4.169, module='triplet'),
  'srm_resnet_50': _variant(50, 25_617_448, None, _SRM, module='srm'),
  'sknet_50': _variant(50, 27_479_784, 79.21, _SK, wide=2, attn='sk'),
  'sknet_101': _variant(101, 48_736_040, 79.81, _SK, wide=2, attn='sk'),
}


def _rules(options: Mapping[str, Any]) -> Sequence[reference.Rule]:
  """The names of torchvision, and those of the modules."""
  block, rule = 'backbone/stage{0}/block{1:02d}/module', reference.Rule
  conv, norm = reference.CONV, reference.NORM
  layer = r'layer(\d+)\.(\d+)\.'
  # The earlier and the later file of triplet attention.
  gates = {
    'channel_width': ('ChannelGateH.spatial', 'cw.conv'),
    'height_channel': ('ChannelGateW.spatial', 'hc.conv'),
    'height_width': ('SpatialGate.spatial', 'hw.conv'),
  }
  triplet = [
    rule(rf'{layer}triplet_attention\.{old}\.{theirs}', f'{block}/{ours}/{leaf}', kind)
    for ours, names in gates.items()
    for old in names
    for theirs, leaf, kind in (('conv', 'conv', conv), ('bn', 'norm', norm))
  ]
  bam = []
  for i, depth in enumerate(options['depths'][:-1], 1):
    after = f'backbone/stage{i}/after{depth - 1:02d}'
    channel, spatial = rf'bam{i}\.channel_att\.gate_c\.', rf'bam{i}\.spatial_att\.gate_s\.'
    bam += [
      rule(channel + 'gate_c_fc_0', f'{after}/channel_squeeze', conv),
      rule(channel + 'gate_c_bn_1', f'{after}/channel_norm', norm),
      rule(channel + 'gate_c_fc_final', f'{after}/channel_excite', conv),
      rule(spatial + 'gate_s_conv_reduce0', f'{after}/spatial_squeeze', conv),
      rule(spatial + 'gate_s_bn_reduce0', f'{after}/spatial_norm', norm),
      rule(spatial + r'gate_s_conv_di_(\d)', f'{after}/spatial_conv{{0:+1}}', conv),
      rule(spatial + r'gate_s_bn_di_(\d)', f'{after}/spatial_norm{{0:+1}}', norm),
      rule(spatial + 'gate_s_conv_final', f'{after}/spatial_excite', conv),
    ]
  return [
    rule(layer + r'eca\.conv', block, conv),
    rule(layer + r'cbam\.ChannelGate\.mlp\.1', block + '/squeeze', conv),
    rule(layer + r'cbam\.ChannelGate\.mlp\.3', block + '/excite', conv),
    rule(layer + r'cbam\.SpatialGate\.spatial\.conv', block + '/spatial/conv', conv),
    rule(layer + r'cbam\.SpatialGate\.spatial\.bn', block + '/spatial/norm', norm),
    rule(layer + r'rclb\.cfc', block + '/style', reference.param('')),
    rule(layer + r'rclb\.bn', block + '/norm', norm),
    *triplet,
    *bam,
    *resnet_variants.REFERENCES['torchvision'].rules_of(options),
  ]


REFERENCES = {
  'official': reference.Reference(
    origin=f'{_ECA}, {_CBAM}, {_TRIPLET}, {_SRM}',
    rules=_rules,
    infer=resnet_variants.REFERENCES['torchvision'].infer,
    variants=('*_resnet_*',),
  ),
}
