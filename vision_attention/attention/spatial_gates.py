"""Gates per channel and position: BAM, CBAM, triplet attention, coordinate attention."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.layers import conv, norm
from vision_attention.ops import reduction

# PyTorch's 0.01, which the authors of CBAM and of triplet attention give the gates' BatchNorm.
_SLOW = 0.99


def _squeezed(dim: int, ratio: float) -> int:
  return max(1, int(dim * ratio))


class Bam(nn.Module):
  """Bottleneck attention module, `x * (1 + sigmoid(channel * spatial))` (arXiv 1807.06514).

  It follows each stage of a ResNet but the last. `channel` is an MLP of the mean over the map;
  `spatial` is a bottleneck with two dilated convolutions to one value per position.

  Attributes:
    ratio: width of both bottlenecks relative to the map's.
    dilation: of the 3x3 convolutions.
    combine: `product` of the branches, as in the authors' code and its published accuracy, or the
      `sum` of the text.
  """

  placement: ClassVar[str] = 'between'
  ratio: float = 1 / 16
  dilation: int = 4
  combine: str = 'product'
  norm_epsilon: float = 1e-5
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b h w c']:
    errors.check_choice('combine', self.combine, ('product', 'sum'))
    dim, hidden_dim = x.shape[-1], _squeezed(x.shape[-1], self.ratio)
    types: dict[str, Any] = {'dtype': self.dtype, 'param_dtype': self.param_dtype}

    def norm_relu(y: Float[Array, '*b c'], name: str) -> Float[Array, '*b c']:
      layer = norm.BatchNorm(self.norm_epsilon, name=name, **types)
      return jax.nn.relu(layer(y, train=train))

    mean = x.astype(jnp.float32).mean((1, 2)).astype(self.dtype)
    hidden = nn.Dense(hidden_dim, name='channel_squeeze', **types)(mean)
    hidden = norm_relu(hidden, 'channel_norm')
    channel = nn.Dense(dim, name='channel_excite', **types)(hidden)[:, None, None]

    y = conv.Conv(hidden_dim, 1, use_bias=True, name='spatial_squeeze', **types)(x)
    y = norm_relu(y, 'spatial_norm')
    for i in (1, 2):
      y = conv.Conv(
        hidden_dim,
        3,
        padding='symmetric',
        dilation=self.dilation,
        use_bias=True,
        name=f'spatial_conv{i}',
        **types,
      )(y)
      y = norm_relu(y, f'spatial_norm{i}')
    spatial = conv.Conv(1, 1, use_bias=True, name='spatial_excite', **types)(y)
    logits = channel * spatial if self.combine == 'product' else channel + spatial
    return x * (1 + jax.nn.sigmoid(logits))


class PlaneGate(nn.Module):
  """`sigmoid(BN(conv7x7))` of two planes, the maximum and the mean along a third axis.

  Attributes:
    kernel_size: of the convolution.
    scale_init: of BatchNorm's scale.
  """

  kernel_size: int = 7
  scale_init: nn.initializers.Initializer = nn.initializers.ones
  norm_epsilon: float = 1e-5
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, planes: Float[Array, 'b p q 2'], *, train: bool) -> Float[Array, 'b p q 1']:
    types: dict[str, Any] = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    y = conv.Conv(1, self.kernel_size, padding='symmetric', name='conv', **types)(planes)
    batch_norm = norm.BatchNorm(
      self.norm_epsilon, momentum=_SLOW, scale_init=self.scale_init, name='norm', **types
    )
    return jax.nn.sigmoid(batch_norm(y, train=train))


def _planes(x: Float[Array, 'b h w c'], axis: int) -> Float[Array, 'b p q 2']:
  """Returns maximum and mean along an axis; the other two stay in order."""
  mean = x.astype(jnp.float32).mean(axis).astype(x.dtype)
  return jnp.stack([reduction.first_max(x, axis), mean], axis=-1)


class Cbam(nn.Module):
  """Convolutional block attention module (arXiv 1807.06521, equations 1-3).

  First channels, `x' = x sigmoid(MLP(mean x) + MLP(max x))`; then positions,
  `x' sigmoid(BN(conv7x7([max_c x', mean_c x'])))`, whose norm starts with a scale of zero, so that
  this gate is a half everywhere.

  Attributes:
    ratio: width inside the MLP relative to the map's.
    kernel_size: of the spatial gate's convolution.
  """

  placement: ClassVar[str] = 'branch'
  ratio: float = 1 / 16
  kernel_size: int = 7
  norm_epsilon: float = 1e-5
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b h w c']:
    dim = x.shape[-1]
    types: dict[str, Any] = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    mean = x.astype(jnp.float32).mean((1, 2)).astype(self.dtype)
    peak = reduction.first_max(x.reshape(x.shape[0], -1, dim), 1)
    pooled = jnp.stack([mean, peak])  # both go through one MLP
    hidden = nn.Dense(_squeezed(dim, self.ratio), name='squeeze', **types)(pooled)
    logits = nn.Dense(dim, name='excite', **types)(jax.nn.relu(hidden)).sum(0)
    x = x * jax.nn.sigmoid(logits)[:, None, None]
    gate = PlaneGate(
      self.kernel_size, nn.initializers.zeros, self.norm_epsilon, name='spatial', **types
    )
    return x * gate(_planes(x, 3), train=train)


class TripletAttention(nn.Module):
  """The mean of three gates, each along one axis of the map (arXiv 2010.03045, equation 5).

  A gate pools its axis and convolves the plane of the other two: (channels, width), (height,
  channels) and (height, width). The first two see neighbouring channels: their order matters.

  Attributes:
    kernel_size: of the convolutions.
    spatial: whether the third gate, that over positions, is there.
  """

  placement: ClassVar[str] = 'branch'
  kernel_size: int = 7
  spatial: bool = True
  norm_epsilon: float = 1e-5
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b h w c']:
    def gate(planes: Float[Array, 'b p q 2'], name: str) -> Float[Array, 'b p q 1']:
      layer = PlaneGate(
        self.kernel_size,
        norm_epsilon=self.norm_epsilon,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=name,
      )
      return layer(planes, train=train)

    over_height = gate(_planes(x, 1).swapaxes(1, 2), 'channel_width')  # b c w 1
    over_width = gate(_planes(x, 2), 'height_channel')  # b h c 1
    gates = over_height.transpose(0, 3, 2, 1) + over_width.swapaxes(2, 3)
    if not self.spatial:
      return x * (gates / 2)
    return x * ((gates + gate(_planes(x, 3), 'height_width')) / 3)


class CoordinateAttention(nn.Module):
  """Gates per row and per column of each channel (arXiv 2103.02907, equations 4-8).

  The means over rows and over columns go through one bottleneck, as one list of `h + w` positions.

  Attributes:
    reduction: factor by which the bottleneck is narrower than the map.
    min_dim: least width of the bottleneck.
  """

  placement: ClassVar[str] = 'branch'
  reduction: int = 32
  min_dim: int = 8
  norm_epsilon: float = 1e-5
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b h w c']:
    _, height, _, dim = x.shape
    types: dict[str, Any] = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    wide = x.astype(jnp.float32)
    lines = jnp.concatenate([wide.mean(2), wide.mean(1)], axis=1).astype(self.dtype)
    y = nn.Dense(max(self.min_dim, dim // self.reduction), name='squeeze', **types)(lines)
    y = norm.BatchNorm(self.norm_epsilon, name='norm', **types)(y, train=train)
    y = jax.nn.hard_swish(y)
    rows = jax.nn.sigmoid(nn.Dense(dim, name='excite_height', **types)(y[:, :height]))
    columns = jax.nn.sigmoid(nn.Dense(dim, name='excite_width', **types)(y[:, height:]))
    return x * rows[:, :, None] * columns[:, None]


MODULES = {
  'bam': Bam,
  'cbam': Cbam,
  'triplet': TripletAttention,
  'coordinate': CoordinateAttention,
}
