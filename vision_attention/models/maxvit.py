"""MaxViT (arXiv 2204.01697): MBConv, attention in windows, attention on a grid, in every block."""

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
from vision_attention.attention import operators
from vision_attention.attention import window as partition
from vision_attention.layers import conv, drop_path, heads, mbconv, mlp, norm, squeeze_excite
from vision_attention.models import base, coatnet, reference
from vision_attention.ops import relative_position, windows

ModuleDef = Callable[..., nn.Module]
INIT = nn.initializers.normal(0.02)
RESIZE = {r'params/backbone/.*/attn/relative_position': relative_position.resize_table}
POLICIES = ('scale', 'fixed')
# Layers of a block: names in the variables, and of what a layout's letters stand for.
LAYERS = {'C': 'mbconv', 'B': 'block', 'G': 'grid', 'P': 'parallel'}


class MaxViTBlock(nn.Module):
  """Layers with shortcuts one after the other; the first halves the map if the block does.

  MBConv has one shortcut, an attention layer two: around attention, and around its MLP (Figure 2).

  Attributes:
    layers: names and layers in order, each called with `stride`, `drop_path` and its name.
    stride: of the first layer.
    drop_path: rate of stochastic depth of every branch, each of which is drawn on its own.
  """

  layers: Sequence[tuple[str, ModuleDef]]
  stride: int
  drop_path: float

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    stride = self.stride
    for name, layer in self.layers:
      x = layer(stride=stride, drop_path=self.drop_path, name=name)(x, train=train)
      stride = 1
    return x


