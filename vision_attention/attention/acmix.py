"""ACmix: self-attention and convolution from the same three projections."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.ops import reflected_attention, shift_convolution


def shift_init(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
  """Initialises a kernel `[k, k, k^2, o]` to shifts."""
  del key
  return jnp.asarray(shift_convolution.shift_kernel(shape[0], shape[-1]), dtype)


class ShiftConvolution(nn.Module):
  """The convolution branch: mixes heads of queries, keys and values, shifts and sums.

  Attributes:
    dim: output channels.
    kernel: side of the convolution.
    stride: of the convolution.
    use_bias: whether the combinations of heads have a bias (ACmix-Swin).
    kernel_init: of the grouped convolution; shifts, as in the paper.
  """

  dim: int
  kernel: int = 3
  stride: int = 1
  use_bias: bool = False
  kernel_init: nn.initializers.Initializer = shift_init
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, maps: Float[Array, 'b h w j d']) -> Float[Array, 'b p q o']:
    taps = self.kernel**2
    init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
    mixing = self.param('mixing', init, (maps.shape[3], taps), self.param_dtype)
    shape = (self.kernel, self.kernel, taps, self.dim)
    kernel = self.param('kernel', self.kernel_init, shape, self.param_dtype)
    arrays: list[Any] = [mixing, kernel]
    if self.use_bias:
      arrays.append(self.param('bias', nn.initializers.zeros, (taps,), self.param_dtype))
    arrays = [jnp.asarray(array).astype(self.dtype) for array in arrays]
    return shift_convolution.shift_convolution(maps.astype(self.dtype), *arrays, stride=self.stride)


class AcmixAttention(nn.Module):
  """ACmix (arXiv 2111.14556, equation 14) in the form of its ResNets.

  `attention_rate * attention + conv_rate * convolution`, both of the same queries, keys and values.
  The attention is over a window around every pixel of the map, continued by reflection. A position
  `p`, a linear map of the coordinates in -1..1, adds `query . (p_query - p_key)` to the logits. The
  query's part is the same for all keys, so that the softmax does not see it, nor the map's bias:
  the keys are `key - p`. There is no projection after the attention.

  The attention map `[b, n, h, w, taps]` is sown as `attention` when the collection `intermediates`
  is mutable.

  Attributes:
    dim: output width.
    num_heads: of the attention.
    kernel: side of the attention's window, odd.
    conv_kernel: side of the convolution.
    stride: of both branches.
    dropout: rate after the layer.
    kernel_init: of the projections.
    conv_init: of the grouped convolution, see `ShiftConvolution`.
  """

  needs_map: ClassVar[bool] = True
  dim: int
  num_heads: int = 4
  kernel: int = 7
  conv_kernel: int = 3
  stride: int = 1
  dropout: float = 0.0
  kernel_init: nn.initializers.Initializer = nn.initializers.variance_scaling(
    2.0, 'fan_out', 'normal'
  )
  conv_init: nn.initializers.Initializer = shift_init
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    if self.dim % self.num_heads:
      raise ValueError(f'{self.num_heads} heads do not divide width {self.dim}: pass a divisor')
    batch, height, width, _ = x.shape
    head_dim = self.dim // self.num_heads
    types: dict[str, Any] = {'dtype': self.dtype, 'param_dtype': self.param_dtype}

    def project(name: str, dim: int, x: Float[Array, '*b c']) -> Float[Array, '*b d']:
      return nn.Dense(dim, kernel_init=self.kernel_init, name=name, **types)(x)

    def heads(name: str) -> Float[Array, 'b h w n d']:
      return project(name, self.dim, x).reshape(batch, height, width, self.num_heads, head_dim)

    query, key, value = heads('query'), heads('key'), heads('value')
    position = project('position', head_dim, coordinates(height, width))
    placed = key - position[:, :, None]
    queries = query[:, :: self.stride, :: self.stride]
    options = {'kernel': self.kernel, 'stride': self.stride, 'scale': head_dim**-0.5}
    if self.is_mutable_collection('intermediates'):
      weights = reflected_attention.reflected_attention_weights(queries, placed, **options)
      self.sow('intermediates', 'attention', weights)
    mixed = reflected_attention.reflected_attention(queries, placed, value, **options)
    mixed = mixed.reshape(*mixed.shape[:3], self.dim)
    convolved = ShiftConvolution(
      self.dim,
      self.conv_kernel,
      self.stride,
      kernel_init=self.conv_init,
      name='conv',
      **types,
    )(jnp.concatenate([query, key, value], 3))

    half = nn.initializers.constant(0.5)
    rates = [
      self.param(f'{branch}_rate', half, (), self.param_dtype) for branch in ('attention', 'conv')
    ]
    attention_rate, conv_rate = (jnp.asarray(rate).astype(self.dtype) for rate in rates)
    y = attention_rate * mixed + conv_rate * convolved
    return nn.Dropout(self.dropout, deterministic=not train)(y)


def coordinates(height: int, width: int) -> Float[Array, 'h w xy']:
  """Returns x and y of every pixel, each from -1 to 1."""
  x, y = jnp.meshgrid(jnp.linspace(-1.0, 1.0, width), jnp.linspace(-1.0, 1.0, height))
  return jnp.stack([x, y], -1)


OPERATORS = {'acmix': AcmixAttention}
