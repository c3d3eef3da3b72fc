"""Self-attention as convolution (arXiv 1911.03584): six layers of attention alone, on CIFAR-10.

Pixels of 2x2 blocks are put together and projected; then come BERT's layers, with the norm after
the addition, and the mean over all positions. There is no class token and nothing is added for
positions. The authors' code: github.com/epfml/attention-cnn.

The multiply-adds are those of the paper's profiler, which sees linear layers only: the means of the
map are not counted (section 5, table 1 prints twice the number).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.attention import operators
from vision_attention.layers import heads, initializers, norm, stage
from vision_attention.models import base, reference
from vision_attention.ops import activation, patches, relative_logits

ModuleDef = Callable[..., nn.Module]
KERNEL = initializers.TORCH_KERNEL
RESIZE = {r'params/backbone/.*/attn/(height|width)_table': relative_logits.resize_offsets}


class Block(nn.Module):
  """`a = LN(x + W attn(x))`, then `LN(a + FFN(a))`: a layer of BERT (arXiv 1810.04805).

  Attributes:
    attn: the operator, called with `dim` and a name.
    mlp_dim: width inside the FFN.
    dropout: rate at the end of either branch.
  """

  attn: ModuleDef
  mlp_dim: int
  dropout: float
  norm: ModuleDef
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b h w c']:
    dim = x.shape[-1]

    def dense(y: Float[Array, 'b h w d'], width: int, name: str) -> Float[Array, 'b h w e']:
      layer = nn.Dense(
        width,
        kernel_init=KERNEL,
        bias_init=initializers.torch_bias(y.shape[-1]),
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=name,
      )
      return layer(y)

    drop = nn.Dropout(self.dropout, deterministic=not train)
    y = self.attn(dim=dim, name='attn')(x, train=train)
    x = self.norm(name='norm1')(x + drop(dense(y, dim, 'proj')), train=train)
    y = activation.gelu_exact(dense(x, self.mlp_dim, 'expand'))
    return self.norm(name='norm2')(x + drop(dense(y, dim, 'project')), train=train)


class ConvAttentionNet(nn.Module):
  """Blocks of pixels, projected, and then layers of one width; the only feature is `stage1`.

  Attributes:
    dim: the width.
    patch: side of the blocks of pixels.
    blocks: the layers, each called with its name.
  """

  dim: int
  patch: int
  blocks: Sequence[ModuleDef]
  remat: bool
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, images: Float[Array, 'b h w c'], *, train: bool
  ) -> dict[str, Float[Array, 'b p q d']]:
    x = patches.space_to_depth(images.astype(self.dtype), self.patch)
    embed = nn.Dense(
      self.dim,
      kernel_init=KERNEL,
      bias_init=initializers.torch_bias(x.shape[-1]),
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name='embed',
    )
    return {'stage1': stage.Stage(self.blocks, self.remat, name='stage1')(embed(x), train=train)}


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  attn: operators.Spec = 'quadratic',
  dim: int = 400,
  depth: int = 6,
  num_heads: int | Sequence[int] = 9,
  mlp_dim: int = 512,
  patch: int = 2,
  norm_epsilon: float = 1e-12,
  attention_dropout: float = 0.0,
  dropout: float = 0.0,
  remat: bool = False,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    num_classes: outputs of the head.
    image_size: height and width, multiples of `patch`.
    dtype: of activations.
    param_dtype: of parameters.
    attn: the operator: `quadratic`, `learned_position`, or any other.
    dim: width.
    depth: layers.
    num_heads: of the operator, one number or one per layer; those of `quadratic` are taps.
    mlp_dim: width inside the FFN.
    patch: side of the blocks of pixels that are put together.
    norm_epsilon: of every LayerNorm.
    attention_dropout: rate on the weights of attention, 0.1 in the paper's training.
    dropout: rate at the end of either residual branch, 0.1 in the paper's training.
    remat: whether layers are computed again in the backward pass, to save memory.

  Raises:
    ValueError: for images that `patch` does not divide, or heads for another number of layers.
  """
  for side in image_size:
    if side % patch:
      low = side - side % patch
      raise ValueError(
        f'patch {patch} does not divide an image of side {side}: the nearest sizes are '
        f'{low} and {low + patch}'
      )
  heads_of = [num_heads] * depth if isinstance(num_heads, int) else list(num_heads)
  if len(heads_of) != depth:
    raise ValueError(
      f'{num_heads=} must be one number or one per layer, of which there are {depth}'
    )
  types: dict[str, Any] = {'dtype': dtype, 'param_dtype': param_dtype}
  made = operators.bind(
    operators.operator(attn), attention_dropout=attention_dropout, kernel_init=KERNEL, **types
  )
  blocks = [
    functools.partial(
      Block,
      attn=operators.bind(made, num_heads=count),
      mlp_dim=mlp_dim,
      dropout=dropout,
      norm=functools.partial(norm.LayerNorm, epsilon=norm_epsilon, **types),
      **types,
    )
    for count in heads_of
  ]
  backbone = functools.partial(
    ConvAttentionNet, dim=dim, patch=patch, blocks=blocks, remat=remat, **types
  )
  head = functools.partial(
    heads.LinearHead,
    num_classes=num_classes,
    feature='stage1',
    kernel_init=KERNEL,
    bias_init=initializers.torch_bias(dim),
    **types,
  )
  return base.Parts(backbone, head)


