"""ACmix-Swin (arXiv 2111.14556): a mixture of window attention and convolution in every block.

The published parameters (30 M and 51 M) are these, rounded up.
"""

import functools
from collections.abc import Sequence
from typing import Any

from vision_attention.attention import acmix
from vision_attention.models import base, reference, swin

RESIZE = swin.RESIZE


@base.extends(swin.build, 'attn', 'padding')
def build(
  *,
  depths: Sequence[int],
  conv_kernel: int = 3,
  stages: Sequence[int] = (1, 2, 3, 4),
  **options: Any,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    depths: blocks per stage.
    conv_kernel: side of the convolutions.
    stages: stages with ACmix, counted from 1; all in the paper, the others are Swin's.
    **options: of `swin.build`.
  """
  mixed = functools.partial(acmix.WindowAcmix, conv_kernel=conv_kernel)
  attn = [[mixed if i in stages else 'window'] * depth for i, depth in enumerate(depths, 1)]
  return swin.build(depths=depths, attn=attn, **options)


_ORIGIN = 'github.com/LeapLabTHU/ACmix, Swin-Transformer'


def _variant(depth: int, params: int, gmacs: float, top1: float) -> base.Variant:
  return base.Variant(
    {'dim': 96, 'depths': (2, 2, depth, 2), 'num_heads': (3, 6, 12, 24), 'window': 7},
    params=params,
    flops=gmacs * 1e9,
    top1=top1,
    source=_ORIGIN,
  )


VARIANTS = {
  'acmix_swin_tiny': _variant(6, 28_649_908, 4.6, 81.9),
  'acmix_swin_small': _variant(18, 50_345_080, 9.0, 83.5),
}

_ATTN = swin.OURS + 'attn'
_RULES = [
  reference.Rule(swin.BLOCK + r'attn\.dep_conv', f'{_ATTN}/conv', reference.CONV),
  reference.Rule(
    swin.BLOCK + r'attn\.fc\.weight',
    f'{_ATTN}/conv',
    reference.param('mixing', reference.kernel),
  ),
  reference.Rule(swin.BLOCK + r'attn\.fc\.bias', f'{_ATTN}/conv', reference.param('bias')),
  reference.Rule(swin.BLOCK + r'attn\.rate1', _ATTN, reference.param('attention_rate')),
  reference.Rule(swin.BLOCK + r'attn\.rate2', _ATTN, reference.param('conv_rate')),
]
REFERENCES = {
  'official': reference.Reference(
    origin=f'{_ORIGIN}/models/swin_transformer_acmix.py',
    rules=(*_RULES, *swin.ATTENTION_RULES, *swin.rules(merges_first=False)),
    options={'fit': 'square'},
    infer=swin.infer('square'),
    ignore=swin.BUFFERS,
  ),
}