class Parallel(nn.Module):
  """`x + Proj([B(u), G(v)])` of `[u, v] = Proj(LN(x))`: both attention layers side by side.

  The first projection doubles the channels; either layer, with its own shortcuts and MLP, takes
  half of the heads (section 4.5, Table 10). The text tells of no norm, biases or shortcut around
  both. With norm and biases the parameters of all four sizes are, truncated, the printed ones;
  without either of them MaxViT-T's 34.5 million are 34.4. MAXIM (arXiv 2201.02973), to which the
  text refers for parallel designs, has all three in its code; and a GELU after the first
  projection, of which the text has nothing, and which is not here.

  Attributes:
    dim: output width, and that of either layer.
    stride: 1 or 2.
    drop_path: rate of stochastic depth of every branch, also within the layers.
    pool: see `mbconv.halve`.
    block: block attention and its MLP, called with `dim`, `stride`, `drop_path` and a name.
    grid: grid attention and its MLP, called alike.
  """

  dim: int
  stride: int
  drop_path: float
  pool: str
  block: ModuleDef
  grid: ModuleDef
  conv: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    shortcut = mbconv.PoolProject(self.dim, self.stride, self.pool, self.conv, name='shortcut')(x)
    y = self.norm(name='norm')(x, train=train)
    y = y if self.stride == 1 else mbconv.halve(y, self.pool)
    y = self.conv(2 * self.dim, kernel_size=1, use_bias=True, name='expand')(y)
    u, v = jnp.split(y, 2, axis=-1)
    same = {'dim': self.dim, 'stride': 1, 'drop_path': self.drop_path}
    u = self.block(**same, name='block')(u, train=train)
    v = self.grid(**same, name='grid')(v, train=train)
    y = jnp.concatenate([u, v], axis=-1)
    y = self.conv(self.dim, kernel_size=1, use_bias=True, name='project')(y)
    return shortcut + drop_path.DropPath(self.drop_path, name='drop_path')(y, train=train)


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  depths: Sequence[int],
  dims: Sequence[int],
  stem_dim: int,
  head_dim: int = 32,
  window: int | Sequence[int] = 7,
  window_policy: str = 'scale',
  fit: str = 'axis',
  table_window: int | Sequence[int] | None = None,
  layout: str | Sequence[str] = 'CBG',
  attn: operators.Spec = partition.WindowAttention,
  grid_attn: operators.Spec = partition.GridAttention,
  activation: str = 'gelu_tanh',
  norm_epsilon: float = 1e-3,
  norm_momentum: float = 0.99,
  layer_norm_epsilon: float = 1e-5,
  drop_path: float = 0.0,
  dropout: float = 0.0,
  pre_logits: bool = True,
  remat: bool = False,
  scan: bool = False,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    num_classes: outputs of the head.
    image_size: height and width; any. Maps that windows or grids do not divide are padded.
    dtype: of activations.
    param_dtype: of parameters.
    depths: blocks per stage.
    dims: width per stage.
    stem_dim: width of the stem.
    head_dim: channels of an attention head.
    window: side of a window and of a grid, or height and width.
    window_policy: `scale`, `window` belongs to images of 224 pixels and grows with them, rounded
      up: 7, 12 and 16 at 224, 384 and 512 pixels, always the last stage's map; or `fixed`, windows
      of `window` pixels at any image size.
    fit: what becomes of windows larger than a map, see `ops.windows.tile`.
    table_window: the window that tables of relative positions are stored for, and from which they
      are interpolated in the program; those of the model unless given. With 7 at any resolution,
      fine-tuning trains what the authors' code trains.
    layout: the layers of a block in order, or those of every stage: `C` for MBConv, `B` for block
      attention and its MLP, `G` for grid attention and its MLP, `P` for both in parallel. Section
      4.5 has all orders (Table 8), one stage of `CB` or `CBB` (Table 7) or of `BG` (Table 9) among
      `CBG`, and `CP` (Table 10).
    attn: the operator of block attention.
    grid_attn: the operator of grid attention.
    activation: a name of `ops.activation`.
    norm_epsilon: of BatchNorm.
    norm_momentum: of BatchNorm's running statistics.
    layer_norm_epsilon: of LayerNorm.
    drop_path: rate of stochastic depth `p`; all branches of block `b` of `B` drop `p b / B`.
    dropout: rate before the classifier.
    pre_logits: whether a dense layer of the last width with tanh precedes the classifier.
    remat: whether blocks are computed again in the backward pass, to save memory.
    scan: whether equal blocks are compiled once, and their variables stacked.

  Raises:
    ValueError: for an unknown policy or layer, numbers of stages that differ, or widths that heads
      do not divide.
  """
  errors.check_choice('window_policy', window_policy, POLICIES)
  layouts = [layout] * len(depths) if isinstance(layout, str) else list(layout)
  if not len(depths) == len(dims) == len(layouts):
    raise ValueError(f'{depths=}, {dims=} and layout {layouts} must have one entry per stage')
  for letters in layouts:
    for letter in letters or ' ':
      errors.check_choice('layer in layout', letter, LAYERS)
  for dim in dims:
    if dim % head_dim:
      raise ValueError(f'head_dim {head_dim} does not divide the width {dim} of dims {dims}')
  sides = windows.pair(window)
  if window_policy == 'scale':
    sides = tuple(-(-m * side // 224) for m, side in zip(sides, image_size, strict=True))
  types: dict[str, Any] = {'dtype': dtype, 'param_dtype': param_dtype}
  convolution = functools.partial(conv.Conv, kernel_init=INIT, **types)
  batch_norm = functools.partial(
    norm.BatchNorm, epsilon=norm_epsilon, momentum=norm_momentum, **types
  )
  layer_norm = functools.partial(norm.LayerNorm, epsilon=layer_norm_epsilon, **types)

  def attention(spec: operators.Spec) -> ModuleDef:
    made = operators.bind(operators.operator(spec), kernel_init=INIT, **types)
    if operators.takes(made, 'table_window'):
      tables = {'interpolate': True, 'table_window': table_window}
      made = operators.bind(made, window=sides, grid=sides, fit=fit, **tables)
    return functools.partial(
      coatnet.TransformerBlock,
      head_dim=head_dim,
      pool='avg',
      attn=made,
      mlp=functools.partial(mlp.Mlp, activation=activation, kernel_init=INIT, **types),
      conv=convolution,
      norm=layer_norm,
    )

  kinds: dict[str, ModuleDef] = {
    'C': functools.partial(
      mbconv.MBConv,
      stride_in='depthwise',
      pool='avg',
      activation=activation,
      conv=convolution,
      norm=batch_norm,
      squeeze=functools.partial(
        squeeze_excite.SqueezeExcite, activation='silu', kernel_init=INIT, **types
      ),
    ),
    'B': attention(attn),
    'G': attention(grid_attn),
  }
  kinds['P'] = functools.partial(
    Parallel, pool='avg', block=kinds['B'], grid=kinds['G'], conv=convolution, norm=layer_norm
  )

  def block(i: int, j: int) -> ModuleDef:
    made = []
    for k, letter in enumerate(layouts[i]):
      again = layouts[i][:k].count(letter)
      layer = functools.partial(kinds[letter], dim=dims[i])
      made.append((LAYERS[letter] + (str(again) if again else ''), layer))
    return functools.partial(MaxViTBlock, tuple(made), stride=1 if j else 2, drop_path=rates[i][j])

  rates = drop_path_rates(drop_path, depths)
  backbone = functools.partial(
    coatnet.CoAtNet,
    image_size=image_size,
    stem=functools.partial(
      coatnet.Stem,
      (stem_dim, stem_dim),
      use_bias=True,
      activation=activation,
      conv=convolution,
      norm=batch_norm,
    ),
    stages=[[block(i, j) for j in range(depth)] for i, depth in enumerate(depths)],
    strides=(2,) * len(depths),
    remat=remat,
    scan=scan,
    dtype=dtype,
  )
  head = functools.partial(
    heads.LinearHead,
    num_classes=num_classes,
    feature=f'stage{len(depths)}',
    norm=layer_norm,
    hidden_dim=dims[-1] if pre_logits else 0,
    dropout=dropout,
    kernel_init=INIT,
    hidden_init=INIT,
    **types,
  )
  return base.Parts(backbone, head)


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
  """Returns the rate of every block; the first has 0."""
  return drop_path.linear_rates(rate, depths, last=False)


def _variant(depths, dims, stem_dim, params, gmacs, top1, source='Table 2') -> base.Variant:
  return base.Variant(
    {'depths': depths, 'dims': dims, 'stem_dim': stem_dim},
    params=params,
    flops=gmacs and gmacs * 1e9,
    top1=top1,
    source=f'arXiv 2204.01697, {source}',
  )


_SHORT, _LONG = (2, 2, 5, 2), (2, 6, 14, 2)
VARIANTS = {
  'maxvit_tiny': _variant(_SHORT, (64, 128, 256, 512), 64, 30_916_528, 5.6, 83.62),
  'maxvit_small': _variant(_SHORT, (96, 192, 384, 768), 64, 68_927_956, 11.7, 84.45),
  # Table 2 prints 23.4 G multiply-adds, Table 10 and the authors' repository 24.2.
  'maxvit_base': _variant(
    _LONG, (96, 192, 384, 768), 64, 119_467_708, 24.2, 84.95, 'Table 2; multiply-adds of Table 10'
  ),
  'maxvit_large': _variant(_LONG, (128, 256, 512, 1024), 128, 211_785_560, 43.9, 85.17),
  # Published after pre-training on ImageNet-21k or JFT alone, at 384 and 512 pixels.
  'maxvit_xlarge': _variant(_LONG, (192, 384, 768, 1536), 192, 474_951_952, None, None, 'Table 1'),
}

_rule = reference.Rule


def _flipped(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """A table `[heads, y, x]` over key minus query to ours, over query minus key."""
  del shape
  return array[:, ::-1, ::-1] if array.ndim == 3 else array


def _leaves(**leaves: str) -> reference.Kind:
  """A module of TensorFlow's, whose arrays are those of ours under other names."""
  return {
    theirs: (
      reference.Leaf(
        'batch_stats' if ours in ('mean', 'var') else 'params', ours, reference.heads_joined
      ),
    )
    for theirs, ours in leaves.items()
  }


