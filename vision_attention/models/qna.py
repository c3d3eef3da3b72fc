"""QnA-ViT (arXiv 2112.11435): learned queries in overlapping windows, then plain self-attention.

A stage has blocks of self-attention in windows, blocks of QnA, and one QnA block of stride 2 that
doubles the width.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.attention import operators, qna
from vision_attention.attention import window as window_attention
from vision_attention.layers import conv, drop_path, heads, mlp, norm
from vision_attention.models import base, hierarchy, reference, swin

ModuleDef = Callable[..., nn.Module]
_SIZE = 224  # that windows are given for


def resize(table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Resizes `[heads, y, x]` or `[y, x, queries, heads]` by `jax.image`'s bicubic kernel."""
  return np.asarray(jax.image.resize(table, shape, 'bicubic'))


RESIZE = {r'params/backbone/.*/attn/(relative_position|position|position_scale)': resize}


class Stem(nn.Module):
  """A 4x4 convolution of stride 4, without bias and norm."""

  dim: int
  conv: ModuleDef

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    del train
    return self.conv(self.dim, 4, 4, name='conv')(x)


class Block(nn.Module):
  """`skip(x) + Attn(LN(x))`, then `x + MLP(LN(x))`.

  Attributes:
    dim: output width.
    num_heads: of the operator.
    attn: the operator; of stride 2 where there is a `skip`.
    skip: makes the map of the operator's shape, or None for the identity. With it, the first
      branch is never dropped.
    drop_path: rate of stochastic depth.
  """

  dim: int
  num_heads: int
  attn: ModuleDef
  skip: ModuleDef | None
  mlp: ModuleDef
  norm: ModuleDef
  drop_path: float

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    attn = operators.bind(self.attn, dim=self.dim, num_heads=self.num_heads)
    y = attn(name='attn')(self.norm(name='norm1')(x, train=train), train=train)
    if self.skip is None:
      x = x + drop_path.DropPath(self.drop_path, name='drop_path1')(y, train=train)
    else:
      x = self.skip(self.dim, 1, 2, name='skip')(x) + y
    y = self.mlp(hidden_dim=4 * self.dim, name='mlp')(self.norm(name='norm2')(x), train=train)
    return x + drop_path.DropPath(self.drop_path, name='drop_path2')(y, train=train)


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  dim: int,
  depths: Sequence[int],
  window_depths: Sequence[int],
  num_heads: Sequence[int],
  window_heads: Sequence[int],
  kernel: int | Sequence[int] = 3,
  window: Sequence[int] = (7, 7, 14, 7),
  window_policy: str = 'fixed',
  padding: str = 'mask',
  num_queries: int = 2,
  normalize_query: bool = True,
  scale: str = 'position',
  attn: operators.Spec = qna.QueryAndAttend,
  activation: str = 'gelu_tanh',
  norm_epsilon: float = 1e-6,
  dropout: float = 0.0,
  drop_path: float = 0.0,
  remat: bool = False,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    num_classes: outputs of the head.
    image_size: height and width; any. A map that windows do not tile is padded for attention.
    dtype: of activations.
    param_dtype: of parameters.
    dim: width of the first stage; every further stage has twice that of the one before.
    depths: blocks of QnA per stage, without those of stride 2.
    window_depths: blocks of self-attention in windows per stage, which come first.
    num_heads: of QnA, per stage; its block of stride 2 has twice as many.
    window_heads: of self-attention, per stage.
    kernel: side of QnA's windows, odd, for all stages or per stage.
    window: side of the windows of self-attention, per stage.
    window_policy: `fixed`, these windows at any image size, or `scale`, windows that are as large
      relative to the image as these are at 224 pixels, rounded up.
    padding: what padded pixels of a map are to self-attention, see `ops.windows.tile`.
    num_queries: learned queries of QnA.
    normalize_query: whether they are divided by their length.
    scale: of QnA's weights, see `attention.qna`.
    attn: the operator in the place of QnA. Where it has no field `stride`, QnA halves the maps.
    activation: a name of `ops.activation`.
    norm_epsilon: of LayerNorm.
    dropout: after attention and within the MLP.
    drop_path: rate of stochastic depth of the last block; the first has 0.
    remat: whether blocks are computed again in the backward pass, to save memory.

  Raises:
    ValueError: for an unknown policy, numbers of stages that differ, or heads that do not divide a
      width.
  """
  errors.check_choice('window_policy', window_policy, swin.POLICIES)
  stages = len(depths)
  kernels = (kernel,) * stages if isinstance(kernel, int) else tuple(kernel)
  counts = {
    'window_depths': window_depths,
    'num_heads': num_heads,
    'window_heads': window_heads,
    'kernel': kernels,
    'window': window,
  }
  for name, values in counts.items():
    if len(values) != stages:
      raise ValueError(f'{name}={values} must have one entry per stage, as {depths=} has')
  types: dict[str, Any] = {'dtype': dtype, 'param_dtype': param_dtype}
  layer_norm = functools.partial(norm.LayerNorm, epsilon=norm_epsilon, **types)
  convolution = functools.partial(conv.Conv, **types)
  rates = drop_path_rates(drop_path, depths, window_depths)

  def block(i: int, rate: float, operator: ModuleDef, count: int, stride: int = 1) -> ModuleDef:
    width = dim * 2**i * stride
    if width % count:
      raise ValueError(f'{count} heads do not divide the width {width} of stage {i + 1}')
    return functools.partial(
      Block,
      dim=width,
      num_heads=count,
      attn=operators.bind(operator, dropout=dropout, **types),
      skip=convolution if stride > 1 else None,
      mlp=functools.partial(mlp.Mlp, activation=activation, dropout=dropout, **types),
      norm=layer_norm,
      drop_path=rate,
    )

  def query_and_attend(i: int, operator: ModuleDef, stride: int = 1) -> ModuleDef:
    if not operators.has_field(operator, 'stride'):
      operator = qna.QueryAndAttend if stride > 1 else operator
    options: dict[str, Any] = {'kernel': kernels[i], 'num_queries': num_queries}
    options |= {'normalize_query': normalize_query, 'scale': scale}
    if not operators.has_field(operator, 'num_queries'):
      options = {}
    return operators.bind(operator, stride=stride, **options)

  def self_attention(i: int) -> ModuleDef:
    sides: Sequence[int] = (window[i],) * 2
    if window_policy == 'scale':
      sides = tuple(-(-side * window[i] // _SIZE) for side in image_size)
    return functools.partial(
      window_attention.WindowAttention,
      window=sides,
      padding=padding,
      qkv_bias=False,
      proj_bias=False,
      kernel_init=nn.initializers.lecun_normal(),
      table_init=nn.initializers.zeros,
    )

  chosen = operators.operator(attn)
  blocks, merges = [], []
  for i in range(stages):
    made = [(self_attention(i), window_heads[i])] * window_depths[i]
    made += [(query_and_attend(i, chosen), num_heads[i])] * depths[i]
    blocks.append([block(i, rates[i][j], *pair) for j, pair in enumerate(made)])
    if i + 1 < stages:
      down = query_and_attend(i, chosen, 2)
      merges.append(block(i, rates[i][-1], down, 2 * num_heads[i], 2))
  backbone = functools.partial(
    hierarchy.Hierarchy,
    image_size=image_size,
    stem=functools.partial(Stem, dim, convolution),
    stages=blocks,
    downsamples=merges,
    norm=layer_norm,
    remat=remat,
    dtype=dtype,
  )
  head = functools.partial(
    heads.LinearHead, num_classes=num_classes, feature=f'stage{stages}', **types
  )
  return base.Parts(backbone, head)


def drop_path_rates(
  rate: float, depths: Sequence[int], window_depths: Sequence[int]
) -> list[list[float]]:
  """Returns the rate of every block, stage by stage; blocks of stride 2 end a stage and count."""
  both = [a + b for a, b in zip(depths, window_depths, strict=True)]
  return drop_path.linear_rates(rate, [*(n + 1 for n in both[:-1]), both[-1]])


def _variant(dim, depth, head_dim, params, gmacs, top1, **options) -> base.Variant:
  return base.Variant(
    {
      'dim': dim,
      'depths': (2, 3, depth, 0),
      'window_depths': (0, 0, 2 * depth, 2),
      'num_heads': tuple(dim // head_dim * 2**i for i in range(4)),
      'window_heads': tuple(dim // 32 * 2**i for i in range(4)),
      **options,
    },
    params=params,
    flops=gmacs * 1e9,
    top1=top1,
    source="arXiv 2112.11435, authors' table",
  )


VARIANTS = {
  'qna_tiny': _variant(64, 2, 8, 15_715_560, 2.42, 81.7),
  'qna_tiny_7x7': _variant(64, 2, 8, 15_753_960, 2.51, 82.0, kernel=7),
  'qna_small': _variant(64, 6, 8, 24_971_560, 4.35, 83.2),
  'qna_base': _variant(96, 6, 16, 55_670_008, 9.51, 83.7),
}


def _part(index: int, heads: int) -> reference.Transform:
  """Takes query, key or value out of `[in, heads * 3 * head_dim]`."""

  def take(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if array.ndim != 2 or array.shape[1] % (3 * heads):
      return array
    return array.reshape(len(array), heads, 3, -1)[:, :, index].reshape(len(array), -1)

  return take


def _rules(options: Mapping[str, Any]) -> list[reference.Rule]:
  """Returns the renames; the blocks of a stage are numbered by kind there."""
  rule, flax, param = reference.Rule, reference.FLAX, reference.param
  rules = [
    rule(r'StemBlock_0/conv_1x1', 'backbone/stem/conv', flax),
    rule(r'ClassificationHead_0/LayerNorm_0', 'backbone/norm', flax),
    rule(r'ClassificationHead_0/head_logits', 'head/classifier', flax),
  ]

  def block(theirs: str, ours: str) -> None:
    query = theirs + 'FusedKQnA_0/'
    rules.extend(
      (
        rule(theirs + r'LayerNorm_0', ours + '/norm1', flax),
        rule(theirs + r'LayerNorm_1', ours + '/norm2', flax),
        rule(theirs + r'MlpBlock_0/Dense_0', ours + '/mlp/expand', flax),
        rule(theirs + r'MlpBlock_0/Dense_1', ours + '/mlp/project', flax),
        rule(theirs + r'Conv_0', ours + '/skip', flax),
        rule(query + 'query', ours + '/attn/query', param('')),
        rule(query + 'Wk', ours + '/attn/key', param('')),
        rule(query + 'rpe_bias', ours + '/attn/position', param('', _by_size)),
        rule(query + r'attn_scale_\w+', ours + '/attn/position_scale', param('', _by_size)),
        rule(query + 'to_v', ours + '/attn/value', flax),
        rule(query + 'to_out', ours + '/attn/proj', flax),
      )
    )

  for i, (before, count) in enumerate(
    zip(options['window_depths'], options['window_heads'], strict=True)
  ):
    stage = f'backbone/stage{i + 1}/block'
    # Written by the number of the block, which begins at one there.
    theirs, ours = rf'LSAStage_{i}/MSA_Block_(\d+)/', stage + '{0:-1:02d}'
    block(theirs, ours)
    attention = theirs + 'MultiHeadSelfAttention_0/'
    names = enumerate(('query', 'key', 'value'))
    parts = tuple(reference.Leaf('params', f'{n}/kernel', _part(k, count)) for k, n in names)
    rules.append(rule(attention + 'to_qkv', ours + '/attn', {'kernel': parts}))
    rules.append(rule(attention + 'to_out', ours + '/attn/proj', flax))
    table = attention + 'RelativePositionalEmbedding_0/rpe_bias'
    moved = param('', swin.table_of_offsets)
    rules.append(rule(table, ours + '/attn/relative_position', moved))
    block(rf'QnAStage_{i}/QnA_Block_(\d+)/', stage + f'{{0:{before - 1:+d}:02d}}')
    block(rf'QnAStage_{i}/QnA_Block_\d+_stride_2/', f'backbone/downsample{i + 2}')
  return rules


def _by_size(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """`[taps, queries * heads]`, row by row, to `[y, x, queries, heads]`."""
  return array.reshape(shape) if array.size == math.prod(shape) else array


def _prepare(state: reference.State) -> reference.State:
  return {key.removeprefix('params/'): value for key, value in state.items()}


def _infer(state: reference.State, options: Mapping[str, Any]) -> dict[str, Any]:
  """Reads classes, kernels and windows off a state, and the image that whole windows cover."""
  bias = state.get('ClassificationHead_0/head_logits/bias')
  found: dict[str, Any] = {'num_classes': 0 if bias is None else len(bias)}
  kernels, windows = {}, {}
  for key, array in state.items():
    if match := re.fullmatch(r'QnAStage_(\d+)/.*/FusedKQnA_0/rpe_bias', key):
      kernels[int(match[1])] = math.isqrt(len(array))
    if match := re.fullmatch(r'LSAStage_(\d+)/.*/rpe_bias', key):
      windows[int(match[1])] = (math.isqrt(len(array)) + 1) // 2
  stages = len(options['depths'])
  given = options.get('window', (7, 7, 14, 7))
  if kernels:
    # A stage without QnA has no say.
    found['kernel'] = tuple(kernels.get(i, max(kernels.values())) for i in range(stages))
  window = tuple(windows.get(i, given[i]) for i in range(stages))
  if window != tuple(given):
    last = max(windows)
    found |= {'window': window, 'image_size': 4 * 2**last * windows[last]}
  return found


REFERENCES = {
  'official': reference.Reference(
    origin='github.com/moabarar/qna, models/qna_vit.py (a flattened tree, `params/...`)',
    rules=_rules,
    prepare=_prepare,
    infer=_infer,
  )
}
