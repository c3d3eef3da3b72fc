"""CoAtNet (arXiv 2106.04803): MBConv stages, then transformer stages with relative attention.

There is no official code. Where the paper is silent, the same authors' MaxViT code decides:
LayerNorm and a dense layer with tanh before the classifier (with it the published sizes come out
exactly), the form of the squeeze, tanh GELU, epsilons.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.attention import operators, relative
from vision_attention.layers import conv, drop_path, heads, mbconv, mlp, norm, squeeze_excite, stage
from vision_attention.models import base, reference
from vision_attention.ops import activation, relative_position

ModuleDef = Callable[..., nn.Module]
INIT = nn.initializers.normal(0.02)
RESIZE = {r'params/backbone/.*/attn/relative_position': relative_position.resize_table}


class TransformerBlock(nn.Module):
  """`x + Attn(LN(x))`, then `x + FFN(LN(x))`; with a stride, equation 4 of the appendix.

  `x = Proj(Pool(x)) + Attn(Pool(LN(x)))`: both branches are pooled, and the width changes in the
  projection of the shortcut and in query, key and value of the other.

  Attributes:
    dim: output width.
    head_dim: channels of a head.
    stride: 1 or 2.
    pool: `max` or `avg`.
    attn: the operator, called with `dim`, `num_heads` and a name.
    drop_path: rate of stochastic depth of either residual branch.
    heads_from: the width that heads divide, that of the block's `output` or of its `input`.
    shortcut_bias: whether the shortcut's projection has a bias.
    layer_scale: a learned factor per channel at the end of either branch, or None.
  """

  dim: int
  head_dim: int
  stride: int
  pool: str
  drop_path: float
  attn: ModuleDef
  mlp: ModuleDef
  conv: ModuleDef
  norm: ModuleDef
  heads_from: str = 'output'
  shortcut_bias: bool = True
  layer_scale: ModuleDef | None = None

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    shortcut = mbconv.PoolProject(
      self.dim, self.stride, self.pool, self.conv, self.shortcut_bias, name='shortcut'
    )(x)
    heads_dim = x.shape[-1] if self.heads_from == 'input' else self.dim
    y = self.norm(name='norm1')(x, train=train)
    y = y if self.stride == 1 else mbconv.halve(y, self.pool)
    num_heads = heads_dim // self.head_dim
    attn = operators.bind(self.attn, dim=self.dim, num_heads=num_heads, head_dim=self.head_dim)
    y = attn(name='attn')(y, train=train)
    y = self.layer_scale(name='scale1')(y) if self.layer_scale else y
    x = shortcut + drop_path.DropPath(self.drop_path, name='drop_path1')(y, train=train)
    y = self.norm(name='norm2')(x, train=train)
    y = self.mlp(4 * self.dim, name='mlp')(y, train=train)
    y = self.layer_scale(name='scale2')(y) if self.layer_scale else y
    return x + drop_path.DropPath(self.drop_path, name='drop_path2')(y, train=train)


class Stem(nn.Module):
  """Two 3x3 convolutions, the first of stride 2; norm and activation between them."""

  dims: Sequence[int]
  use_bias: bool
  activation: str
  conv: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    x = self.conv(self.dims[0], stride=2, use_bias=self.use_bias, name='conv1')(x)
    x = activation.by_name(self.activation)(self.norm(name='norm')(x, train=train))
    return self.conv(self.dims[1], use_bias=self.use_bias, name='conv2')(x)


class CoAtNet(nn.Module):
  """Stem and stages of blocks; the features are the last map of every resolution.

  Attributes:
    image_size: height and width that the tables of relative positions are made for.
    stem: the stem, but for its name.
    stages: per stage, its blocks.
    strides: of the stages.
    final_norm: a norm on the last map, or None.
  """

  image_size: tuple[int, int]
  stem: ModuleDef
  stages: Sequence[Sequence[ModuleDef]]
  strides: Sequence[int]
  final_norm: ModuleDef | None = None
  remat: bool = False
  scan: bool = False
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, images: Float[Array, 'b h w c'], *, train: bool
  ) -> dict[str, Float[Array, 'b p q d']]:
    base.check_image_size(images, self.image_size)
    x = self.stem(name='stem')(images.astype(self.dtype), train=train)
    features, level = {}, 0
    for i, (blocks, stride) in enumerate(zip(self.stages, self.strides, strict=True), 1):
      x = stage.Stage(blocks, self.remat, scan=self.scan, name=f'stage{i}')(x, train=train)
      if self.final_norm is not None and i == len(self.stages):
        x = self.final_norm(name='norm')(x, train=train)
      level += stride == 2
      features[f'stage{level}'] = x
    return features


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
  layout: str = 'CCTT',
  strides: Sequence[int] = (2, 2, 2, 2),
  stride_in: str = 'expand',
  pool: str = 'max',
  attn: operators.Spec = relative.RelativeAttention,
  activation: str = 'gelu_tanh',
  padding: str = 'same',
  stem_bias: bool = True,
  norm_epsilon: float = 1e-3,
  norm_momentum: float = 0.99,
  layer_norm_epsilon: float = 1e-5,
  drop_path: float = 0.0,
  dropout: float = 0.0,
  head_norm: bool = True,
  pre_logits: bool = True,
  remat: bool = False,
  scan: bool = False,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    num_classes: outputs of the head.
    image_size: height and width.
    dtype: of activations.
    param_dtype: of parameters.
    depths: blocks per stage.
    dims: width per stage.
    stem_dim: width of the stem.
    head_dim: channels of an attention head.
    layout: a letter per stage: `C` for MBConv, `T` for the transformer block.
    strides: per stage, of its first block.
    stride_in: where an MBConv's stride sits: `expand` (equation 5), `depthwise` (Table 9 and the
      models marked with a dagger) or `inputs`.
    pool: `max` (the paper) or `avg`, in every shortcut and before attention.
    attn: the operator of the transformer blocks.
    activation: a name of `ops.activation`.
    padding: of convolutions, `same` (TensorFlow) or `symmetric` (PyTorch).
    stem_bias: whether the stem's convolutions have biases.
    norm_epsilon: of BatchNorm.
    norm_momentum: of BatchNorm's running statistics.
    layer_norm_epsilon: of LayerNorm.
    drop_path: rate of stochastic depth `p`; block `b` of `B` drops `p b / B`.
    dropout: rate before the classifier.
    head_norm: whether a LayerNorm follows the global average pooling.
    pre_logits: whether a dense layer of the last width with tanh precedes the classifier.
    remat: whether blocks are computed again in the backward pass, to save memory.
    scan: whether equal blocks are compiled once, and their variables stacked.

  Raises:
    ValueError: for stages of different numbers, or widths that heads do not divide.
  """
  if not len(depths) == len(dims) == len(strides) == len(layout):
    raise ValueError(
      f'layout {layout!r}, depths {depths}, dims {dims} and strides {strides} must have one entry '
      'per stage'
    )
  for kind, dim in zip(layout, dims, strict=True):
    errors.check_choice('stage in layout', kind, ('C', 'T'))
    if kind == 'T' and dim % head_dim:
      raise ValueError(f'head_dim {head_dim} does not divide the width {dim} of dims {dims}')
  types = {'dtype': dtype, 'param_dtype': param_dtype}
  layer = functools.partial(conv.Conv, padding=padding, kernel_init=INIT, **types)
  batch_norm = functools.partial(
    norm.BatchNorm, epsilon=norm_epsilon, momentum=norm_momentum, **types
  )
  layer_norm = functools.partial(norm.LayerNorm, epsilon=layer_norm_epsilon, **types)
  shared = {
    'C': functools.partial(
      mbconv.MBConv,
      stride_in=stride_in,
      pool=pool,
      activation=activation,
      conv=layer,
      norm=batch_norm,
      squeeze=functools.partial(
        squeeze_excite.SqueezeExcite, activation='silu', kernel_init=INIT, **types
      ),
    ),
    'T': functools.partial(
      TransformerBlock,
      head_dim=head_dim,
      pool=pool,
      attn=operators.bind(operators.operator(attn), kernel_init=INIT, **types),
      mlp=functools.partial(mlp.Mlp, activation=activation, kernel_init=INIT, **types),
      conv=layer,
      norm=layer_norm,
    ),
  }
  rates = drop_path_rates(drop_path, depths, last=False)
  stages = [
    [
      functools.partial(
        shared[kind], dim=dim, stride=stride if j == 0 else 1, drop_path=stage_rates[j]
      )
      for j in range(depth)
    ]
    for kind, dim, stride, depth, stage_rates in zip(
      layout, dims, strides, depths, rates, strict=True
    )
  ]
  backbone = functools.partial(
    CoAtNet,
    image_size=image_size,
    stem=functools.partial(
      Stem,
      (stem_dim, stem_dim),
      use_bias=stem_bias,
      activation=activation,
      conv=layer,
      norm=batch_norm,
    ),
    stages=stages,
    strides=tuple(strides),
    remat=remat,
    scan=scan,
    dtype=dtype,
  )
  head = functools.partial(
    heads.LinearHead,
    num_classes=num_classes,
    feature=f'stage{list(strides).count(2)}',
    norm=layer_norm if head_norm else None,
    hidden_dim=dims[-1] if pre_logits else 0,
    dropout=dropout,
    kernel_init=INIT,
    hidden_init=INIT,
    **types,
  )
  return base.Parts(backbone, head)


