"""NAT (arXiv 2204.07143) and DiNAT (arXiv 2209.15001): neighbourhood attention in every block.

Every other block of DiNAT is dilated. DiNAT_s has the patches and merges of Swin in place of
overlapping convolutions; the isotropic models are one stage of 16x16 patches.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.attention import neighborhood, operators
from vision_attention.layers import (
  conv,
  drop_path,
  heads,
  initializers,
  mlp,
  norm,
  patch_embed,
)
from vision_attention.layers import layer_scale as scales
from vision_attention.models import base, hierarchy, reference, resnet_blocks, swin, vit
from vision_attention.ops import bicubic

ModuleDef = Callable[..., nn.Module]
PerBlock = Sequence[Sequence[operators.Spec]]
INIT = nn.initializers.truncated_normal(0.02)
# From 7x7 to 11x11 neighbours, as for DiNAT-L at 384 pixels.
RESIZE = {r'params/backbone/.*/attn/relative_position': bicubic.resize}
STEMS = ('conv', 'patch')
POLICIES = ('fixed', 'scale')


class Stem(nn.Module):
  """Two 3x3 convolutions of stride 2, without anything in between, then a norm."""

  dim: int
  conv: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    for i, dim in enumerate((self.dim // 2, self.dim), 1):
      bias = initializers.torch_bias(9 * x.shape[-1])
      x = self.conv(dim, 3, 2, use_bias=True, bias_init=bias, name=f'conv{i}')(x)
    return self.norm(name='norm')(x, train=train)


class Downsample(nn.Module):
  """A 3x3 convolution of stride 2, then a norm."""

  dim: int
  conv: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    return self.norm(name='norm')(self.conv(self.dim, 3, 2, name='conv')(x), train=train)


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  depths: Sequence[int],
  dim: int,
  num_heads: Sequence[int],
  kernel: int = 7,
  dilations: Sequence[Sequence[int]] = ((1,),),
  dilation_policy: str = 'fixed',
  stem: str = 'conv',
  patch: int = 4,
  mlp_ratio: float = 3,
  layer_scale: float | None = None,
  qkv_bias: bool = True,
  attn: operators.Spec | PerBlock = neighborhood.NeighborhoodAttention,
  activation: str = 'gelu_exact',
  norm_epsilon: float = 1e-5,
  dropout: float = 0.0,
  drop_path: float = 0.0,
  remat: bool = False,
  scan: bool = False,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    num_classes: outputs of the head.
    image_size: height and width; any. No parameter depends on it. Maps that are smaller than
      `kernel * dilation` are padded for attention.
    dtype: of activations.
    param_dtype: of parameters.
    depths: blocks per stage.
    dim: width of the first stage; every further stage has twice that of the one before.
    num_heads: per stage.
    kernel: side of a neighbourhood, odd.
    dilations: per stage, or once for all, the distances of neighbours of its first blocks, which
      repeat until its last.
    dilation_policy: `fixed`, those at any image size, or `scale`, in place of those above one the
      largest that the stage's map has room for (8, 4, 2, 1 at 224 pixels, 13, 6, 3, 1 at 384).
    stem: `conv`, overlapping convolutions, also between stages (NAT, DiNAT), or `patch`, patches
      of `patch` pixels and Swin's merging of them (DiNAT_s, isotropic models).
    patch: side of a patch.
    mlp_ratio: width inside the MLP relative to the block's.
    layer_scale: what a learned factor of every branch begins at, or None for no factor.
    qkv_bias: whether query, key and value have biases.
    attn: the operator, or one per stage and block. One with fields `kernel` and `dilation` gets
      these.
    activation: a name of `ops.activation`.
    norm_epsilon: of LayerNorm.
    dropout: after attention and within the MLP.
    drop_path: rate of stochastic depth of the last block; the first has 0.
    remat: whether blocks are computed again in the backward pass, to save memory.
    scan: whether equal blocks are compiled once, and their variables stacked.

  Raises:
    ValueError: for an unknown choice, numbers of stages that differ, or heads that do not divide a
      width.
  """
  errors.check_choice('stem', stem, STEMS)
  errors.check_choice('dilation_policy', dilation_policy, POLICIES)
  dilations = tuple(dilations) * len(depths) if len(dilations) == 1 else tuple(dilations)
  if not len(depths) == len(num_heads) == len(dilations):
    raise ValueError(f'{depths=}, {num_heads=} and {dilations=} must have one entry per stage')
  dims = [dim * 2**i for i in range(len(depths))]
  for width, count in zip(dims, num_heads, strict=True):
    if width % count:
      raise ValueError(f'num_heads {num_heads} do not divide the widths {dims}: pass divisors')
  types: dict[str, Any] = {'dtype': dtype, 'param_dtype': param_dtype}
  layer_norm = functools.partial(norm.LayerNorm, epsilon=norm_epsilon, **types)
  scale = scales.define(layer_scale, **types)
  convolution = functools.partial(
    conv.Conv, padding='symmetric', kernel_init=initializers.TORCH_KERNEL, **types
  )
  per_block: Any = attn if resnet_blocks.is_nested(attn) else [[attn] * depth for depth in depths]
  rates = drop_path_rates(drop_path, depths)

  def dilation(i: int, j: int) -> int:
    step = dilations[i][j % len(dilations[i])]
    if dilation_policy == 'fixed' or step == 1:
      return step
    first = 4 if stem == 'conv' else patch
    return max(1, min(-(-side // (first * 2**i)) for side in image_size) // kernel)

  def block(i: int, j: int) -> ModuleDef:
    made = operators.bind(
      operators.operator(per_block[i][j]), kernel_init=INIT, dropout=dropout, **types
    )
    if operators.takes(made, 'dilation'):
      made = operators.bind(made, kernel=kernel, dilation=dilation(i, j), qkv_bias=qkv_bias)
    return functools.partial(
      vit.EncoderBlock,
      dim=dims[i],
      num_heads=num_heads[i],
      attn=made,
      mlp=functools.partial(
        mlp.Mlp,
        hidden_dim=int(dims[i] * mlp_ratio),
        activation=activation,
        dropout=dropout,
        kernel_init=INIT,
        **types,
      ),
      norm=layer_norm,
      layer_scale=scale,
      drop_path=rates[i][j],
    )

  if stem == 'conv':
    first = functools.partial(Stem, dim, convolution, layer_norm)
    between = [functools.partial(Downsample, width, convolution, layer_norm) for width in dims[1:]]
  else:
    first = functools.partial(
      patch_embed.PatchEmbed,
      dim=dim,
      patch=patch,
      pad=True,
      conv=functools.partial(convolution, bias_init=initializers.torch_bias(3 * patch**2)),
      norm=layer_norm,
    )
    between = [
      functools.partial(swin.PatchMerging, width, layer_norm, kernel_init=INIT, **types)
      for width in dims[1:]
    ]
  backbone = functools.partial(
    hierarchy.Hierarchy,
    stem=first,
    stages=[[block(i, j) for j in range(depth)] for i, depth in enumerate(depths)],
    downsamples=between,
    norm=layer_norm,
    remat=remat,
    scan=scan,
    dtype=dtype,
  )
  head = functools.partial(
    heads.LinearHead,
    num_classes=num_classes,
    feature=f'stage{len(depths)}',
    kernel_init=INIT,
    **types,
  )
  return base.Parts(backbone, head)


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
  """Returns the rate of every block."""
  return drop_path.linear_rates(rate, depths)


_NAT, _DINAT = "arXiv 2204.07143, authors' table", "arXiv 2209.15001, authors' table"
_22K = ' (ImageNet-22k pre-training)'
_DILATIONS = ((1, 8), (1, 4), (1, 2), (1,))


def _variant(params, gmacs, top1, source, size=224, **options) -> base.Variant:
  return base.Variant(
    options, image_size=size, params=params, flops=gmacs * 1e9, top1=top1, source=source
  )


def _nat(dim, params, gmacs, top1, *, depth=18, source=_NAT, **options) -> base.Variant:
  """Three, four, `depth` and five blocks, heads of 32 channels."""
  options = {'mlp_ratio': 3 if dim == 64 else 2, **options}
  return _variant(
    params,
    gmacs,
    top1,
    source,
    depths=(3, 4, depth, 5),
    dim=dim,
    num_heads=tuple(dim // 32 * 2**i for i in range(4)),
    **options,
  )


_dinat = functools.partial(_nat, source=_DINAT, dilations=_DILATIONS)
_large = functools.partial(_dinat, 192, source=_DINAT + _22K)


def _dinat_s(dim, params, gmacs, top1, *, depth=18, source=_DINAT, **options) -> base.Variant:
  """Swin's depths and widths."""
  return _variant(
    params,
    gmacs,
    top1,
    source,
    depths=(2, 2, depth, 2),
    dim=dim,
    num_heads=tuple(dim // 32 * 2**i for i in range(4)),
    stem='patch',
    mlp_ratio=4,
    **{'dilations': _DILATIONS, **options},
  )


def _isotropic(dim, params, gmacs, top1, dilation) -> base.Variant:
  """ViT's depth and width."""
  return _variant(
    params,
    gmacs,
    top1,
    _DINAT,
    depths=(12,),
    dim=dim,
    num_heads=(dim // 32,),
    stem='patch',
    patch=16,
    mlp_ratio=4,
    dilations=((1, dilation),),
  )


VARIANTS = {
  'nat_mini': _nat(64, 19_984_174, 2.7, 81.8, depth=6),
  'nat_tiny': _nat(64, 27_901_582, 4.3, 83.2),
  'nat_small': _nat(96, 50_743_297, 7.8, 83.7, layer_scale=1e-5),
  'nat_base': _nat(128, 89_769_652, 13.7, 84.3, layer_scale=1e-5),
  'dinat_mini': _dinat(64, 19_984_174, 2.7, 81.8, depth=6),
  'dinat_tiny': _dinat(64, 27_901_582, 4.3, 82.7),
  'dinat_small': _dinat(96, 50_719_681, 7.8, 83.8),
  'dinat_base': _dinat(128, 89_769_652, 13.7, 84.4, layer_scale=1e-5),
  'dinat_large': _large(200_943_514, 30.6, 86.6),
  'dinat_large_384': _large(
    200_943_514, 89.7, 87.4, size=384, dilations=((1, 13), (1, 6), (1, 3), (1,))
  ),
  'dinat_large_384_11x11': _large(201_144_250, 92.4, 87.5, size=384, kernel=11),
  'dinat_s_tiny': _dinat_s(96, 28_288_354, 4.5, 81.8, depth=6),
  'dinat_s_small': _dinat_s(96, 49_606_258, 8.7, 83.5),
  'dinat_s_base': _dinat_s(128, 87_768_224, 15.4, 83.8),
  'dinat_s_large': _dinat_s(192, 196_532_476, 34.5, 86.5, source=_DINAT + _22K),
  'dinat_s_large_384': _dinat_s(
    192,
    196_532_476,
    101.5,
    87.4,
    source=_DINAT + _22K,
    size=384,
    dilations=((1, 13), (1, 6), (1, 3), (1,)),
  ),
  'nat_isotropic_small': _isotropic(384, 21_999_736, 4.3, 80.0, 1),
  'nat_isotropic_base': _isotropic(768, 86_465_800, 16.9, 81.6, 1),
  'dinat_isotropic_small': _isotropic(384, 21_999_736, 4.3, 80.8, 2),
  'dinat_isotropic_base': _isotropic(768, 86_465_800, 16.9, 82.1, 2),
}


def _rules(options: Mapping[str, Any]) -> list[reference.Rule]:
  """Returns the renames; stages are called `levels`, Swin's `layers`, and one is not called."""
  single = len(options['depths']) == 1
  blocks = r'layers\.(\d+)\.' if single else r'(?:levels|layers)\.(\d+)\.blocks\.(\d+)\.'
  stages = r'(?:levels|layers)\.(\d+)\.'
  ours = 'backbone/stage1/block{0:02d}/' if single else 'backbone/stage{0:+1}/block{1:02d}/'
  number = '{1}' if single else '{2}'
  reduction = 'reduction' if options.get('stem') == 'patch' else 'conv'
  rule = reference.Rule

  def flipped(array, shape):
    del shape
    return array[:, ::-1, ::-1]  # key minus query

  return [
    rule(r'patch_embed\.proj\.(\d)', 'backbone/stem/conv{0:+1}', reference.CONV),
    rule(r'patch_embed\.proj', 'backbone/stem/conv', reference.CONV),
    rule(r'patch_embed\.norm', 'backbone/stem/norm', reference.NORM),
    rule(blocks + r'attn\.qkv', ours + 'attn', reference.fused('query', 'key', 'value')),
    rule(blocks + r'attn\.rpb', ours + 'attn/relative_position', reference.param('', flipped)),
    rule(blocks + r'attn\.proj', ours + 'attn/proj', reference.DENSE),
    rule(blocks + r'norm(\d)', ours + f'norm{number}', reference.NORM),
    rule(blocks + r'mlp\.fc1', ours + 'mlp/expand', reference.DENSE),
    rule(blocks + r'mlp\.fc2', ours + 'mlp/project', reference.DENSE),
    rule(blocks + r'gamma(\d)', ours + f'layer_scale{number}/scale', reference.param('')),
    rule(stages + r'downsample\.norm', 'backbone/downsample{0:+2}/norm', reference.NORM),
    rule(
      stages + r'downsample\.reduction',
      f'backbone/downsample{{0:+2}}/{reduction}',
      reference.DENSE,
    ),
    rule('norm', 'backbone/norm', reference.NORM),
    rule('head', 'head/classifier', reference.DENSE),
  ]


def _infer(state: reference.State, options: Mapping[str, Any]) -> dict[str, Any]:
  """Reads classes, kernel, and whether branches are scaled off a state."""
  bias = state.get('head.bias')
  found: dict[str, Any] = {'num_classes': 0 if bias is None else len(bias)}
  tables = [array for key, array in state.items() if key.endswith('attn.rpb')]
  if tables:
    found['kernel'] = (tables[0].shape[-1] + 1) // 2
  scaled = any(re.search(r'\.gamma1$', key) for key in state)
  found['layer_scale'] = (options.get('layer_scale') or 1e-5) if scaled else None
  return found


REFERENCES = {
  'official': reference.Reference(
    origin='github.com/SHI-Labs/Neighborhood-Attention-Transformer, classification',
    rules=_rules,
    infer=_infer,
    # Of the ViT with relative positions that the isotropic models are compared with.
    ignore=(r'.*\.relative_position_index',),
  )
}
