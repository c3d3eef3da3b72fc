"""EA-AA-ResNet (arXiv 2102.12895, section 4.1): the attention of AA-ResNet evolves over blocks.

Every block of the last three stages has an augmented convolution whose logits go on from those of
the block before. The second stage attends at half its resolution, on the third stage's grid, so
the chain runs through both and starts anew in the fourth. By the released code
(github.com/pkuyym/EvolvingAttention, EAResnet50), which differs from AA-ResNet: no least number of
channels of a head (they have 4, 8 and 16 channels). That code builds bottlenecks only; the form of
`ea_aa_resnet_34`, with the first convolution of basic blocks augmented, is a reading of ours.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.attention import augmented, evolving
from vision_attention.layers import conv, drop_path, heads, norm
from vision_attention.models import base, reference, resnet_blocks
from vision_attention.ops import activation as activations
from vision_attention.ops import relative_logits

ModuleDef = Callable[..., nn.Module]
Logits = Float[Array, 'b n s t'] | None
RESIZE = {r'params/backbone/.*/attn/(height|width)_offsets': relative_logits.resize_offsets}


class Block(nn.Module):
  """A residual block that also takes and gives logits; without `attn` it hands them through.

  Attributes:
    dim: output channels.
    inner_dim: channels of the 3x3 convolutions.
    stride: of the (first) 3x3 convolution.
    bottleneck: whether the block is the bottleneck.
    attn: in place of the (first) 3x3 convolution, called with `dim`, `stride` and a name, then with
      the map and logits; or None.
    drop_path: rate of stochastic depth.
    last_scale_init: of the branch's last norm.
  """

  dim: int
  inner_dim: int
  stride: int
  bottleneck: bool
  attn: ModuleDef | None
  activation: str
  drop_path: float
  last_scale_init: nn.initializers.Initializer
  conv: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b h w c'], logits: Logits, *, train: bool
  ) -> tuple[Float[Array, 'b p q d'], Float[Array, 'b m u v'] | None]:
    act = activations.by_name(self.activation)
    if self.bottleneck:
      layers = [(self.inner_dim, 1, 1), (self.inner_dim, 3, self.stride), (self.dim, 1, 1)]
    else:
      layers = [(self.inner_dim, 3, self.stride), (self.dim, 3, 1)]
    spatial = 2 if self.bottleneck else 1
    y = x
    for i, (dim, kernel_size, stride) in enumerate(layers, 1):
      last = i == len(layers)
      if self.attn is not None and i == spatial:
        y, logits = self.attn(dim=dim, stride=stride, name='attn')(y, logits, train=train)
      else:
        y = self.conv(dim, kernel_size=kernel_size, stride=stride, name=f'conv{i}')(y)
      init = self.last_scale_init if last else nn.initializers.ones
      y = self.norm(scale_init=init, name=f'norm{i}')(y, train=train)
      y = y if last else act(y)
    y = drop_path.DropPath(self.drop_path, name='drop_path')(y, train=train)
    shortcut = resnet_blocks.Shortcut(
      self.dim, self.stride, False, self.conv, self.norm, name='shortcut'
    )
    return act(y + shortcut(x, train=train)), logits


class Stage(nn.Module):
  """Blocks one after the other, each with the logits of the one before; see `layers.stage`."""

  blocks: Sequence[ModuleDef]
  remat: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b h w c'], logits: Logits, *, train: bool
  ) -> tuple[Float[Array, 'b p q d'], Float[Array, 'b m u v'] | None]:
    def apply(block: nn.Module, x: Float[Array, 'b h w c'], logits: Logits) -> Any:
      return block(x, logits, train=train)

    for j, block in enumerate(self.blocks):
      x, logits = (nn.remat(apply) if self.remat else apply)(block(name=f'block{j:02d}'), x, logits)
    return x, logits


class EvolvingResNet(nn.Module):
  """Stem and stages; the logits of a stage's last block go on to the next stage.

  Attributes:
    stem: called with a name.
    stages: per stage, its blocks.
    across_stages: whether the chain crosses stages where the grids are the same.
  """

  stem: ModuleDef
  stages: Sequence[Sequence[ModuleDef]]
  across_stages: bool
  remat: bool = False
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, images: Float[Array, 'b h w c'], *, train: bool
  ) -> dict[str, Float[Array, 'b p q d']]:
    x = self.stem(name='stem')(images.astype(self.dtype), train=train)
    logits, features = None, {}
    for i, blocks in enumerate(self.stages, 1):
      logits = logits if self.across_stages else None
      x, logits = Stage(blocks, self.remat, name=f'stage{i}')(x, logits, train=train)
      features[f'stage{i}'] = x
    return features


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  depths: Sequence[int],
  block: str = 'bottleneck',
  width: int = 64,
  stem: str = '7x7',
  alpha: float = 1.0,
  beta: float = 0.5,
  kappa: float = 0.25,
  upsilon: float = 0.125,
  num_heads: int = 8,
  min_head_dim: int = 1,
  position: str = 'relative',
  table_init: str = 'literal',
  attn_stages: Sequence[int] = (2, 3, 4),
  pooled_stages: Sequence[int] = (2,),
  across_stages: bool = True,
  activation: str = 'relu',
  pool_padding: str = 'same',
  drop_path: float = 0.0,
  dropout: float = 0.0,
  zero_init_last: bool = False,
  norm_momentum: float = 0.997,
  remat: bool = False,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    num_classes: outputs of the head.
    image_size: height and width.
    dtype: of activations.
    param_dtype: of parameters.
    depths: blocks per stage.
    block: `bottleneck` or `basic`.
    width: channels inside the blocks of the first stage.
    stem: a name of `resnet_blocks.Stem`.
    alpha: share of the convolution over logits; with `beta=0` too, this is an AA-ResNet.
    beta: share of the previous block's logits.
    kappa: channels of all queries relative to the convolution's.
    upsilon: channels of all values likewise.
    num_heads: of every attention.
    min_head_dim: least channels of a head's queries.
    position: `relative`, `absolute`, `coordinates` or `none`.
    table_init: `literal` or `intended`, see `augmented.Augmentation`.
    attn_stages: stages with augmented convolutions, counted from 1.
    pooled_stages: those of them whose attention works at half the resolution.
    across_stages: whether the chain of logits crosses stages where the grids are the same.
    activation: a name of `ops.activation`, in the blocks.
    pool_padding: of the stem's max-pool.
    drop_path: rate of stochastic depth of the last block, growing linearly from 0.
    dropout: rate before the classifier.
    zero_init_last: whether each residual branch starts at zero.
    norm_momentum: of BatchNorm's running statistics.
    remat: whether blocks are computed again in the backward pass.

  Raises:
    ValueError: for an unknown choice.
  """
  del image_size
  errors.check_choice('block', block, ('bottleneck', 'basic'))
  errors.check_choice('stem', stem, resnet_blocks.STEMS)
  errors.check_choice('position', position, augmented.POSITIONS)
  errors.check_choice('table_init', table_init, augmented.TABLE_INITS)
  types: dict[str, Any] = {'dtype': dtype, 'param_dtype': param_dtype}
  init = nn.initializers.lecun_normal()
  layer = functools.partial(conv.Conv, padding='symmetric', kernel_init=init, **types)
  batch_norm = functools.partial(norm.BatchNorm, epsilon=1e-5, momentum=norm_momentum, **types)
  bottleneck = block == 'bottleneck'
  rates = drop_path_rates(drop_path, depths)

  def make(stage: int, j: int) -> ModuleDef:
    inner_dim = width * 2 ** (stage - 1)
    attn = functools.partial(
      evolving.EvolvingConv,
      num_heads=num_heads,
      kappa=kappa,
      upsilon=upsilon,
      min_head_dim=min_head_dim,
      position=position,
      table_init=table_init,
      downsample=2 if stage in pooled_stages else 1,
      alpha=alpha,
      beta=beta,
      kernel_init=init,
      **types,
    )
    return functools.partial(
      Block,
      dim=4 * inner_dim if bottleneck else inner_dim,
      inner_dim=inner_dim,
      stride=2 if stage > 1 and j == 0 else 1,
      bottleneck=bottleneck,
      attn=attn if stage in attn_stages else None,
      activation=activation,
      drop_path=rates[stage - 1][j],
      last_scale_init=nn.initializers.zeros if zero_init_last else nn.initializers.ones,
      conv=layer,
      norm=batch_norm,
    )

  backbone = functools.partial(
    EvolvingResNet,
    stem=functools.partial(
      resnet_blocks.Stem, stem, width, activation, pool_padding, layer, batch_norm
    ),
    stages=[[make(i, j) for j in range(depth)] for i, depth in enumerate(depths, 1)],
    across_stages=across_stages,
    remat=remat,
    dtype=dtype,
  )
  head = functools.partial(
    heads.LinearHead,
    num_classes=num_classes,
    feature=f'stage{len(depths)}',
    dropout=dropout,
    kernel_init=nn.initializers.xavier_uniform(),
    **types,
  )
  return base.Parts(backbone, head)


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
  """Returns the rate of every block; see `layers.drop_path.linear_rates`."""
  return drop_path.linear_rates(rate, depths)


