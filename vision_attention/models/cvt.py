"""CvT (arXiv 2103.15808): tokens made by overlapping convolutions, attention with them too.

No layer knows positions, so that nothing depends on the resolution.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import linen as nn
from jax.typing import DTypeLike

from vision_attention import errors
from vision_attention.attention import convolutional_projection, operators
from vision_attention.layers import drop_path, norm
from vision_attention.models import base, reference, resnet_blocks, token_hierarchy

ModuleDef = Callable[..., nn.Module]
POOLS = ('cls', 'gap')


def embedded_size(size: Sequence[int], patch: int, stride: int, pad: int) -> tuple[int, int]:
  """Returns height and width of what a token embedding makes of a map."""
  height, width = ((side + 2 * pad - patch) // stride + 1 for side in size)
  return height, width


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  depths: Sequence[int],
  dims: Sequence[int],
  num_heads: Sequence[int],
  patches: Sequence[int] = (7, 3, 3),
  strides: Sequence[int] = (4, 2, 2),
  paddings: Sequence[int] = (2, 1, 1),
  kv_strides: Sequence[int] = (2, 2, 2),
  mlp_ratio: float = 4,
  pool: str = 'cls',
  attn: operators.Spec | Sequence[Sequence[operators.Spec]] = (
    convolutional_projection.ConvolutionalProjectionAttention
  ),
  activation: str = 'quick_gelu',
  norm_epsilon: float = 1e-5,
  last_norm_epsilon: float | None = None,
  dropout: float = 0.0,
  drop_path: float | Sequence[float] = 0.0,
  remat: bool = False,
  scan: bool = False,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    num_classes: outputs of the head.
    image_size: height and width; any of at least three pixels.
    dtype: of activations.
    param_dtype: of parameters.
    depths: blocks per stage.
    dims: width per stage.
    num_heads: per stage.
    patches: per stage, side of the token embedding's kernel.
    strides: per stage, of the token embedding.
    paddings: per stage, zeros around the token embedding's input.
    kv_strides: per stage, of the convolutions that make keys and values (Table 7).
    mlp_ratio: width inside the MLP relative to the block's.
    pool: `cls` (a class token in the last stage) or `gap` (mean of its tokens).
    attn: the operator, or one per stage and block. In the last stage, with a class token, one that
      takes tokens without a map or has a field `map_size`.
    activation: a name of `ops.activation`.
    norm_epsilon: of LayerNorm.
    last_norm_epsilon: of the last LayerNorm, where it differs.
    dropout: of tokens, after attention and within the MLP.
    drop_path: rate of stochastic depth of a stage's last block, per stage; the first one has 0. One
      number is that of the last stage, and the others have none.
    remat: whether blocks are computed again in the backward pass, to save memory.
    scan: whether equal blocks are compiled once, and their variables stacked.

  Raises:
    ValueError: for numbers of stages that differ, heads that do not divide a width, an operator
      that has no place for the class token, or an image of which no token remains.
  """
  errors.check_choice('pool', pool, POOLS)
  per_stage = {
    'depths': depths,
    'dims': dims,
    'num_heads': num_heads,
    'patches': patches,
    'strides': strides,
    'paddings': paddings,
    'kv_strides': kv_strides,
  }
  token_hierarchy.check_stages(**per_stage)
  size = image_size
  for embedding in zip(patches, strides, paddings, strict=True):
    size = embedded_size(size, *embedding)
  if min(size) < 1:
    least = max(patches[0] - 2 * paddings[0], 1)
    raise ValueError(
      f'no token remains of an image of {image_size[0]}x{image_size[1]}: pass an image_size of at '
      f'least {least}x{least}'
    )
  types: dict[str, Any] = {'dtype': dtype, 'param_dtype': param_dtype}
  layer_norm = functools.partial(norm.LayerNorm, epsilon=norm_epsilon, **types)
  per_block: Any = attn if resnet_blocks.is_nested(attn) else [[attn] * depth for depth in depths]
  rates = drop_path_rates(drop_path, depths)

  def operator(i: int, j: int) -> ModuleDef:
    made = operators.bind(
      operators.operator(per_block[i][j]),
      kernel_init=token_hierarchy.INIT,
      dropout=dropout,
      **types,
    )
    made = operators.bind(made, kv_stride=kv_strides[i])
    if pool == 'cls' and i == len(depths) - 1:
      made = token_hierarchy.for_tokens(made, size)
    return made

  return token_hierarchy.assemble(
    num_classes=num_classes,
    image_size=image_size,
    embeddings=[
      functools.partial(token_hierarchy.TokenEmbedding, *fields, norm=layer_norm, **types)
      for fields in zip(dims, patches, strides, paddings, strict=True)
    ],
    attn=[[operator(i, j) for j in range(depth)] for i, depth in enumerate(depths)],
    dims=dims,
    num_heads=num_heads,
    mlp_ratios=[mlp_ratio] * len(dims),
    activation=activation,
    rates=rates,
    norm=layer_norm,
    last_norm=functools.partial(
      norm.LayerNorm,
      epsilon=norm_epsilon if last_norm_epsilon is None else last_norm_epsilon,
      **types,
    ),
    class_token=pool == 'cls',
    dropout=dropout,
    types=types,
    remat=remat,
    scan=scan,
  )


def drop_path_rates(rate: float | Sequence[float], depths: Sequence[int]) -> list[list[float]]:
  """Returns the rate of every block: within a stage from 0 to the stage's."""
  rates = (*(0.0,) * (len(depths) - 1), rate) if isinstance(rate, int | float) else tuple(rate)
  if len(rates) != len(depths):
    raise ValueError(f'drop_path {rates} must have one entry per stage of depths {depths}')
  return [drop_path.linear_rates(float(r), [n])[0] for r, n in zip(rates, depths, strict=True)]


