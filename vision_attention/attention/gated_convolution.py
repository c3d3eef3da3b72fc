"""Recursive gated convolution (arXiv 2207.14284): interactions of high order without attention."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.layers import conv, norm
from vision_attention.ops import global_filter

ModuleDef = Callable[..., nn.Module]
SPATIAL = ('conv', 'global')


def widths(dim: int, order: int) -> list[int]:
  """Returns the widths of the gates (equation 3.3): each is half of the next, and the last `dim`.

  Raises:
    ValueError: if halving does not come out even, with the highest order that does.
  """
  if order < 1 or dim % 2 ** (order - 1):
    highest = (dim & -dim).bit_length()
    raise ValueError(
      f'order {order} halves width {dim} {order - 1} times: it must lie between 1 and {highest}'
    )
  return [dim // 2**k for k in reversed(range(order))]


class GlobalLocalFilter(nn.Module):
  """A 3x3 depthwise convolution of the first half of the channels, a global filter of the second.

  Between two norms; the two halves' channels alternate in the result. The filter is made for the
  map that the layer is initialised with; on another it is resized, see `ops.global_filter`.

  Attributes:
    norm_epsilon: of both norms.
    kernel_init: of the convolution.
    filter_init: of the filter's real and imaginary parts.
  """

  norm_epsilon: float = 1e-6
  kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
  filter_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h w c']:
    _, height, width, dim = x.shape
    if dim % 2:
      raise ValueError(f'width {dim} has no half: the nearest are {dim - 1} and {dim + 1}')
    types: dict[str, Any] = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    near, far = jnp.split(norm.LayerNorm(self.norm_epsilon, name='norm1', **types)(x), 2, -1)
    near = conv.Conv(
      dim // 2,
      groups=dim // 2,
      padding='symmetric',
      kernel_init=self.kernel_init,
      name='local',
      **types,
    )(near)
    shape = (2, height, global_filter.half(width), dim // 2)
    if self.has_variable('params', 'filter'):
      # Made for another map, perhaps.
      shape = self.get_variable('params', 'filter').shape
    filters = self.param('filter', self.filter_init, shape, self.param_dtype)
    far = global_filter.global_filter(far, jnp.asarray(filters))
    mixed = jnp.stack([near, far], -1).reshape(x.shape)
    return norm.LayerNorm(self.norm_epsilon, name='norm2', **types)(mixed)


class RecursiveGatedConv(nn.Module):
  """`y = p_n` of `p_0 = P x`, `p_{k+1} = f_k(p_k) * scale * Depthwise(q_k)` (equation 3.4).

  `p_0` and the gates `q_0, ..., q_{n-1}` of growing width are projections of the input; `f_k` is a
  projection to the next width, `f_0` the identity. Order 1 is a gated convolution. There is neither
  an activation nor a norm between.

  Attributes:
    dim: output width.
    order: number of gates.
    kernel_size: of the depthwise convolution, odd.
    spatial: `conv`, a depthwise convolution with bias, or `global`, see `GlobalLocalFilter`.
    scale: of the gates, with the convolution's bias; 1/3 in HorNets, 1 in their pyramid networks.
    norm_epsilon: of the norms in a `GlobalLocalFilter`.
    dropout: rate after the layer.
  """

  needs_map: ClassVar[bool] = True
  dim: int
  order: int = 3
  kernel_size: int = 7
  spatial: str = 'conv'
  scale: float = 1 / 3
  norm_epsilon: float = 1e-6
  dropout: float = 0.0
  kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b h w d']:
    errors.check_choice('spatial', self.spatial, SPATIAL)
    errors.check_odd('kernel_size', self.kernel_size)
    dims = widths(self.dim, self.order)
    types: dict[str, Any] = {
      'kernel_init': self.kernel_init,
      'dtype': self.dtype,
      'param_dtype': self.param_dtype,
    }

    def dense(dim: int, name: str) -> nn.Dense:
      return nn.Dense(dim, name=name, **types)

    projected = dense(2 * self.dim, 'proj_in')(x)
    y, gates = projected[..., : dims[0]], projected[..., dims[0] :]
    if self.spatial == 'conv':
      mix = conv.Conv(
        sum(dims),
        self.kernel_size,
        groups=sum(dims),
        padding='symmetric',
        use_bias=True,
        name='depthwise',
        **types,
      )
    else:
      mix = GlobalLocalFilter(self.norm_epsilon, name='depthwise', **types)
    gates = mix(gates) * self.scale
    for k, dim in enumerate(dims):
      # Gate `k` begins behind those before it, which are `dims[0]` narrower together.
      start = dim - dims[0]
      y = (dense(dim, f'proj{k}')(y) if k else y) * gates[..., start : start + dim]
    y = dense(self.dim, 'proj_out')(y)
    return nn.Dropout(self.dropout, deterministic=not train)(y)


OPERATORS = {'gnconv': RecursiveGatedConv}
