"""The tables of `resnet.py`: variants with published numbers, and other names of their weights."""

from collections.abc import Mapping, Sequence
from typing import Any

from vision_attention.models import base, reference

_R18, _R50, _R101, _R152 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)
_HE = 'arXiv 1512.03385; top-1 of arXiv 1904.09925, Table 2'
_SASA = 'arXiv 1906.05909, Table 1'
_SE_SASA = 'arXiv 1709.01507 in the depths of arXiv 1906.05909; counted'
_RS = 'arXiv 2103.07579; top-1 of github.com/tensorflow/tpu, resnet_rs'
_VISION = 'github.com/pytorch/vision, IMAGENET1K_V1'
_TIMM = 'github.com/huggingface/pytorch-image-models'
_BASIC: dict[str, Any] = {'block': 'basic'}
_D: dict[str, Any] = {'stem': 'deep', 'shortcut': 'avg'}
_SE: dict[str, Any] = {'se_ratio': 1 / 16}


def _variant(depths, params, gmacs=None, top1=None, source=_TIMM, size=224, **options: Any):
  return base.Variant(
    {'depths': depths, **options},
    image_size=size,
    params=params,
    flops=None if gmacs is None else gmacs * 1e9,
    top1=top1,
    source=source,
  )


def _rs(depths, params, size, top1):
  options: dict[str, Any] = {'stem': 'deep_conv', 'shortcut': 'avg', 'se_ratio': 0.25}
  return _variant(depths, params, top1=top1, source=_RS, size=size, **options)


VARIANTS = {
  'resnet_18': _variant(_R18, 11_689_512, 1.814, 69.8, _VISION, **_BASIC),
  'resnet_26': _variant((1, 2, 4, 1), 13_696_552, 2.342, 74.5, _SASA),
  'resnet_34': _variant(_R50, 21_797_672, 3.664, 73.6, _HE, **_BASIC),
  'resnet_38': _variant((2, 3, 5, 2), 19_626_792, 3.216, 76.2, _SASA),
  'resnet_50': _variant(_R50, 25_557_032, 4.089, 76.4, _HE),
  'resnet_101': _variant(_R101, 44_549_160, 7.801, 77.9, _HE),
  'resnet_152': _variant(_R152, 60_192_808, 11.514, 78.4, _HE),
  'se_resnet_18': _variant(_R18, 11_778_592, **_BASIC, **_SE),
  'se_resnet_26': _variant((1, 2, 4, 1), 14_826_744, None, None, _SE_SASA, **_SE),
  'se_resnet_34': _variant(_R50, 21_958_868, 3.66, 74.3, _HE, **_BASIC, **_SE),
  'se_resnet_38': _variant((2, 3, 5, 2), 21_457_384, None, None, _SE_SASA, **_SE),
  'se_resnet_50': _variant(_R50, 28_088_024, 4.09, 77.5, _HE, **_SE),
  'se_resnet_101': _variant(_R101, 49_326_872, 7.80, 78.4, _HE, **_SE),
  'se_resnet_152': _variant(_R152, 66_821_848, 11.51, 78.9, _HE, **_SE),
  'wide_resnet_50_2': _variant(_R50, 68_883_240, 11.398, 78.5, _VISION, wide=2),
  'wide_resnet_101_2': _variant(_R101, 126_886_696, 22.753, 78.8, _VISION, wide=2),
  'resnet26': _variant(_R18, 15_995_176),
  'resnet18d': _variant(_R18, 11_708_744, **_BASIC, **_D),
  'resnet26d': _variant(_R18, 16_014_408, **_D),
  'resnet34d': _variant(_R50, 21_816_904, **_BASIC, **_D),
  'resnet50d': _variant(_R50, 25_576_264, **_D),
  'resnet101d': _variant(_R101, 44_568_392, **_D),
  'resnet152d': _variant(_R152, 60_212_040, **_D),
  'resnet200d': _variant((3, 24, 36, 3), 64_693_064, **_D),
  'resnetrs50': _rs(_R50, 35_691_912, 160, 78.8),
  'resnetrs101': _rs(_R101, 63_618_696, 192, 81.2),
  'resnetrs152': _rs(_R152, 86_621_576, 256, 83.0),
  'resnetrs200': _rs((3, 24, 36, 3), 93_209_992, 256, 83.4),
  'resnetrs270': _rs((4, 29, 53, 4), 129_861_448, 256, 83.8),
  'resnetrs350': _rs((4, 36, 72, 4), 163_956_168, 320, 84.2),
  'resnetrs420': _rs((4, 44, 87, 4), 191_891_656, 320, 84.4),
}


def _timm_rules(options: Mapping[str, Any]) -> Sequence[reference.Rule]:
  """timm and torchvision name alike; -D moves a shortcut's layers by the pool before them."""
  block, deep = 'backbone/stage{0}/block{1:02d}', options.get('stem', '7x7').startswith('deep')
  average = options.get('shortcut') == 'avg'
  rule, conv, norm = reference.Rule, reference.CONV, reference.NORM
  shortcut = (1, 2) if average else (0, 1)
  rules = [
    rule(r'layer(\d+)\.(\d+)\.conv(\d)', block + '/conv{2}', conv),
    rule(r'layer(\d+)\.(\d+)\.bn(\d)', block + '/norm{2}', norm),
    rule(r'layer(\d+)\.(\d+)\.se\.fc1', block + '/module/squeeze', conv),
    rule(r'layer(\d+)\.(\d+)\.se\.fc2', block + '/module/excite', conv),
    rule(rf'layer(\d+)\.(\d+)\.downsample\.{shortcut[0]}', block + '/shortcut/conv', conv),
    rule(rf'layer(\d+)\.(\d+)\.downsample\.{shortcut[1]}', block + '/shortcut/norm', norm),
    rule('fc', 'head/classifier', reference.DENSE),
  ]
  if not deep:
    return [
      *rules,
      rule('conv1', 'backbone/stem/conv1', conv),
      rule('bn1', 'backbone/stem/norm1', norm),
    ]
  return [
    *rules,
    *(rule(rf'conv1\.{3 * i}', f'backbone/stem/conv{i + 1}', conv) for i in range(3)),
    *(rule(rf'conv1\.{3 * i + 1}', f'backbone/stem/norm{i + 1}', norm) for i in range(2)),
    rule('bn1', 'backbone/stem/norm3', norm),
    rule(r'maxpool\.0', 'backbone/stem/conv4', conv),
    rule(r'maxpool\.1', 'backbone/stem/norm4', norm),
  ]


def _infer(state: reference.State, options: Mapping[str, Any]) -> dict[str, Any]:
  """A file without a classifier gives a model without one."""
  del options
  return {'num_classes': len(state['fc.bias']) if 'fc.bias' in state else 0}


REFERENCES = {
  'timm': reference.Reference(
    origin='github.com/huggingface/pytorch-image-models, timm/models/resnet.py',
    rules=_timm_rules,
    # timm rounds the squeeze of SE to a multiple of 8: it shows in SE-ResNet-18 and -34.
    options={'se_divisor': 8},
    infer=_infer,
  ),
  'torchvision': reference.Reference(
    origin='github.com/pytorch/vision, torchvision/models/resnet.py',
    rules=_timm_rules,
    infer=_infer,
    variants=('resnet_18', 'resnet_34', 'resnet_50', 'resnet_101', 'resnet_152', 'wide_resnet_*'),
  ),
}