def drop_path_rates(rate: float, depths: Sequence[int], *, last: bool) -> list[list[float]]:
  """Returns the rate of every block; see `layers.drop_path.linear_rates`."""
  return drop_path.linear_rates(rate, depths, last=last)


def _variant(depths, dims, stem_dim, params, gmacs, top1, size=224, **options) -> base.Variant:
  return base.Variant(
    {'depths': depths, 'dims': dims, 'stem_dim': stem_dim, **options},
    image_size=size,
    params=params,
    flops=gmacs * 1e9,
    top1=top1,
    source='arXiv 2106.04803, ' + {224: 'Table 4', 512: 'Table 5 (JFT pre-training)'}[size],
  )


_HUGE = {'layout': 'CCCTT', 'strides': (2, 2, 2, 1, 2), 'head_dim': 128}
VARIANTS = {
  'coatnet_0': _variant((2, 3, 5, 2), (96, 192, 384, 768), 64, 25_036_948, 4.2, 81.6),
  'coatnet_1': _variant((2, 6, 14, 2), (96, 192, 384, 768), 64, 42_225_904, 8.4, 83.3),
  'coatnet_2': _variant((2, 6, 14, 2), (128, 256, 512, 1024), 128, 74_685_000, 15.7, 84.1),
  'coatnet_3': _variant((2, 6, 14, 2), (192, 384, 768, 1536), 192, 166_966_648, 34.7, 84.5),
  'coatnet_4': _variant((2, 12, 28, 2), (192, 384, 768, 1536), 192, 277_678_984, 360.9, 89.11, 512),
  'coatnet_5': _variant(
    (2, 12, 28, 2), (256, 512, 1280, 2048), 192, 688_918_424, 812, 89.77, 512, head_dim=64
  ),
  # Table 12 prints 2048 for the last width, which gives 1.35 billion parameters; 3072 gives the
  # published 1.47 billion and the better match of multiply-adds.
  'coatnet_6': _variant(
    (2, 4, 8, 42, 2), (192, 384, 768, 1536, 3072), 192, 1_472_796_592, 1521, 90.45, 512, **_HUGE
  ),
  'coatnet_7': _variant(
    (2, 4, 8, 42, 2), (256, 512, 1024, 2048, 3072), 192, 2_444_188_408, 2586, 90.88, 512, **_HUGE
  ),
}


