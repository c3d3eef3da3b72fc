"""A backbone of stages that begin with a token embedding, the last with a class token: CvT, PVT."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.attention import operators
from vision_attention.layers import conv, heads, initializers, mlp, stage
from vision_attention.models import base, vit
from vision_attention.ops import reduction

ModuleDef = Callable[..., nn.Module]
# The authors' truncated distributions are cut a hundred times their spread away.
INIT = nn.initializers.normal(0.02)


class TokenEmbedding(nn.Module):
  """Convolutional token embedding: an overlapping convolution of a map, and a norm (section 3.1).

  Attributes:
    dim: output channels.
    patch: side of the kernel.
    stride: of the convolution.
    pad: zeros on every side.
    position: whether a learned vector per position is added behind the norm (PVT's).
  """

  dim: int
  patch: int
  stride: int
  pad: int
  norm: ModuleDef
  position: bool = False
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    sides = (self.pad, self.pad)
    x = conv.Conv(
      self.dim,
      self.patch,
      self.stride,
      padding='valid',
      use_bias=True,
      kernel_init=initializers.TORCH_KERNEL,
      bias_init=initializers.torch_bias(self.patch**2 * x.shape[-1]),
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name='conv',
    )(jnp.pad(x, ((0, 0), sides, sides, (0, 0))))
    x = self.norm(name='norm')(x, train=train)
    if not self.position:
      return x
    position = self.param('position', INIT, x.shape[1:], self.param_dtype)
    return reduction.add_shared(x, jnp.asarray(position).astype(self.dtype))


class TokenHierarchy(nn.Module):
  """Per stage a token embedding and blocks; a class token in the last stage.

  Features are the last map of every stage and, where there is one, the normed class token `cls`;
  without one, or with `norm_map`, the last map is normed.

  Attributes:
    image_size: height and width that the model was created for.
    embeddings: per stage, its token embedding.
    stages: per stage, its blocks; of the last stage, blocks of tokens if there is a class token.
    class_token: whether there is one.
    cls_position: whether a learned position of its own is added to the class token.
    norm: after the last block.
    norm_map: whether the last map is normed beside the class token.
    remat: whether blocks are computed again in the backward pass.
    scan: whether equal blocks are compiled once.
  """

  image_size: tuple[int, int]
  embeddings: Sequence[ModuleDef]
  stages: Sequence[Sequence[ModuleDef]]
  class_token: bool
  norm: ModuleDef
  remat: bool = False
  scan: bool = False
  dropout: float = 0.0
  cls_position: bool = False
  norm_map: bool = False
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, images: Float[Array, 'b h w c'], *, train: bool
  ) -> dict[str, Float[Array, 'b ...']]:
    base.check_image_size(images, self.image_size)
    if not self.class_token and self.has_variable('params', 'cls'):
      raise ValueError(
        "the variables have a class token, which this model lacks: create it with pool='cls'"
      )
    x, last, features = images.astype(self.dtype), len(self.stages), {}
    drop = nn.Dropout(self.dropout, deterministic=not train)
    for i, (embedding, blocks) in enumerate(zip(self.embeddings, self.stages, strict=True), 1):
      x = embedding(name=f'embed{i}')(x, train=train)
      shape, with_cls = x.shape, self.class_token and i == last
      if with_cls:
        cls = jnp.broadcast_to(self._cls(shape[-1]).astype(x.dtype), (len(x), 1, shape[-1]))
        x = jnp.concatenate([cls, x.reshape(len(x), -1, shape[-1])], 1)
      x = stage.Stage(blocks, self.remat, scan=self.scan, name=f'stage{i}')(drop(x), train=train)
      if i == last and (self.norm_map or not with_cls):
        x = self.norm(name='norm')(x, train=train)
      if with_cls:
        cls = x[:, 0]
        features['cls'] = cls if self.norm_map else self.norm(name='norm')(cls, train=train)
        x = x[:, 1:].reshape(shape)
      features[f'stage{i}'] = x
    return features

  def _cls(self, dim: int) -> Float[Array, 'c']:
    cls = jnp.asarray(self.param('cls', INIT, (dim,), self.param_dtype))
    if self.cls_position:
      cls = cls + jnp.asarray(self.param('cls_position', INIT, (dim,), self.param_dtype))
    return cls


def check_stages(**per_stage: Sequence[Any]) -> None:
  """Raises ValueError for numbers of stages that differ, and for heads that do not divide a width.

  Args:
    **per_stage: options with an entry per stage, `dims` and `num_heads` among them.
  """
  lengths = {key: len(value) for key, value in per_stage.items()}
  if len(set(lengths.values())) > 1:
    raise ValueError(f'all of {lengths} must have one entry per stage')
  dims, num_heads = per_stage['dims'], per_stage['num_heads']
  if any(dim % count for dim, count in zip(dims, num_heads, strict=True)):
    raise ValueError(f'num_heads {num_heads} do not divide the widths {dims}: pass divisors')


def for_tokens(made: ModuleDef, size: tuple[int, int]) -> ModuleDef:
  """Returns the operator for the tokens of a map of a size, behind a class token.

  Raises:
    ValueError: if it works on a map alone.
  """
  if operators.takes(made, 'map_size'):
    return operators.bind(made, map_size=size)
  if operators.trait(made, 'needs_map', False):
    raise ValueError(
      f'{made} works on a map [b, h, w, c], and the class token of the last stage has no place in '
      "one: pass pool='gap'"
    )
  return made


def assemble(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  embeddings: Sequence[ModuleDef],
  attn: Sequence[Sequence[ModuleDef]],
  dims: Sequence[int],
  num_heads: Sequence[int],
  mlp_ratios: Sequence[float],
  activation: str,
  rates: Sequence[Sequence[float]],
  norm: ModuleDef,
  last_norm: ModuleDef,
  class_token: bool,
  dropout: float,
  types: Mapping[str, Any],
  **fields: Any,
) -> base.Parts:
  """Returns backbone and head of a pyramid with a class token in its last stage, or without.

  Args:
    num_classes: outputs of the head.
    image_size: height and width.
    embeddings: per stage, what makes its map.
    attn: per stage and block, the operator, without width and heads.
    dims: width per stage.
    num_heads: per stage.
    mlp_ratios: per stage, width inside the MLP relative to the block's.
    activation: a name of `ops.activation`.
    rates: of stochastic depth, per stage and block.
    norm: of blocks.
    last_norm: after the last block.
    class_token: whether there is one, which is classified; the mean of the map otherwise.
    dropout: of tokens and within the MLP.
    types: `dtype` and `param_dtype`.
    **fields: further fields of `TokenHierarchy`.
  """

  def block(i: int, j: int) -> ModuleDef:
    return functools.partial(
      vit.EncoderBlock,
      dim=dims[i],
      num_heads=num_heads[i],
      attn=attn[i][j],
      mlp=functools.partial(
        mlp.Mlp,
        hidden_dim=int(dims[i] * mlp_ratios[i]),
        activation=activation,
        dropout=dropout,
        kernel_init=INIT,
        **types,
      ),
      norm=norm,
      drop_path=rates[i][j],
    )

  backbone = functools.partial(
    TokenHierarchy,
    image_size=image_size,
    embeddings=embeddings,
    stages=[[block(i, j) for j in range(len(row))] for i, row in enumerate(attn)],
    class_token=class_token,
    norm=last_norm,
    dropout=dropout,
    **fields,
    **types,
  )
  head = functools.partial(
    heads.LinearHead,
    num_classes=num_classes,
    feature='cls' if class_token else f'stage{len(dims)}',
    pool='none' if class_token else 'gap',
    kernel_init=INIT,
    **types,
  )
  return base.Parts(backbone, head)