def _variant(depths, params, source, **options: Any) -> base.Variant:
  # The paper's accuracies are not repeated: they have not been compared with its text.
  return base.Variant({'depths': depths, **options}, params=params, source=source)


_CODE = 'arXiv 2102.12895; parameters of github.com/pkuyym/EvolvingAttention, for 1000 classes'
VARIANTS = {
  'ea_aa_resnet_34': _variant(
    (3, 4, 6, 3), 21_294_368, 'arXiv 2102.12895; basic blocks as read here', block='basic'
  ),
  'ea_aa_resnet_50': _variant((3, 4, 6, 3), 24_967_712, _CODE),
  'ea_aa_resnet_101': _variant((3, 4, 23, 3), 43_440_728, _CODE),
  'ea_aa_resnet_152': _variant((3, 8, 36, 3), 58_659_248, _CODE),
}


def _part(index: int) -> reference.Transform:
  """Keys, queries and values of the released code's fused `kqv`, whose last are fewer."""

  def take(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    dim = shape[-1]
    mine = array[..., -dim:] if index == 2 else array[..., index * dim : (index + 1) * dim]
    return reference.same(mine, shape)

  return take


_TF_CONV: reference.Kind = {
  leaf: (reference.Leaf('params', leaf, reference.same),) for leaf in ('kernel', 'bias')
}
_TF_NORM: reference.Kind = {
  theirs: (reference.Leaf(collection, ours, reference.same),)
  for theirs, collection, ours in (
    ('gamma', 'params', 'scale'),
    ('beta', 'params', 'bias'),
    ('moving_mean', 'batch_stats', 'mean'),
    ('moving_variance', 'batch_stats', 'var'),
  )
}
_KQV: reference.Kind = {
  leaf: tuple(
    reference.Leaf('params', f'{name}/{leaf}', _part(i))
    for i, name in enumerate(('key', 'query', 'value'))
  )
  for leaf in ('kernel', 'bias')
}


def _official_rules(options: Mapping[str, Any]) -> Sequence[reference.Rule]:
  """TensorFlow numbers layers in the order in which they are made, over the whole network."""
  rule, rules, made = reference.Rule, [], {'conv2d': 0, 'batch_normalization': 0}

  def add(kind: str, ours: str) -> None:
    count = made[kind]
    made[kind] += 1
    pattern = rf'resnet_model/{kind}' + (f'_{count}' if count else '')
    rules.append(rule(pattern, ours, _TF_CONV if kind == 'conv2d' else _TF_NORM))

  def add_pair(ours: str, conv_name: str, norm_name: str) -> None:
    add('conv2d', f'{ours}/{conv_name}')
    add('batch_normalization', f'{ours}/{norm_name}')

  add_pair('backbone/stem', 'conv1', 'norm1')
  for i, depth in enumerate(options['depths']):
    for j in range(depth):
      block = f'backbone/stage{i + 1}/block{j:02d}'
      if j == 0:
        add_pair(f'{block}/shortcut', 'conv', 'norm')
      add_pair(block, 'conv1', 'norm1')
      if i + 1 in options.get('attn_stages', (2, 3, 4)):
        scope = rf'resnet_model/asconv_{i}_{j}_0/'
        names = {'conv2d': 'conv', 'evolve': 'evolve', 'proj': 'proj'}
        rules += [rule(scope + a, f'{block}/attn/{b}', _TF_CONV) for a, b in names.items()]
        rules.append(rule(scope + 'conv2d_1', f'{block}/attn', _KQV))
        for side in ('height', 'width'):
          table = reference.param(f'{block}/attn/{side}_offsets')
          rules.append(rule(f'{scope}r_{side}', '', table))
        add('batch_normalization', f'{block}/norm2')
      else:
        add_pair(block, 'conv2', 'norm2')
      add_pair(block, 'conv3', 'norm3')
  return [*rules, rule('resnet_model/dense', 'head/classifier', _TF_CONV)]


def _official_prepare(state: reference.State) -> reference.State:
  """Names the last layers of an attention, which are numbered by whether it evolves."""
  state = {key.removesuffix(':0'): value for key, value in state.items()}

  def renamed(key: str) -> str:
    match = re.fullmatch(r'(.*/asconv_\d+_\d+_0/)conv2d_([23])(/.*)', key)
    if match is None:
      return key
    scope, number, leaf = match.groups()
    evolves = number == '2' and f'{scope}conv2d_3/kernel' in state
    return scope + ('evolve' if evolves else 'proj') + leaf

  return {renamed(key): value for key, value in state.items()}


def _official_infer(state: reference.State, options: Mapping[str, Any]) -> dict[str, Any]:
  """The third stage works at 1/16, and its tables have `2 side / 16 - 1` rows."""
  del options
  height, width = (
    8 * (state[f'resnet_model/asconv_2_0_0/r_{side}'].shape[0] + 1) for side in ('height', 'width')
  )
  return {'image_size': (height, width), 'num_classes': len(state['resnet_model/dense/bias'])}


REFERENCES = {
  'official': reference.Reference(
    origin='github.com/pkuyym/EvolvingAttention, EAResnet50/official/resnet/resnet_model.py',
    rules=_official_rules,
    prepare=_official_prepare,
    infer=_official_infer,
    ignore=(r'global_step(:0)?', r'.*/Momentum(:0)?', r'.*/(beta|gamma)/Momentum(:0)?'),
    variants=('ea_aa_resnet_50', 'ea_aa_resnet_101', 'ea_aa_resnet_152'),
  ),
}
