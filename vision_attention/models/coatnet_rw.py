"""timm's own CoAtNets (`coatnet_*_rw_*`), trained before anything official was to be seen.

They are other models than the paper's: an activation after the first norm of an MBConv, expansion
of the input's width, SiLU, squeeze partly before the last norm, attention heads of the input's
width, LayerNorm before pooling and no dense layer after it; `rmlp` makes the relative bias by a
network.
Source: github.com/huggingface/pytorch-image-models, timm/models/maxxvit.py and its results table.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jax.typing import DTypeLike

from vision_attention import errors
from vision_attention.attention import relative
from vision_attention.layers import conv, heads, layer_scale, mbconv, mlp, norm, squeeze_excite
from vision_attention.models import base, coatnet, reference

RESIZE = coatnet.RESIZE


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  depths: Sequence[int],
  dims: Sequence[int],
  stem_dims: Sequence[int],
  stride_in: str = 'depthwise',
  pool: str = 'avg',
  pre_norm_act: bool = True,
  squeeze_early: bool = False,
  squeeze_activation: str = 'relu',
  se_ratio: float = 0.25,
  project_bias: bool = False,
  shortcut_bias: bool = True,
  position: str = 'table',
  position_dim: int = 512,
  scale_init: float = 0.0,
  transformer_norm: str = 'layer',
  drop_path: float = 0.0,
  dropout: float = 0.0,
  remat: bool = False,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    num_classes: outputs of the head.
    image_size: height and width.
    dtype: of activations.
    param_dtype: of parameters.
    depths: blocks per stage, two of MBConv and two of transformer.
    dims: width per stage.
    stem_dims: of the stem's two convolutions.
    stride_in: where an MBConv's stride sits: `depthwise`, `expand` or `inputs`.
    pool: of shortcuts and before attention: `avg`, `max` or `max3`.
    pre_norm_act: whether an activation follows the first norm of an MBConv.
    squeeze_early: whether the squeeze comes before the last norm.
    squeeze_activation: inside the squeeze.
    se_ratio: width of the squeeze relative to the inner width.
    project_bias: whether an MBConv's last convolution and shortcut have biases.
    shortcut_bias: whether a transformer block's shortcut has one.
    position: `table`, or `network` for `rmlp`.
    position_dim: width of that network.
    scale_init: initial layer scale, 0 for none.
    transformer_norm: `layer` or `batch`.
    drop_path: rate of stochastic depth of the last block.
    dropout: rate before the classifier.
    remat: whether blocks are computed again in the backward pass, to save memory.
  """
  errors.check_choice('position', position, ('table', 'network'))
  errors.check_choice('transformer_norm', transformer_norm, ('layer', 'batch'))
  types: dict[str, Any] = {'dtype': dtype, 'param_dtype': param_dtype}
  layer = functools.partial(conv.Conv, padding='symmetric', **types)
  batch_norm = functools.partial(norm.BatchNorm, epsilon=1e-5, **types)
  norms = {
    'layer': functools.partial(norm.LayerNorm, epsilon=1e-6, **types),
    'batch': functools.partial(norm.BatchNorm, epsilon=1e-6, **types),
  }
  inner_norm = norms[transformer_norm]
  attn = functools.partial(relative.RelativeAttention, **types)
  if position == 'network':
    attn = functools.partial(relative.LogPositionAttention, hidden_dim=position_dim, **types)
  convolutional = functools.partial(
    mbconv.MBConv,
    stride_in=stride_in,
    pool=pool,
    activation='silu',
    conv=layer,
    norm=batch_norm,
    squeeze=functools.partial(squeeze_excite.SqueezeExcite, activation=squeeze_activation, **types),
    se_ratio=se_ratio,
    pre_norm_act=pre_norm_act,
    expand_from='input',
    squeeze_early=squeeze_early,
    project_bias=project_bias,
  )
  transformer = functools.partial(
    coatnet.TransformerBlock,
    head_dim=32,
    pool=pool,
    attn=attn,
    mlp=functools.partial(mlp.Mlp, activation='gelu_exact', **types),
    conv=layer,
    norm=inner_norm,
    heads_from='input',
    shortcut_bias=shortcut_bias,
    layer_scale=functools.partial(layer_scale.LayerScale, scale_init, **types)
    if scale_init
    else None,
  )
  blocks = (convolutional, convolutional, transformer, transformer)
  rates = coatnet.drop_path_rates(drop_path, depths, last=True)
  stages = [
    [
      functools.partial(block, dim=dim, stride=2 if j == 0 else 1, drop_path=stage_rates[j])
      for j in range(depth)
    ]
    for block, dim, depth, stage_rates in zip(blocks, dims, depths, rates, strict=True)
  ]
  backbone = functools.partial(
    coatnet.CoAtNet,
    image_size=image_size,
    stem=functools.partial(
      coatnet.Stem, stem_dims, use_bias=False, activation='silu', conv=layer, norm=batch_norm
    ),
    stages=stages,
    strides=(2, 2, 2, 2),
    final_norm=inner_norm,
    remat=remat,
    dtype=dtype,
  )
  head = functools.partial(
    heads.LinearHead, num_classes=num_classes, feature='stage4', dropout=dropout, **types
  )
  return base.Parts(backbone, head)


