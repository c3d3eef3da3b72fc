"""ViT (arXiv 2010.11929, 2106.10270) with its hybrids, plain (2205.01580) and scaled (2106.04560).

Tables and other people's names for the weights: `vit_variants.py`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.attention import map_pool, mhsa, operators
from vision_attention.layers import conv, drop_path, heads, mlp, norm, stage
from vision_attention.models import base, vit_hybrid, vit_variants
from vision_attention.ops import position_embedding, reduction

VARIANTS = vit_variants.VARIANTS
REFERENCES = vit_variants.REFERENCES
RESIZE = {'params/backbone/position': position_embedding.resize}
ModuleDef = Callable[..., nn.Module]


class EncoderBlock(nn.Module):
  """`x + Attn(LN(x))`, then `x + MLP(LN(x))` (arXiv 2010.11929, equations 2 and 3).

  Attributes:
    dim: width.
    num_heads: of the operator.
    attn: the operator, called with `dim`, `num_heads` and a name.
    drop_path: rate of stochastic depth of either branch.
    layer_scale: a learned factor per channel at the end of either branch, or None.
  """

  dim: int
  num_heads: int
  attn: ModuleDef
  mlp: ModuleDef
  norm: ModuleDef
  drop_path: float
  layer_scale: ModuleDef | None = None

  @nn.compact
  def __call__(self, x: Float[Array, 'b ... c'], *, train: bool) -> Float[Array, 'b ... c']:
    attn = operators.bind(self.attn, dim=self.dim, num_heads=self.num_heads)
    for i, (branch, name) in enumerate(((attn, 'attn'), (self.mlp, 'mlp')), 1):
      y = self.norm(name=f'norm{i}')(x, train=train)
      y = branch(name=name)(y, train=train)
      if self.layer_scale is not None:
        y = self.layer_scale(name=f'layer_scale{i}')(y)
      x = x + drop_path.DropPath(self.drop_path, name=f'drop_path{i}')(y, train=train)
    return x


class VisionTransformer(nn.Module):
  """Patches, positions, encoder blocks, LayerNorm.

  Without a class token the blocks see a map `[b, h, w, c]`, so that any operator on maps fits;
  with one they see tokens `[b, 1 + h w, c]`. The features are the map `stage1`, and `cls`.

  Attributes:
    image_size: height and width that the positions are made for.
    grid: patches along height and width.
    stem: of a hybrid, or None.
    class_token: whether there is one.
    norm: after the last block, or None.
    learned_position: or the fixed sine and cosine of `ops.position_embedding`.
  """

  image_size: tuple[int, int]
  grid: tuple[int, int]
  dim: int
  patch: int
  stem: ModuleDef | None
  blocks: Sequence[ModuleDef]
  norm: ModuleDef | None
  class_token: bool
  learned_position: bool
  dropout: float
  remat: bool
  scan: bool = False
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, images: Float[Array, 'b h w c'], *, train: bool
  ) -> dict[str, Float[Array, 'b ...']]:
    base.check_image_size(images, self.image_size)
    self._check_variables()
    types: dict[str, Any] = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    x = images.astype(self.dtype)
    if self.stem is not None:
      x = self.stem(name='stem')(x, train=train)
    x = conv.Conv(
      self.dim, self.patch, self.patch, padding='valid', use_bias=True, name='embed', **types
    )(x)
    x = reduction.add_shared(x, self._position().astype(self.dtype))
    if self.class_token:
      x = x.reshape(len(x), -1, self.dim)
      x = jnp.concatenate([jnp.broadcast_to(self._cls(), (len(x), 1, self.dim)), x], axis=1)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    x = stage.Stage(self.blocks, self.remat, scan=self.scan, name='stage1')(x, train=train)
    if self.norm is not None:
      x = self.norm(name='norm')(x, train=train)
    if not self.class_token:
      return {'stage1': x}
    return {'stage1': x[:, 1:].reshape(len(x), *self.grid, self.dim), 'cls': x[:, 0]}

  def _check_variables(self) -> None:
    """Refuses variables of another kind, of which Flax would leave the surplus unused."""
    kinds = {
      'cls': (self.class_token, "pool='cls'"),
      'position': (self.learned_position, "position='learned'"),
      'norm': (self.norm is not None, 'norm_after_pool=False'),
    }
    for name, (used, option) in kinds.items():
      if not used and self.has_variable('params', name):
        raise ValueError(
          f'the variables have {name!r}, which this model lacks: create it with {option}'
        )

  def _position(self) -> Float[Array, 'h w c']:
    if not self.learned_position:
      return jnp.asarray(position_embedding.sincos2d(*self.grid, self.dim))
    init = nn.initializers.normal(0.02)
    return self.param('position', init, (*self.grid, self.dim), self.param_dtype)

  def _cls(self) -> Float[Array, 'c']:
    """The class token with its own position."""
    cls = self.param('cls', nn.initializers.zeros, (self.dim,), self.param_dtype)
    if self.learned_position:
      init = nn.initializers.normal(0.02)
      cls = cls + self.param('cls_position', init, (self.dim,), self.param_dtype)
    return cls.astype(self.dtype)


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  dim: int,
  depth: int,
  mlp_dim: int,
  num_heads: int,
  patch: int,
  stem_depths: Sequence[int] | None = None,
  pool: str = 'cls',
  position: str = 'learned',
  pre_logits: bool = False,
  norm_after_pool: bool = False,
  attn: operators.Spec = mhsa.MultiHeadAttention,
  activation: str = 'gelu_tanh',
  norm_epsilon: float = 1e-6,
  stem_norm_epsilon: float = 1e-6,
  std_epsilon_in: str = 'std',
  dropout: float = 0.0,
  drop_path: float = 0.0,
  head_bias: float = 0.0,
  remat: bool = False,
  scan: bool = False,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    num_classes: outputs of the head.
    image_size: height and width; multiples of the patch (times the stride of a hybrid's stem).
    dtype: of activations.
    param_dtype: of parameters.
    dim: width.
    depth: encoder blocks.
    mlp_dim: width inside the MLP.
    num_heads: attention heads.
    patch: side of a patch, in pixels, or in positions of a hybrid's stem.
    stem_depths: units per stage of a hybrid's ResNet; empty for its root alone; None for no stem.
    pool: `cls` (a class token), `gap` (mean of all tokens) or `map` (attention pooling).
    position: `learned` or `sincos2d`.
    pre_logits: whether a dense layer with tanh precedes the classifier (the representation layer of
      pre-training).
    norm_after_pool: whether the last LayerNorm follows the mean instead of preceding it (timm's
      default with `gap`).
    attn: the operator; with a class token, one that takes tokens without a map.
    activation: a name of `ops.activation`.
    norm_epsilon: of LayerNorm.
    stem_norm_epsilon: of a hybrid's group norm.
    std_epsilon_in: of a hybrid's weight standardisation; see `layers.conv.StdConv`.
    dropout: after positions, attention and within the MLP.
    drop_path: rate of stochastic depth of the last block; the first has 0.
    head_bias: initial bias of the classifier (-6.9 or -10 with a sigmoid loss).
    remat: whether blocks are computed again in the backward pass, to save memory.
    scan: whether equal blocks are compiled once, and their variables stacked.

  Raises:
    ValueError: for an image size that patches do not tile, an operator that needs a map, or a norm
      after a pooling other than the mean.
  """
  errors.check_choice('pool', pool, ('cls', 'gap', 'map'))
  errors.check_choice('position', position, ('learned', 'sincos2d'))
  attn = operators.operator(attn)
  if pool == 'cls' and operators.trait(attn, 'needs_map', False):
    raise ValueError(
      f'{attn} works on a map [b, h, w, c], and the class token has no place in one: '
      "pass pool='gap' or pool='map'"
    )
  if norm_after_pool and pool != 'gap':
    raise ValueError(
      f"norm_after_pool follows the mean of all tokens: pass pool='gap', not {pool!r}"
    )
  stride = patch * (1 if stem_depths is None else vit_hybrid.stride_of(stem_depths))
  for side in image_size:
    if side % stride:
      lower = side // stride * stride
      raise ValueError(
        f'patches of {stride} pixels do not tile an image of side {side}: the nearest sizes are '
        f'{lower or stride} and {lower + stride}'
      )
  types = {'dtype': dtype, 'param_dtype': param_dtype}
  xavier = nn.initializers.xavier_uniform()
  layer_norm = functools.partial(norm.LayerNorm, epsilon=norm_epsilon, **types)
  block = functools.partial(
    EncoderBlock,
    dim=dim,
    num_heads=num_heads,
    attn=operators.bind(attn, dropout=dropout, kernel_init=xavier, **types),
    mlp=functools.partial(
      mlp.Mlp,
      hidden_dim=mlp_dim,
      activation=activation,
      dropout=dropout,
      kernel_init=xavier,
      bias_init=nn.initializers.normal(1e-6),
      **types,
    ),
    norm=layer_norm,
  )
  [rates] = drop_path_rates(drop_path, depth)
  stem = None
  if stem_depths is not None:
    stem = functools.partial(
      vit_hybrid.ResNetStem,
      depths=tuple(stem_depths),
      conv=functools.partial(conv.StdConv, padding='same', epsilon_in=std_epsilon_in, **types),
      norm=functools.partial(norm.GroupNorm, epsilon=stem_norm_epsilon, **types),
    )
  backbone = functools.partial(
    VisionTransformer,
    image_size=image_size,
    grid=(image_size[0] // stride, image_size[1] // stride),
    dim=dim,
    patch=patch,
    stem=stem,
    blocks=[functools.partial(block, drop_path=rate) for rate in rates],
    norm=None if norm_after_pool else layer_norm,
    class_token=pool == 'cls',
    learned_position=position == 'learned',
    dropout=dropout,
    remat=remat,
    scan=scan,
    **types,
  )
  pools = {
    'cls': 'none',
    'gap': 'gap',
    'map': functools.partial(
      map_pool.MapPool,
      num_heads=num_heads,
      hidden_dim=mlp_dim,
      activation=activation,
      norm_epsilon=norm_epsilon,
      **types,
    ),
  }
  head = functools.partial(
    heads.LinearHead,
    num_classes=num_classes,
    feature='cls' if pool == 'cls' else 'stage1',
    pool=pools[pool],
    norm=layer_norm if norm_after_pool else None,
    hidden_dim=dim if pre_logits else 0,
    kernel_init=nn.initializers.zeros,
    bias_init=nn.initializers.constant(head_bias),
    **types,
  )
  return base.Parts(backbone, head)


def drop_path_rates(rate: float, depth: int) -> list[list[float]]:
  """Returns the rates of one stage of `depth` blocks."""
  return drop_path.linear_rates(rate, [depth])
