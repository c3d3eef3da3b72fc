"""Gates per channel, made from statistics of the whole map: eSE, ECA, Gather-Excite, SRM.

Squeeze-and-excitation itself is `layers.squeeze_excite`.
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.layers import conv, norm
from vision_attention.ops import convolution


def _fan_in_uniform(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
  """PyTorch's default for a convolution: uniform within `+-fan_in ** -0.5`."""
  bound = math.prod(shape) ** -0.5
  return jax.random.uniform(key, shape, dtype, -bound, bound)


class EffectiveSqueezeExcite(nn.Module):
  """`x * hard_sigmoid(W mean(x) + b)` with a square `W` (arXiv 1911.06667, equation 5)."""

  placement: ClassVar[str] = 'branch'
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool = False) -> Float[Array, 'b h w c']:
    del train
    mean = x.astype(jnp.float32).mean((1, 2), keepdims=True).astype(self.dtype)
    excite = nn.Dense(
      x.shape[-1],
      kernel_init=self.kernel_init,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name='excite',
    )
    return x * jax.nn.hard_sigmoid(excite(mean))


def adaptive_kernel_size(dim: int, gamma: float = 2, offset: float = 1) -> int:
  """Returns the odd number of taps nearest above `|log2(dim) + offset| / gamma`, at least 3."""
  taps = int(abs(math.log2(dim) + offset) / gamma)
  return max(taps + 1 - taps % 2, 3)


