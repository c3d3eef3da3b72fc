"""ACmix: self-attention and convolution from the same three projections."""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.layers import initializers
from vision_attention.ops import (
  reflected_attention,
  relative_position,
  shift_convolution,
  windows,
)

BRANCHES = ('attention', 'conv')


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
    mixing_init: of the combinations' weights.
    bias_init: of their biases.
  """

  dim: int
  kernel: int = 3
  stride: int = 1
  use_bias: bool = False
  kernel_init: nn.initializers.Initializer = shift_init
  mixing_init: nn.initializers.Initializer = nn.initializers.variance_scaling(
    2.0, 'fan_out', 'normal'
  )
  bias_init: nn.initializers.Initializer = nn.initializers.zeros
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, maps: Float[Array, 'b h w j d']) -> Float[Array, 'b p q o']:
    taps = self.kernel**2
    mixing = self.param('mixing', self.mixing_init, (maps.shape[3], taps), self.param_dtype)
    shape = (self.kernel, self.kernel, taps, self.dim)
    kernel = self.param('kernel', self.kernel_init, shape, self.param_dtype)
    arrays: list[Any] = [mixing, kernel]
    if self.use_bias:
      arrays.append(self.param('bias', self.bias_init, (taps,), self.param_dtype))
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

    y = _mixed(self, mixed, convolved)
    return nn.Dropout(self.dropout, deterministic=not train)(y)


def _mixed(
  module: Any, attended: Float[Array, 'b h w d'], convolved: Float[Array, 'b h w d']
) -> Float[Array, 'b h w d']:
  """Adds the branches, each by a learned rate of the module that begins at a half."""
  half = nn.initializers.constant(0.5)
  rates = (module.param(f'{name}_rate', half, (), module.param_dtype) for name in BRANCHES)
  attention_rate, conv_rate = (jnp.asarray(rate).astype(module.dtype) for rate in rates)
  return attention_rate * attended + conv_rate * convolved


def coordinates(height: int, width: int) -> Float[Array, 'h w xy']:
  """Returns x and y of every pixel, each from -1 to 1."""
  x, y = jnp.meshgrid(jnp.linspace(-1.0, 1.0, width), jnp.linspace(-1.0, 1.0, height))
  return jnp.stack([x, y], -1)


class WindowAcmix(nn.Module):
  """ACmix in the form of its Swin Transformers: attention within windows, see `WindowAttention`.

  `attention_rate * P attention + conv_rate * convolution`: the projection `P` is of the attention
  alone. Where windows are shifted the convolution sees the map as they do, rolled: pixels of
  opposite borders are neighbours, and zeros lie around the rolled map. Where windows do not tile
  the map, it is rolled without what they are padded by.

  The attention map `[b * windows, n, q, k]` is sown as `attention` where `intermediates` is
  mutable.

  Attributes:
    dim: output width.
    num_heads: of the attention.
    window: side of a window, or height and width.
    shift: rows and columns before the first whole window, one number or two.
    fit: what becomes of windows larger than the map, see `ops.windows.tile`.
    padding: what padded pixels are to attention, see `ops.windows.tile`.
    conv_kernel: side of the convolution.
    qkv_bias: whether query, key and value have biases.
    dropout: rate after the layer.
    kernel_init: of the projections.
    table_init: of the table of relative positions.
  """

  needs_map: ClassVar[bool] = True
  dim: int
  num_heads: int = 4
  window: int | Sequence[int] = 7
  shift: int | Sequence[int] = 0
  fit: str = 'axis'
  padding: str = 'mask'
  conv_kernel: int = 3
  qkv_bias: bool = True
  dropout: float = 0.0
  kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
  table_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b h w d']:
    if self.dim % self.num_heads:
      raise ValueError(f'{self.num_heads} heads do not divide width {self.dim}: pass a divisor')
    types: dict[str, Any] = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    tiling = windows.tile(x.shape[1:3], self.window, self.shift, fit=self.fit, padding=self.padding)

    def dense(name: str, use_bias: bool, x: Float[Array, 'b g q c']) -> Float[Array, 'b g q d']:
      init = self.kernel_init
      return nn.Dense(self.dim, use_bias=use_bias, kernel_init=init, name=name, **types)(x)

    def rolled(x: Float[Array, 'b g q c']) -> Float[Array, 'b h w c']:
      """Puts windows together to the map that `windows.split` rolled."""
      if tiling.padded == tiling.size:
        return windows.merge(x, tiling.window, tiling.size)
      return jnp.roll(windows.join(x, tiling), [-s for s in tiling.shift], (1, 2))

    pixels = windows.split(x, tiling)
    shared = [dense(name, self.qkv_bias, pixels) for name in ('query', 'key', 'value')]
    head_dim = self.dim // self.num_heads
    query, key, value = (y.reshape(*y.shape[:3], self.num_heads, head_dim) for y in shared)
    rows, columns = tiling.window
    shape = (self.num_heads, 2 * rows - 1, 2 * columns - 1)
    table = self.param('relative_position', self.table_init, shape, self.param_dtype)
    bias = relative_position.relative_bias(jnp.asarray(table), rows, columns)
    logits = windows.window_logits(query, key, bias, windows.visible(tiling))
    if self.is_mutable_collection('intermediates'):
      self.sow('intermediates', 'attention', jax.nn.softmax(windows.fold(logits)))
    attended = windows.window_attention(logits, value)
    attended = dense('proj', True, attended.reshape(*attended.shape[:3], self.dim))
    maps = rolled(jnp.concatenate(shared, -1))
    convolved = ShiftConvolution(
      self.dim,
      self.conv_kernel,
      use_bias=True,
      mixing_init=initializers.TORCH_KERNEL,
      bias_init=initializers.torch_bias(3 * self.num_heads),
      name='conv',
      **types,
    )(maps.reshape(*maps.shape[:3], 3 * self.num_heads, head_dim))
    y = jnp.roll(_mixed(self, rolled(attended), convolved), tiling.shift, (1, 2))
    return nn.Dropout(self.dropout, deterministic=not train)(y)


OPERATORS = {'acmix': AcmixAttention, 'acmix_window': WindowAcmix}
