"""ResNets with attention that only timm defines, under timm's names.

ECA-ResNets (arXiv 1910.03151) in the -D form and with tiered stems; selective-kernel ResNets
(1903.06586), which but for `skresnext50_32x4d` split the channels between the branches; ResNeSts
(2004.08955) of stem width 32; and the ResNeXts (1611.05431) among them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vision_attention.models import base, reference, resnet, resnet_variants

_SOURCE = 'github.com/huggingface/pytorch-image-models, release 1.0.31'
_R18, _R50, _R101 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 23, 3)
_R200, _R269 = (3, 24, 36, 3), (3, 30, 48, 8)
_D: dict[str, Any] = {'stem': 'deep', 'shortcut': 'avg'}
_T: dict[str, Any] = {'stem': 'deep_tiered', 'shortcut': 'avg'}
_X4: dict[str, Any] = {'wide': 2, 'groups': 32}
_ECA: dict[str, Any] = {'module': 'eca'}
# timm rounds the squeeze to a multiple of 8.
_SE: dict[str, Any] = {'se_ratio': 1 / 16, 'se_divisor': 8}

build = resnet.build


def _variant(depths: Sequence[int], params: int, size: int = 224, **options: Any) -> base.Variant:
  return base.Variant({'depths': depths, **options}, image_size=size, params=params, source=_SOURCE)


def _selective(**fields: Any) -> dict[str, Any]:
  return {'attn': {'name': 'sk', **fields}, 'zero_init_last': False}


def _split(**fields: Any) -> dict[str, Any]:
  return {**_D, 'attn': {'name': 'splat', **fields}}


_SK18 = _selective(split=True, groups=1, ratio=1 / 8, divisor=16, least=16)
_SK50 = _selective(split=True, groups=1, divisor=8, least=8)

VARIANTS = {
  'resnet26t': _variant(_R18, 16_011_872, 256, **_T),
  'resnet50t': _variant(_R50, 25_573_728, **_T),
  'resnext50_32x4d': _variant(_R50, 25_028_904, **_X4),
  'resnext50d_32x4d': _variant(_R50, 25_048_136, **_X4, **_D),
  'resnext101_32x4d': _variant(_R101, 44_177_704, **_X4),
  'resnext101_32x8d': _variant(_R101, 88_791_336, wide=4, groups=32),
  'resnext101_64x4d': _variant(_R101, 83_455_272, wide=4, groups=64),
  'seresnet50t': _variant(_R50, 28_104_720, **_T, **_SE),
  'seresnext26d_32x4d': _variant(_R18, 16_809_512, **_X4, **_D, **_SE),
  'seresnext26t_32x4d': _variant(_R18, 16_806_976, **_X4, **_T, **_SE),
  'seresnext50_32x4d': _variant(_R50, 27_559_896, **_X4, **_SE),
  'seresnext101_32x4d': _variant(_R101, 48_955_416, **_X4, **_SE),
  'seresnext101_32x8d': _variant(_R101, 93_569_048, wide=4, groups=32, **_SE),
  'ecaresnet26t': _variant(_R18, 16_011_916, 256, **_T, **_ECA),
  'ecaresnet50d': _variant(_R50, 25_576_350, **_D, **_ECA),
  'ecaresnet50t': _variant(_R50, 25_573_814, 256, **_T, **_ECA),
  'ecaresnetlight': _variant((1, 1, 11, 3), 30_162_046, shortcut='avg', **_ECA),
  'ecaresnet101d': _variant(_R101, 44_568_563, **_D, **_ECA),
  'ecaresnet200d': _variant(_R200, 64_693_400, 256, **_D, **_ECA),
  'ecaresnet269d': _variant(_R269, 102_093_077, 320, **_D, **_ECA),
  'ecaresnext26t_32x4d': _variant(_R18, 15_406_220, **_X4, **_T, **_ECA),
  'ecaresnext50t_32x4d': _variant(_R50, 25_045_686, **_X4, **_T, **_ECA),
  'skresnet18': _variant(_R18, 11_958_056, block='basic', **_SK18),
  'skresnet34': _variant(_R50, 22_282_376, block='basic', **_SK18),
  'skresnet50': _variant(_R50, 25_803_160, **_SK50),
  'skresnet50d': _variant(_R50, 25_822_392, **_D, **_SK50),
  'skresnext50_32x4d': _variant(_R50, 27_479_784, wide=2, **_selective(divisor=32)),
  'resnest14d': _variant((1, 1, 1, 1), 10_611_688, **_split(pool='after')),
  'resnest26d': _variant(_R18, 17_069_448, **_split(pool='after')),
  'resnest50d': _variant(_R50, 27_483_240, **_split(pool='after')),
  'resnest50d_4s2x40d': _variant(
    _R50, 30_417_592, wide=1.25, **_split(radix=4, groups=2, pool='before')
  ),
  'resnest50d_1s4x24d': _variant(
    _R50, 25_677_000, wide=1.5, **_split(radix=1, groups=4, pool='before')
  ),
}


def _rules(options: Mapping[str, Any]) -> Sequence[reference.Rule]:
  """The names of a plain ResNet, and those of its attention."""
  block, rule = 'backbone/stage{0}/block{1:02d}', reference.Rule
  conv, norm = reference.CONV, reference.NORM
  layer = r'layer(\d+)\.(\d+)\.'
  name = options['attn']['name'] if 'attn' in options else None
  mine = [rule(layer + r'se\.conv', block + '/module', conv)]
  if name == 'sk':
    mine = [
      rule(layer + r'conv(\d)\.conv', block + '/conv{2}', conv),
      rule(layer + r'conv(\d)\.bn', block + '/norm{2}', norm),
      rule(layer + r'conv\d\.paths\.(\d+)\.conv', block + '/attn/conv{2:+1}', conv),
      rule(layer + r'conv\d\.paths\.(\d+)\.bn', block + '/attn/norm{2:+1}', norm),
      rule(layer + r'conv\d\.attn\.fc_reduce', block + '/attn/squeeze', conv),
      rule(layer + r'conv\d\.attn\.bn', block + '/attn/squeeze_norm', norm),
      rule(layer + r'conv\d\.attn\.fc_select', block + '/attn/select', conv),
    ]
  if name == 'splat':
    mine = [
      rule(layer + r'conv2\.conv', block + '/attn/conv', conv),
      rule(layer + r'conv2\.bn0', block + '/attn/norm', norm),
      rule(layer + r'conv2\.fc1', block + '/attn/squeeze', conv),
      rule(layer + r'conv2\.bn1', block + '/attn/squeeze_norm', norm),
      rule(layer + r'conv2\.fc2', block + '/attn/select', conv),
    ]
  return [*mine, *resnet_variants.REFERENCES['timm'].rules_of(options)]


REFERENCES = {
  'timm': reference.Reference(
    origin='github.com/huggingface/pytorch-image-models, timm/models/{resnet,sknet,resnest}.py',
    rules=_rules,
    infer=resnet_variants.REFERENCES['timm'].infer,
  ),
}
