"""The tables of `byoanet.py`: timm's variants, which block is which, and timm's weight names."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vision_attention import errors
from vision_attention.attention import operators
from vision_attention.models import base, reference, resnet_blocks

# timm scales the content logits alone, gives padding a share of the softmax, and takes rows of the
# tables by the index of a query among those that are computed.
_HALO: dict[str, Any] = {
  'name': 'halo',
  'num_heads': 8,
  'scale': 'rsqrt',
  'mask_padding': False,
  'index': 'subsampled',
}
_BOT: dict[str, Any] = {'name': 'bottleneck', 'num_heads': 4, 'scale_position': False}
_LAMBDA: dict[str, Any] = {'name': 'lambda', 'num_heads': 4}
_SE: dict[str, Any] = {'name': 'se', 'divisor': 8}
_ECA: dict[str, Any] = {'name': 'eca'}
_GC: dict[str, Any] = {'name': 'gc', 'ratio': 1 / 8, 'norm_epsilon': 1e-6}


def spread(layout: Sequence[str], attn: Any) -> list[list[operators.Spec | None]]:
  """Returns the operator of every block, None for blocks `C`.

  Args:
    layout: per stage, a letter per block: `C` or `A`.
    attn: one operator for all blocks `A`, or one per stage, or one per stage and block.

  Raises:
    ValueError: for another letter, lengths that differ, or a block `A` without an operator.
  """
  per_stage = list(attn) if resnet_blocks.is_nested(attn) else [attn] * len(layout)
  if len(per_stage) != len(layout):
    raise ValueError(f'attn has {len(per_stage)} entries for the {len(layout)} stages of {layout}')
  found = []
  for i, (letters, mine) in enumerate(zip(layout, per_stage, strict=True), 1):
    row = list(mine) if resnet_blocks.is_nested(mine) else [mine] * len(letters)
    if len(row) != len(letters):
      raise ValueError(f'attn has {len(row)} entries for the blocks {letters} of stage {i}')
    for letter, spec in zip(letters, row, strict=True):
      errors.check_choice('block in layout', letter, ('C', 'A'))
      if letter == 'A' and spec is None:
        raise ValueError(f'blocks {letters} of stage {i} attend, but attn gives no operator')
    found.append([s if c == 'A' else None for c, s in zip(letters, row, strict=True)])
  return found


def inner_dims(
  layout: Sequence[str],
  dims: Sequence[int],
  ratio: float | Sequence[float],
  *,
  stem_dim: int,
  of_input: bool,
) -> list[list[int]]:
  """Returns the channels inside every block: multiples of 8, at most a tenth below `dim * ratio`.

  Args:
    layout: per stage, a letter per block.
    dims: output channels per stage.
    ratio: one number, or one per stage.
    stem_dim: input channels of the first stage.
    of_input: whether the ratio is to the block's input and not to its output.
  """
  ratios = [ratio] * len(dims) if isinstance(ratio, int | float) else list(ratio)
  if not len(ratios) == len(dims) == len(layout):
    raise ValueError(f'{layout=}, {dims=} and {ratio=} must have one entry per stage')
  found, channels = [], stem_dim
  for letters, dim, share in zip(layout, dims, ratios, strict=True):
    row = []
    for _ in letters:
      exact = (channels if of_input else dim) * share
      rounded = max(8, int(exact + 4) // 8 * 8)
      row.append(rounded + 8 if rounded < 0.9 * exact else rounded)
      channels = dim
    found.append(row)
  return found


def _fixes_map(spec: Any) -> bool:
  """Whether an operator's tables are made for one size of map."""
  if not isinstance(spec, Mapping):
    return spec in ('bottleneck', 'relative')
  if spec['name'] == 'lambda':
    return spec.get('kernel', 9) is None
  return _fixes_map(spec['name']) and spec.get('position') != 'none'


def has_tables(layout: Sequence[str], attn: Any) -> bool:
  """Whether any block has tables that are made for one size of map."""
  return any(_fixes_map(spec) for row in spread(layout, attn) for spec in row)


