"""Swin Transformer (arXiv 2103.14030): attention in windows, shifted in every other block.

Any operator takes the place of window attention (`attn`): a paper that exchanges it calls `build`.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.attention import operators, window
from vision_attention.layers import (
  conv,
  drop_path,
  heads,
  initializers,
  mlp,
  norm,
  patch_embed,
)
from vision_attention.models import base, hierarchy, reference, resnet_blocks, vit
from vision_attention.ops import bicubic, windows

ModuleDef = Callable[..., nn.Module]
PerBlock = Sequence[Sequence[operators.Spec]]
# Swin's code bounds the normal distribution at 2, a hundred times its spread.
INIT = nn.initializers.normal(0.02)
RESIZE = {r'params/backbone/.*/attn/relative_position': bicubic.resize}
POLICIES = ('fixed', 'scale')


class PatchMerging(nn.Module):
  """Halves a map: 2x2 pixels become one, then LayerNorm and a projection (section 3.1).

  The pixels' channels follow each other column by column. A map of odd size is padded with zeros.
  """

  dim: int
  norm: ModuleDef
  kernel_init: nn.initializers.Initializer = INIT
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    bottom, right = (side % 2 for side in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0)))
    corners = [x[:, y::2, z::2] for z, y in itertools.product((0, 1), (0, 1))]
    y = self.norm(name='norm')(jnp.concatenate(corners, -1), train=train)
    return nn.Dense(
      self.dim,
      use_bias=False,
      kernel_init=self.kernel_init,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name='reduction',
    )(y)


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  depths: Sequence[int],
  dim: int,
  num_heads: Sequence[int],
  window: int | Sequence[int] = 7,
  window_policy: str = 'fixed',
  fit: str = 'axis',
  padding: str = 'mask',
  patch: int = 4,
  mlp_ratio: float = 4,
  qkv_bias: bool = True,
  attn: operators.Spec | PerBlock = window.WindowAttention,
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
    image_size: height and width; any. Sizes that patches, windows or halving do not divide are
      padded at bottom and right.
    dtype: of activations.
    param_dtype: of parameters.
    depths: blocks per stage.
    dim: width of the first stage; every further stage has twice that of the one before.
    num_heads: per stage.
    window: side of a window, or height and width.
    window_policy: `fixed`, windows of `window` pixels at any image size, or `scale`, windows as
      large as the last stage's map (an image's side / 32, rounded up) in place of `window`.
    fit: what becomes of windows larger than a map, see `ops.windows.tile`.
    padding: what padded pixels of a map are to attention, see `ops.windows.tile`.
    patch: side of a patch.
    mlp_ratio: width inside the MLP relative to the block's.
    qkv_bias: whether query, key and value have biases.
    attn: the operator, or one per stage and block. One with a field `shift` gets `window` and
      `shift`, half a window in every other block.
    activation: a name of `ops.activation`.
    norm_epsilon: of LayerNorm.
    dropout: after attention and within the MLP.
    drop_path: rate of stochastic depth of the last block; the first has 0.
    remat: whether blocks are computed again in the backward pass, to save memory.
    scan: whether equal blocks are compiled once, and their variables stacked.

  Raises:
    ValueError: for an unknown policy, numbers of stages that differ, or heads that do not divide a
      width.
  """
  errors.check_choice('window_policy', window_policy, POLICIES)
  if len(depths) != len(num_heads):
    raise ValueError(f'{depths=} and {num_heads=} must have one entry per stage')
  dims = [dim * 2**i for i in range(len(depths))]
  for width, count in zip(dims, num_heads, strict=True):
    if width % count:
      raise ValueError(f'num_heads {num_heads} do not divide the widths {dims}: pass divisors')
  if window_policy == 'scale':
    window = tuple(-(-side // (patch * 2 ** (len(depths) - 1))) for side in image_size)
  sides = windows.pair(window)
  types: dict[str, Any] = {'dtype': dtype, 'param_dtype': param_dtype}
  layer_norm = functools.partial(norm.LayerNorm, epsilon=norm_epsilon, **types)
  per_block: Any = attn if resnet_blocks.is_nested(attn) else [[attn] * depth for depth in depths]
  rates = drop_path_rates(drop_path, depths)

  def block(i: int, j: int) -> ModuleDef:
    made = operators.bind(
      operators.operator(per_block[i][j]), kernel_init=INIT, dropout=dropout, **types
    )
    if operators.takes(made, 'shift'):
      shift = tuple(side // 2 for side in sides) if j % 2 else (0, 0)
      made = operators.bind(
        made, window=sides, shift=shift, fit=fit, padding=padding, qkv_bias=qkv_bias
      )
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
      drop_path=rates[i][j],
    )

  backbone = functools.partial(
    hierarchy.Hierarchy,
    image_size=image_size,
    stem=functools.partial(
      patch_embed.PatchEmbed,
      dim=dim,
      patch=patch,
      pad=True,
      conv=functools.partial(
        conv.Conv,
        kernel_init=initializers.TORCH_KERNEL,
        bias_init=initializers.torch_bias(3 * patch**2),
        **types,
      ),
      norm=layer_norm,
    ),
    stages=[[block(i, j) for j in range(depth)] for i, depth in enumerate(depths)],
    downsamples=[functools.partial(PatchMerging, width, layer_norm, **types) for width in dims[1:]],
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


def _variant(data, dim, heads, params, gmacs, top1, depth=18, window=7, size=224) -> base.Variant:
  return base.Variant(
    {
      'dim': dim,
      'depths': (2, 2, depth, 2),
      'num_heads': tuple(heads * 2**i for i in range(4)),
      'window': window,
    },
    image_size=size,
    params=params,
    flops=gmacs * 1e9,
    top1=top1,
    source=f'arXiv 2103.14030, Table 1 ({data})',
  )


_1K, _22K = 'ImageNet-1k', 'ImageNet-22k pre-training'
VARIANTS = {
  'swin_tiny': _variant(_1K, 96, 3, 28_288_354, 4.5, 81.3, depth=6),
  'swin_small': _variant(_1K, 96, 3, 49_606_258, 8.7, 83.0),
  'swin_base': _variant(_1K, 128, 4, 87_768_224, 15.4, 83.5),
  'swin_base_w12': _variant(_1K, 128, 4, 87_903_584, 47.0, 84.5, window=12, size=384),
  # 224 pixels: the authors' repository; Table 1 has 384 alone.
  'swin_large': _variant(_22K, 192, 6, 196_532_476, 34.5, 86.3),
  'swin_large_w12': _variant(_22K, 192, 6, 196_735_516, 103.9, 87.3, window=12, size=384),
}


def table_of_offsets(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """`[offsets, heads]`, rows first and query minus key like ours, to `[heads, y, x]`."""
  return array.T.reshape(shape) if array.size == math.prod(shape) else array


# Swin's names of the parts of a block; papers that exchange `attn` have the rest in common.
BLOCK = r'layers\.(\d+)\.blocks\.(\d+)\.'
OURS = 'backbone/stage{0:+1}/block{1:02d}/'
ATTENTION_RULES = (
  reference.Rule(BLOCK + r'attn\.qkv', OURS + 'attn', reference.fused('query', 'key', 'value')),
  reference.Rule(
    BLOCK + r'attn\.relative_position_bias_table',
    OURS + 'attn/relative_position',
    reference.param('', table_of_offsets),
  ),
  reference.Rule(BLOCK + r'attn\.proj', OURS + 'attn/proj', reference.DENSE),
)


def rules(*, merges_first: bool) -> list[reference.Rule]:
  """Returns the renames of everything but attention.

  Args:
    merges_first: whether a stage begins with the merging of patches (timm) or ends with it.
  """
  rule = reference.Rule
  before = '{0:+1}' if merges_first else '{0:+2}'
  return [
    rule(r'patch_embed\.proj', 'backbone/stem/conv', reference.CONV),
    rule(r'patch_embed\.norm', 'backbone/stem/norm', reference.NORM),
    rule(BLOCK + r'norm(\d)', OURS + 'norm{2}', reference.NORM),
    rule(BLOCK + r'mlp\.fc1', OURS + 'mlp/expand', reference.DENSE),
    rule(BLOCK + r'mlp\.fc2', OURS + 'mlp/project', reference.DENSE),
    rule(r'layers\.(\d+)\.downsample\.norm', f'backbone/downsample{before}/norm', reference.NORM),
    rule(
      r'layers\.(\d+)\.downsample\.reduction',
      f'backbone/downsample{before}/reduction',
      reference.DENSE,
    ),
    rule('norm', 'backbone/norm', reference.NORM),
    rule(r'head(?:\.fc)?', 'head/classifier', reference.DENSE),
  ]


def infer(fit: str) -> Callable[[reference.State, Mapping[str, Any]], dict[str, Any]]:
  """Returns what reads classes and a resolution off a state: one for which the tables are made.

  A table that is smaller than those of the first stage belongs to a map smaller than its windows.
  A rectangular one does not tell height from width, and is taken to belong to a wide image.
  """

  def read(state: reference.State, options: Mapping[str, Any]) -> dict[str, Any]:
    del options
    classifier = state.get('head.fc.bias', state.get('head.bias'))
    found: dict[str, Any] = {'num_classes': 0 if classifier is None else len(classifier)}
    table = r'layers\.(\d+)\.blocks\.0\.attn\.relative_position_bias_table'
    matches = {key: re.fullmatch(table, key) for key in state}
    sizes = {int(match[1]): len(state[key]) for key, match in matches.items() if match}
    if not sizes:
      return found
    window = (math.isqrt(max(sizes.values())) + 1) // 2
    sides = range(4 * 2 ** max(sizes) * window, 0, -4)
    squares = ((side, side) for side in sides)
    wide = ((height, width) for width in sides for height in sides)
    for size in itertools.chain(squares, wide):
      made = {}
      for i in sizes:
        grid = [-(-side // (4 * 2**i)) for side in size]
        rows, columns = windows.tile(grid, window, fit=fit).window
        made[i] = (2 * rows - 1) * (2 * columns - 1)
      if made == sizes:
        return {**found, 'image_size': size}
    return found

  return read


_HF_BLOCK = r'^(layers\.\d+\.blocks\.\d+\.)'
# Files' names, and those of release 5 in memory, to the authors'.
_HF_NAMES = reference.renaming(
  (r'^swin\.(?:encoder\.)?', ''),
  (r'^embeddings\.patch_embeddings\.projection', 'patch_embed.proj'),
  (r'^embeddings\.norm', 'patch_embed.norm'),
  (_HF_BLOCK + 'layernorm_before', r'\1norm1'),
  (_HF_BLOCK + 'layernorm_after', r'\1norm2'),
  (_HF_BLOCK + r'attention\.output\.dense', r'\1attn.proj'),
  (_HF_BLOCK + r'attention\.o_proj', r'\1attn.proj'),
  (_HF_BLOCK + r'attention\.([qkv])_proj', r'\1attn.\2'),
  (_HF_BLOCK + r'attention\.self\.([qkv])(?:uery|ey|alue)', r'\1attn.\2'),
  (_HF_BLOCK + r'attention\.(?:self|relative_position_bias)\.', r'\1attn.'),
  (_HF_BLOCK + r'intermediate\.dense', r'\1mlp.fc1'),
  (_HF_BLOCK + r'output\.dense', r'\1mlp.fc2'),
  ('^layernorm', 'norm'),
  ('^classifier', 'head'),
)
_HF_ATTENTION = (
  *(
    reference.Rule(BLOCK + rf'attn\.{name[0]}', OURS + f'attn/{name}', reference.DENSE)
    for name in ('query', 'key', 'value')
  ),
  *ATTENTION_RULES[1:],
)
# Made anew from the resolution in every model.
BUFFERS = (r'.*\.relative_position_index', r'.*\.attn_mask')
REFERENCES = {
  'official': reference.Reference(
    origin='github.com/microsoft/Swin-Transformer, models/swin_transformer.py',
    rules=(*ATTENTION_RULES, *rules(merges_first=False)),
    options={'fit': 'square'},
    infer=infer('square'),
    ignore=BUFFERS,
  ),
  'timm': reference.Reference(
    origin='github.com/huggingface/pytorch-image-models, timm/models/swin_transformer.py',
    rules=(*ATTENTION_RULES, *rules(merges_first=True)),
    options={'padding': 'attend_late'},
    infer=infer('axis'),
    ignore=BUFFERS,
  ),
  'hf': reference.Reference(
    origin='github.com/huggingface/transformers, models/swin/modeling_swin.py',
    rules=(*_HF_ATTENTION, *rules(merges_first=False)),
    options={'fit': 'square', 'padding': 'attend'},
    prepare=_HF_NAMES,
    infer=infer('square'),
    ignore=BUFFERS,
  ),
}
