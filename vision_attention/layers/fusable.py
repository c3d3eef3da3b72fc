"""Linear layers with a batch normalisation beside them, which in inference are one layer.

Fused, a layer has the parameters that `fold` makes of the separate ones: a `linear` with a bias,
and no `norm`.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.layers import conv, initializers, norm
from vision_attention.ops import fusion

Params = Mapping[str, Any]


def _affine(params: Params, stats: Params, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
  """Returns factor and summand of a BatchNorm in inference, in float64."""
  wide = {key: np.asarray(value, np.float64) for key, value in (*params.items(), *stats.items())}
  factor = wide['scale'] / np.sqrt(wide['var'] + epsilon)
  return factor, wide['bias'] - wide['mean'] * factor


def _linear(kernel: np.ndarray, bias: np.ndarray, like: Any) -> dict[str, Any]:
  return {'linear': {'kernel': jnp.asarray(kernel, like), 'bias': jnp.asarray(bias, like)}}


class _ThenNorm(nn.Module):
  """A linear map without bias, then BatchNorm.

  Attributes:
    dim: output width.
    epsilon: of the norm.
    momentum: share of the old running statistics that one step keeps.
    scale_init: of the norm.
    fused: whether the norm is folded into the linear map.
  """

  dim: int
  epsilon: float = 1e-5
  momentum: float = 0.9
  scale_init: nn.initializers.Initializer = nn.initializers.ones
  kernel_init: nn.initializers.Initializer = initializers.TORCH_KERNEL
  fused: bool = False
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  def normed(self, y: Float[Array, '*b d'], *, train: bool) -> Float[Array, '*b d']:
    if self.fused:
      return y
    return norm.BatchNorm(
      self.epsilon,
      self.momentum,
      self.scale_init,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name='norm',
    )(y, train=train)

  @staticmethod
  def fold(params: Params, stats: Params, epsilon: float) -> dict[str, Any]:
    """Returns the parameters of the fused layer."""
    kernel = params['linear']['kernel']
    factor, bias = _affine(params['norm'], stats['norm'], epsilon)
    return _linear(np.asarray(kernel, np.float64) * factor, bias, kernel.dtype)


class LinearNorm(_ThenNorm):
  """`BatchNorm(x W)` on the last axis, over all others."""

  @nn.compact
  def __call__(self, x: Float[Array, '*b c'], *, train: bool) -> Float[Array, '*b d']:
    y = nn.Dense(
      self.dim,
      use_bias=self.fused,
      kernel_init=self.kernel_init,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      dot_general=fusion.dot_general,
      name='linear',
    )(x)
    return self.normed(y, train=train)


class ConvNorm(_ThenNorm):
  """A convolution with PyTorch's symmetric padding, then BatchNorm.

  Attributes:
    kernel_size: side of the kernel.
    stride: step along height and width.
  """

  kernel_size: int = 3
  stride: int = 1

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    y = conv.Conv(
      self.dim,
      self.kernel_size,
      self.stride,
      padding='symmetric',
      use_bias=self.fused,
      kernel_init=self.kernel_init,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name='linear',
    )(x)
    return self.normed(y, train=train)


class NormLinear(nn.Module):
  """`BatchNorm(x) W + b`: the norm comes first. Attributes are those of `LinearNorm`."""

  dim: int
  epsilon: float = 1e-5
  momentum: float = 0.9
  kernel_init: nn.initializers.Initializer = initializers.TORCH_KERNEL
  fused: bool = False
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, '*b c'], *, train: bool) -> Float[Array, '*b d']:
    types: Any = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    if not self.fused:
      x = norm.BatchNorm(self.epsilon, self.momentum, **types, name='norm')(x, train=train)
    return nn.Dense(self.dim, kernel_init=self.kernel_init, **types, name='linear')(x)

  @staticmethod
  def fold(params: Params, stats: Params, epsilon: float) -> dict[str, Any]:
    """Returns the parameters of the fused layer."""
    kernel, bias = (params['linear'][key] for key in ('kernel', 'bias'))
    factor, summand = _affine(params['norm'], stats['norm'], epsilon)
    wide = np.asarray(kernel, np.float64)
    return _linear(factor[:, None] * wide, np.asarray(bias) + summand @ wide, kernel.dtype)


LAYERS = (LinearNorm, ConvNorm, NormLinear)