_RESULTS = 'github.com/huggingface/pytorch-image-models, results-imagenet.csv'
_TIMM = 'github.com/huggingface/pytorch-image-models'


def _variant(layout, params, top1=None, size=256, dims=(256, 512, 1024, 2048), **options: Any):
  return base.Variant(
    {'layout': layout, 'dims': dims, **options},
    image_size=size,
    params=params,
    top1=top1,
    source=_TIMM if top1 is None else _RESULTS,
  )


_C26, _A26 = ('CC', 'CC', 'CC', 'CC'), ('CC', 'CC', 'CA', 'AA')
_C33, _A33 = ('CC', 'CCC', 'CCC', 'CC'), ('CC', 'CCA', 'CCA', 'AA')
_C50, _A50 = ('CCC', 'CCCC', 'C' * 6, 'CCC'), ('CCC', 'CCCA', 'CACACA', 'CAC')
_MIX50 = ('CCC', 'CACA', 'CACACA', 'CAC')
_S: dict[str, Any] = {'activation': 'silu'}
_NO_POOL: dict[str, Any] = {'stem_pool': False}
_NEXT: dict[str, Any] = {'group_size': 32, **_S}
_R33: dict[str, Any] = {'dims': (256, 512, 1536, 1536), 'final_dim': 1280, **_S, **_NO_POOL}
_SE33: dict[str, Any] = {
  'dims': (256, 512, 1024, 1536),
  'ratio': (0.25, 0.25, 0.25, 0.333),
  'final_dim': 1280,
  'gate': _SE,
  **_S,
  **_NO_POOL,
}
_H2, _H3 = {**_HALO, 'halo': 2}, {**_HALO, 'halo': 3}
_Z_HALO = {**_HALO, 'block': 7, 'halo': 2, 'head_dim': 24}
_REGNETZ_B: dict[str, Any] = {
  'dims': (48, 96, 192, 288),
  'strides': (2, 2, 2, 2),
  'ratio': 3,
  'ratio_of': 'input',
  'group_size': 16,
  'gate': {**_SE, 'ratio': 0.25},
  'stem': '3x3',
  'stem_dim': 32,
  'shortcut': 'none',
  'linear': True,
  'final_dim': 1536,
  **_S,
  **_NO_POOL,
}

VARIANTS = {
  'botnet26t_256': _variant(_A26, 12_488_672, 79.26, attn=_BOT),
  'botnet50ts_256': _variant(_A50, 22_742_688, attn=_BOT, **_S),
  'sebotnet33ts_256': _variant(_A33, 13_701_984, 81.16, attn=_BOT, **_SE33),
  'eca_botnext26ts_256': _variant(
    _A26, 10_593_301, 79.26, attn={**_BOT, 'head_dim': 16}, gate=_ECA, group_size=16, **_S
  ),
  'halonet26t': _variant(_A26, 12_480_288, 79.13, attn=_H2),
  'halonet50ts': _variant(
    _A50, 22_733_280, 81.64, attn=(None, {**_H3, 'num_heads': 4}, _H3, _H3), **_S
  ),
  'sehalonet33ts': _variant(_A33, 13_691_712, 80.98, attn=_H3, **_SE33),
  'eca_halonext26ts': _variant(
    _A26, 10_756_885, 79.52, attn={**_H2, 'head_dim': 16}, gate=_ECA, group_size=16, **_S
  ),
  'haloregnetz_b': _variant(
    ('CC', 'C' * 6, 'CCCACCCACCCA', 'AA'),
    11_680_072,
    81.06,
    size=224,
    # The queries' width is a third of the values', and follows the block's input.
    attn=(None, None, _Z_HALO, (_Z_HALO, {**_Z_HALO, 'head_dim': 36})),
    **_REGNETZ_B,
  ),
  'lambda_resnet26t': _variant(_A26, 10_958_272, attn=_LAMBDA),
  'lambda_resnet26rpt_256': _variant(_A26, 10_988_688, attn={**_LAMBDA, 'kernel': None}),
  'lambda_resnet50ts': _variant(_A50, 21_536_832, attn=_LAMBDA, **_S),
  'lamhalobotnet50ts_256': _variant(
    _MIX50, 22_569_824, 81.55, attn=(None, {**_LAMBDA, 'kernel': 13}, _H3, _BOT), **_S, **_NO_POOL
  ),
  'halo2botnet50ts_256': _variant(
    _MIX50, 22_635_360, 82.08, attn=(None, _H3, _H3, _BOT), **_S, **_NO_POOL
  ),
  'gcresnet33ts': _variant(_C33, 19_880_698, gate=_GC, **_R33),
  'gcresnet50t': _variant(_C50, 25_897_080, gate=_GC, **_NO_POOL),
  'gcresnext26ts': _variant(_C26, 10_476_600, gate=_GC, **_NEXT),
  'gcresnext50ts': _variant(_C50, 15_667_320, gate=_GC, **_NEXT),
  'resnet32ts': _variant(_C33, 17_963_616, **{**_R33, 'final_dim': 0}),
  'resnet33ts': _variant(_C33, 19_676_256, **_R33),
  'seresnet33ts': _variant(_C33, 19_779_200, gate=_SE, **_R33),
  'eca_resnet33ts': _variant(_C33, 19_676_302, gate=_ECA, **_R33),
  'resnext26ts': _variant(_C26, 10_297_952, **_NEXT),
  'seresnext26ts': _variant(_C26, 10_388_064, gate=_SE, **_NEXT),
  'eca_resnext26ts': _variant(_C26, 10_297_988, gate=_ECA, **_NEXT),
  'regnetz_b16': _variant(('CC', 'C' * 6, 'C' * 12, 'CC'), 9_715_480, size=224, **_REGNETZ_B),
}


