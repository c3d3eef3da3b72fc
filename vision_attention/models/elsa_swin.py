"""ELSA-Swin (arXiv 2112.12786): enhanced local self-attention in place of window attention.

In all stages but the last, whose map is a window at 224 pixels. With no window there is no shift,
and with no table no position: what was trained at one resolution runs at any.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vision_attention.attention import elsa
from vision_attention.models import base, reference, swin

RESIZE = swin.RESIZE


@base.extends(swin.build, 'attn', 'padding')
def build(
  *,
  depths: Sequence[int],
  stages: Sequence[int] = (1, 2, 3),
  kernel: int = 7,
  dilation: int = 1,
  group_width: int = 8,
  mul_power: int = 0,
  add_scale: float = 1.0,
  qkv_bias: bool = True,
  **options: Any,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    depths: blocks per stage.
    stages: stages with ELSA, counted from 1; the others have window attention.
    kernel: side of the neighbourhood, odd.
    dilation: distance of its taps.
    group_width: channels of a group of the convolution that makes the attention map.
    mul_power: exponent of what multiplies attention maps, 0 for none (`attention.elsa`).
    add_scale: factor of what is added to them, 0 for none.
    qkv_bias: whether query, key and value have biases, in either attention.
    **options: of `swin.build`.
  """
  enhanced = functools.partial(
    elsa.EnhancedLocalAttention,
    kernel=kernel,
    dilation=dilation,
    group_width=group_width,
    mul_power=mul_power,
    add_scale=add_scale,
    qkv_bias=qkv_bias,
  )
  attn = [[enhanced if i in stages else 'window'] * depth for i, depth in enumerate(depths, 1)]
  return swin.build(depths=depths, attn=attn, qkv_bias=qkv_bias, **options)


_ORIGIN = 'github.com/damo-cv/ELSA, cls/models'
# Not counted is what attention maps multiply: 49 products per channel and pixel.
_SOURCE = f'{_ORIGIN}, README; multiply-adds are those of its layers'


def _variant(dim, depth, heads, params, gmacs, top1, **more) -> base.Variant:
  return base.Variant(
    {
      'dim': dim,
      'depths': (2, 2, depth, 2),
      'num_heads': tuple(heads * 2**i for i in range(4)),
      **more,
    },
    params=params,
    flops=gmacs * 1e9,
    top1=top1,
    source=_SOURCE,
  )


VARIANTS = {
  'elsa_swin_tiny': _variant(96, 6, 3, 29_140_978, 4.70, 82.7, group_width=4),
  'elsa_swin_small': _variant(96, 18, 3, 52_874_626, 9.45, 83.5),
  'elsa_swin_base': _variant(128, 18, 4, 92_682_464, 16.52, 84.0),
}


def _prepare(state: reference.State) -> reference.State:
  """Takes fused arrays apart, and gives window attention the names and the order of Swin's."""
  out: reference.State = {}
  for key, array in state.items():
    block, _, leaf = key.rpartition('.attn.')
    if leaf.startswith('pre_proj.'):
      kind = leaf.removeprefix('pre_proj.')
      local = state.get(f'{block}.attn.attn.0.weight')
      if local is None:
        value, query, key_ = np.split(array, 3)
        out[f'{block}.attn.qkv.{kind}'] = np.concatenate([query, key_, value])
      else:
        parts = np.split(array, [len(local), 2 * len(local)])
        for name, part in zip(('query', 'key', 'value'), parts, strict=True):
          out[f'{block}.attn.{name}.{kind}'] = part
    elif leaf == 'rb':
      # `[heads, offsets]` over key minus query; reversed, it is over query minus key.
      out[f'{block}.attn.relative_position_bias_table'] = array[:, ::-1].T
    elif leaf == 'ghost_head' and array.ndim == 5:
      out[f'{block}.attn.ghost_mul'], out[f'{block}.attn.ghost_add'] = array
    else:
      out[key.replace('.attn.post_proj.', '.attn.proj.')] = array
  return out


_ATTN = swin.OURS + 'attn'


def attention_rules(theirs: str, ours: str, options: Mapping[str, Any]) -> list[reference.Rule]:
  """Returns the renames of prepared ELSA, given patterns that end before its parts."""
  rule = reference.Rule
  # One of the two matrices is stored without saying which.
  single = 'ghost_mul' if options.get('mul_power', 0) else 'ghost_add'
  return [
    *(rule(theirs + name, f'{ours}/{name}', reference.CONV) for name in ('query', 'key', 'value')),
    rule(theirs + r'attn\.0', f'{ours}/local', reference.CONV),
    rule(theirs + r'attn\.2', f'{ours}/logits', reference.CONV),
    *(
      rule(theirs + name, ours, reference.param(goal, reference.kernel))
      for name, goal in (
        ('ghost_head', single),
        ('ghost_mul', 'ghost_mul'),
        ('ghost_add', 'ghost_add'),
      )
    ),
  ]


def _rules(options: Mapping[str, Any]) -> list[reference.Rule]:
  return [
    *attention_rules(swin.BLOCK + r'attn\.', _ATTN, options),
    *swin.ATTENTION_RULES,
    *swin.rules(merges_first=False),
  ]


def _infer(state: reference.State, options: Mapping[str, Any]) -> dict[str, Any]:
  """Reads classes, resolution, and what the convolutions and the ghost head are."""
  found = swin.infer('square')(state, options)
  block = 'layers.0.blocks.0.attn.'
  if block + 'attn.0.weight' in state:
    shape = state[block + 'attn.0.weight'].shape
    found |= {'group_width': shape[1], 'kernel': shape[-1]}
    found['qkv_bias'] = block + 'query.bias' in state
  if block + 'ghost_mul' in state:
    found['mul_power'] = options.get('mul_power', 0) or 1
  elif block + 'ghost_head' not in state:
    found |= {'mul_power': 0, 'add_scale': 0.0}
  return found


REFERENCES = {
  'official': reference.Reference(
    origin=f'{_ORIGIN}/elsa_swin.py',
    rules=_rules,
    options={'fit': 'square'},
    prepare=_prepare,
    infer=_infer,
    ignore=(*swin.BUFFERS, r'.*\.relative_id'),
  ),
}
