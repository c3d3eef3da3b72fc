"""LESA: a grouped convolution for the pixel itself, self-attention for its context."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.layers import conv, norm
from vision_attention.ops import relative_logits, relative_position

POSITIONS = ('flat', 'axes')
HE_INIT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
LECUN_INIT = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')


class LogitsNorm(nn.Module):
  """The sum of several kinds of logits, each with a BatchNorm per head, in float32.

  Statistics are over batch, queries and keys. Subtracting a mean or adding a bias changes a whole
  row of logits alike, which the softmax does not see: only the factors are applied. Both are kept
  as variables because weights have them.

  Attributes:
    epsilon: added to the variance.
    momentum: share of the old running statistics that one step keeps.
  """

  epsilon: float = 1e-5
  momentum: float = 0.9
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, *logits: Float[Array, 'b n q k'], train: bool) -> Float[Array, 'b n q k']:
    heads = logits[0].shape[1]
    dim = (len(logits) * heads,)
    scale = self.param('scale', nn.initializers.ones, dim, self.param_dtype)
    self.param('bias', nn.initializers.zeros, dim, self.param_dtype)
    running_mean = self.variable('batch_stats', 'mean', jnp.zeros, dim, jnp.float32)
    running_var = self.variable('batch_stats', 'var', jnp.ones, dim, jnp.float32)
    var = running_var.value
    if train:
      # Per device these are reduced to one number per head before anything crosses devices.
      mean = jnp.concatenate([x.mean((0, 2, 3)) for x in logits])
      square = jnp.concatenate([jnp.square(x).mean((0, 2, 3)) for x in logits])
      var = jnp.maximum(square - jnp.square(mean), 0.0)
      if not self.is_initializing():
        running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
        running_var.value = self.momentum * running_var.value + (1 - self.momentum) * var
    factors = (scale * jax.lax.rsqrt(var + self.epsilon)).reshape(-1, heads, 1, 1)
    total = jnp.zeros_like(logits[0])
    for factor, x in zip(factors, logits, strict=True):
      total = total + factor * x
    return total


class LesaAttention(nn.Module):
  """Locally enhanced self-attention (arXiv 2107.05637): `y = unary + gate * binary`.

  The unary term is a grouped 3x3 convolution and a 1x1 one; the binary term is self-attention over
  the whole map; the gate is made of both, per pixel and channel ("dynamic fusion"). Every linear
  map is without bias and followed by BatchNorm, also the logits, which therefore have no scale.

  Positions are vectors per offset, shared by the heads:
    `flat`: the offset of the flattened indices `y * width + x`. Query, key and value meet a vector
      of their own each, as in Axial-DeepLab (arXiv 2003.07853, equation 4): the form of the
      classification models. Different displacements share a vector where rows end.
    `axes`: the sum of a vector for rows and one for columns, met by the query alone: the form of
      the detection models.
  Both tie the parameters to one size of map. The attention map `[b, n, q, k]` is sown as
  `attention` when the collection `intermediates` is mutable.

  Attributes:
    dim: output width, a multiple of `2 * num_heads`.
    num_heads: of the attention; a head's queries and keys are half as wide as its values.
    groups: of the unary convolution; as many as heads unless given.
    position: `flat` or `axes`.
    dropout: rate after the layer.
    kernel_init: of the convolutions.
    norm_epsilon: of BatchNorm.
    norm_momentum: of BatchNorm's running statistics.
  """

  needs_map: ClassVar[bool] = True
  # The layer ends in norms of its own.
  norm_after: ClassVar[bool] = False
  stages: ClassVar[tuple[int, ...]] = (3, 4)
  dim: int
  num_heads: int = 8
  groups: int | None = None
  position: str = 'flat'
  dropout: float = 0.0
  kernel_init: nn.initializers.Initializer = HE_INIT
  norm_epsilon: float = 1e-5
  norm_momentum: float = 0.9
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b h w d']:
    errors.check_choice('position', self.position, POSITIONS)
    if self.dim % (2 * self.num_heads):
      raise ValueError(
        f'{self.num_heads} heads, with keys half as wide as values, do not divide width '
        f'{self.dim}: pass a divisor of {self.dim // 2}'
      )
    unary, binary = self._unary(x, train), self._binary(x, train)
    fused = jax.nn.relu(jnp.concatenate([unary, binary], -1))
    fused = self._norm('fusion_norm1')(self._conv('fusion1')(fused), train=train)
    gate = self._norm('fusion_norm2')(self._conv('fusion2')(jax.nn.relu(fused)), train=train)
    y = unary + jax.nn.sigmoid(gate) * binary
    return nn.Dropout(self.dropout, deterministic=not train)(y)

  def _types(self) -> dict[str, Any]:
    return {'dtype': self.dtype, 'param_dtype': self.param_dtype}

  def _norm(self, name: str) -> norm.BatchNorm:
    return norm.BatchNorm(self.norm_epsilon, self.norm_momentum, name=name, **self._types())

  def _conv(self, name: str, size: int = 1, groups: int = 1) -> conv.Conv:
    return conv.Conv(
      self.dim, size, groups=groups, kernel_init=self.kernel_init, name=name, **self._types()
    )

  def _unary(self, x: Float[Array, 'b h w c'], train: bool) -> Float[Array, 'b h w d']:
    groups = self.groups or self.num_heads
    y = self._conv('local', 3, groups)(x)
    if groups > 1:
      y = self._conv('local_proj')(y)
    return self._norm('local_norm')(y, train=train)

  def _binary(self, x: Float[Array, 'b h w c'], train: bool) -> Float[Array, 'b h w d']:
    batch, height, width, _ = x.shape
    size, heads, value_dim = height * width, self.num_heads, self.dim // self.num_heads
    key_dim = value_dim // 2
    qkv = nn.Dense(
      2 * self.dim, use_bias=False, kernel_init=LECUN_INIT, name='qkv', **self._types()
    )(x)
    qkv = self._norm('qkv_norm')(qkv, train=train).reshape(batch, size, heads, -1)
    query, key, value = jnp.split(qkv, (key_dim, 2 * key_dim), axis=-1)

    logits = [_einsum('bind,bjnd->bnij', query, key)]
    value_position = None
    if self.position == 'flat':
      init = nn.initializers.normal(value_dim**-0.5)
      table = self._table('relative', init, (2 * key_dim + value_dim, 2 * size - 1), x.shape[1:3])
      vectors = relative_position.toeplitz(table.astype(self.dtype), size)
      query_position, key_position, value_position = jnp.split(vectors, (key_dim, 2 * key_dim))
      logits.append(_einsum('bind,dij->bnij', query, query_position))
      logits.append(_einsum('bjnd,dji->bnij', key, key_position))
    else:
      init = nn.initializers.normal(key_dim**-0.5)
      tables = [
        self._table(f'relative_{axis}', init, (2 * extent - 1, key_dim), x.shape[1:3])
        for axis, extent in (('height', height), ('width', width))
      ]
      maps = query.reshape(batch, height, width, heads, key_dim)
      logits.append(relative_logits.relative_logits_2d(maps, *tables))
    summed = LogitsNorm(self.norm_epsilon, self.norm_momentum, self.param_dtype, name='logits_norm')
    weights = jax.nn.softmax(summed(*logits, train=train), axis=-1)
    if self.is_mutable_collection('intermediates'):
      self.sow('intermediates', 'attention', weights)

    weights = weights.astype(self.dtype)
    mixed = _einsum('bnij,bjnd->bind', weights, value).astype(self.dtype)
    if value_position is not None:
      # What is mixed of contents and of positions alternates, channel by channel.
      offsets = _einsum('bnij,dij->bind', weights, value_position).astype(self.dtype)
      mixed = jnp.stack([mixed, offsets], -1)
    mixed = self._norm('binary_norm')(mixed.reshape(batch, size, -1), train=train)
    return mixed.reshape(batch, height, width, self.dim, -1).sum(-1)

  def _table(
    self, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...], extent: Any
  ) -> jax.Array:
    """Returns a table of positions, and refuses one that is made for another size of map."""
    if self.has_variable('params', name):
      found = jnp.shape(self.get_variable('params', name))
      if found != shape:
        raise ValueError(
          f'{name} has shape {found}, but a map of {extent[0]}x{extent[1]} needs {shape}: '
          'positions of LESA belong to one size of map, so take images of the size that the '
          'variables were made for'
        )
    return jnp.asarray(self.param(name, init, shape, self.param_dtype))


def _einsum(rule: str, *arrays: jax.Array) -> jax.Array:
  return jnp.einsum(rule, *arrays, preferred_element_type=jnp.float32)


OPERATORS = {'lesa': LesaAttention}