def _variant(depths, dims, heads, params, gmacs, top1, size=224, data='') -> base.Variant:
  return base.Variant(
    {'depths': depths, 'dims': dims, 'num_heads': heads},
    image_size=size,
    params=params,
    flops=gmacs * 1e9,
    top1=top1,
    source=f'arXiv 2103.15808, Table 3{data}',
  )


VARIANTS = {
  'cvt_13': _variant((1, 2, 10), (64, 192, 384), (1, 3, 6), 19_997_480, 4.53, 81.6),
  'cvt_21': _variant((1, 4, 16), (64, 192, 384), (1, 3, 6), 31_622_696, 7.13, 82.5),
  'cvt_w24': _variant(
    (2, 2, 20),
    (192, 768, 1024),
    (3, 12, 16),
    277_196_392,
    193.2,
    87.7,
    384,
    ' (ImageNet-22k pre-training)',
  ),
}

_rule = reference.Rule
_CONV, _NORM, _DENSE = reference.CONV, reference.NORM, reference.DENSE
_OURS = 'backbone/stage{0:+1}/block{1:02d}/'
_BLOCK = r'stage(\d+)\.blocks\.(\d+)\.'
_HF_STAGE = r'cvt\.encoder\.stages\.(\d+)\.'
_HF_BLOCK = _HF_STAGE + r'layers\.(\d+)\.'
_HF_ATTENTION = _HF_BLOCK + r'attention\.attention\.'
_HF_CONV = _HF_ATTENTION + r'convolution_projection_(query|key|value)\.convolution_projection\.'
_NAMES = {'q': 'query', 'k': 'key', 'v': 'value'}


def _cls_rule(pattern: str) -> reference.Rule:
  return _rule(pattern, 'backbone/cls', reference.param(''))


_OFFICIAL_RULES = (
  _rule(r'stage(\d+)\.patch_embed\.proj', 'backbone/embed{0:+1}/conv', _CONV),
  _rule(r'stage(\d+)\.patch_embed\.norm', 'backbone/embed{0:+1}/norm', _NORM),
  _cls_rule(r'stage\d+\.cls_token'),
  _rule(_BLOCK + r'norm(\d)', _OURS + 'norm{2}', _NORM),
  *(
    _rule(rf'{_BLOCK}attn\.{theirs}', f'{_OURS}attn/{ours}', kind)
    for short, name in _NAMES.items()
    for theirs, ours, kind in (
      (rf'conv_proj_{short}\.conv', f'{name}_conv', _CONV),
      (rf'conv_proj_{short}\.bn', f'{name}_norm', _NORM),
      (f'proj_{short}', name, _DENSE),
    )
  ),
  _rule(_BLOCK + r'attn\.proj', _OURS + 'attn/proj', _DENSE),
  _rule(_BLOCK + r'mlp\.fc1', _OURS + 'mlp/expand', _DENSE),
  _rule(_BLOCK + r'mlp\.fc2', _OURS + 'mlp/project', _DENSE),
  _rule('norm', 'backbone/norm', _NORM),
  _rule('head', 'head/classifier', _DENSE),
)
_HF_RULES = (
  _rule(
    _HF_STAGE + r'embedding\.convolution_embeddings\.projection',
    'backbone/embed{0:+1}/conv',
    _CONV,
  ),
  _rule(
    _HF_STAGE + r'embedding\.convolution_embeddings\.normalization',
    'backbone/embed{0:+1}/norm',
    _NORM,
  ),
  _cls_rule(r'cvt\.encoder\.stages\.\d+\.cls_token'),
  _rule(_HF_BLOCK + 'layernorm_before', _OURS + 'norm1', _NORM),
  _rule(_HF_BLOCK + 'layernorm_after', _OURS + 'norm2', _NORM),
  _rule(_HF_CONV + 'convolution', _OURS + 'attn/{2}_conv', _CONV),
  _rule(_HF_CONV + 'normalization', _OURS + 'attn/{2}_norm', _NORM),
  _rule(_HF_ATTENTION + 'projection_(query|key|value)', _OURS + 'attn/{2}', _DENSE),
  _rule(_HF_BLOCK + r'attention\.output\.dense', _OURS + 'attn/proj', _DENSE),
  _rule(_HF_BLOCK + r'intermediate\.dense', _OURS + 'mlp/expand', _DENSE),
  _rule(_HF_BLOCK + r'output\.dense', _OURS + 'mlp/project', _DENSE),
  _rule('layernorm', 'backbone/norm', _NORM),
  _rule('classifier', 'head/classifier', _DENSE),
)


def _infer(classifier: str):
  """Returns what reads classes and the pooling off a state."""

  def infer(state: reference.State, options: Mapping[str, Any]) -> dict[str, Any]:
    del options
    return {
      'num_classes': len(state[classifier]) if classifier in state else 0,
      'pool': 'cls' if any(key.endswith('.cls_token') for key in state) else 'gap',
    }

  return infer


REFERENCES = {
  'official': reference.Reference(
    origin='github.com/microsoft/CvT, lib/models/cls_cvt.py',
    rules=_OFFICIAL_RULES,
    infer=_infer('head.bias'),
  ),
  # Another function of the same weights: the exact GELU in place of its sigmoid.
  'hf': reference.Reference(
    origin='github.com/huggingface/transformers, models/cvt/modeling_cvt.py',
    rules=_HF_RULES,
    options={'activation': 'gelu_exact', 'last_norm_epsilon': 1e-12},
    infer=_infer('classifier.bias'),
  ),
}
