"""HaloNet (arXiv 2103.12731): ResNets of blocked local attention, H0 to H7.

No code was ever published. Where the paper's tables leave the wiring open, the published numbers of
parameters fix it: no output projection in the attention, a 1x1 convolution before the head where
there is a `d_f`, no squeeze-and-excitation. Scaling of the content logits and the activation are
not known; the paper's equation has no scale, and two ports have `rsqrt`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.attention import halo as halo_attention
from vision_attention.layers import conv, norm
from vision_attention.models import base, reference, resnet, resnet_blocks
from vision_attention.ops import activation as activations

ModuleDef = Callable[..., nn.Module]


class PatchStem(nn.Module):
  """Patches of 4x4 pixels, projected: convolution of stride 4, norm, activation (section 4.5)."""

  dim: int
  activation: str
  conv: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    x = self.conv(self.dim, kernel_size=4, stride=4, name='conv')(x)
    return activations.by_name(self.activation)(self.norm(name='norm')(x, train=train))


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  depths: Sequence[int],
  block: int = 8,
  halo: int = 3,
  value_ratio: float = 1.0,
  expansion: float = 1.0,
  final_dim: int = 0,
  width: int = 64,
  num_heads: int | Sequence[int] = (4, 8, 8, 8),
  conv_stages: Sequence[int] = (),
  stem: str = '7x7',
  scale: str = 'none',
  mask_padding: bool = True,
  index: str = 'offset',
  shared: bool = True,
  activation: str = 'relu',
  drop_path: float = 0.0,
  drop_path_rule: str = 'stage',
  dropout: float = 0.0,
  norm_epsilon: float = 1e-5,
  norm_momentum: float = 0.9,
  remat: bool = False,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    num_classes: outputs of the head.
    image_size: height and width; any.
    dtype: of activations.
    param_dtype: of parameters.
    depths: blocks per stage.
    block: side of the blocks of queries (`b`).
    halo: how far keys are seen beyond the block (`h`).
    value_ratio: width of the values relative to the stage's (`r_v`).
    expansion: output width of a block relative to the stage's (`r_b`).
    final_dim: channels of the 1x1 convolution before the head (`d_f`), 0 for none.
    width: of the first stage, doubled from stage to stage.
    num_heads: one number or one per stage.
    conv_stages: stages with 3x3 convolutions in place of attention, counted from 1 (Table 5).
    stem: of `resnet_blocks.Stem`, or `patch`.
    scale: of content logits, `none` or `rsqrt`.
    mask_padding: whether pixels outside the map are masked.
    index: rows of the tables of relative positions, `offset` or timm's `subsampled`; see
      `ops.local_attention.Neighbourhood`.
    shared: whether all heads share the tables of relative positions.
    activation: a name of `ops.activation`.
    drop_path: nominal rate of stochastic depth.
    drop_path_rule: see `models.resnet.build`.
    dropout: rate before the classifier.
    norm_epsilon: of BatchNorm.
    norm_momentum: of BatchNorm's running statistics.
    remat: whether blocks are computed again in the backward pass, to save memory.

  Raises:
    ValueError: for an unknown choice, or stages that the network does not have.
  """
  outside = set(conv_stages) - set(range(1, len(depths) + 1))
  if outside:
    raise ValueError(f'conv_stages {tuple(conv_stages)} must lie within 1..{len(depths)}')
  attn = functools.partial(
    halo_attention.HaloAttention,
    block=block,
    halo=halo,
    value_ratio=value_ratio,
    scale=scale,
    mask_padding=mask_padding,
    index=index,
    shared=shared,
  )
  stages = [i for i in range(1, len(depths) + 1) if i not in conv_stages]
  types = {'dtype': dtype, 'param_dtype': param_dtype}
  patch_stem = functools.partial(
    PatchStem,
    width,
    activation,
    conv=functools.partial(conv.Conv, kernel_init=resnet.CONV_INIT, **types),
    norm=functools.partial(norm.BatchNorm, epsilon=norm_epsilon, momentum=norm_momentum, **types),
  )
  return resnet.build(
    num_classes=num_classes,
    image_size=image_size,
    depths=depths,
    width=width,
    expansion=expansion,
    stem=patch_stem if stem == 'patch' else stem,
    attn=resnet_blocks.per_block(attn, depths, stages),
    num_heads=num_heads,
    final_dim=final_dim,
    activation=activation,
    drop_path=drop_path,
    drop_path_rule=drop_path_rule,
    dropout=dropout,
    norm_epsilon=norm_epsilon,
    norm_momentum=norm_momentum,
    remat=remat,
    dtype=dtype,
    param_dtype=param_dtype,
  )