def _split(index: int) -> reference.Transform:
  """One of query, key and value, in this order; a query is as wide as a key."""

  def take(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    width = shape[-1]
    start = len(array) - width if index == 2 else index * width
    return reference.kernel(array[start : start + width], shape)

  return take


def _head_split(index: int, heads: int) -> reference.Transform:
  """Key (0) or value (1) of a projection that holds, head by head, one after the other."""

  def take(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if len(array) % heads or shape[-1] % heads:
      return array
    by_head, width = array.reshape(heads, -1, *array.shape[1:]), shape[-1] // heads
    mine = by_head[:, :width] if index == 0 else by_head[:, -width:]
    return reference.kernel(mine.reshape(-1, *array.shape[1:]), shape)

  return take


def _parts(**transforms: reference.Transform) -> reference.Kind:
  return {
    'weight': tuple(
      reference.Leaf('params', f'{name}/kernel', change) for name, change in transforms.items()
    )
  }


def attention_names(spec: Any, num_heads: int = 4) -> dict[str, tuple[str, reference.Kind]]:
  """Returns, by timm's name below `self_attn`, ours below `attn`, and the kind."""
  fields = spec if isinstance(spec, Mapping) else {'name': spec}
  table = reference.param('')
  if fields['name'] == 'bottleneck':
    return {
      'qkv': ('', _parts(query=_split(0), key=_split(1), value=_split(2))),
      r'pos_embed\.(height|width)_rel': ('/relative_{0}', table),
    }
  if fields['name'] == 'halo':
    heads = fields.get('num_heads', num_heads)
    return {
      'q': ('/query', reference.CONV),
      'kv': ('', _parts(key=_head_split(0, heads), value=_head_split(1, heads))),
      r'pos_embed\.(height|width)_rel': ('/{0}_table', table),
    }
  if fields['name'] == 'lambda':
    return {
      'qkv': ('/qkv', reference.DENSE),
      'norm_q': ('/norm_query', reference.NORM),
      'norm_v': ('/norm_value', reference.NORM),
      'conv_lambda': ('/position', reference.CONV),
      'pos_emb': ('/relative_position', reference.param('', reference.offsets)),
    }
  raise ValueError(f'timm has no weights with attn={spec!r}: it has bottleneck, halo and lambda')


_GATES: dict[str, dict[str, tuple[str, reference.Kind]]] = {
  'se': {'fc1': ('/squeeze', reference.CONV), 'fc2': ('/excite', reference.CONV)},
  'eca': {r'conv\.weight': ('/kernel', reference.param(''))},
  'gc': {
    'conv_attn': ('/key', reference.CONV),
    r'mlp_add\.fc1': ('/add/squeeze', reference.CONV),
    r'mlp_add\.norm': ('/add/norm', reference.NORM),
    r'mlp_add\.fc2': ('/add/excite', reference.CONV),
  },
}


def _rules(options: Mapping[str, Any]) -> Sequence[reference.Rule]:
  """Blocks differ in kind and heads, so that each has rules of its own."""
  rule, conv, norm = reference.Rule, reference.CONV, reference.NORM
  rules = [
    rule(r'head\.fc', 'head/classifier', reference.DENSE),
    rule(r'stem\.conv(\d)\.conv', 'backbone/stem/conv{0}', conv),
    rule(r'stem\.conv(\d)\.bn', 'backbone/stem/norm{0}', norm),
    rule(r'stem\.conv', 'backbone/stem/conv1', conv),
    rule(r'stem\.bn', 'backbone/stem/norm1', norm),
    rule(r'final_conv\.conv', 'backbone/final/conv', conv),
    rule(r'final_conv\.bn', 'backbone/final/norm', norm),
  ]
  gate = options.get('gate')
  gate = gate['name'] if isinstance(gate, Mapping) else gate
  for i, row in enumerate(spread(options['layout'], options.get('attn'))):
    for j, spec in enumerate(row):
      theirs, ours = rf'stages\.{i}\.{j}\.', f'backbone/stage{i + 1}/block{j:02d}'
      rules += [
        rule(theirs + r'conv(\d)_(?:1x1|kxk)\.conv', ours + '/conv{0}', conv),
        rule(theirs + r'conv(\d)_(?:1x1|kxk)\.bn', ours + '/norm{0}', norm),
        rule(theirs + r'post_attn', ours + '/norm2', norm),
        rule(theirs + r'shortcut\.conv', ours + '/shortcut/conv', conv),
        rule(theirs + r'shortcut\.bn', ours + '/shortcut/norm', norm),
      ]
      names = {} if spec is None else attention_names(spec, options.get('num_heads', 4))
      rules += [
        rule(theirs + r'self_attn\.' + a, ours + '/attn' + b, k) for a, (b, k) in names.items()
      ]
      names = _GATES.get(gate, {}) if spec is None and gate else {}
      rules += [rule(theirs + r'attn\.' + a, ours + '/gate' + b, k) for a, (b, k) in names.items()]
  return rules


def _infer(state: reference.State, options: Mapping[str, Any]) -> dict[str, Any]:
  """The classifier shows the classes; tables that are tied to a map show the resolution."""
  found: dict[str, Any] = {'num_classes': len(state.get('head.fc.bias', ()))}
  strides = options.get('strides', (1, 2, 2, 2))
  stem = 4 if options.get('stem', 'tiered') == 'tiered' or options.get('stem_pool', True) else 2
  for key in state:
    match = re.fullmatch(r'(stages\.(\d+)\.(\d+)\.self_attn)\.qkv\.weight', key)
    if match is None:  # halo attention, whose tables fit any map, has no `qkv`
      continue
    prefix, i, j = match[1], int(match[2]), int(match[3])
    if f'{prefix}.pos_emb' in state:
      offsets = state[f'{prefix}.pos_emb'].shape[:2]
    elif f'{prefix}.pos_embed.height_rel' in state:
      offsets = [len(state[f'{prefix}.pos_embed.{side}_rel']) for side in ('height', 'width')]
    else:
      continue
    # The first block of a stage attends before it halves the map.
    stride = stem * math.prod(strides[: i + (j > 0)])
    height, width = (stride * (n + 1) // 2 for n in offsets)
    return {**found, 'image_size': (height, width)}
  return found


REFERENCES = {
  'timm': reference.Reference(
    origin='github.com/huggingface/pytorch-image-models, timm/models/byoanet.py and byobnet.py',
    rules=_rules,
    infer=_infer,
  )
}