def _variant(depths, dims, params, top1=None, size=224, **options: Any) -> base.Variant:
  options = {'stem_dims': (dims[0] // 2, dims[0]), **options}
  return base.Variant(
    {'depths': depths, 'dims': dims, **options},
    image_size=size,
    params=params,
    top1=top1,
    source='github.com/huggingface/pytorch-image-models, results-imagenet.csv',
  )


_NANO, _SMALL = (64, 128, 256, 512), (96, 192, 384, 768)
_MEDIUM, _LARGE = (128, 256, 512, 1024), (192, 384, 768, 1536)
_DEEP = (2, 6, 14, 2)
_OLD: dict[str, Any] = {'stem_dims': (32, 64), 'squeeze_early': True, 'shortcut_bias': False}
_NEW: dict[str, Any] = {'pre_norm_act': False, 'squeeze_activation': 'silu', 'project_bias': True}
_NEW |= {'stem_dims': (32, 64)}
_SILU: dict[str, Any] = {'squeeze_activation': 'silu'}
_MLP: dict[str, Any] = {'position': 'network'}
VARIANTS = {
  'coatnet_pico_rw_224': _variant((2, 3, 5, 2), _NANO, 10_851_364, **_NEW),
  'coatnet_nano_rw_224': _variant(
    (3, 4, 6, 3), _NANO, 15_141_244, 81.70, **_NEW, stride_in='inputs'
  ),
  'coatnet_0_rw_224': _variant((2, 3, 7, 2), _SMALL, 27_435_562, 82.39, **_OLD, stride_in='inputs'),
  'coatnet_1_rw_224': _variant(_DEEP, _SMALL, 41_721_502, 83.62, **_OLD),
  'coatnet_2_rw_224': _variant(_DEEP, _MEDIUM, 73_868_400, 86.58, **_SILU),
  'coatnet_3_rw_224': _variant(_DEEP, _LARGE, 165_173_428, **_SILU, scale_init=1e-6),
  'coatnet_bn_0_rw_224': _variant(
    (2, 3, 7, 2), _SMALL, 27_435_562, 82.39, **_OLD, transformer_norm='batch'
  ),
  'coatnet_rmlp_nano_rw_224': _variant(
    (3, 4, 6, 3), _NANO, 15_145_116, **_NEW, **_MLP, position_dim=384
  ),
  'coatnet_rmlp_0_rw_224': _variant((2, 3, 7, 2), _SMALL, 27_446_074, **_MLP, stem_dims=(32, 64)),
  'coatnet_rmlp_1_rw_224': _variant(
    _DEEP, _SMALL, 41_691_982, **_OLD, **_MLP, position_dim=384, stride_in='inputs', pool='max3'
  ),
  'coatnet_rmlp_1_rw2_224': _variant(_DEEP, _SMALL, 41_724_622, **_MLP, stem_dims=(32, 64)),
  'coatnet_rmlp_2_rw_224': _variant(_DEEP, _MEDIUM, 73_881_264, **_SILU, **_MLP, scale_init=1e-6),
  'coatnet_rmlp_2_rw_384': _variant(
    _DEEP, _MEDIUM, 73_881_264, 87.39, 384, **_SILU, **_MLP, scale_init=1e-6
  ),
  'coatnet_rmlp_3_rw_224': _variant(_DEEP, _LARGE, 165_152_788, **_SILU, **_MLP, scale_init=1e-6),
}


def _rules(options: Mapping[str, Any]) -> Sequence[reference.Rule]:
  """Those of the paper's models, but that heads follow the input, and what is only here."""
  widths = (options['dims'][1], *options['dims'])
  rules = []
  for i in (2, 3):
    first, later = (dim // 32 for dim in (widths[i], widths[i + 1]))
    for pattern, count in ((r'(0)', first), (r'([1-9]\d*)', later)):
      fused = reference.fused('query', 'key', 'value', heads=count)
      theirs, ours = rf'stages\.{i}\.blocks\.{pattern}\.', f'backbone/stage{i + 1}/block{{0:02d}}/'
      rules.append(reference.Rule(theirs + r'attn\.qkv', ours + 'attn', fused))
  scale = {'gamma': reference.param('scale')['']}
  block, ours = r'stages\.(\d)\.blocks\.(\d+)\.', 'backbone/stage{0:+1}/block{1:02d}/'
  network = 'attn/position_'
  return [
    *rules,
    reference.Rule(block + r'se_early\.fc1', ours + 'se/squeeze', reference.CONV),
    reference.Rule(block + r'se_early\.fc2', ours + 'se/excite', reference.CONV),
    reference.Rule(block + r'ls(\d)', ours + 'scale{2}', scale),
    reference.Rule(block + r'attn\.rel_pos\.mlp\.fc1', ours + network + 'expand', reference.DENSE),
    reference.Rule(block + r'attn\.rel_pos\.mlp\.fc2', ours + network + 'project', reference.DENSE),
    reference.Rule('norm', 'backbone/norm', reference.NORM),
    *coatnet.timm_rules({**options, 'head_dim': 32}),
  ]


def _infer(state: reference.State, options: Mapping[str, Any]) -> dict[str, Any]:
  """A network of positions fits every resolution; a table shows its own."""
  if options.get('position') == 'network':
    return {'num_classes': len(state['head.fc.bias']) if 'head.fc.bias' in state else 0}
  return dict(coatnet.timm_infer(state, options))


REFERENCES = {
  'timm': reference.Reference(
    origin='github.com/huggingface/pytorch-image-models, timm/models/maxxvit.py, coatnet_*_rw_*',
    rules=_rules,
    infer=_infer,
    ignore=(r'.*\.relative_position_index', r'.*\.rel_coords_log'),
  )
}
