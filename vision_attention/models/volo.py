"""VOLO (arXiv 2106.13112): outlook attention on fine patches, then a transformer on coarser ones.

Trained with a label for every token (arXiv 2104.10858): the head has a classifier for the class
token and another for all the others, and images are mixed by tokens.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.attention import class_attention, mhsa, operators, outlook
from vision_attention.layers import conv, drop_path, initializers, mlp, norm, stage
from vision_attention.models import base, resnet_blocks, vit, volo_variants
from vision_attention.ops import mix_token, reduction

VARIANTS = volo_variants.VARIANTS
REFERENCES = volo_variants.REFERENCES
RESIZE = volo_variants.RESIZE
ModuleDef = Callable[..., nn.Module]
PerBlock = Sequence[Sequence[operators.Spec]]
# The code bounds the normal distribution at 2, a hundred times its spread.
INIT = nn.initializers.normal(0.02)
POOLS = ('cls', 'gap')


class Stem(nn.Module):
  """Three convolutions with BatchNorm and ReLU, the first halving, then patches of their map.

  Attributes:
    dim: output channels.
    hidden_dim: channels of the convolutions.
    patch: side of a patch in pixels of the image, even.
  """

  dim: int
  hidden_dim: int
  patch: int
  conv: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    for i, (size, stride) in enumerate(((7, 2), (3, 1), (3, 1)), 1):
      y = self.conv(self.hidden_dim, size, stride, padding='symmetric', name=f'conv{i}')(x)
      x = jax.nn.relu(self.norm(name=f'norm{i}')(y, train=train))
    side = self.patch // 2
    init = initializers.torch_bias(self.hidden_dim * side**2)
    return self.conv(
      self.dim, side, side, padding='valid', use_bias=True, bias_init=init, name='proj'
    )(x)


class ClassBlock(nn.Module):
  """`cls + Attn(LN(tokens))`, then `cls + MLP(LN(cls))`; the other tokens stay (2103.17239)."""

  dim: int
  num_heads: int
  attn: ModuleDef
  mlp: ModuleDef
  norm: ModuleDef

  @nn.compact
  def __call__(self, x: Float[Array, 'b k c'], *, train: bool) -> Float[Array, 'b k c']:
    y = self.norm(name='norm1')(x, train=train)
    y = self.attn(dim=self.dim, num_heads=self.num_heads, name='attn')(y, train=train)
    cls = x[:, 0] + y
    y = self.norm(name='norm2')(cls, train=train)
    cls = cls + self.mlp(name='mlp')(y, train=train)
    return jnp.concatenate([cls[:, None], x[:, 1:]], 1)


class Volo(nn.Module):
  """Patches, stages of blocks, and blocks in which the class token alone changes.

  The first stage's map is halved, and there positions are added. Features are the last map of every
  stage, that of the last stage after a norm; with class blocks `cls`; where tokens were mixed
  `mixed`, 1 for tokens that come from the partner and 0 for others.

  Attributes:
    image_size: height and width that the positions are made for.
    grid: height and width of the second stage's map.
    dim: width from there on.
    stem: from images to the first map.
    stages: per stage, its blocks.
    class_blocks: blocks of the class token.
    norm: after the last block.
    mix_token: in training, exponent of the distribution of the share of tokens that are mixed; 0
      for none.
    remat: whether blocks are computed again in the backward pass.
  """

  image_size: tuple[int, int]
  grid: tuple[int, int]
  dim: int
  stem: ModuleDef
  stages: Sequence[Sequence[ModuleDef]]
  class_blocks: Sequence[ModuleDef]
  conv: ModuleDef
  norm: ModuleDef
  mix_token: float
  dropout: float
  remat: bool = False
  scan: bool = False
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, images: Float[Array, 'b h w c'], *, train: bool
  ) -> dict[str, Float[Array, 'b ...']]:
    base.check_image_size(images, self.image_size)
    x = self.stem(name='stem')(images.astype(self.dtype), train=train)
    features = {}
    if train and self.mix_token:
      cells = mix_token.box(self.make_rng('dropout'), self.grid, self.mix_token)
      x = mix_token.exchange(x, cells)
      features['mixed'] = jnp.broadcast_to(cells, (len(x), *self.grid)).astype(jnp.float32)
    for i, blocks in enumerate(self.stages, 1):
      if i == 2:
        x = self._halve(x, train)
      x = stage.Stage(blocks, self.remat, scan=self.scan, name=f'stage{i}')(x, train=train)
      features[f'stage{i}'] = x
    last = self.norm(name='norm')
    if self.class_blocks:
      cls = self.param('cls', nn.initializers.normal(0.02), (self.dim,), self.param_dtype)
      cls = jnp.broadcast_to(jnp.asarray(cls).astype(self.dtype), (len(x), 1, self.dim))
      tokens = jnp.concatenate([cls, x.reshape(len(x), -1, self.dim)], 1)
      tokens = stage.Stage(self.class_blocks, self.remat, scan=self.scan, name='class_stage')(
        tokens, train=train
      )
      tokens = last(tokens, train=train)
      features['cls'], x = tokens[:, 0], tokens[:, 1:].reshape(x.shape)
    else:
      x = last(x, train=train)
    features[f'stage{len(self.stages)}'] = x
    return features

  def _halve(self, x: Float[Array, 'b h w c'], train: bool) -> Float[Array, 'b p q d']:
    bias_init = initializers.torch_bias(4 * x.shape[-1])
    x = self.conv(
      self.dim, 2, 2, padding='valid', use_bias=True, bias_init=bias_init, name='downsample2'
    )(x)
    shape = (*self.grid, self.dim)
    position = self.param('position', nn.initializers.normal(0.02), shape, self.param_dtype)
    x = reduction.add_shared(x, jnp.asarray(position).astype(self.dtype))
    return nn.Dropout(self.dropout, deterministic=not train)(x)


class TokenHead(nn.Module):
  """`classifier(cls) + 1/2 max over tokens of aux_classifier(token)`, per class.

  For training with labels of tokens, `named` gives the summands apart:

    classifier: logits of the class token, `[b, k]`.
    tokens: logits of all others, `[b, h, w, k]`, where tokens were mixed put back to the image that
      they come from.
    share: of the class token's label, `[b]`; the rest is that of image `b - 1 - i`.

  Attributes:
    num_classes: outputs of either classifier; 0 gives what the first would have seen.
    feature: name of the map.
    pool: `cls`, or `gap`, the mean over all tokens with the class token, if there is one.
    aux_head: whether the tokens have a classifier.
    layer: a classifier, called with its outputs.
  """

  num_classes: int
  feature: str
  pool: str
  aux_head: bool
  layer: ModuleDef
  dtype: DTypeLike = jnp.float32

  @property
  def outputs(self) -> tuple[str, ...]:
    """Names of the classifiers, where tokens have one too."""
    return ('classifier', 'tokens') if self.aux_head and self.num_classes else ()

  @nn.compact
  def __call__(
    self, features: Mapping[str, Float[Array, 'b ...']], *, train: bool, named: bool = False
  ) -> Any:
    """Returns float32 logits, or a dict of what they are made of where `named` is asked for."""
    tokens = features[self.feature]
    if self.pool == 'cls':
      x = features['cls']
    else:
      seen = tokens.reshape(len(tokens), -1, tokens.shape[-1]).astype(jnp.float32)
      if 'cls' in features:
        seen = jnp.concatenate([features['cls'][:, None].astype(jnp.float32), seen], 1)
      x = seen.mean(1).astype(self.dtype)
    if not self.num_classes:
      return x.astype(jnp.float32)
    logits = self.layer(self.num_classes, name='classifier')(x).astype(jnp.float32)
    if not self.aux_head:
      return logits
    aux = self.layer(self.num_classes, name='aux_classifier')(tokens).astype(jnp.float32)
    if not named:
      if 'mixed' in features:
        raise ValueError(
          'mix_token mixes images, and so their labels: train with the logits of tokens '
          '(`named_logits`), or create the model with mix_token=0'
        )
      return logits + 0.5 * aux.max((1, 2))
    share = jnp.ones(len(x))
    if 'mixed' in features:
      mixed = features['mixed']
      share, aux = 1.0 - mixed.mean((1, 2)), mix_token.exchange(aux, mixed[0] > 0)
    return {'classifier': logits, 'tokens': aux, 'share': share}


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  depths: Sequence[int],
  dims: Sequence[int],
  num_heads: Sequence[int],
  mlp_ratio: float = 3,
  stem_dim: int = 64,
  patch: int = 8,
  class_depth: int = 2,
  pool: str = 'cls',
  aux_head: bool = True,
  kernel: int = 3,
  step: int = 2,
  qkv_bias: bool = False,
  local_attn: operators.Spec = outlook.OutlookAttention,
  attn: operators.Spec | PerBlock = mhsa.MultiHeadAttention,
  activation: str = 'gelu_exact',
  norm_epsilon: float = 1e-5,
  norm_momentum: float = 0.9,
  mix_token: float = 0.0,
  dropout: float = 0.0,
  drop_path: float = 0.0,
  remat: bool = False,
  scan: bool = False,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    num_classes: outputs of the head.
    image_size: height and width; any of two patches and more. What patches and halving leave over
      at bottom and right is not seen.
    dtype: of activations.
    param_dtype: of parameters.
    depths: blocks per stage.
    dims: width of the first stage, and of all others.
    num_heads: of the first stage, and of all others.
    mlp_ratio: width inside the MLP relative to the block's.
    stem_dim: channels of the stem's convolutions.
    patch: side of a patch of the first stage, even; those of the others are twice as large.
    class_depth: blocks in which the class token attends to all; 0 for no class token.
    pool: what the head classifies, see `TokenHead`.
    aux_head: whether it also classifies tokens.
    kernel: side of the windows of outlook attention.
    step: their distance.
    qkv_bias: whether queries, keys and values have biases.
    local_attn: the operator of the first stage.
    attn: that of the others, or one per stage and block, the first stage's too.
    activation: a name of `ops.activation`.
    norm_epsilon: of all norms.
    norm_momentum: of the stem's BatchNorm.
    mix_token: in training, exponent of the distribution of the share of mixed tokens (the paper's
      is 1); 0 for none.
    dropout: after positions.
    drop_path: rate of stochastic depth of the last block; it grows from the first, but those of the
      first stage have none (the code).
    remat: whether blocks are computed again in the backward pass, to save memory.
    scan: whether equal blocks are compiled once, and their variables stacked.

  Raises:
    ValueError: for an image of less than two patches, heads that do not divide a width, or a
      pooling without what it pools.
  """
  errors.check_choice('pool', pool, POOLS)
  if pool == 'cls' and not class_depth:
    raise ValueError("pool='cls' needs a class token: pass class_depth=2, or pool='gap'")
  if patch < 2 or patch % 2:
    raise ValueError(f'patch {patch} is not even: the nearest is {max(2, patch + patch % 2)}')
  for width, count in zip(dims, num_heads, strict=True):
    if width % count:
      raise ValueError(f'num_heads {num_heads} do not divide the widths {dims}: pass divisors')
  # The stem's first convolution rounds up, patches and halving round down.
  fine = [-(-side // 2) // (patch // 2) for side in image_size]
  grid = (fine[0] // 2, fine[1] // 2)
  if min(grid) < 1:
    raise ValueError(
      f'images of {image_size[0]}x{image_size[1]} leave no pixel: the smallest side is {2 * patch}'
    )
  types: dict[str, Any] = {'dtype': dtype, 'param_dtype': param_dtype}
  layer = functools.partial(conv.Conv, kernel_init=initializers.TORCH_KERNEL, **types)
  layer_norm = functools.partial(norm.LayerNorm, epsilon=norm_epsilon, **types)
  local = operators.bind(operators.operator(local_attn), kernel=kernel, step=step)
  per_block: Any = attn
  if not resnet_blocks.is_nested(attn):
    per_block = [[local if i == 0 else attn] * depth for i, depth in enumerate(depths)]
  rates = drop_path_rates(drop_path, depths)

  def perceptron(width: int) -> ModuleDef:
    return functools.partial(
      mlp.Mlp,
      hidden_dim=int(width * mlp_ratio),
      activation=activation,
      kernel_init=INIT,
      **types,
    )

  def block(i: int, j: int) -> ModuleDef:
    operator = operators.operator(per_block[i][j])
    return functools.partial(
      vit.EncoderBlock,
      dim=dims[min(i, 1)],
      num_heads=num_heads[min(i, 1)],
      attn=operators.bind(operator, kernel_init=INIT, qkv_bias=qkv_bias, **types),
      mlp=perceptron(dims[min(i, 1)]),
      norm=layer_norm,
      drop_path=rates[i][j],
    )

  class_block = functools.partial(
    ClassBlock,
    dim=dims[1],
    num_heads=num_heads[1],
    attn=functools.partial(
      class_attention.ClassAttention, qkv_bias=qkv_bias, kernel_init=INIT, **types
    ),
    mlp=perceptron(dims[1]),
    norm=layer_norm,
  )
  backbone = functools.partial(
    Volo,
    image_size=image_size,
    grid=grid,
    dim=dims[1],
    stem=functools.partial(
      Stem,
      dim=dims[0],
      hidden_dim=stem_dim,
      patch=patch,
      conv=layer,
      norm=functools.partial(norm.BatchNorm, norm_epsilon, norm_momentum, **types),
    ),
    stages=[[block(i, j) for j in range(depth)] for i, depth in enumerate(depths)],
    class_blocks=[class_block] * class_depth,
    conv=layer,
    norm=layer_norm,
    mix_token=mix_token,
    dropout=dropout,
    remat=remat,
    scan=scan,
    **types,
  )
  head = functools.partial(
    TokenHead,
    num_classes=num_classes,
    feature=f'stage{len(depths)}',
    pool=pool,
    aux_head=aux_head,
    layer=functools.partial(nn.Dense, kernel_init=INIT, **types),
    dtype=dtype,
  )
  return base.Parts(backbone, head)


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
  """Returns the rate of every block."""
  _, *others = drop_path.linear_rates(rate, depths)
  return [[0.0] * depths[0], *others]
