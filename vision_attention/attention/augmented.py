"""Attention-augmented convolution (arXiv 1904.09925, section 3): some channels attend globally."""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.layers import conv
from vision_attention.ops import attention, convolution, position_embedding, relative_logits, resize

POSITIONS = ('relative', 'absolute', 'coordinates', 'none')
TABLE_INITS = ('intended', 'literal')
Logits = Float[Array, 'b n s t']


def pool(x: Float[Array, 'b h w c'], stride: int) -> Float[Array, 'b p q c']:
  """Averages 3x3 pixels with TensorFlow's padding, which does not count."""
  return convolution.avg_pool(x, window=3, stride=stride, padding='same', count_include_pad=False)


def coordinates(height: int, width: int) -> Float[Array, 'h w 2']:
  """Returns y and x of every pixel, from -1 to 1 (CoordConv, arXiv 1807.03247)."""
  axes = (jnp.linspace(-1.0, 1.0, n) if n > 1 else jnp.zeros(1) for n in (height, width))
  return jnp.stack(jnp.meshgrid(*axes, indexing='ij'), -1)


class Augmentation(nn.Module):
  """The two parts of an augmented convolution; subclasses say how they are called.

  A convolution gives the first `dim - value_dim` channels; the others are multi-head attention
  over all pixels, with a vector per vertical and per horizontal offset that the heads share. A
  strided convolution goes with attention on the map that 3x3 pixels are averaged to.

  Attributes:
    dim: output channels, of convolution and attention together.
    num_heads: number of heads.
    head_dim: channels of a head's queries and keys; by `kappa` unless given.
    stride: of the convolution.
    kernel_size: of the convolution.
    kappa: channels of all queries, relative to `dim` (rounded down to a multiple of the heads).
    upsilon: channels of all values, relative to `dim` (likewise); 0 for the convolution alone.
    min_head_dim: least channels of a head's queries.
    downsample: attention works on a map that is averaged by this factor and interpolated back.
    position: `relative`; `absolute`, sinusoids added to the attention's input; `coordinates`
      appended to it (CoordConv); or `none`.
    table_init: `intended` draws offsets with standard deviation `head_dim ** -0.5`; `literal` with
      that mean and deviation one, as the paper's listing does (TensorFlow takes it as the mean).
    padding: of the convolution, see `layers.conv.Conv`.
    dropout: rate on the attention's channels.
  """

  stages: ClassVar[tuple[int, ...]] = (2, 3, 4)
  needs_map: ClassVar[bool] = True
  dim: int
  num_heads: int = 8
  head_dim: int | None = None
  stride: int = 1
  kernel_size: int = 3
  kappa: float = 0.2
  upsilon: float = 0.1
  min_head_dim: int = 20
  downsample: int = 1
  position: str = 'relative'
  table_init: str = 'intended'
  padding: str = 'symmetric'
  dropout: float = 0.0
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  def key_and_value_dim(self) -> tuple[int, int]:
    """Returns the channels of all queries (and keys) and of all values.

    Raises:
      ValueError: if not even one channel per head is left for the values.
    """
    if self.kappa <= 0 or not 0 <= self.upsilon <= 1:
      raise ValueError(
        f'kappa={self.kappa} must be positive and upsilon={self.upsilon} within 0..1'
      )
    if not self.upsilon:
      return 0, 0
    if self.num_heads > self.dim:
      raise ValueError(
        f'{self.num_heads} heads have no channel each in a convolution of {self.dim} channels: '
        f'pass num_heads={self.dim} or fewer'
      )
    # The floor of 0.3 * 10 must be 3.
    key, value = (
      int(share * self.dim / self.num_heads + 1e-6) for share in (self.kappa, self.upsilon)
    )
    key = self.head_dim or max(key, self.min_head_dim, 1)
    return key * self.num_heads, max(value, 1) * self.num_heads

  def augment(
    self,
    x: Float[Array, 'b h w c'],
    train: bool,
    evolve: Callable[[Logits], Logits] | None = None,
  ) -> tuple[Float[Array, 'b p q d'], Logits | None]:
    """Returns the map and the logits that the softmax saw; `evolve` changes the latter."""
    key_dim, value_dim = self.key_and_value_dim()
    parts, logits = [], None
    if self.dim > value_dim:
      layer = conv.Conv(
        self.dim - value_dim,
        self.kernel_size,
        self.stride,
        padding=self.padding,
        kernel_init=self.kernel_init,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name='conv',
      )
      parts.append(layer(x))
    if value_dim:
      y, logits = self._attend(x.astype(self.dtype), key_dim, value_dim, evolve)
      parts.append(nn.Dropout(self.dropout, deterministic=not train)(y))
    return jnp.concatenate(parts, -1), logits

  def _attend(
    self,
    x: Float[Array, 'b h w c'],
    key_dim: int,
    value_dim: int,
    evolve: Callable[[Logits], Logits] | None,
  ) -> tuple[Float[Array, 'b p q v'], Logits]:
    x = pool(x, self.stride) if self.stride > 1 else x
    size = x.shape[1:3]
    x = pool(x, self.downsample) if self.downsample > 1 else x
    batch, height, width, _ = x.shape
    x = self._with_position(x)

    def dense(dim: int, name: str) -> nn.Dense:
      return nn.Dense(
        dim,
        kernel_init=self.kernel_init,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=name,
      )

    def heads(dim: int, name: str) -> Float[Array, 'b k n d']:
      return dense(dim, name)(x).reshape(batch, -1, self.num_heads, dim // self.num_heads)

    query, key, value = heads(key_dim, 'query'), heads(key_dim, 'key'), heads(value_dim, 'value')
    # Scaled before everything else: the logits of positions are scaled too.
    query = query * query.shape[-1] ** -0.5
    bias = None
    if self.position == 'relative':
      bias = relative_logits.relative_logits_2d(
        query.reshape(batch, height, width, self.num_heads, -1),
        self._table('height_offsets', height, query.shape[-1]),
        self._table('width_offsets', width, query.shape[-1]),
      )
    logits = attention.attention_logits(query, key, bias, scale=1.0)
    logits = logits if evolve is None else evolve(logits)
    if self.is_mutable_collection('intermediates'):
      self.sow('intermediates', 'attention', jax.nn.softmax(logits, -1))
    mixed = attention.attend(logits, value).reshape(batch, height, width, value_dim)
    y = dense(value_dim, 'proj')(mixed)
    return (y if (height, width) == size else resize.bilinear_corner(y, *size)), logits

  def _with_position(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h w e']:
    """Adds or appends what says where a pixel is, unless the logits do."""
    errors.check_choice('position', self.position, POSITIONS)
    if self.position == 'absolute':
      return x + position_embedding.sincos2d(*x.shape[1:]).astype(self.dtype)
    if self.position == 'coordinates':
      where = coordinates(*x.shape[1:3]).astype(self.dtype)
      return jnp.concatenate([x, jnp.broadcast_to(where, (*x.shape[:3], 2))], -1)
    return x

  def _table(self, name: str, size: int, head_dim: int) -> Float[Array, 'offsets d']:
    errors.check_choice('table_init', self.table_init, TABLE_INITS)
    literal, scale = self.table_init == 'literal', head_dim**-0.5

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
      drawn = jax.random.normal(key, shape, dtype)
      return scale + drawn if literal else scale * drawn

    if self.has_variable('params', name):
      offsets = self.get_variable('params', name).shape[0]
      if offsets != 2 * size - 1:
        raise ValueError(
          f'{name} of {offsets} offsets belong to a side of {(offsets + 1) / 2:g} pixels, the map '
          f'has {size}: pass image_size to create_model, and to load_reference, which resizes them'
        )
    return jnp.asarray(self.param(name, init, (2 * size - 1, head_dim), self.param_dtype))


class AugmentedConv(Augmentation):
  """`concat(conv(x), attention(x))` in the place of a convolution (equation 5)."""

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    return self.augment(x, train)[0]


OPERATORS = {'augmented': AugmentedConv}