_CONV = _leaves(kernel='kernel', depthwise_kernel='kernel', bias='bias')
_DENSE = _leaves(weight='kernel', bias='bias')
_NORM = _leaves(gamma='scale', beta='bias', moving_mean='mean', moving_variance='var')
_MBCONV = {
  'pre_norm': ('pre_norm', _NORM),
  'expand_conv': ('expand', _CONV),
  'expand_norm': ('norm1', _NORM),
  'depthwise_conv': ('depthwise', _CONV),
  'depthwise_norm': ('norm2', _NORM),
  'se/reduce_conv2d': ('se/squeeze', _CONV),
  'se/expand_conv2d': ('se/excite', _CONV),
  'shrink_conv': ('project', _CONV),
  'shortcut_conv': ('shortcut/proj', _CONV),
}
_ATTENTION = {
  'attn_layer_norm{}': ('norm1', _NORM),
  'attention{}/q': ('attn/query', _DENSE),
  'attention{}/k': ('attn/key', _DENSE),
  'attention{}/v': ('attn/value', _DENSE),
  'attention{}/o': ('attn/proj', _DENSE),
  'attention{}/relative_bias': ('attn/relative_position', reference.param('', _flipped)),
  'ffn_layer_norm{}': ('norm2', _NORM),
  'ffn{}/expand_dense': ('mlp/expand', _DENSE),
  'ffn{}/shrink_dense': ('mlp/project', _DENSE),
}
_BLOCK, _OURS = r'block_(\d+)_(\d+)/', 'backbone/stage{0:+1}/block{1:02d}/'
_OFFICIAL_RULES = (
  _rule(r'stem/conv_(\d)', 'backbone/stem/conv{0:+1}', _CONV),
  _rule('stem/norm_0', 'backbone/stem/norm', _NORM),
  *(_rule(f'{_BLOCK}mbconv/{a}', f'{_OURS}mbconv/{b}', kind) for a, (b, kind) in _MBCONV.items()),
  *(
    _rule(_BLOCK + a.format(suffix), f'{_OURS}{layer}/{b}', kind)
    for suffix, layer in (('', 'block'), ('_1', 'grid'))
    for a, (b, kind) in _ATTENTION.items()
  ),
  _rule('final_layer_norm', 'head/norm', _NORM),
  _rule('cls_head/inner_dense', 'head/pre_logits', _DENSE),
  _rule('cls_head/logit_dense', 'head/classifier', _DENSE),
)
_TIMM_BLOCK = r'stages\.(\d+)\.blocks\.(\d+)\.'
_TIMM_ATTENTION = {
  r'norm(\d)': ('norm{3}', reference.NORM),
  r'attn\.qkv': ('attn', reference.fused('query', 'key', 'value')),
  r'attn\.rel_pos\.relative_position_bias_table': (
    'attn/relative_position',
    reference.param('', _flipped),
  ),
  r'attn\.proj': ('attn/proj', reference.DENSE),
  r'mlp\.fc1': ('mlp/expand', reference.DENSE),
  r'mlp\.fc2': ('mlp/project', reference.DENSE),
}
_TIMM_RULES = (
  _rule(r'stem\.conv(\d)', 'backbone/stem/conv{0}', reference.CONV),
  _rule(r'stem\.norm1', 'backbone/stem/norm', reference.NORM),
  *(
    _rule(rf'{_TIMM_BLOCK}conv\.{a}', f'{_OURS}mbconv/{b}', kind)
    for a, (b, kind) in coatnet.TIMM_MBCONV.items()
  ),
  *(
    _rule(rf'{_TIMM_BLOCK}attn_(block|grid)\.{a}', f'{_OURS}{{2}}/{b}', kind)
    for a, (b, kind) in _TIMM_ATTENTION.items()
  ),
  _rule(r'head\.norm', 'head/norm', reference.NORM),
  _rule(r'head\.pre_logits\.fc', 'head/pre_logits', reference.DENSE),
  _rule(r'head\.fc', 'head/classifier', reference.DENSE),
)


