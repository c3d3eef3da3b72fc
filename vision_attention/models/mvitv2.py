"""MViTv2 (arXiv 2112.01526): stages whose first block pools the queries and widens the channels."""

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
from vision_attention.attention import operators, pooling_attention
from vision_attention.layers import conv, drop_path, heads, initializers, mlp, norm, stage
from vision_attention.models import base, reference, resnet_blocks
from vision_attention.ops import convolution, decomposed_position

ModuleDef = Callable[..., nn.Module]
PerBlock = Sequence[Sequence[operators.Spec]]
# The code bounds the normal distribution at 2, a hundred times its spread.
INIT = nn.initializers.normal(0.02)
RESIZE = {r'params/backbone/.*/attn/relative_(height|width)': decomposed_position.resize}
EXPANSIONS = ('attention', 'mlp')


class Block(nn.Module):
  """`x + Attn(LN(x))`, then `x + MLP(LN(x))`, of which either may change the width (figure 2).

  Where the width changes the shortcut projects the normed input, and where attention pools its
  queries the shortcut takes the maximum of 3x3 pixels.

  Attributes:
    dim: width of attention.
    out_dim: width of the result.
    stride: of attention.
    size: of the map if the input is tokens, a class token and then the map; None for a map.
    attn: called with a name.
    mlp: called with its output width.
    drop_path: rate of stochastic depth.
  """

  dim: int
  out_dim: int
  stride: int
  size: tuple[int, int] | None
  attn: ModuleDef
  mlp: ModuleDef
  norm: ModuleDef
  dense: ModuleDef
  drop_path: float

  @nn.compact
  def __call__(self, x: Float[Array, 'b ... c'], *, train: bool) -> Float[Array, 'b ... d']:
    normed = self.norm(name='norm1')(x, train=train)
    y = self.attn(name='attn')(normed, train=train)
    x = x if x.shape[-1] == self.dim else self.dense(self.dim, name='shortcut')(normed)
    x = self._pool(x)
    # An operator without a stride leaves the halving to us.
    y = y if y.shape == x.shape else self._pool(y)
    x = x + drop_path.DropPath(self.drop_path, name='drop_path1')(y, train=train)
    normed = self.norm(name='norm2')(x, train=train)
    y = self.mlp(out_dim=self.out_dim, name='mlp')(normed, train=train)
    x = x if self.out_dim == self.dim else self.dense(self.out_dim, name='shortcut')(normed)
    return x + drop_path.DropPath(self.drop_path, name='drop_path2')(y, train=train)

  def _pool(self, x: Float[Array, 'b ... c']) -> Float[Array, 'b ... c']:
    if self.stride == 1:
      return x
    token, y = pooling_attention.split_class(x, self.size)
    y = convolution.max_pool(y, window=self.stride + 1, stride=self.stride, padding='symmetric')
    return pooling_attention.join_class(token, y)


