"""ACmix-ResNet (arXiv 2111.14556): a mixture of attention and convolution in every bottleneck.

The published parameters (10.6 M, 14.6 M, 18.6 M) and multiply-adds (2.3 G, 2.9 G, 3.6 G) are not
those of the released code, whose models are these, at any number of heads; why is not known.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from flax.linen import initializers
from jax.typing import DTypeLike

from vision_attention.attention import acmix
from vision_attention.models import base, reference, resnet

HE_INIT = initializers.variance_scaling(2.0, 'fan_out', 'normal')


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  depths: Sequence[int],
  width: int = 64,
  num_heads: int | Sequence[int] = 4,
  kernel: int = 7,
  conv_kernel: int = 3,
  shift_init: bool = True,
  stages: Sequence[int] = (1, 2, 3, 4),
  stem: str = '7x7',
  drop_path: float = 0.0,
  dropout: float = 0.0,
  remat: bool = False,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    num_classes: outputs of the head.
    image_size: height and width; any.
    dtype: of activations.
    param_dtype: of parameters.
    depths: blocks per stage.
    width: channels inside the blocks of the first stage.
    num_heads: of the attention, one number or one per stage.
    kernel: side of the attention's window.
    conv_kernel: side of the convolution.
    shift_init: whether the convolutions begin as shifts (the paper) or with He's normal values,
      with which the official code writes over them.
    stages: stages with ACmix, counted from 1; all in the paper.
    stem: see `resnet.build`.
    drop_path: rate of stochastic depth, growing linearly over the blocks.
    dropout: rate before the classifier.
    remat: whether blocks are computed again in the backward pass, to save memory.
  """
  attn = functools.partial(acmix.AcmixAttention, kernel=kernel, conv_kernel=conv_kernel)
  if not shift_init:
    attn = functools.partial(attn, conv_init=HE_INIT)
  return resnet.build(
    num_classes=num_classes,
    image_size=image_size,
    dtype=dtype,
    param_dtype=param_dtype,
    depths=depths,
    width=width,
    stem=stem,
    attn=attn,
    attn_stages=[stage for stage in stages if stage <= len(depths)],
    num_heads=num_heads,
    drop_path=drop_path,
    drop_path_rule='block',
    dropout=dropout,
    zero_init_last=False,
    conv_init=HE_INIT,
    remat=remat,
  )


_ORIGIN = 'github.com/LeapLabTHU/ACmix, ResNet'


def _variant(depths: Sequence[int], params: int, gmacs: float, top1: float) -> base.Variant:
  source = f'{_ORIGIN}; multiply-adds are those of its layers and of the attention'
  return base.Variant(
    {'depths': depths}, params=params, flops=gmacs * 1e9, top1=top1, source=source
  )


VARIANTS = {
  'acmix_resnet_26': _variant((1, 2, 4, 1), 10_487_816, 2.230, 76.1),
  'acmix_resnet_38': _variant((2, 3, 5, 2), 14_410_896, 2.877, 77.4),
  'acmix_resnet_50': _variant((3, 4, 6, 3), 18_333_976, 3.524, 77.8),
}


def _infer(state: reference.State, options: Mapping[str, Any]) -> dict[str, Any]:
  """Reads classes, heads per stage and the side of the convolution off the weights."""
  del options
  mixing = (f'layer{i}.0.conv2.fc.weight' for i in itertools.count(1))
  heads = [state[key].shape[1] // 3 for key in itertools.takewhile(state.__contains__, mixing)]
  return {
    'num_classes': len(state['fc.bias']) if 'fc.bias' in state else 0,
    'num_heads': heads[0] if len(set(heads)) == 1 else tuple(heads),
    'conv_kernel': state['layer1.0.conv2.dep_conv.weight'].shape[-1],
  }


_BLOCK, _THEIRS = 'backbone/stage{0}/block{1:02d}/attn', r'layer(\d+)\.(\d+)\.conv2\.'
_RULES = [
  *(
    reference.Rule(_THEIRS + theirs, f'{_BLOCK}/{ours}', reference.CONV)
    for theirs, ours in (
      ('conv1', 'query'),
      ('conv2', 'key'),
      ('conv3', 'value'),
      ('conv_p', 'position'),
      ('dep_conv', 'conv'),
    )
  ),
  reference.Rule(
    _THEIRS + r'fc\.weight', f'{_BLOCK}/conv', reference.param('mixing', reference.kernel)
  ),
  reference.Rule(_THEIRS + 'rate1', _BLOCK, reference.param('attention_rate')),
  reference.Rule(_THEIRS + 'rate2', _BLOCK, reference.param('conv_rate')),
]
_RESNET = resnet.REFERENCES['torchvision']
REFERENCES = {
  'official': reference.Reference(
    origin=f'{_ORIGIN}/ResNet_ImageNet.py',
    rules=lambda options: [*_RULES, *_RESNET.rules_of(options)],
    prepare=lambda state: {key.removeprefix('module.'): value for key, value in state.items()},
    infer=_infer,
  ),
}