def _variant(
  block, halo, value_ratio, expansion, third, size, final_dim, params, gmacs, top1
) -> base.Variant:
  return base.Variant(
    {
      'depths': (3, 3, third, 3),
      'block': block,
      'halo': halo,
      'value_ratio': value_ratio,
      'expansion': expansion,
      'final_dim': final_dim,
    },
    image_size=size,
    params=params,
    flops=gmacs * 1e9,
    top1=top1,
    source='arXiv 2103.12731, Tables 2 and 3; multiply-adds counted; top-1 of H0 to H6 unverified',
  )


VARIANTS = {
  'halonet_h0': _variant(8, 3, 1.0, 0.5, 7, 256, 0, 5_496_104, 2.31, 77.9),
  'halonet_h1': _variant(8, 3, 1.0, 1.0, 10, 256, 0, 8_094_056, 2.94, 79.9),
  'halonet_h2': _variant(8, 3, 1.0, 1.25, 11, 256, 0, 9_397_928, 3.26, 80.4),
  'halonet_h3': _variant(10, 3, 1.0, 1.5, 12, 320, 1024, 11_834_728, 6.08, 81.9),
  'halonet_h4': _variant(12, 2, 1.0, 3.0, 12, 384, 1280, 19_098_088, 11.86, 83.3),
  'halonet_h5': _variant(14, 2, 2.5, 2.0, 23, 448, 1536, 30_710_760, 31.96, 84.0),
  'halonet_h6': _variant(8, 4, 3.0, 2.75, 24, 512, 1536, 43_441_384, 52.45, 84.4),
  'halonet_h7': _variant(10, 3, 4.0, 3.5, 26, 600, 2048, 67_421_288, 108.5, 84.9),
  # The network of the ablations: ResNet-50's depths and expansion.
  'halonet_50': base.Variant(
    {'depths': (3, 4, 6, 3), 'expansion': 4.0},
    image_size=256,
    params=18_033_032,
    source='arXiv 2103.12731, ablations; depths and blocks unverified, parameters counted',
  ),
}


def _timm_rules(options: Mapping[str, Any]) -> Sequence[reference.Rule]:
  rule, conv_, norm_ = reference.Rule, reference.CONV, reference.NORM
  theirs, ours = r'stages\.(\d+)\.(\d+)\.', 'backbone/stage{0:+1}/block{1:02d}/'
  names = {
    r'conv(\d)_(?:1x1|kxk)\.conv': ('conv{2}', conv_),
    r'conv(\d)_(?:1x1|kxk)\.bn': ('norm{2}', norm_),
    r'self_attn\.q': ('attn/query', conv_),
    r'self_attn\.kv': ('attn', reference.fused('key', 'value', heads=options['num_heads'])),
    r'self_attn\.pos_embed\.(height|width)_rel': ('attn/{2}_table', reference.param('')),
    'post_attn': ('norm2', norm_),
    r'shortcut\.conv': ('shortcut/conv', conv_),
    r'shortcut\.bn': ('shortcut/norm', norm_),
  }
  return [
    *(rule(theirs + a, ours + b, kind) for a, (b, kind) in names.items()),
    rule(r'stem\.conv1\.conv', 'backbone/stem/conv1', conv_),
    rule(r'stem\.conv1\.bn', 'backbone/stem/norm1', norm_),
    rule(r'head\.fc', 'head/classifier', reference.DENSE),
  ]


def _infer(state: reference.State, options: Mapping[str, Any]) -> dict[str, Any]:
  """A file without a classifier gives a model without one."""
  del options
  return {'num_classes': len(state.get('head.fc.bias', ()))}


REFERENCES = {
  'timm': reference.Reference(
    origin='github.com/huggingface/pytorch-image-models, timm/models/byoanet.py, halonet_h1',
    rules=_timm_rules,
    options={
      'num_heads': 8,
      'scale': 'rsqrt',
      'mask_padding': False,
      'index': 'subsampled',
    },
    infer=_infer,
    variants=('halonet_h1',),
  ),
}
