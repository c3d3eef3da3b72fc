"""ACmix-PVT: an own reading of the numbers that ACmix (arXiv 2111.14556, Table 2) gives for PVT.

Neither code nor description of it is public. The host is the Pyramid Vision Transformer (arXiv
2102.12122) with the mean over positions in place of its class token; what is mixed in is told at
`attention.spatial_reduction`. No weights of others fit.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.attention import spatial_reduction
from vision_attention.layers import conv, drop_path, heads, mlp, norm, stage
from vision_attention.models import base
from vision_attention.ops import reduction

_INIT = nn.initializers.truncated_normal(0.02)


class Block(nn.Module):
  """Pre-norm attention and perceptron on a map."""

  attn: base.ModuleDef
  mlp: base.ModuleDef
  norm: base.ModuleDef
  drop_path: float

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b h w c']:
    drop = drop_path.DropPath
    y = self.attn(name='attn')(self.norm(name='norm1')(x), train=train)
    x = x + drop(self.drop_path, name='drop_path1')(y, train=train)
    y = self.mlp(name='mlp')(self.norm(name='norm2')(x), train=train)
    return x + drop(self.drop_path, name='drop_path2')(y, train=train)


class Embed(nn.Module):
  """Patches to vectors, LayerNorm, and a learned vector per position."""

  dim: int
  patch: int
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b p q d']:
    types: dict[str, Any] = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    layer = conv.Conv(
      self.dim, self.patch, self.patch, padding='valid', use_bias=True, name='proj', **types
    )
    x = norm.LayerNorm(1e-5, name='norm', **types)(layer(x))
    position = self.param('position', _INIT, x.shape[1:], self.param_dtype)
    return reduction.add_shared(x, jnp.asarray(position).astype(self.dtype))


class PVT(nn.Module):
  """Four stages at a quarter, an eighth, ... of the image's size."""

  image_size: tuple[int, int]
  depths: Sequence[int]
  dims: Sequence[int]
  num_heads: Sequence[int]
  mlp_ratios: Sequence[float]
  reductions: Sequence[int]
  conv: bool
  drop_path: float
  remat: bool
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, images: Float[Array, 'b h w c'], *, train: bool
  ) -> dict[str, Float[Array, 'b p q d']]:
    base.check_image_size(images, self.image_size)
    types: dict[str, Any] = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    layer_norm = functools.partial(norm.LayerNorm, epsilon=1e-6, **types)
    rates = drop_path.linear_rates(self.drop_path, self.depths)
    x, features = images.astype(self.dtype), {}
    for i, dim in enumerate(self.dims):
      name = f'stage{i + 1}'
      x = Embed(dim, 2 if i else 4, name=f'{name}_embed', **types)(x)
      attn = functools.partial(
        spatial_reduction.SpatialReductionAttention,
        dim,
        self.num_heads[i],
        self.reductions[i],
        conv=self.conv,
        **types,
      )
      perceptron = functools.partial(
        mlp.Mlp, int(dim * self.mlp_ratios[i]), 'gelu_exact', kernel_init=_INIT, **types
      )
      blocks = [functools.partial(Block, attn, perceptron, layer_norm, rate) for rate in rates[i]]
      x = stage.Stage(blocks, self.remat, name=name)(x, train=train)
      features[name] = x
    features['final'] = layer_norm(name='norm')(x)
    return features


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  depths: Sequence[int],
  dims: Sequence[int] = (64, 128, 320, 512),
  num_heads: Sequence[int] = (1, 2, 5, 8),
  mlp_ratios: Sequence[float] = (8, 8, 4, 4),
  reductions: Sequence[int] = (8, 4, 2, 1),
  conv: bool = True,
  drop_path: float = 0.1,
  remat: bool = False,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    num_classes: outputs of the head.
    image_size: height and width, multiples of 4 times a power of two per further stage.
    dtype: of activations.
    param_dtype: of parameters.
    depths: blocks per stage.
    dims: channels per stage.
    num_heads: heads per stage.
    mlp_ratios: width inside the perceptrons, per stage, relative to the channels.
    reductions: per stage, see `attention.spatial_reduction`.
    conv: whether ACmix's convolution branch is mixed in.
    drop_path: rate of stochastic depth, growing linearly over the blocks.
    remat: whether blocks are computed again in the backward pass, to save memory.
  """
  step = 2 ** (len(depths) + 1)
  if any(side % step for side in image_size):
    nearest = tuple(max(step, round(side / step) * step) for side in image_size)
    raise ValueError(f'image_size {image_size} must be multiples of {step}: pass {nearest}')
  backbone = functools.partial(
    PVT,
    image_size,
    tuple(depths),
    tuple(dims),
    tuple(num_heads),
    tuple(mlp_ratios),
    tuple(reductions),
    conv,
    drop_path,
    remat,
    dtype=dtype,
    param_dtype=param_dtype,
  )
  head = functools.partial(
    heads.LinearHead,
    num_classes=num_classes,
    feature='final',
    kernel_init=_INIT,
    dtype=dtype,
    param_dtype=param_dtype,
  )
  return base.Parts(backbone, head)


_SOURCE = 'arXiv 2111.14556, Table 2, which gives 13 and 25 M parameters; own reading'
VARIANTS = {
  'acmix_pvt_tiny': base.Variant(
    {'depths': (2, 2, 2, 2)}, params=13_395_104, top1=78.0, source=_SOURCE
  ),
  'acmix_pvt_small': base.Variant(
    {'depths': (3, 4, 6, 3)}, params=24_823_731, top1=81.7, source=_SOURCE
  ),
}