class EfficientChannelAttention(nn.Module):
  """`x * sigmoid(conv(mean(x)))`, a convolution along the channels (arXiv 1910.03151, eq. 6-12).

  Neighbouring channels share it: the order of channels matters.

  Attributes:
    kernel_size: number of taps, odd; by the width (equation 12, gamma 2, b 1) unless given.
    circular: whether the first and last channel are neighbours (timm's CECA), or zeros surround
      them.
  """

  placement: ClassVar[str] = 'branch'
  kernel_size: int | None = None
  circular: bool = False
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool = False) -> Float[Array, 'b h w c']:
    del train
    dim = x.shape[-1]
    taps = self.kernel_size or adaptive_kernel_size(dim)
    if taps % 2 == 0:
      raise ValueError(f'kernel_size {taps} must be odd, to be centred: {taps - 1} or {taps + 1}')
    kernel = jnp.asarray(self.param('kernel', _fan_in_uniform, (taps,), self.param_dtype))
    mean = x.astype(jnp.float32).mean((1, 2))
    pad = [(0, 0), (taps // 2, taps // 2)]
    padded = jnp.pad(mean, pad, mode='wrap' if self.circular else 'constant')
    # Shifted slices: a convolution of one channel is no work for a matrix unit.
    logits = sum(kernel[i].astype(jnp.float32) * padded[:, i : i + dim] for i in range(taps))
    return x * jax.nn.sigmoid(logits).astype(self.dtype)[:, None, None]


class _GlobalGather(nn.Module):
  """A depthwise convolution as large as the map, and thus with a kernel tied to its size."""

  dtype: DTypeLike
  param_dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b 1 1 c']:
    shape = (*x.shape[1:3], 1, x.shape[-1])
    made = self.get_variable('params', 'kernel')
    if made is not None and made.shape != shape:
      raise ValueError(
        f'a global gather was made for {made.shape[0]}x{made.shape[1]} maps, not '
        f'{shape[0]}x{shape[1]}: keep the image size that the parameters were made for'
      )
    kernel = self.param('kernel', nn.initializers.lecun_normal(), shape, self.param_dtype)
    kernel = jnp.asarray(kernel)[:, :, 0].astype(self.dtype)
    return jnp.einsum('bhwc,hwc->bc', x.astype(self.dtype), kernel)[:, None, None]


class GatherExcite(nn.Module):
  """`x * sigmoid(excite(gather(x)))` (arXiv 1810.12348): by default GE-theta of global extent.

  Attributes:
    learned: gathers by depthwise convolutions with BatchNorm (GE-theta, GE-theta+), or averages
      (GE-theta-). Of global extent the convolution is as large as the map, so that the parameters
      belong to one image size.
    mlp: excites by SE's two layers, after an activation where the gather is learned (GE-theta+).
    extent: 0 gathers the whole map; otherwise a power of two, the ratio of the gathered map to the
      input (E8: 8), which is spread again by the nearest neighbour. Its learned form is a chain of
      3x3 convolutions of stride 2 (order of norm and activation as in timm; not verified against
      the authors').
    ratio: width inside the two layers, relative to the map's.
  """

  placement: ClassVar[str] = 'branch'
  learned: bool = True
  mlp: bool = False
  extent: int = 0
  ratio: float = 1 / 16
  norm_epsilon: float = 1e-5
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b h w c']:
    if self.extent and (self.extent & (self.extent - 1) or self.extent < 2):
      raise ValueError(f'extent {self.extent} must be 0 (global), 2, 4, 8 or another power of two')
    y = self._learned(x, train) if self.learned else self._averaged(x)
    if self.mlp:
      dim, types = x.shape[-1], self._types()
      y = jax.nn.relu(y) if self.learned else y
      hidden = nn.Dense(max(1, int(dim * self.ratio)), name='squeeze', **types)(y)
      y = nn.Dense(dim, name='excite', **types)(jax.nn.relu(hidden))
    gate = jax.nn.sigmoid(y)
    for axis in (1, 2) if self.extent else ():
      source = jnp.arange(x.shape[axis]) * gate.shape[axis] // x.shape[axis]
      gate = jnp.take(gate, source, axis=axis)
    return x * gate

  def _types(self) -> dict[str, Any]:
    return {'dtype': self.dtype, 'param_dtype': self.param_dtype}

  def _averaged(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b p q c']:
    if not self.extent:
      return x.astype(jnp.float32).mean((1, 2), keepdims=True).astype(self.dtype)
    return convolution.avg_pool(
      x,
      window=2 * self.extent - 1,
      stride=self.extent,
      padding='symmetric',
      count_include_pad=False,
    )

  def _learned(self, x: Float[Array, 'b h w c'], train: bool) -> Float[Array, 'b p q c']:
    dim, types = x.shape[-1], self._types()
    if not self.extent:
      y = _GlobalGather(name='gather', **types)(x)
      return norm.BatchNorm(self.norm_epsilon, name='norm', **types)(y, train=train)
    layers = self.extent.bit_length() - 1
    for i in range(1, layers + 1):
      layer = conv.Conv(dim, 3, 2, groups=dim, padding='symmetric', name=f'gather{i}', **types)
      x = norm.BatchNorm(self.norm_epsilon, name=f'norm{i}', **types)(layer(x), train=train)
      x = jax.nn.relu(x) if i < layers else x
    return x


class GatherExciteMinus(GatherExcite):
  """GE-theta-: the gate is the sigmoid of the mean, without any parameter."""

  learned: bool = False


class GatherExcitePlus(GatherExcite):
  """GE-theta+: a learned gather, then the two layers of SE."""

  mlp: bool = True


class StyleRecalibration(nn.Module):
  """`x * sigmoid(BN(a mean(x) + b std(x)))`, per channel (SRM, arXiv 1903.10829, eq. 1-4).

  The deviation is that of the unbiased variance. The weights start at zero, so that every gate
  starts at a half; the authors exclude them and the norm from weight decay.
  """

  placement: ClassVar[str] = 'branch'
  norm_epsilon: float = 1e-5
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b h w c']:
    _, height, width, dim = x.shape
    wide = x.astype(jnp.float32)
    mean = wide.mean((1, 2), keepdims=True)
    # A map of one position has no deviation.
    var = jnp.square(wide - mean).sum((1, 2)) / max(height * width - 1, 1)
    style = self.param('style', nn.initializers.zeros, (dim, 2), self.param_dtype)
    style = jnp.asarray(style).astype(jnp.float32)
    y = style[:, 0] * mean[:, 0, 0] + style[:, 1] * jnp.sqrt(var + 1e-5)
    y = norm.BatchNorm(self.norm_epsilon, param_dtype=self.param_dtype, name='norm')(y, train=train)
    return x * jax.nn.sigmoid(y).astype(self.dtype)[:, None, None]


MODULES = {
  'ese': EffectiveSqueezeExcite,
  'eca': EfficientChannelAttention,
  'ge_minus': GatherExciteMinus,
  'ge': GatherExcite,
  'ge_plus': GatherExcitePlus,
  'srm': StyleRecalibration,
}
