"""LESA-ResNet (arXiv 2107.05637): locally enhanced self-attention in stages 3 and 4.

ResNet and Wide-ResNet whose last stage keeps the resolution, so that attention works on 14x14
positions at 224 pixels. The first block of stage 3, which halves the map, stays a convolution.
The parameters belong to one image size.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.typing import DTypeLike

from vision_attention.attention import lesa
from vision_attention.models import base, reference, resnet

_STRIDES = (1, 2, 2, 1)


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  depths: Sequence[int],
  width: int = 64,
  wide: int = 1,
  strides: Sequence[int] = _STRIDES,
  stages: Sequence[int] = (3, 4),
  first_conv: Sequence[int] = (3,),
  num_heads: int = 8,
  groups: int | None = None,
  position: str = 'flat',
  stem: str = '7x7',
  drop_path: float = 0.0,
  dropout: float = 0.0,
  remat: bool = False,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    num_classes: outputs of the head.
    image_size: height and width; any, but the variables are good for maps of that size only.
    dtype: of activations.
    param_dtype: of parameters.
    depths: blocks per stage.
    width: channels inside the blocks of the first stage.
    wide: factor of the channels inside bottlenecks.
    strides: per stage; the detection backbones have (1, 2, 2, 2).
    stages: stages with attention, counted from 1.
    first_conv: those of them whose first block keeps its convolution.
    num_heads: of the attention.
    groups: of the convolution beside it; as many as heads unless given.
    position: `flat` (classification) or `axes` (detection), see `attention.lesa`.
    stem: see `resnet.build`.
    drop_path: rate of stochastic depth, growing linearly over the blocks.
    dropout: rate before the classifier.
    remat: whether blocks are computed again in the backward pass, to save memory.
  """
  attn = functools.partial(lesa.LesaAttention, groups=groups, position=position)
  return resnet.build(
    num_classes=num_classes,
    image_size=image_size,
    dtype=dtype,
    param_dtype=param_dtype,
    depths=depths,
    width=width,
    wide=wide,
    strides=strides,
    stem=stem,
    attn=[
      [attn if i in stages and (j or i not in first_conv) else None for j in range(depth)]
      for i, depth in enumerate(depths, 1)
    ],
    num_heads=num_heads,
    drop_path=drop_path,
    drop_path_rule='block',
    dropout=dropout,
    zero_init_last=False,
    conv_init=lesa.HE_INIT,
    remat=remat,
  )


_SOURCE = 'github.com/Chenglin-Yang/LESA_classification'
_UNRELEASED = 'arXiv 2107.05637 (this depth was not released)'
_R50, _R101 = (3, 4, 6, 3), (3, 4, 23, 3)
VARIANTS = {
  'lesa_resnet_50': base.Variant(
    {'depths': _R50}, params=23_777_512, flops=6.225e9, top1=79.55, source=_SOURCE
  ),
  'lesa_resnet_101': base.Variant({'depths': _R101}, params=41_159_128, source=_UNRELEASED),
  'lesa_wrn_50': base.Variant(
    {'depths': _R50, 'wide': 2}, params=61_145_896, top1=80.18, source=_SOURCE
  ),
  'lesa_wrn_101': base.Variant(
    {'depths': _R101, 'wide': 2}, params=111_749_592, source=_UNRELEASED
  ),
}


def _prepare(state: reference.State) -> reference.State:
  """Drops the prefix that parallel training puts before every name."""
  return {key.removeprefix('module.'): value for key, value in state.items()}


def _infer(state: reference.State, options: Mapping[str, Any]) -> dict[str, Any]:
  """Reads form, heads, strides and resolution off the tables of positions."""
  inferred: dict[str, Any] = {'num_classes': len(state['fc.bias']) if 'fc.bias' in state else 0}
  depths = options['depths']
  sides: dict[tuple[int, int], int] = {}
  flat = any(key.endswith('.conv2.relative') for key in state)
  for i, depth in enumerate(depths, 1):
    for j in range(depth):
      layer = f'layer{i}.{j}.conv2.'
      if flat and layer + 'relative' in state:
        sides[i, j] = round(((state[layer + 'relative'].shape[1] + 1) / 2) ** 0.5)
      elif layer + 'rel_height' in state:
        sides[i, j] = (len(state[layer + 'rel_height']) + 1) // 2
  if not sides:
    return inferred
  (i, j), side = next(iter(sides.items()))
  kinds = 3 if flat else 2
  stages = tuple(sorted({stage for stage, _ in sides}))
  # A stage with a stride attends at the resolution that it is given, in its first block.
  reduced = [sides[stage, 0] > sides[stage, 1] for stage in stages if (stage, 0) in sides]
  inferred |= {
    'num_heads': len(state[f'layer{i}.{j}.conv2.bn_similarity.weight']) // kinds,
    'position': 'flat' if flat else 'axes',
    'stages': stages,
    'first_conv': tuple(stage for stage in stages if (stage, 0) not in sides),
  }
  strides = (1, 2, 2, 2) if any(reduced) else options.get('strides', _STRIDES)
  factor = 4 * math.prod(strides[: i if j else i - 1])
  inferred |= {'strides': strides, 'image_size': factor * side}
  return inferred


def _rules() -> list[reference.Rule]:
  block, mine = 'backbone/stage{0}/block{1:02d}', r'layer(\d+)\.(\d+)\.conv2\.'
  rule, layer, norm = reference.Rule, reference.CONV, reference.NORM
  modules = {
    'qkv_transform': ('qkv', layer),
    'bn_qkv': ('qkv_norm', norm),
    'bn_similarity': ('logits_norm', norm),
    'bn_output': ('binary_norm', norm),
    r'x_transform\.0': ('local', layer),
    r'x_transform\.1': ('local_proj', layer),
    'bn_x': ('local_norm', norm),
    r'reasoning\.1': ('fusion1', layer),
    r'reasoning\.2': ('fusion_norm1', norm),
    r'projection\.0': ('fusion2', layer),
    r'projection\.1': ('fusion_norm2', norm),
    'relative': ('', reference.param('relative')),
    'rel_height': ('', reference.param('relative_height')),
    'rel_width': ('', reference.param('relative_width')),
  }
  return [
    rule(mine + key, f'{block}/attn/{name}'.rstrip('/'), kind)
    for key, (name, kind) in modules.items()
  ]


_RESNET = resnet.REFERENCES['torchvision']
REFERENCES = {
  'official': reference.Reference(
    origin=f'{_SOURCE}, lib/models/resnet.py',
    rules=lambda options: [*_rules(), *_RESNET.rules_of(options)],
    prepare=_prepare,
    infer=_infer,
    ignore=(r'.*\.flatten_index',),
  ),
}