def _official_prepare(state: reference.State) -> reference.State:
  """Takes averaged weights where a checkpoint has them; drops the scope and the optimizer's."""
  average = '/ExponentialMovingAverage'
  state = {key.removesuffix(':0'): value for key, value in state.items()}
  plain = {key: value for key, value in state.items() if not key.endswith(average)}
  averaged = {key.removesuffix(average): v for key, v in state.items() if key.endswith(average)}
  found = {key.removeprefix('maxvit/'): value for key, value in {**plain, **averaged}.items()}
  extra = re.compile(r'(global_step|.*/Adam\w*)')
  return {key: value for key, value in found.items() if not extra.fullmatch(key)}


def _infer(table: str, classifier: str):
  """Returns what reads classes and the tables' resolution off a state, whose keys these are."""

  def infer(state: reference.State, options: Mapping[str, Any]) -> dict[str, Any]:
    del options
    found: dict[str, Any] = {'num_classes': len(state[classifier]) if classifier in state else 0}
    if table in state and state[table].ndim == 3:
      found['image_size'] = tuple(16 * (side + 1) for side in state[table].shape[1:])
    return found

  return infer


REFERENCES = {
  'official': reference.Reference(
    origin='github.com/google-research/maxvit, maxvit/models/maxvit.py',
    rules=_OFFICIAL_RULES,
    prepare=_official_prepare,
    infer=_infer('block_00_00/attention/relative_bias', 'cls_head/logit_dense/bias'),
  ),
  'timm': reference.Reference(
    origin='github.com/huggingface/pytorch-image-models, timm/models/maxxvit.py, maxvit_*_tf_*',
    rules=_TIMM_RULES,
    infer=_infer(
      'stages.0.blocks.0.attn_block.attn.rel_pos.relative_position_bias_table', 'head.fc.bias'
    ),
    ignore=(r'.*\.(relative_position_index|(height|width)_lookup)',),
  ),
}
