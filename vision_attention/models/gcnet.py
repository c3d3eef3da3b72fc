"""GCNet (arXiv 1904.11492; extended: 2012.13375) and non-local networks (1711.07971) on ResNets.

`gc_resnet_*` end every residual branch of stages 2 to 4 in a global context block ("after 1x1": on
the widened map, behind the last norm and before the addition); `nl_resnet_*` have one non-local
block before the last block of stage 3. The authors' code, github.com/xvjiarui/GCNet, is for
detection on COCO; the ImageNet numbers of the paper have no public code. Its printed multiply-adds
(3.86 G for ResNet-50) are those of ResNets whose stride sits in the first convolution.

timm's `gcresnet*` are other networks, whose block follows the 3x3 convolution.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jax.typing import DTypeLike

from vision_attention import errors
from vision_attention.attention import operators
from vision_attention.models import base, reference, resnet

PLACES = ('branch', 'one', 'alternate')


def _after(module: operators.ModuleDef, place: str, depths: Sequence[int]) -> resnet.PerBlock:
  """Returns what follows the blocks: `one` before the last of stage 3, or every other of 2 and 3.

  `alternate` is the "5 blocks" of arXiv 1711.07971, section 5.1, in a ResNet-50.
  """
  third = min(2, len(depths) - 1)

  def follows(i: int, j: int) -> bool:
    if place == 'one':
      return (i, j) == (third, max(depths[third] - 2, 0))
    return i in (1, 2) and j % 2 == 0

  return [
    [module if follows(i, j) else None for j in range(depth)] for i, depth in enumerate(depths)
  ]


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  depths: Sequence[int],
  context: operators.Spec = 'gc',
  place: str = 'branch',
  stages: Sequence[int] = (2, 3, 4),
  ratio: float | None = None,
  pooling: str | None = None,
  fusion: str | None = None,
  block: str = 'bottleneck',
  width: int = 64,
  stem: str = '7x7',
  pool_padding: str = 'symmetric',
  drop_path: float = 0.0,
  dropout: float = 0.0,
  zero_init_last: bool = True,
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
    context: `gc`, `nl`, `snl`, or any module of attention, also as `{'name': ..., field: value}`.
    place: `branch` ends every residual branch of `stages`; `one` puts one block before the last of
      stage 3; `alternate` follows every other block of stages 2 and 3.
    stages: for `branch`, counted from 1.
    ratio: of the bottleneck of the context block; its own default unless given.
    pooling: of the context block, `att` or `avg`.
    fusion: of the context block, `add`, `mul` or `both`.
    block: `bottleneck` or `basic`.
    width: channels inside the blocks of the first stage.
    stem: see `resnet_blocks.Stem`.
    pool_padding: of the stem's max-pool.
    drop_path: nominal rate of stochastic depth, growing by stage.
    dropout: rate before the classifier.
    zero_init_last: whether each residual branch starts at zero.
    norm_momentum: of BatchNorm's running statistics.
    remat: whether blocks are computed again in the backward pass, to save memory.

  Raises:
    ValueError: for an unknown choice, or a field that the module does not have.
  """
  errors.check_choice('place', place, PLACES)
  module = operators.module(context)
  given = {'ratio': ratio, 'pooling': pooling, 'fusion': fusion}
  for field, value in given.items():
    if value is None:
      continue
    if not operators.has_field(module, field):
      raise ValueError(f'{context!r} has no {field} to set to {value!r}: leave it out')
    module = functools.partial(module, **{field: value})
  placed: dict[str, Any] = {}
  if place == 'branch':
    module = operators.bind(module, dtype=dtype, param_dtype=param_dtype)
    placed['module'] = [
      [module if i in stages else None for _ in range(depth)] for i, depth in enumerate(depths, 1)
    ]
  else:
    module = operators.bind(
      module, dtype=dtype, param_dtype=param_dtype, norm_momentum=norm_momentum
    )
    placed['after'] = _after(module, place, depths)
  return resnet.build(
    num_classes=num_classes,
    image_size=image_size,
    dtype=dtype,
    param_dtype=param_dtype,
    depths=depths,
    block=block,
    width=width,
    stem=stem,
    pool_padding=pool_padding,
    drop_path=drop_path,
    dropout=dropout,
    zero_init_last=zero_init_last,
    norm_momentum=norm_momentum,
    remat=remat,
    **placed,
  )