def _variant(attn: operators.Spec, params: int, operations: float, accuracy: str, **options: Any):
  return base.Variant(
    {'attn': attn, **options},
    image_size=32,
    num_classes=10,
    params=params,
    flops=operations / 2,
    source=f'arXiv 1911.03584, Table 1{accuracy}',
  )


def _recalled(percent: float) -> str:
  return f' (CIFAR-10; accuracy there {percent}, recalled, not verified)'


_GENERAL = {'name': 'quadratic', 'isotropic': False}
_CONTENT = {'name': 'learned_position', 'content': True}
VARIANTS = {
  'conv_attention_quadratic': _variant('quadratic', 12_086_844, 6.2e9, _recalled(93.8)),
  'conv_attention_quadratic_general': _variant(_GENERAL, 12_087_006, 6.2e9, _recalled(87.3)),
  'conv_attention_quadratic_heads16': _variant(
    'quadratic', 18_806_970, 9.6e9, ' (not in it: the 16 heads of the code)', num_heads=16
  ),
  'conv_attention_learned': _variant('learned_position', 12_278_682, 6.2e9, _recalled(91.8)),
  # Table 1 prints 29.5 M parameters.
  'conv_attention_learned_content': _variant(_CONTENT, 29_601_882, 15e9, _recalled(87.1)),
}


def _rules(options: Mapping[str, Any]) -> Sequence[reference.Rule]:
  """The authors' names. Their rows are the second axis of a map, and their columns the first."""
  del options
  rule, dense, norms = reference.Rule, reference.DENSE, reference.NORM
  theirs, ours = r'encoder\.layer\.(\d+)\.', 'backbone/stage1/block{0:02d}/'
  attn = theirs + r'attention\.self\.'
  params = {
    r'attention_centers': ('centers', reference.same),
    r'attention_spreads': ('spreads', reference.same),
    r'row_embeddings\.weight': ('width_table', reference.same),
    r'col_embeddings\.weight': ('height_table', reference.same),
    r'head_keys_row\.weight': ('width_key', reference.kernel),
    r'head_keys_col\.weight': ('height_key', reference.kernel),
  }
  return [
    *(rule(attn + a, f'{ours}attn/{b}', reference.param('', t)) for a, (b, t) in params.items()),
    rule(attn + '(query|key)', ours + 'attn/{1}', dense),
    rule(attn + 'value', ours + 'attn/proj', dense),
    rule(theirs + r'attention\.output\.dense', ours + 'proj', dense),
    rule(theirs + r'attention\.output\.LayerNorm', ours + 'norm1', norms),
    rule(theirs + r'intermediate\.dense', ours + 'expand', dense),
    rule(theirs + r'output\.dense', ours + 'project', dense),
    rule(theirs + r'output\.LayerNorm', ours + 'norm2', norms),
    rule('features_upscale', 'backbone/embed', dense),
    rule('classifier', 'head/classifier', dense),
  ]


def _infer(state: reference.State, options: Mapping[str, Any]) -> dict[str, Any]:
  """Widths and heads show in shapes; tables of `2 M - 1` offsets say that a map has side `M`."""
  layers = sorted({int(key.split('.')[2]) for key in state if key.startswith('encoder.layer.')})
  dim, pixels = state['features_upscale.weight'].shape
  patch = round((pixels / 3) ** 0.5)
  values = [state[f'encoder.layer.{i}.attention.self.value.weight'] for i in layers]
  inferred: dict[str, Any] = {
    'num_classes': len(state['classifier.bias']) if 'classifier.bias' in state else 0,
    'dim': dim,
    'depth': len(layers),
    'num_heads': [value.shape[1] // dim for value in values],
    'mlp_dim': len(state['encoder.layer.0.intermediate.dense.bias']),
    'patch': patch,
  }
  table = state.get('encoder.layer.0.attention.self.row_embeddings.weight')
  if table is not None:
    spec = options['attn'] if isinstance(options['attn'], Mapping) else {'name': options['attn']}
    longest = (len(table) + 1) // 2
    inferred['attn'] = {**spec, 'max_size': longest, 'position_dim': table.shape[1]}
  return inferred


REFERENCES = {
  'official': reference.Reference(
    origin='github.com/epfml/attention-cnn, models/transformer.py, BertImage',
    rules=_rules,
    infer=_infer,
    # The table of squared offsets, and the indices, are made anew.
    ignore=(r'.*\.self\.(R|relative_indices)', 'attention_mask'),
  ),
}
