"""LeViT (arXiv 2104.01136): a convolutional stem, then attention on maps that shrink twice.

Every linear map is normalised over the batch, so that in inference there is no norm:
`models.fusing`.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.attention import levit, operators
from vision_attention.layers import drop_path, fusable
from vision_attention.models import base, hierarchy, reference, resnet_blocks
from vision_attention.ops import activation, distance_bias

ModuleDef = Callable[..., nn.Module]
PerBlock = Sequence[Sequence[operators.Spec]]
RESIZE = {r'params/backbone/.*/attention_bias': distance_bias.resize}


class Stem(nn.Module):
  """Four 3x3 convolutions of stride 2, with an activation between them (section 4.2).

  Attributes:
    dim: width of the last; those before it have half of the next.
  """

  dim: int
  activation: str
  layer: ModuleDef

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    for i in range(4):
      x = activation.by_name(self.activation)(x) if i else x
      layer = self.layer(self.dim // 2 ** (3 - i), stride=2, name=f'conv{i + 1}')
      x = layer(x, train=train)
    return x


class Mlp(nn.Module):
  """Two linear maps with norms, an activation between them; the branch begins as nothing."""

  ratio: float
  activation: str
  layer: ModuleDef

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b h w c']:
    dim = x.shape[-1]
    y = self.layer(int(dim * self.ratio), name='expand')(x, train=train)
    y = activation.by_name(self.activation)(y)
    return self.layer(dim, scale_init=nn.initializers.zeros, name='project')(y, train=train)


class Block(nn.Module):
  """Attention, then an MLP.

  Attributes:
    attn: called with a name.
    residual: whether the input is added to attention; not where it changes the shape.
    drop_path: rate of stochastic depth.
  """

  attn: ModuleDef
  mlp: ModuleDef
  drop_path: float
  residual: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    y = self.attn(name='attn')(x, train=train)
    if self.residual:
      y = x + drop_path.DropPath(self.drop_path, name='drop_path1')(y, train=train)
    z = self.mlp(name='mlp')(y, train=train)
    return y + drop_path.DropPath(self.drop_path, name='drop_path2')(z, train=train)


class Head(nn.Module):
  """The mean over the map, then one classifier, or the mean of two (section 4.2).

  The second classifier learns from a teacher: `named` gives the logits of either.

  Attributes:
    num_classes: outputs; 0 gives the mean over the map.
    feature: name of the feature that is read.
    distillation: whether there are two.
    layer: a classifier, called with its outputs.
  """

  num_classes: int
  feature: str
  distillation: bool
  layer: ModuleDef
  dtype: DTypeLike = jnp.float32

  @property
  def outputs(self) -> tuple[str, ...]:
    """Names of the logits that `named` gives; none with one classifier."""
    return ('classifier', 'distilled') if self.distillation and self.num_classes else ()

  @nn.compact
  def __call__(
    self, features: Mapping[str, Float[Array, 'b ...']], *, train: bool, named: bool = False
  ) -> Any:
    """Returns float32 logits: their mean, or a dict of both where `named` is asked for."""
    x = features[self.feature].astype(jnp.float32).mean((1, 2)).astype(self.dtype)
    if not self.num_classes:
      return x.astype(jnp.float32)
    logits = {}
    for name in self.outputs or ('classifier',):
      y = self.layer(self.num_classes, name=name)(x, train=train)
      logits[name] = y.astype(jnp.float32)
    return logits if named else sum(logits.values()) / len(logits)


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  dims: Sequence[int],
  depths: Sequence[int],
  num_heads: Sequence[int],
  head_dim: int,
  shrink_heads: Sequence[int] | None = None,
  value_ratio: int = 2,
  shrink_value_ratio: int = 4,
  mlp_ratio: float = 2,
  attn: operators.Spec | PerBlock = levit.LevitAttention,
  distillation: bool = True,
  activation: str = 'hard_swish',
  norm_epsilon: float = 1e-5,
  norm_momentum: float = 0.9,
  dropout: float = 0.0,
  drop_path: float = 0.0,
  remat: bool = False,
  scan: bool = False,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    num_classes: outputs of the head.
    image_size: height and width; any. Maps round up.
    dtype: of activations.
    param_dtype: of parameters.
    dims: width per stage.
    depths: blocks per stage.
    num_heads: per stage; `num_heads * head_dim` need not be the width.
    head_dim: channels of queries and keys per head.
    shrink_heads: of the attention before every stage but the first; the width before it over
      `head_dim` unless given.
    value_ratio: channels of a head's values relative to `head_dim`.
    shrink_value_ratio: the same where the map shrinks.
    mlp_ratio: width inside the MLP relative to the stage's.
    attn: the operator of the stages' blocks, or one per stage and block.
    distillation: whether a second classifier learns from a teacher.
    activation: a name of `ops.activation`.
    norm_epsilon: of BatchNorm.
    norm_momentum: of BatchNorm, the share of old statistics that one step keeps.
    dropout: after attention.
    drop_path: rate of stochastic depth, the same in all branches.
    remat: whether blocks are computed again in the backward pass, to save memory.
    scan: whether equal blocks are compiled once, and their variables stacked.

  Raises:
    ValueError: for numbers of stages that differ.
  """
  if shrink_heads is None:
    shrink_heads = [dim // head_dim for dim in dims[:-1]]
  if not len(dims) == len(depths) == len(num_heads) == len(shrink_heads) + 1:
    raise ValueError(
      f'{dims=}, {depths=} and {num_heads=} must have one entry per stage, and {shrink_heads=} one '
      'less'
    )
  if dims[0] % 8:
    raise ValueError(
      f'the stem halves the width {dims[0]} three times: pass a multiple of 8 as first of dims'
    )
  types: dict[str, Any] = {'dtype': dtype, 'param_dtype': param_dtype}
  norms: dict[str, Any] = {'epsilon': norm_epsilon, 'momentum': norm_momentum}
  per_block: Any = attn if resnet_blocks.is_nested(attn) else [[attn] * depth for depth in depths]
  mlp = functools.partial(
    Mlp,
    ratio=mlp_ratio,
    activation=activation,
    layer=functools.partial(fusable.LinearNorm, **norms, **types),
  )
  shared = {'norm_epsilon': norm_epsilon, 'norm_momentum': norm_momentum, 'activation': activation}

  def block(i: int, j: int) -> ModuleDef:
    made = operators.bind(
      operators.operator(per_block[i][j]),
      dim=dims[i],
      num_heads=num_heads[i],
      head_dim=head_dim,
      dropout=dropout,
      **types,
    )
    if operators.takes(made, 'value_ratio'):
      made = operators.bind(
        made, value_ratio=value_ratio, scale_init=nn.initializers.zeros, **shared
      )
    return functools.partial(Block, attn=made, mlp=mlp, drop_path=drop_path)

  def shrink(i: int) -> ModuleDef:
    made = functools.partial(
      levit.LevitAttention,
      dim=dims[i + 1],
      num_heads=shrink_heads[i],
      head_dim=head_dim,
      stride=2,
      value_ratio=shrink_value_ratio,
      dropout=dropout,
      **shared,
      **types,
    )
    return functools.partial(Block, attn=made, mlp=mlp, drop_path=drop_path, residual=False)

  backbone = functools.partial(
    hierarchy.Hierarchy,
    image_size=image_size,
    stem=functools.partial(
      Stem,
      dim=dims[0],
      activation=activation,
      layer=functools.partial(fusable.ConvNorm, **norms, **types),
    ),
    stages=[[block(i, j) for j in range(depth)] for i, depth in enumerate(depths)],
    downsamples=[shrink(i) for i in range(len(dims) - 1)],
    remat=remat,
    scan=scan,
    dtype=dtype,
  )
  head = functools.partial(
    Head,
    num_classes=num_classes,
    feature=f'stage{len(dims)}',
    distillation=distillation,
    layer=functools.partial(
      fusable.NormLinear, kernel_init=nn.initializers.truncated_normal(0.02), **norms, **types
    ),
    dtype=dtype,
  )
  return base.Parts(backbone, head)


def _variant(dims, depths, num_heads, head_dim, params, mmacs, top1) -> base.Variant:
  return base.Variant(
    {'dims': dims, 'depths': depths, 'num_heads': num_heads, 'head_dim': head_dim},
    params=params,
    flops=mmacs * 1e6,
    top1=top1,
    source='arXiv 2104.01136, Table 3 (ImageNet-1k, with a teacher)',
  )


# Multiply-adds as the authors' code counts them; the table has 1120 M for LeViT-256.
VARIANTS = {
  'levit_128s': _variant((128, 256, 384), (2, 3, 4), (4, 6, 8), 16, 7_777_058, 305, 76.6),
  'levit_128': _variant((128, 256, 384), (4, 4, 4), (4, 8, 12), 16, 9_213_936, 406, 78.6),
  'levit_192': _variant((192, 288, 384), (4, 4, 4), (3, 5, 6), 32, 10_947_069, 658, 80.0),
  'levit_256': _variant((256, 384, 512), (4, 4, 4), (4, 6, 8), 32, 18_893_876, 1128, 81.6),
  'levit_384': _variant((384, 512, 768), (4, 4, 4), (6, 9, 12), 32, 39_128_836, 2353, 82.6),
}


def _named_by_stage(state: reference.State) -> reference.State:
  """Gives the authors' keys, a list of numbered branches, timm's names of stages and blocks."""
  branches: dict[str, str] = {}
  stage, block, parent = 0, -1, ''
  found = (re.match(r'blocks\.(\d+)\.', key) for key in state)
  for number in sorted({int(match[1]) for match in found if match}):
    if f'blocks.{number}.kv.c.weight' in state:
      stage, block = stage + 1, -1
      parent = f'stages.{stage}.downsample'
      branches[str(number)] = f'{parent}.attn_downsample'
    elif f'blocks.{number}.m.qkv.c.weight' in state:
      block += 1
      parent = f'stages.{stage}.blocks.{block}'
      branches[str(number)] = f'{parent}.attn'
    else:
      branches[str(number)] = f'{parent}.mlp'

  def renamed(key: str) -> str:
    key = re.sub(r'^patch_embed\.(\d+)', lambda m: f'stem.conv{int(m[1]) // 2 + 1}', key)
    key = re.sub(r'\.(c|l)\.(weight|bias)$', r'.linear.\2', key)
    match = re.fullmatch(r'blocks\.(\d+)\.(?:m\.)?(.*)', key)
    if match is None:
      return key
    rest = re.sub(r'^(q|proj)\.1\.', r'\1.ln.', match[2])
    rest = re.sub(r'^([02])\.', lambda m: f'ln{int(m[1]) // 2 + 1}.', rest)
    return f'{branches[match[1]]}.{rest}'

  return {renamed(key): value for key, value in state.items()}


_HF_NAMES = reference.renaming(
  (r'^levit\.patch_embeddings\.embedding_layer_(\d)', r'stem.conv\1'),
  (r'\.module\.', '.m.'),
  (r'\.queries_keys_values\.', '.qkv.'),
  (r'\.keys_values\.', '.kv.'),
  (r'\.queries\.', '.q.1.'),
  (r'\.projection\.', '.proj.1.'),
  (r'\.linear_up\.', '.0.'),
  (r'\.linear_down\.', '.2.'),
  (r'\.batch_norm\.', '.bn.'),
  (r'\.(?:convolution|linear)\.', '.c.'),
  (r'^classifier_distill\.', 'head_dist.'),
  (r'^classifier\.', 'head.'),
)


def _hf_prepare(state: reference.State) -> reference.State:
  """Gives layers by stage the authors' names, one list of all, and these timm's."""
  state = _HF_NAMES(state)
  pattern = re.compile(r'levit\.encoder\.stages\.(\d+)\.layers\.(\d+)\.')
  places = {(int(m[1]), int(m[2])) for m in map(pattern.match, state) if m}
  numbers = {place: i for i, place in enumerate(sorted(places))}

  def listed(match: re.Match[str]) -> str:
    return f'blocks.{numbers[int(match[1]), int(match[2])]}.'

  return _named_by_stage({pattern.sub(listed, key): value for key, value in state.items()})


def _table(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """`[heads, distances]`, row by row like ours, to `[heads, h, w]`."""
  return array.reshape(shape) if array.size == math.prod(shape) else array


def _rules() -> list[reference.Rule]:
  """timm's names, which its models of 1x1 convolutions share."""
  block = r'stages\.(\d+)\.blocks\.(\d+)\.', 'backbone/stage{0:+1}/block{1:02d}/'
  shrink = r'stages\.(\d+)\.downsample\.', 'backbone/downsample{0:+1}/'
  pairs = [
    (r'stem\.conv(\d)', 'backbone/stem/conv{0}'),
    ('head', 'head/classifier'),
    ('head_dist', 'head/distilled'),
  ]
  rules = []
  for (theirs, ours), attn in ((block, 'attn'), (shrink, 'attn_downsample')):
    layers = {'qkv': 'qkv', 'kv': 'kv', r'q\.ln': 'query', r'proj\.ln': 'proj'}
    pairs += [(rf'{theirs}{attn}\.{a}', f'{ours}attn/{b}') for a, b in layers.items()]
    layers = {'ln1': 'expand', 'ln2': 'project'}
    pairs += [(rf'{theirs}mlp\.{a}', f'{ours}mlp/{b}') for a, b in layers.items()]
    table = rf'{theirs}{attn}\.attention_biases'
    rules.append(reference.Rule(table, f'{ours}attn/attention_bias', reference.param('', _table)))
  for theirs, ours in pairs:
    rules.append(reference.Rule(rf'{theirs}\.linear', f'{ours}/linear', reference.CONV))
    rules.append(reference.Rule(rf'{theirs}\.bn', f'{ours}/norm', reference.NORM))
  return rules


def _infer(state: reference.State, options: Mapping[str, Any]) -> dict[str, Any]:
  """Reads classes, heads and resolution off a state; a rectangle is taken to be a wide image."""
  del options
  classifier = state.get('head.linear.bias')
  found: dict[str, Any] = {
    'num_classes': 0 if classifier is None else len(classifier),
    'distillation': 'head_dist.linear.bias' in state,
  }
  table = state.get('stages.0.blocks.0.attn.attention_biases')
  if table is not None:
    size = table.shape[-1]
    height = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    found['image_size'] = (16 * height, 16 * (size // height))
  return found


BUFFERS = (r'.*\.attention_bias_idxs',)
REFERENCES = {
  'official': reference.Reference(
    origin='github.com/facebookresearch/LeViT, levit.py',
    rules=_rules(),
    prepare=_named_by_stage,
    infer=_infer,
    ignore=BUFFERS,
  ),
  'timm': reference.Reference(
    origin='github.com/huggingface/pytorch-image-models, timm/models/levit.py',
    rules=_rules(),
    infer=_infer,
    ignore=BUFFERS,
  ),
  'hf': reference.Reference(
    origin='github.com/huggingface/transformers, models/levit/modeling_levit.py',
    rules=_rules(),
    prepare=_hf_prepare,
    infer=_infer,
    ignore=BUFFERS,
  ),
}