# timm's names within an MBConv block.
TIMM_MBCONV = {
  'pre_norm': ('pre_norm', reference.NORM),
  'conv1_1x1': ('expand', reference.CONV),
  'norm1': ('norm1', reference.NORM),
  'conv2_kxk': ('depthwise', reference.CONV),
  'norm2': ('norm2', reference.NORM),
  r'se\.fc1': ('se/squeeze', reference.CONV),
  r'se\.fc2': ('se/excite', reference.CONV),
  'conv3_1x1': ('project', reference.CONV),
  r'shortcut\.expand': ('shortcut/proj', reference.CONV),
}


def timm_rules(options: Mapping[str, Any]) -> Sequence[reference.Rule]:
  """timm's names; every projection of it is a 1x1 convolution, and qkv is ordered by head."""
  rules = []
  rule, conv_, norm_ = reference.Rule, reference.CONV, reference.NORM
  for i, (kind, dim) in enumerate(zip('CCTT', options['dims'], strict=True)):
    theirs, ours = rf'stages\.{i}\.blocks\.(\d+)\.', f'backbone/stage{i + 1}/block{{0:02d}}/'
    names = {
      'C': TIMM_MBCONV,
      'T': {
        r'norm1(?:\.norm)?': ('norm1', norm_),
        r'attn\.qkv': (
          'attn',
          reference.fused('query', 'key', 'value', heads=dim // options['head_dim']),
        ),
        r'attn\.rel_pos\.relative_position_bias_table': (
          'attn/relative_position',
          reference.param('', _timm_table),
        ),
        r'attn\.proj': ('attn/proj', conv_),
        'norm2': ('norm2', norm_),
        r'mlp\.fc1': ('mlp/expand', conv_),
        r'mlp\.fc2': ('mlp/project', conv_),
      },
    }[kind]
    names = {**names, r'shortcut\.expand': ('shortcut/proj', conv_)}
    rules += [rule(theirs + a, ours + b, k) for a, (b, k) in names.items()]
  return [
    *rules,
    rule(r'stem\.conv(\d)', 'backbone/stem/conv{0}', conv_),
    rule(r'stem\.norm1', 'backbone/stem/norm', norm_),
    rule(r'head\.norm', 'head/norm', norm_),
    rule(r'head\.pre_logits\.fc', 'head/pre_logits', reference.DENSE),
    rule(r'head\.fc', 'head/classifier', reference.DENSE),
  ]


def _timm_table(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """`[offsets, heads]`, rows first and query minus key like ours, to `[heads, y, x]`."""
  return array.T.reshape(shape) if array.size == math.prod(shape) else array


def timm_infer(state: reference.State, options: Mapping[str, Any]) -> dict[str, Any]:
  """The first transformer stage works at 1/16, and its table has `2 size / 16 - 1` rows."""
  del options
  offsets = state['stages.2.blocks.0.attn.rel_pos.relative_position_bias_table'].shape[0]
  side = round(offsets**0.5)
  classifier = state.get('head.fc.bias')
  return {
    'image_size': 16 * (side + 1) // 2,
    'num_classes': 0 if classifier is None else len(classifier),
  }


REFERENCES = {
  'timm': reference.Reference(
    origin='github.com/huggingface/pytorch-image-models, timm/models/maxxvit.py, coatnet_*_224',
    rules=timm_rules,
    options={
      'activation': 'gelu_exact',
      'padding': 'symmetric',
      'norm_epsilon': 1e-5,
      'layer_norm_epsilon': 1e-6,
      'norm_momentum': 0.9,
      'stem_bias': False,
      'stride_in': 'depthwise',
      'pool': 'avg',
      'head_dim': 32,
    },
    infer=timm_infer,
    ignore=(r'.*\.relative_position_index',),
    variants=('coatnet_[0-5]',),
  ),
}
