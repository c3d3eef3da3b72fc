"""ACmix-Swin (arXiv 2111.14556): a mixture of window attention and convolution in every block.

The published parameters (30 M and 51 M) are these, rounded up.
"""

import functools
from collections.abc import Sequence

from jax.typing import DTypeLike

from vision_attention.attention import acmix
from vision_attention.models import base, reference, swin

RESIZE = swin.RESIZE


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  depths: Sequence[int],
  dim: int,
  num_heads: Sequence[int],
  window: int | Sequence[int] = 7,
  window_policy: str = 'fixed',
  fit: str = 'axis',
  conv_kernel: int = 3,
  stages: Sequence[int] = (1, 2, 3, 4),
  mlp_ratio: float = 4,
  qkv_bias: bool = True,
  activation: str = 'gelu_exact',
  norm_epsilon: float = 1e-5,
  dropout: float = 0.0,
  drop_path: float = 0.0,
  remat: bool = False,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    num_classes: outputs of the head.
    image_size: height and width; any, see `swin.build`.
    dtype: of activations.
    param_dtype: of parameters.
    depths: blocks per stage.
    dim: width of the first stage; every further stage has twice that of the one before.
    num_heads: per stage.
    window: side of a window, or height and width.
    window_policy: `fixed` or `scale`, see `swin.build`.
    fit: what becomes of windows larger than a map, see `ops.windows.tile`.
    conv_kernel: side of the convolutions.
    stages: stages with ACmix, counted from 1; all in the paper, the others are Swin's.
    mlp_ratio: width inside the MLP relative to the block's.
    qkv_bias: whether query, key and value have biases.
    activation: a name of `ops.activation`.
    norm_epsilon: of LayerNorm.
    dropout: after attention and within the MLP.
    drop_path: rate of stochastic depth of the last block; the first has 0.
    remat: whether blocks are computed again in the backward pass, to save memory.
  """
  mixed = functools.partial(acmix.WindowAcmix, conv_kernel=conv_kernel)
  attn = [[mixed if i in stages else 'window'] * depth for i, depth in enumerate(depths, 1)]
  return swin.build(
    num_classes=num_classes,
    image_size=image_size,
    dtype=dtype,
    param_dtype=param_dtype,
    depths=depths,
    dim=dim,
    num_heads=num_heads,
    window=window,
    window_policy=window_policy,
    fit=fit,
    mlp_ratio=mlp_ratio,
    qkv_bias=qkv_bias,
    attn=attn,
    activation=activation,
    norm_epsilon=norm_epsilon,
    dropout=dropout,
    drop_path=drop_path,
    remat=remat,
  )


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
