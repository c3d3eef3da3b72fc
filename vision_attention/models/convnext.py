"""ConvNeXt (arXiv 2201.03545): blocks of a 7x7 depthwise convolution and an MLP, in four stages."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.attention import operators
from vision_attention.layers import (
  conv,
  drop_path,
  heads,
  mlp,
  norm,
  patch_embed,
)
from vision_attention.layers import layer_scale as scales
from vision_attention.models import base, hierarchy, reference, resnet_blocks

ModuleDef = Callable[..., nn.Module]
PerBlock = Sequence[Sequence[operators.Spec | None]]
# The code bounds the normal distribution at 2, a hundred times its spread.
INIT = nn.initializers.normal(0.02)


class Block(nn.Module):
  """`x + scale * MLP(LN(Depthwise(x)))` (figure 4).

  Attributes:
    dim: width.
    kernel_size: of the depthwise convolution.
    attn: an operator in its place, called with `dim` and a name, or None.
    layer_scale: a learned factor per channel, or None.
    drop_path: rate of stochastic depth.
  """

  dim: int
  kernel_size: int
  attn: ModuleDef | None
  layer_scale: ModuleDef | None
  drop_path: float
  conv: ModuleDef
  mlp: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b h w c']:
    if self.attn is not None:
      y = self.attn(dim=self.dim, name='attn')(x, train=train)
    else:
      y = self.conv(self.dim, self.kernel_size, groups=self.dim, name='depthwise')(x)
    y = self.norm(name='norm')(y, train=train)
    y = self.mlp(hidden_dim=4 * self.dim, name='mlp')(y, train=train)
    if self.layer_scale is not None:
      y = self.layer_scale(name='layer_scale')(y)
    return x + drop_path.DropPath(self.drop_path, name='drop_path')(y, train=train)


class Downsample(nn.Module):
  """LayerNorm, then a 2x2 convolution of stride 2; at odd sizes the last pixels are left out."""

  dim: int
  conv: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    y = self.norm(name='norm')(x, train=train)
    return self.conv(self.dim, 2, 2, padding='valid', name='conv')(y)


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  depths: Sequence[int],
  dims: Sequence[int],
  kernel_size: int = 7,
  attn: operators.Spec | PerBlock | None = None,
  num_heads: Sequence[int] | None = None,
  layer_scale: float | None = 1e-6,
  activation: str = 'gelu_exact',
  norm_epsilon: float = 1e-6,
  dropout: float = 0.0,
  drop_path: float = 0.0,
  head_init_scale: float = 1.0,
  remat: bool = False,
  scan: bool = False,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    num_classes: outputs of the head.
    image_size: height and width; any of 32 and more. What patches and halving leave over at bottom
      and right is not seen.
    dtype: of activations.
    param_dtype: of parameters.
    depths: blocks per stage.
    dims: width per stage.
    kernel_size: of the depthwise convolutions, odd.
    attn: an operator in their place, or one per stage and block (None keeps the convolution).
    num_heads: of the operator, per stage; one per 32 channels unless given.
    layer_scale: what the learned factor of every branch begins at, or None for no factor.
    activation: a name of `ops.activation`.
    norm_epsilon: of LayerNorm.
    dropout: before the classifier.
    drop_path: rate of stochastic depth of the last block; the first has 0.
    head_init_scale: factor of the classifier's initial kernel (0.001 in fine-tuning).
    remat: whether blocks are computed again in the backward pass, to save memory.
    scan: whether equal blocks are compiled once, and their variables stacked.

  Raises:
    ValueError: for numbers of stages that differ, or an even kernel.
  """
  del image_size
  counts = tuple(max(1, dim // 32) for dim in dims) if num_heads is None else tuple(num_heads)
  if not len(depths) == len(dims) == len(counts):
    raise ValueError(f'{depths=}, {dims=} and num_heads={counts} must have one entry per stage')
  errors.check_odd('kernel_size', kernel_size)
  types: dict[str, Any] = {'dtype': dtype, 'param_dtype': param_dtype}
  layer = functools.partial(
    conv.Conv, padding='symmetric', use_bias=True, kernel_init=INIT, **types
  )
  layer_norm = functools.partial(norm.LayerNorm, epsilon=norm_epsilon, **types)
  scale = scales.define(layer_scale, **types)
  per_block: Any = attn if resnet_blocks.is_nested(attn) else [[attn] * n for n in depths]
  rates = drop_path_rates(drop_path, depths)

  def block(i: int, j: int) -> ModuleDef:
    spec = per_block[i][j]
    operator = None
    if spec is not None:
      operator = operators.bind(operators.operator(spec), num_heads=counts[i], **types)
    return functools.partial(
      Block,
      dim=dims[i],
      kernel_size=kernel_size,
      attn=operator,
      layer_scale=scale,
      drop_path=rates[i][j],
      conv=layer,
      mlp=functools.partial(mlp.Mlp, activation=activation, kernel_init=INIT, **types),
      norm=layer_norm,
    )

  return assemble(
    [[block(i, j) for j in range(depth)] for i, depth in enumerate(depths)],
    dims,
    num_classes=num_classes,
    conv_layer=layer,
    norm_layer=layer_norm,
    dropout=dropout,
    head_init_scale=head_init_scale,
    remat=remat,
    scan=scan,
    **types,
  )


def assemble(
  stages: Sequence[Sequence[ModuleDef]],
  dims: Sequence[int],
  *,
  num_classes: int,
  conv_layer: ModuleDef,
  norm_layer: ModuleDef,
  dropout: float,
  head_init_scale: float,
  remat: bool,
  scan: bool,
  **types: Any,
) -> base.Parts:
  """Returns backbone and head of ConvNeXt around the blocks of every stage, which may be others."""
  backbone = functools.partial(
    hierarchy.Hierarchy,
    stem=functools.partial(
      patch_embed.PatchEmbed, dim=dims[0], patch=4, pad=False, conv=conv_layer, norm=norm_layer
    ),
    stages=stages,
    downsamples=[functools.partial(Downsample, dim, conv_layer, norm_layer) for dim in dims[1:]],
    smallest=2 ** (len(dims) + 1),
    remat=remat,
    scan=scan,
    dtype=types['dtype'],
  )
  head = functools.partial(
    heads.LinearHead,
    num_classes=num_classes,
    feature=f'stage{len(stages)}',
    norm=norm_layer,
    dropout=dropout,
    kernel_init=nn.initializers.normal(0.02 * head_init_scale),
    **types,
  )
  return base.Parts(backbone, head)


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
  """Returns the rate of every block."""
  return drop_path.linear_rates(rate, depths)


def _variant(dim, depth, params, gmacs, top1, source) -> base.Variant:
  return base.Variant(
    {'depths': (3, 3, depth, 3), 'dims': tuple(dim * 2**i for i in range(4))},
    params=params,
    flops=gmacs * 1e9,
    top1=top1,
    source=source,
  )


_1K = 'arXiv 2201.03545, Table 1 (ImageNet-1k)'
_22K = 'arXiv 2201.03545, Table 1 (ImageNet-22k pre-training)'
VARIANTS = {
  'convnext_tiny': _variant(96, 9, 28_589_128, 4.5, 82.1, _1K),
  'convnext_small': _variant(96, 27, 50_223_688, 8.7, 83.1, _1K),
  'convnext_base': _variant(128, 27, 88_591_464, 15.4, 83.8, _1K),
  'convnext_large': _variant(192, 27, 197_767_336, 34.4, 84.3, _1K),
  'convnext_xlarge': _variant(256, 27, 350_196_968, 60.9, 87.0, _22K),
}


def _rules(stem: str, downsample: str, block: str, names: Mapping[str, str], head: str):
  """Returns the renames, given the reference's patterns.

  Args:
    stem: of the stem's two layers; the group is their number.
    downsample: of a downsampling's two layers; the groups are its stage and their number.
    block: of a block; the groups are stage and block.
    names: the parts of a block.
    head: of the norm behind the pooling and the classifier, as `norm|classifier`.
  """
  rule, ours = reference.Rule, 'backbone/stage{0:+1}/block{1:02d}/'
  last_norm, classifier = head.split('|')
  kinds = {'depthwise': reference.CONV, 'norm': reference.NORM}
  return (
    rule(stem.format('0'), 'backbone/stem/conv', reference.CONV),
    rule(stem.format('1'), 'backbone/stem/norm', reference.NORM),
    rule(downsample.format('0'), 'backbone/downsample{0:+1}/norm', reference.NORM),
    rule(downsample.format('1'), 'backbone/downsample{0:+1}/conv', reference.CONV),
    *(rule(block + a, ours + b, kinds.get(b, reference.DENSE)) for a, b in names.items()),
    rule(block + 'gamma', ours + 'layer_scale/scale', reference.param('')),
    rule(last_norm, 'head/norm', reference.NORM),
    rule(classifier, 'head/classifier', reference.DENSE),
  )


def _infer(gamma: str, classifier: str):
  def infer(state: reference.State, options: Mapping[str, Any]) -> dict[str, Any]:
    del options
    bias = state.get(classifier)
    found: dict[str, Any] = {'num_classes': 0 if bias is None else len(bias)}
    return found if gamma in state else {**found, 'layer_scale': None}

  return infer


# Layers of layer-wise learning-rate decay: 12 groups, three blocks of stage 3 in each.
DECAY_LAYERS = {
  'backbone/stem/': 0,
  'backbone/stage1/': 1,
  'backbone/(downsample2|stage2)/': 2,
  'backbone/downsample3/': 3,
  **{
    f'backbone/stage3/block({"|".join(f"{3 * k + j:02d}" for j in range(3))})/': 3 + k
    for k in range(9)
  },
  'backbone/(downsample4|stage4)/': 12,
}
_OFFICIAL_RULES = _rules(
  r'downsample_layers\.0\.{}',
  r'downsample_layers\.(\d+)\.{}',
  r'stages\.(\d+)\.(\d+)\.',
  {'dwconv': 'depthwise', 'norm': 'norm', 'pwconv1': 'mlp/expand', 'pwconv2': 'mlp/project'},
  'norm|head',
)
_HF_NAMES = reference.renaming(
  (r'^convnext\.embeddings\.patch_embeddings', 'downsample_layers.0.0'),
  (r'^convnext\.embeddings\.layernorm', 'downsample_layers.0.1'),
  (r'^convnext\.encoder\.stages\.(\d+)\.downsampling_layer', r'downsample_layers.\1'),
  (r'^convnext\.encoder\.stages\.(\d+)\.layers', r'stages.\1'),
  (r'^(stages\..*)layernorm', r'\1norm'),
  (r'^(stages\..*)layer_scale_parameter', r'\1gamma'),
  (r'^convnext\.layernorm', 'norm'),
  ('^classifier', 'head'),
)
REFERENCES = {
  'official': reference.Reference(
    origin='github.com/facebookresearch/ConvNeXt, models/convnext.py',
    rules=_OFFICIAL_RULES,
    infer=_infer('stages.0.0.gamma', 'head.bias'),
  ),
  'timm': reference.Reference(
    origin='github.com/huggingface/pytorch-image-models, timm/models/convnext.py',
    rules=_rules(
      r'stem\.{}',
      r'stages\.(\d+)\.downsample\.{}',
      r'stages\.(\d+)\.blocks\.(\d+)\.',
      {
        'conv_dw': 'depthwise',
        'norm': 'norm',
        r'mlp\.fc1': 'mlp/expand',
        r'mlp\.fc2': 'mlp/project',
      },
      r'head\.norm|head\.fc',
    ),
    infer=_infer('stages.0.blocks.0.gamma', 'head.fc.bias'),
  ),
  'hf': reference.Reference(
    origin='github.com/huggingface/transformers, models/convnext/modeling_convnext.py',
    rules=_OFFICIAL_RULES,
    prepare=_HF_NAMES,
    infer=_infer('stages.0.0.gamma', 'head.bias'),
  ),
}