_SOURCE = 'arXiv 1904.11492, Table 4 (top-1 recalled, not verified)'
_NL: Mapping[str, Any] = {'context': 'nl', 'place': 'one'}


def _variant(depths, params, top1=None, source='arXiv 1904.11492', **options: Any) -> base.Variant:
  return base.Variant({'depths': depths, **options}, params=params, top1=top1, source=source)


VARIANTS = {
  'gc_resnet_50': _variant((3, 4, 6, 3), 28_078_773, 77.70, _SOURCE),
  'gc_resnet_101': _variant((3, 4, 23, 3), 49_337_222),
  'nl_resnet_50': _variant((3, 4, 6, 3), 27_658_792, 77.20, _SOURCE, **_NL),
  'nl_resnet_101': _variant((3, 4, 23, 3), 46_650_920, **_NL),
}


def _rules(options: Mapping[str, Any]) -> Sequence[reference.Rule]:
  """torchvision's names, with or without `backbone.` before them, and the context block's."""
  del options
  rule, conv, norm = reference.Rule, reference.CONV, reference.NORM
  theirs, ours = r'(?:backbone\.)?layer(\d+)\.(\d+)\.', 'backbone/stage{0}/block{1:02d}/'
  names = {
    r'conv(\d)': ('conv{2}', conv),
    r'bn(\d)': ('norm{2}', norm),
    r'downsample\.0': ('shortcut/conv', conv),
    r'downsample\.1': ('shortcut/norm', norm),
    r'context_block\.conv_mask': ('module/key', conv),
    r'context_block\.channel_(add|mul)_conv\.0': ('module/{2}/squeeze', conv),
    r'context_block\.channel_(add|mul)_conv\.1': ('module/{2}/norm', norm),
    r'context_block\.channel_(add|mul)_conv\.3': ('module/{2}/excite', conv),
  }
  return [
    *(rule(theirs + a, ours + b, kind) for a, (b, kind) in names.items()),
    rule(r'(?:backbone\.)?conv1', 'backbone/stem/conv1', conv),
    rule(r'(?:backbone\.)?bn1', 'backbone/stem/norm1', norm),
    rule('fc', 'head/classifier', reference.DENSE),
  ]


def _infer(state: reference.State, options: Mapping[str, Any]) -> dict[str, Any]:
  """The placement, the bottleneck and what the block pools and fuses show in names and shapes."""
  del options
  inferred: dict[str, Any] = {'num_classes': len(state['fc.bias']) if 'fc.bias' in state else 0}
  blocks = sorted(key for key in state if '.context_block.' in key)
  if not blocks:
    return {**inferred, 'stages': ()}
  stages = {int(key.split('layer')[1].split('.')[0]) for key in blocks}
  fusions = {name for name in ('add', 'mul') if any(f'channel_{name}_conv' in k for k in blocks)}
  squeeze = next(state[key] for key in blocks if key.endswith('_conv.0.weight'))
  return {
    **inferred,
    'stages': tuple(sorted(stages)),
    'ratio': squeeze.shape[0] / squeeze.shape[1],
    'pooling': 'att' if any(key.endswith('conv_mask.weight') for key in blocks) else 'avg',
    'fusion': 'both' if len(fusions) == 2 else fusions.pop(),
  }


REFERENCES = {
  'official': reference.Reference(
    origin='github.com/xvjiarui/GCNet, mmdet/models/backbones/resnet.py, ResNet with gcb',
    rules=_rules,
    infer=_infer,
    ignore=(r'(neck|rpn_head|bbox_head|mask_head)\..*',),
    variants=('gc_resnet_*',),
  ),
}
