"""Convolutions in branches with a softmax between them: selective kernel, split attention."""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.layers import conv, norm
from vision_attention.ops import activation, convolution


def squeezed_dim(dim: int, ratio: float, divisor: int, least: int) -> int:
  """Returns `dim * ratio`, rounded to a multiple that is no tenth smaller, and at least `least`."""
  rounded = max(least, int(dim * ratio + divisor / 2) // divisor * divisor)
  return rounded + divisor if rounded < 0.9 * dim * ratio else rounded


class SelectiveKernel(nn.Module):
  """Selective kernel convolution (arXiv 1903.06586, equations 1-6), with norms and activations.

  3x3 convolutions of growing dilation run side by side; from the mean of their sum comes a softmax
  over the branches for every channel, and with it their weighted sum.

  Attributes:
    dim: output width.
    stride: of the convolutions.
    groups: of the convolutions, at most: the largest common divisor with both widths is taken.
    branches: the dilations are 1, 2, ... ("5x5" is a 3x3 of dilation 2).
    split: whether each branch reads its own part of the channels (timm's skresnets), or all.
    ratio: width of the squeeze relative to `dim`.
    divisor: the squeeze is rounded to a multiple of this.
    least: smallest width of the squeeze.
    activation: a name of `ops.activation`.
  """

  needs_map: ClassVar[bool] = True
  norm_after: ClassVar[bool] = False
  act_after: ClassVar[bool] = False
  dim: int
  stride: int = 1
  groups: int = 32
  branches: int = 2
  split: bool = False
  ratio: float = 1 / 16
  divisor: int = 1
  least: int = 32
  activation: str = 'relu'
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  norm_epsilon: float = 1e-5
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    act = activation.by_name(self.activation)
    types: dict[str, Any] = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    inputs = [x] * self.branches
    if self.split:
      if x.shape[-1] % self.branches:
        raise ValueError(
          f'{self.branches} branches do not divide {x.shape[-1]} channels: pass split=False'
        )
      inputs = jnp.split(x, self.branches, axis=-1)

    def norm_act(y: Float[Array, '*b c'], name: str) -> Float[Array, '*b c']:
      return act(norm.BatchNorm(self.norm_epsilon, name=name, **types)(y, train=train))

    maps = []
    for i, part in enumerate(inputs, 1):
      layer = conv.Conv(
        self.dim,
        3,
        self.stride,
        groups=math.gcd(self.groups, part.shape[-1], self.dim),
        padding='symmetric',
        dilation=i,
        kernel_init=self.kernel_init,
        name=f'conv{i}',
        **types,
      )
      maps.append(norm_act(layer(part), f'norm{i}'))
    means = [y.astype(jnp.float32).mean((1, 2)) for y in maps]
    mean = jnp.asarray(sum(means)).astype(self.dtype)
    hidden_dim = squeezed_dim(self.dim, self.ratio, self.divisor, self.least)
    hidden = nn.Dense(hidden_dim, use_bias=False, name='squeeze', **types)(mean)
    hidden = norm_act(hidden, 'squeeze_norm')
    logits = nn.Dense(self.branches * self.dim, use_bias=False, name='select', **types)(hidden)
    logits = logits.reshape(-1, self.branches, self.dim).astype(jnp.float32)
    weights = jax.nn.softmax(logits, axis=1).astype(self.dtype)
    products = [y * weights[:, i, None, None] for i, y in enumerate(maps)]
    return jnp.asarray(sum(products))


class SplitAttention(nn.Module):
  """ResNeSt's split attention (arXiv 2004.08955, equations 1-3), with norms and activations.

  One 3x3 convolution makes `radix` maps; from the mean of their sum comes a softmax over them for
  every channel (a sigmoid if there is but one), and with it their weighted sum.

  Attributes:
    dim: output width.
    stride: 2 halves the map in the convolution, or by `pool`.
    radix: number of maps.
    groups: cardinality; each group has `radix` groups of the convolution.
    ratio: width of the squeeze relative to the `radix` maps of the input's width.
    pool: `none`; `before` or `after` the rest, a 3x3 average in place of the convolution's stride.
    activation: a name of `ops.activation`.
  """

  needs_map: ClassVar[bool] = True
  norm_after: ClassVar[bool] = False
  act_after: ClassVar[bool] = False
  dim: int
  stride: int = 1
  radix: int = 2
  groups: int = 1
  ratio: float = 1 / 4
  pool: str = 'none'
  activation: str = 'relu'
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  norm_epsilon: float = 1e-5
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    errors.check_choice('pool', self.pool, ('none', 'before', 'after'))
    if x.shape[-1] % (self.groups * self.radix) or self.dim % self.groups:
      raise ValueError(
        f'{self.groups} groups of {self.radix} do not divide {x.shape[-1]} channels, or not '
        f'{self.dim}: pass other groups or another radix'
      )
    act = activation.by_name(self.activation)
    types: dict[str, Any] = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    hidden_dim = squeezed_dim(x.shape[-1] * self.radix, self.ratio, 8, 32)

    def norm_act(y: Float[Array, '*b c'], name: str) -> Float[Array, '*b c']:
      return act(norm.BatchNorm(self.norm_epsilon, name=name, **types)(y, train=train))

    x = self._halve(x) if self.pool == 'before' else x
    y = conv.Conv(
      self.dim * self.radix,
      3,
      self.stride if self.pool == 'none' else 1,
      groups=self.groups * self.radix,
      padding='symmetric',
      kernel_init=self.kernel_init,
      name='conv',
      **types,
    )(x)
    y = norm_act(y, 'norm')
    maps = y.reshape(*y.shape[:3], self.radix, self.dim)
    mean = maps.astype(jnp.float32).sum(3).mean((1, 2), keepdims=True).astype(self.dtype)
    pointwise = {'kernel_size': 1, 'groups': self.groups, 'use_bias': True, **types}
    hidden = norm_act(conv.Conv(hidden_dim, name='squeeze', **pointwise)(mean), 'squeeze_norm')
    logits = conv.Conv(self.dim * self.radix, name='select', **pointwise)(hidden)
    logits = logits.reshape(-1, self.groups, self.radix, self.dim // self.groups)
    logits = logits.astype(jnp.float32)
    weights = jax.nn.softmax(logits, axis=2) if self.radix > 1 else jax.nn.sigmoid(logits)
    weights = weights.swapaxes(1, 2).reshape(-1, 1, 1, self.radix, self.dim).astype(self.dtype)
    y = (maps * weights).sum(3)
    return self._halve(y) if self.pool == 'after' else y

  def _halve(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b p q c']:
    if self.stride == 1:
      return x
    return convolution.avg_pool(x, window=3, stride=self.stride, padding='symmetric')


OPERATORS = {'sk': SelectiveKernel, 'splat': SplitAttention}
