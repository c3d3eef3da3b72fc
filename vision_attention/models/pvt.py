"""PVT (arXiv 2102.12122): a pyramid whose attention has fewer keys than queries.

Every stage cuts its map into patches with a learned position each; keys are patches of the map. The
last stage has a class token.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from vision_attention import errors
from vision_attention.attention import mhsa, operators, spatial_reduction
from vision_attention.layers import drop_path as stochastic_depth
from vision_attention.layers import norm
from vision_attention.models import base, reference, resnet_blocks, token_hierarchy
from vision_attention.ops import position_embedding

ModuleDef = Callable[..., nn.Module]
POOLS = ('cls', 'gap')
RESIZE = {r'params/backbone/embed\d+/position': position_embedding.resize_centres}


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  depths: Sequence[int],
  dims: Sequence[int] = (64, 128, 320, 512),
  num_heads: Sequence[int] = (1, 2, 5, 8),
  mlp_ratios: Sequence[float] = (8, 8, 4, 4),
  reductions: Sequence[int] = (8, 4, 2, 1),
  pool: str = 'cls',
  attn: operators.Spec | Sequence[Sequence[operators.Spec]] = (
    spatial_reduction.SpatialReductionAttention
  ),
  norm_epsilon: float = 1e-6,
  inner_epsilon: float = 1e-5,
  dropout: float = 0.0,
  drop_path: float = 0.0,
  remat: bool = False,
  scan: bool = False,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    num_classes: outputs of the head.
    image_size: height and width, multiples of 4 times a power of two per further stage.
    dtype: of activations.
    param_dtype: of parameters.
    depths: blocks per stage.
    dims: channels per stage.
    num_heads: heads per stage.
    mlp_ratios: width inside the MLPs, per stage, relative to the channels.
    reductions: per stage, the side of the patches that become keys (Table 1, `R`).
    pool: `cls` (a class token in the last stage) or `gap` (mean of its positions).
    attn: the operator, or one per stage and block. In the last stage, with a class token, one that
      takes tokens without a map; spatial reduction by 1 is multi-head self-attention there.
    norm_epsilon: of LayerNorm in blocks and behind them.
    inner_epsilon: of LayerNorm on patches and on keys.
    dropout: of patches, after attention and within the MLP.
    drop_path: rate of stochastic depth, growing linearly over the blocks.
    remat: whether blocks are computed again in the backward pass, to save memory.
    scan: whether equal blocks are compiled once, and their variables stacked.

  Raises:
    ValueError: for numbers of stages that differ, heads that do not divide a width, an operator
      that has no place for the class token, or an image that the patches do not tile.
  """
  errors.check_choice('pool', pool, POOLS)
  per_stage = {
    'depths': depths,
    'dims': dims,
    'num_heads': num_heads,
    'mlp_ratios': mlp_ratios,
    'reductions': reductions,
  }
  token_hierarchy.check_stages(**per_stage)
  step = 2 ** (len(depths) + 1)
  if any(side % step for side in image_size):
    nearest = tuple(max(step, round(side / step) * step) for side in image_size)
    raise ValueError(f'image_size {image_size} must be multiples of {step}: pass {nearest}')
  types: dict[str, Any] = {'dtype': dtype, 'param_dtype': param_dtype}
  layer_norm = functools.partial(norm.LayerNorm, epsilon=norm_epsilon, **types)
  inner_norm = functools.partial(norm.LayerNorm, epsilon=inner_epsilon, **types)
  per_block: Any = attn if resnet_blocks.is_nested(attn) else [[attn] * depth for depth in depths]
  patches = (4,) + (2,) * (len(dims) - 1)

  def operator(i: int, j: int) -> ModuleDef:
    made = operators.operator(per_block[i][j])
    if pool == 'cls' and i == len(depths) - 1:
      if made is spatial_reduction.SpatialReductionAttention and reductions[i] == 1:
        made = mhsa.MultiHeadAttention  # the same, and of tokens too
      made = token_hierarchy.for_tokens(made, (image_size[0] // step, image_size[1] // step))
    return operators.bind(
      made,
      reduction=reductions[i],
      norm_epsilon=inner_epsilon,
      kernel_init=token_hierarchy.INIT,
      dropout=dropout,
      **types,
    )

  return token_hierarchy.assemble(
    num_classes=num_classes,
    image_size=image_size,
    embeddings=[
      functools.partial(
        token_hierarchy.TokenEmbedding,
        dim,
        patch,
        patch,
        0,
        norm=inner_norm,
        position=True,
        **types,
      )
      for dim, patch in zip(dims, patches, strict=True)
    ],
    attn=[[operator(i, j) for j in range(depth)] for i, depth in enumerate(depths)],
    dims=dims,
    num_heads=num_heads,
    mlp_ratios=mlp_ratios,
    activation='gelu_exact',
    rates=drop_path_rates(drop_path, depths),
    norm=layer_norm,
    last_norm=layer_norm,
    class_token=pool == 'cls',
    dropout=dropout,
    types=types,
    cls_position=True,
    norm_map=True,
    remat=remat,
    scan=scan,
  )


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
  """Returns the rate of every block."""
  return stochastic_depth.linear_rates(rate, depths)


def _variant(depths: Sequence[int], params: int, gmacs: float, top1: float) -> base.Variant:
  return base.Variant(
    {'depths': depths},
    params=params,
    flops=gmacs * 1e9,
    top1=top1,
    source='arXiv 2102.12122, Tables 1 and 2',
  )


VARIANTS = {
  'pvt_tiny': _variant((2, 2, 2, 2), 13_229_288, 1.9, 75.1),
  'pvt_small': _variant((3, 4, 6, 3), 24_485_864, 3.8, 79.8),
  'pvt_medium': _variant((3, 4, 18, 3), 44_208_104, 6.7, 81.2),
  'pvt_large': _variant((3, 8, 27, 3), 61_369_320, 9.8, 81.7),
}


def _gridded(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """A table `[1, n, c]`, or `[n, c]`, to `[h, w, c]`."""
  return array.reshape(shape) if array.size == math.prod(shape) else array


def _prepare(position: str, cls: str) -> Callable[[reference.State], reference.State]:
  """Returns what splits the class token's position off the table that has one.

  Args:
    position: format of the keys of tables, of the stage.
    cls: key of the class token.
  """

  def prepare(state: reference.State) -> reference.State:
    state = dict(state)
    tables = [key for i in range(9) if (key := position.format(i)) in state]
    if cls in state and tables:
      table = state[tables[-1]].reshape(-1, state[tables[-1]].shape[-1])
      state['cls_position'], state[tables[-1]] = table[0], table[1:]
    return state

  return prepare


def _infer(position: str, cls: str, classifier: str):
  """Returns what reads classes, pooling and a square resolution off prepared weights."""

  def infer(state: reference.State, options: Mapping[str, Any]) -> dict[str, Any]:
    del options
    found: dict[str, Any] = {
      'num_classes': len(state[classifier]) if classifier in state else 0,
      'pool': 'cls' if cls in state else 'gap',
    }
    table = state.get(position)
    if table is not None and math.isqrt(table.shape[-2]) ** 2 == table.shape[-2]:
      found['image_size'] = (4 * math.isqrt(table.shape[-2]),) * 2
    return found

  return infer


_rule = reference.Rule
_CONV, _NORM, _DENSE = reference.CONV, reference.NORM, reference.DENSE
_TABLE = reference.param('', _gridded)
_CLS_RULES = (_rule('cls_position', 'backbone/cls_position', reference.param('')),)
_BLOCK, _OURS = r'block(\d+)\.(\d+)\.', 'backbone/stage{0}/block{1:02d}/'
_OFFICIAL_RULES = (
  _rule(r'patch_embed(\d+)\.proj', 'backbone/embed{0}/conv', _CONV),
  _rule(r'patch_embed(\d+)\.norm', 'backbone/embed{0}/norm', _NORM),
  _rule(r'pos_embed(\d+)', 'backbone/embed{0}/position', _TABLE),
  _rule('cls_token', 'backbone/cls', reference.param('')),
  *_CLS_RULES,
  _rule(_BLOCK + r'norm(\d)', _OURS + 'norm{2}', _NORM),
  _rule(_BLOCK + r'attn\.q', _OURS + 'attn/query', _DENSE),
  _rule(_BLOCK + r'attn\.kv', _OURS + 'attn', reference.fused('key', 'value')),
  _rule(_BLOCK + r'attn\.proj', _OURS + 'attn/proj', _DENSE),
  _rule(_BLOCK + r'attn\.sr', _OURS + 'attn/reduce', _CONV),
  _rule(_BLOCK + r'attn\.norm', _OURS + 'attn/reduce_norm', _NORM),
  _rule(_BLOCK + r'mlp\.fc1', _OURS + 'mlp/expand', _DENSE),
  _rule(_BLOCK + r'mlp\.fc2', _OURS + 'mlp/project', _DENSE),
  _rule('norm', 'backbone/norm', _NORM),
  _rule('head', 'head/classifier', _DENSE),
)
_HF_EMBED = r'pvt\.encoder\.patch_embeddings\.(\d+)\.'
_HF_BLOCK, _HF_OURS = r'pvt\.encoder\.block\.(\d+)\.(\d+)\.', 'backbone/stage{0:+1}/block{1:02d}/'
_HF_POSITION = 'pvt.encoder.patch_embeddings.{}.position_embeddings'
_HF_CLS = 'pvt.encoder.patch_embeddings.3.cls_token'
_HF_RULES = (
  _rule(_HF_EMBED + 'projection', 'backbone/embed{0:+1}/conv', _CONV),
  _rule(_HF_EMBED + 'layer_norm', 'backbone/embed{0:+1}/norm', _NORM),
  _rule(_HF_EMBED + 'position_embeddings', 'backbone/embed{0:+1}/position', _TABLE),
  _rule(_HF_EMBED + 'cls_token', 'backbone/cls', reference.param('')),
  *_CLS_RULES,
  _rule(_HF_BLOCK + r'layer_norm_(\d)', _HF_OURS + 'norm{2}', _NORM),
  _rule(_HF_BLOCK + r'attention\.self\.(query|key|value)', _HF_OURS + 'attn/{2}', _DENSE),
  _rule(_HF_BLOCK + r'attention\.output\.dense', _HF_OURS + 'attn/proj', _DENSE),
  _rule(_HF_BLOCK + r'attention\.self\.sequence_reduction', _HF_OURS + 'attn/reduce', _CONV),
  _rule(_HF_BLOCK + r'attention\.self\.layer_norm', _HF_OURS + 'attn/reduce_norm', _NORM),
  _rule(_HF_BLOCK + r'mlp\.dense1', _HF_OURS + 'mlp/expand', _DENSE),
  _rule(_HF_BLOCK + r'mlp\.dense2', _HF_OURS + 'mlp/project', _DENSE),
  _rule(r'pvt\.encoder\.layer_norm', 'backbone/norm', _NORM),
  _rule('classifier', 'head/classifier', _DENSE),
)
REFERENCES = {
  'official': reference.Reference(
    origin='github.com/whai362/PVT, classification/pvt.py',
    rules=_OFFICIAL_RULES,
    prepare=_prepare('pos_embed{}', 'cls_token'),
    infer=_infer('pos_embed1', 'cls_token', 'head.bias'),
  ),
  'hf': reference.Reference(
    origin='github.com/huggingface/transformers, models/pvt/modeling_pvt.py',
    rules=_HF_RULES,
    options={'inner_epsilon': 1e-6},
    prepare=_prepare(_HF_POSITION, _HF_CLS),
    infer=_infer(_HF_POSITION.format(0), _HF_CLS, 'classifier.bias'),
  ),
}