class MultiscaleVit(nn.Module):
  """Overlapping patches, then stages of blocks; features are the last map of every stage.

  That of the last stage is normed. With a class token, `cls` is its last, normed too.

  Attributes:
    image_size: height and width that the tables are made for.
    stem: from images to the first map.
    stages: per stage, its blocks.
    sizes: per stage, height and width of its map.
    class_token: whether there is one.
    norm: after the last block.
    remat: whether blocks are computed again in the backward pass.
  """

  image_size: tuple[int, int]
  stem: ModuleDef
  stages: Sequence[Sequence[ModuleDef]]
  sizes: Sequence[tuple[int, int]]
  class_token: bool
  norm: ModuleDef
  remat: bool = False
  scan: bool = False
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, images: Float[Array, 'b h w c'], *, train: bool
  ) -> dict[str, Float[Array, 'b ...']]:
    base.check_image_size(images, self.image_size)
    x = self.stem(name='stem')(images.astype(self.dtype))
    if self.class_token:
      token = self.param('cls', INIT, (1, 1, x.shape[-1]), self.param_dtype)
      token = jnp.asarray(token).astype(self.dtype)
      x = pooling_attention.join_class(jnp.broadcast_to(token, (len(x), 1, x.shape[-1])), x)
    features = {}
    for i, blocks in enumerate(self.stages, 1):
      x = stage.Stage(blocks, self.remat, scan=self.scan, name=f'stage{i}')(x, train=train)
      x = self.norm(name='norm')(x, train=train) if i == len(self.stages) else x
      size = self.sizes[i - 1] if self.class_token else None
      token, features[f'stage{i}'] = pooling_attention.split_class(x, size)
      if token is not None:
        features['cls'] = token[:, 0]
    return features


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  depths: Sequence[int],
  dim: int,
  num_heads: int,
  class_token: bool = False,
  expand: str = 'attention',
  kv_stride: int = 4,
  windows: Sequence[int] | None = None,
  padding: str = 'mask',
  global_kv_stride: int = 1,
  residual_class: bool = False,
  mlp_ratio: float = 4,
  qkv_bias: bool = True,
  attn: operators.Spec | PerBlock = pooling_attention.PoolingAttention,
  activation: str = 'gelu_exact',
  norm_epsilon: float = 1e-6,
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
    depths: blocks per stage.
    dim: width of the first stage; every further stage has twice that of the one before.
    num_heads: of the first stage; doubled like the width.
    class_token: whether a class token is classified; otherwise the mean of the map is.
    expand: where the width doubles: in the `attention` of a stage's first block (appendix B.1), or
      in the `mlp` of the last block of the stage before (the released MViTv2-L of ImageNet-1k).
    kv_stride: of keys and values in the first stage, halved wherever queries are pooled.
    windows: hybrid window attention (section 4.2): per stage, the side of windows on its map. The
      last blocks of all stages but the first are global; a stage's first block, which sees the map
      of the stage before, has its windows. The paper's are (56, 28, 14, 7).
    padding: of maps that windows do not tile, see `attention.pooling_attention`.
    global_kv_stride: factor of the stride of keys and values in the global blocks between windows,
      but for the last stage's; 2 in the authors' detection code.
    residual_class: whether residual pooling takes in the class token (timm).
    mlp_ratio: width inside the MLP relative to attention's.
    qkv_bias: whether query, key and value have biases.
    attn: the operator, or one per stage and block. One without a stride is pooled by a maximum.
    activation: a name of `ops.activation`.
    norm_epsilon: of LayerNorm.
    dropout: after attention and within the MLP.
    drop_path: rate of stochastic depth of the last block; the first has 0.
    remat: whether blocks are computed again in the backward pass, to save memory.
    scan: whether equal blocks are compiled once, and their variables stacked.

  Raises:
    ValueError: for an unknown choice, heads that do not divide the width, windows that are not one
      per stage, or a class token among windows or an operator on maps.
  """
  errors.check_choice('expand', expand, EXPANSIONS)
  count = len(depths)
  if dim % num_heads:
    raise ValueError(f'num_heads {num_heads} do not divide the width {dim}: pass a divisor')
  if windows is not None and (len(windows) != count or class_token):
    raise ValueError(
      f'windows {windows} must be one per stage of {depths=}, and go without a class token'
    )
  types: dict[str, Any] = {'dtype': dtype, 'param_dtype': param_dtype}
  layer_norm = functools.partial(norm.LayerNorm, epsilon=norm_epsilon, **types)
  per_block: Any = attn if resnet_blocks.is_nested(attn) else [[attn] * depth for depth in depths]
  rates = drop_path_rates(drop_path, depths)
  sizes = [_halved(image_size, 4 * 2**i) for i in range(count)]

  def block(i: int, j: int) -> ModuleDef:
    first, last = i > 0 and j == 0, j == depths[i] - 1
    widens = expand == 'mlp' and last and i + 1 < count
    window = None
    if windows is not None and not (i and last):
      window = windows[i - 1 if first else i]
    # A global block among windows.
    wider = windows is not None and window is None and i + 1 < count
    size = sizes[i - 1 if first else i] if class_token else None
    made = operators.bind(
      operators.operator(per_block[i][j]),
      dim=dim * 2**i,
      num_heads=num_heads * 2**i,
      stride=2 if first else 1,
      kv_stride=max(kv_stride // 2**i, 1) * (global_kv_stride if wider else 1),
      qkv_bias=qkv_bias,
      dropout=dropout,
      kernel_init=INIT,
      **types,
    )
    if operators.takes(made, 'residual_class'):
      made = operators.bind(
        made, size=size, residual_class=residual_class, window=window, padding=padding
      )
      made = operators.bind(made, norm_epsilon=norm_epsilon)
    elif class_token or windows is not None:
      raise ValueError(f'{per_block[i][j]} takes neither a class token nor windows: leave them out')
    return functools.partial(
      Block,
      dim=dim * 2**i,
      out_dim=dim * 2 ** (i + widens),
      stride=2 if first else 1,
      size=size,
      attn=made,
      mlp=functools.partial(
        mlp.Mlp,
        hidden_dim=int(dim * 2**i * mlp_ratio),
        activation=activation,
        dropout=dropout,
        kernel_init=INIT,
        **types,
      ),
      norm=layer_norm,
      dense=functools.partial(nn.Dense, kernel_init=INIT, **types),
      drop_path=rates[i][j],
    )

  backbone = functools.partial(
    MultiscaleVit,
    image_size=image_size,
    stem=functools.partial(
      conv.Conv,
      dim,
      kernel_size=7,
      stride=4,
      padding='symmetric',
      use_bias=True,
      kernel_init=initializers.TORCH_KERNEL,
      bias_init=initializers.torch_bias(3 * 7**2),
      **types,
    ),
    stages=[[block(i, j) for j in range(depth)] for i, depth in enumerate(depths)],
    sizes=sizes,
    class_token=class_token,
    norm=layer_norm,
    remat=remat,
    scan=scan,
    **types,
  )
  head = functools.partial(
    heads.LinearHead,
    num_classes=num_classes,
    feature='cls' if class_token else f'stage{count}',
    pool='none' if class_token else 'gap',
    kernel_init=INIT,
    **types,
  )
  return base.Parts(backbone, head)


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
  """Returns the rate of every block."""
  return drop_path.linear_rates(rate, depths)


def _halved(size: tuple[int, int], stride: int) -> tuple[int, int]:
  """Returns the map of an image; every convolution of stride 2 or 4 rounds up."""
  height, width = (-(-side // stride) for side in size)
  return height, width


def _variant(depths, dim, heads, params, gmacs, top1, source, **more) -> base.Variant:
  return base.Variant(
    {'depths': depths, 'dim': dim, 'num_heads': heads, **more},
    params=params,
    flops=gmacs * 1e9,
    top1=top1,
    source=source,
  )


_1K = 'arXiv 2112.01526, Table 2 (ImageNet-1k)'
_21K = 'arXiv 2112.01526, Table 3 (ImageNet-21k pre-training)'
_COUNTED = "the authors' code; 1000 classes and no published accuracy"
_T, _S, _B, _L, _H = (1, 2, 5, 2), (1, 2, 11, 2), (2, 3, 16, 3), (2, 6, 36, 4), (4, 8, 60, 8)
_CLASS = {'class_token': True}
# MViTv2-L of ImageNet-1k doubles its width in the MLP, at more multiply-adds than the 42.1 G of
# Table 2. MViTv2-H is with a class token alone.
VARIANTS = {
  'mvitv2_tiny': _variant(_T, 96, 1, 24_173_320, 4.7, 82.3, _1K),
  'mvitv2_small': _variant(_S, 96, 1, 34_870_216, 7.0, 83.6, _1K),
  'mvitv2_base': _variant(_B, 96, 1, 51_472_744, 10.2, 84.4, _1K),
  'mvitv2_large': _variant(_L, 144, 2, 217_992_952, 43.87, 85.3, _1K, expand='mlp'),
  'mvitv2_huge': _variant(_H, 192, 3, 666_879_912, 120.6, 88.0, _21K, **_CLASS),
  'mvitv2_small_cls': _variant(_S, 96, 1, 34_870_312, 7.0, None, _COUNTED, **_CLASS),
  'mvitv2_base_cls': _variant(_B, 96, 1, 51_472_840, 10.2, None, _COUNTED, **_CLASS),
  'mvitv2_large_cls': _variant(_L, 144, 2, 213_635_512, 42.1, 87.5, _21K, **_CLASS),
}


def _named_by_stage(state: reference.State) -> reference.State:
  """Gives the authors' keys timm's names: blocks by stage, and convolutions without time."""
  widths = {}
  for key, value in state.items():
    match = re.fullmatch(r'blocks\.(\d+)\.attn\.qkv\.weight', key)
    if match:
      widths[int(match[1])] = len(value)
  order = sorted(set(widths.values()))
  stages = {k: order.index(width) for k, width in widths.items()}
  start = {i: min(k for k, s in stages.items() if s == i) for i in range(len(order))}

  def renamed(key: str) -> str:
    match = re.fullmatch(r'blocks\.(\d+)\.(.*)', key)
    if match is None or int(match[1]) not in stages:
      return key.replace('head.projection.', 'head.fc.')
    k, rest = int(match[1]), match[2]
    norm2 = state.get(f'blocks.{k}.norm2.bias')
    attends = norm2 is not None and len(norm2) == len(state.get(f'blocks.{k}.proj.bias', ()))
    rest = re.sub(r'^proj\.', f'shortcut_proj_{"attn" if attends else "mlp"}.', rest)
    return f'stages.{stages[k]}.blocks.{k - start[stages[k]]}.{rest}'

  # Released weights are those of a video model of one frame.
  return {
    renamed(key): value[:, :, 0] if value.ndim == 5 and value.shape[2] == 1 else value
    for key, value in state.items()
  }


def _rules() -> list[reference.Rule]:
  rule, theirs = reference.Rule, r'stages\.(\d+)\.blocks\.(\d+)\.'
  ours = 'backbone/stage{0:+1}/block{1:02d}/'
  rules = [
    rule(r'patch_embed\.proj', 'backbone/stem', reference.CONV),
    rule('cls_token', 'backbone/cls', reference.param('')),
    rule(theirs + r'norm(\d)', ours + 'norm{2}', reference.NORM),
    rule(theirs + r'attn\.qkv', ours + 'attn', reference.fused('query', 'key', 'value')),
    rule(theirs + r'attn\.proj', ours + 'attn/proj', reference.DENSE),
    rule(theirs + r'shortcut_proj_(?:attn|mlp)', ours + 'shortcut', reference.DENSE),
    rule(theirs + r'mlp\.fc1', ours + 'mlp/expand', reference.DENSE),
    rule(theirs + r'mlp\.fc2', ours + 'mlp/project', reference.DENSE),
    rule('norm', 'backbone/norm', reference.NORM),
    rule(r'head\.fc', 'head/classifier', reference.DENSE),
  ]
  for a, b in (('q', 'query'), ('k', 'key'), ('v', 'value')):
    rules.append(rule(theirs + rf'attn\.pool_{a}', ours + f'attn/pool_{b}', reference.CONV))
    rules.append(rule(theirs + rf'attn\.norm_{a}', ours + f'attn/norm_{b}', reference.NORM))
  for a, b in (('h', 'height'), ('w', 'width')):
    table = reference.param('')
    rules.append(rule(theirs + rf'attn\.rel_pos_{a}', ours + f'attn/relative_{b}', table))
  return rules


def _infer(state: reference.State, options: Mapping[str, Any]) -> dict[str, Any]:
  """Reads classes, form and resolution off a state."""
  del options
  classifier = state.get('head.fc.bias')
  found: dict[str, Any] = {
    'num_classes': 0 if classifier is None else len(classifier),
    'class_token': 'cls_token' in state,
    'expand': 'mlp' if any('shortcut_proj_mlp' in key for key in state) else 'attention',
  }
  tables = [state.get(f'stages.0.blocks.0.attn.rel_pos_{axis}') for axis in 'hw']
  if all(table is not None for table in tables):
    # Queries of the first stage are the patches, of which each is 4 pixels.
    found['image_size'] = tuple(2 * (len(np.asarray(table)) + 1) for table in tables)
  return found


REFERENCES = {
  'official': reference.Reference(
    origin='github.com/facebookresearch/mvit, mvit/models/mvit_model.py',
    rules=_rules(),
    prepare=_named_by_stage,
    infer=_infer,
  ),
  'timm': reference.Reference(
    origin='github.com/huggingface/pytorch-image-models, timm/models/mvitv2.py',
    rules=_rules(),
    options={'residual_class': True},
    infer=_infer,
  ),
}
