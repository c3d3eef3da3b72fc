"""HorNet (arXiv 2207.14284): four stages of recursive gated convolutions of growing order."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import linen as nn
from jax.typing import DTypeLike

from vision_attention.attention import gated_convolution, operators
from vision_attention.layers import conv, drop_path, mlp, norm
from vision_attention.layers import layer_scale as scales
from vision_attention.models import base, convnext, reference, resnet_blocks, vit
from vision_attention.ops import global_filter

ModuleDef = Callable[..., nn.Module]
PerBlock = Sequence[Sequence[operators.Spec]]
# The code bounds the normal distribution at 2, a hundred times its spread.
INIT = nn.initializers.normal(0.02)
RESIZE = {r'params/backbone/.*/attn/depthwise/filter': global_filter.resize}


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  depths: Sequence[int],
  dim: int,
  orders: Sequence[int] = (2, 3, 4, 5),
  global_stages: Sequence[int] = (),
  kernel_size: int = 7,
  gate_scale: float = 1 / 3,
  attn: operators.Spec | PerBlock | None = None,
  num_heads: Sequence[int] | None = None,
  mlp_ratio: float = 4,
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
      and right is not seen. Global filters are made for it, and resized on images of another size.
    dtype: of activations.
    param_dtype: of parameters.
    depths: blocks per stage.
    dim: width of the first stage; every further stage has twice that of the one before.
    orders: of the gated convolutions, per stage.
    global_stages: stages, counted from 1, in which half of the channels pass a global filter and
      the other half a 3x3 convolution, in place of one of `kernel_size`.
    kernel_size: of the depthwise convolutions, odd.
    gate_scale: factor of the gates.
    attn: an operator in place of the gated convolutions, or one per stage and block.
    num_heads: of that operator, per stage; one per 32 channels unless given.
    mlp_ratio: width inside the MLP relative to the block's.
    layer_scale: what the learned factor of every branch begins at, or None for no factor.
    activation: a name of `ops.activation`.
    norm_epsilon: of LayerNorm, also within global filters.
    dropout: before the classifier.
    drop_path: rate of stochastic depth of the last block; the first has 0.
    head_init_scale: factor of the classifier's initial kernel.
    remat: whether blocks are computed again in the backward pass, to save memory.
    scan: whether equal blocks are compiled once, and their variables stacked.

  Raises:
    ValueError: for numbers of stages that differ, an even kernel, or an order that does not fit a
      width.
  """
  del image_size
  dims = [dim * 2**i for i in range(len(depths))]
  counts = tuple(max(1, d // 32) for d in dims) if num_heads is None else tuple(num_heads)
  if len(counts) != len(depths) or len(orders) < len(depths):
    raise ValueError(
      f'{depths=}, {orders=} and num_heads={counts} must have one entry per stage: pass '
      f'{len(depths)} of each'
    )
  if not set(global_stages) <= set(range(1, len(depths) + 1)):
    raise ValueError(f'{global_stages=} must lie between 1 and {len(depths)}')
  types: dict[str, Any] = {'dtype': dtype, 'param_dtype': param_dtype}
  layer = functools.partial(
    conv.Conv, padding='symmetric', use_bias=True, kernel_init=INIT, **types
  )
  layer_norm = functools.partial(norm.LayerNorm, epsilon=norm_epsilon, **types)
  scale = scales.define(layer_scale, **types)
  rates = drop_path_rates(drop_path, depths)
  per_block: Any = attn if resnet_blocks.is_nested(attn) else [[attn] * n for n in depths]

  def mixer(i: int, j: int) -> ModuleDef:
    if per_block[i][j] is not None:
      made = operators.operator(per_block[i][j])
    else:
      gated_convolution.widths(dims[i], orders[i])
      made = functools.partial(
        gated_convolution.RecursiveGatedConv,
        order=orders[i],
        kernel_size=kernel_size,
        spatial='global' if i + 1 in global_stages else 'conv',
        scale=gate_scale,
        norm_epsilon=norm_epsilon,
      )
    return operators.bind(made, kernel_init=INIT, **types)

  def block(i: int, j: int) -> ModuleDef:
    return functools.partial(
      vit.EncoderBlock,
      dim=dims[i],
      num_heads=counts[i],
      attn=mixer(i, j),
      mlp=functools.partial(
        mlp.Mlp,
        hidden_dim=int(dims[i] * mlp_ratio),
        activation=activation,
        kernel_init=INIT,
        **types,
      ),
      norm=layer_norm,
      layer_scale=scale,
      drop_path=rates[i][j],
    )

  return convnext.assemble(
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


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
  """Returns the rate of every block."""
  return drop_path.linear_rates(rate, depths)


_CODE = 'github.com/raoyongming/HorNet'
_22K = f'{_CODE} (ImageNet-22k pre-training; top-1 unverified against the paper)'
_GLOBAL = (3, 4)


def _variant(dim, params, gmacs, top1, stages=(), size=224, source=_CODE) -> base.Variant:
  return base.Variant(
    {'depths': (2, 3, 18, 2), 'dim': dim, 'global_stages': stages},
    image_size=size,
    params=params,
    flops=gmacs and gmacs * 1e9,
    top1=top1,
    source=source,
  )


# The code's table prints 209 M, 211 M and 216 M parameters for the three large models: those of
# its models are these, and with 21841 classes they are 226.6 M, 228.3 M and 233.8 M.
VARIANTS = {
  'hornet_tiny_7x7': _variant(64, 22_409_512, 3.98, 82.8),
  'hornet_tiny_gf': _variant(64, 22_991_848, 3.90, 83.0, _GLOBAL),
  'hornet_small_7x7': _variant(96, 49_528_264, 8.83, 83.8),
  'hornet_small_gf': _variant(96, 50_401_768, 8.71, 84.0, _GLOBAL),
  'hornet_base_7x7': _variant(128, 87_256_680, 15.58, 84.2),
  'hornet_base_gf': _variant(128, 88_421_352, 15.42, 84.3, _GLOBAL),
  'hornet_base_gf_img384': _variant(128, 92_099_560, None, None, _GLOBAL, 384),
  'hornet_large_7x7': _variant(192, 194_542_504, 34.8, 86.8, source=_22K),
  'hornet_large_gf': _variant(192, 196_289_512, 34.7, 87.0, _GLOBAL, source=_22K),
  'hornet_large_gf_img384': _variant(192, 201_806_824, 101.8, 87.7, _GLOBAL, 384, _22K),
}


def _infer(state: reference.State, options: Mapping[str, Any]) -> dict[str, Any]:
  """Reads classes, factors and, where there are global filters, a resolution off the weights.

  Half a spectrum does not tell an even number of columns from the next odd one. A map is taken to
  be square where it can be, and to be half of that of the stage before.
  """
  del options
  found: dict[str, Any] = {'num_classes': len(state['head.bias']) if 'head.bias' in state else 0}
  if 'stages.0.0.gamma1' not in state:
    found['layer_scale'] = None
  filters = {
    i: state[key].shape[1:3]
    for i in range(4)
    if (key := f'stages.{i}.0.gnconv.dwconv.complex_weight') in state
  }
  if not filters:
    return found
  first = min(filters)
  height, columns = filters[first]
  fits = [
    width
    for width in (2 * columns - 2, 2 * columns - 1)
    if all(c == (width >> (i - first)) // 2 + 1 for i, (_, c) in filters.items())
  ]
  width = height if height in fits or not fits else fits[0]
  return {**found, 'image_size': (height * 4 << first, width * 4 << first)}


def _filters(array, shape: tuple[int, ...]):
  """`[c, h, w, 2]` to `[2, h, w, c]`."""
  del shape
  return array.transpose(3, 1, 2, 0)


_THEIRS = r'stages\.(\d+)\.(\d+)\.'
_OURS = 'backbone/stage{0:+1}/block{1:02d}/'
_MIXER, _OUR_MIXER = _THEIRS + r'gnconv\.', _OURS + 'attn/'


def _rules() -> list[reference.Rule]:
  rule, param = reference.Rule, reference.param
  return [
    rule(r'downsample_layers\.0\.0', 'backbone/stem/conv', reference.CONV),
    rule(r'downsample_layers\.0\.1', 'backbone/stem/norm', reference.NORM),
    rule(r'downsample_layers\.(\d+)\.0', 'backbone/downsample{0:+1}/norm', reference.NORM),
    rule(r'downsample_layers\.(\d+)\.1', 'backbone/downsample{0:+1}/conv', reference.CONV),
    rule(_MIXER + r'(proj_in|proj_out)', _OUR_MIXER + '{2}', reference.DENSE),
    rule(_MIXER + r'pws\.(\d+)', _OUR_MIXER + 'proj{2:+1}', reference.DENSE),
    rule(_MIXER + 'dwconv', _OUR_MIXER + 'depthwise', reference.CONV),
    rule(_MIXER + r'dwconv\.dw', _OUR_MIXER + 'depthwise/local', reference.CONV),
    rule(_MIXER + r'dwconv\.complex_weight', _OUR_MIXER + 'depthwise/filter', param('', _filters)),
    rule(_MIXER + r'dwconv\.pre_norm', _OUR_MIXER + 'depthwise/norm1', reference.NORM),
    rule(_MIXER + r'dwconv\.post_norm', _OUR_MIXER + 'depthwise/norm2', reference.NORM),
    rule(_THEIRS + r'norm(\d)', _OURS + 'norm{2}', reference.NORM),
    rule(_THEIRS + 'pwconv1', _OURS + 'mlp/expand', reference.DENSE),
    rule(_THEIRS + 'pwconv2', _OURS + 'mlp/project', reference.DENSE),
    rule(_THEIRS + r'gamma(\d)', _OURS + 'layer_scale{2}/scale', param('')),
    rule('norm', 'head/norm', reference.NORM),
    rule('head', 'head/classifier', reference.DENSE),
  ]


# Layers of layer-wise learning-rate decay: 12 groups, two blocks of stage 3 in each.
DECAY_LAYERS = {
  'backbone/stem/': 0,
  'backbone/stage1/': 1,
  'backbone/(downsample2|stage2)/': 2,
  'backbone/downsample3/': 3,
  **{f'backbone/stage3/block({2 * k:02d}|{2 * k + 1:02d})/': 3 + k for k in range(9)},
  'backbone/(downsample4|stage4)/': 12,
}
REFERENCES = {
  'official': reference.Reference(
    origin=f'{_CODE}, hornet.py', rules=tuple(_rules()), infer=_infer
  ),
}
