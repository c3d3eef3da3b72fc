"""Enhanced local self-attention: weights from products of query and key at the same pixel."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.attention import halo
from vision_attention.layers import conv, initializers
from vision_attention.ops import convolution, ghost_attention


class EnhancedLocalAttention(nn.Module):
  """ELSA (arXiv 2112.12786, section 3) on maps of any size.

  Hadamard attention: the logits of a pixel's `kernel x kernel` taps are two convolutions of
  `query * key`, the first over such a neighbourhood in groups, the second pointwise, with GELU
  (exact) between. No query meets its neighbour's key. Taps outside the map take part, with zero
  values.

  Ghost head: every channel has static matrices over the taps, of which `mul ** mul_power`
  multiplies the attention map of its head and `add_scale * add` is added to it.

  The map `[b, n, h, w, kernel^2]`, before the ghost head, is sown as `attention` where
  `intermediates` is mutable.

  Attributes:
    dim: output width.
    num_heads: number of heads.
    head_dim: channels of a head of values; `dim / num_heads` unless given.
    qk_dim: channels of query and key; two thirds of `dim` unless given, rounded up to groups.
    kernel: side of the neighbourhood, odd.
    dilation: distance of its taps.
    stride: results are for every `stride`-th pixel, of `query * key` the means in between.
    group_width: channels of a group.
    mul_power: exponent of the factors, 0 for none (the paper's lambda).
    add_scale: factor of the summands, 0 for none (the paper's gamma).
    scale: of `query * key`, `none` or `rsqrt` (of `head_dim`).
    qkv_bias: whether query, key and value have biases.
    dropout: rate after the output projection.
    kernel_init: of the output projection.
    conv_init: of everything before it, which are convolutions in the code.
  """

  needs_map: ClassVar[bool] = True
  dim: int
  num_heads: int = 4
  head_dim: int | None = None
  qk_dim: int | None = None
  kernel: int = 5
  dilation: int = 1
  stride: int = 1
  group_width: int = 8
  mul_power: int | float = 1
  add_scale: float = 1.0
  scale: str = 'none'
  qkv_bias: bool = False
  dropout: float = 0.0
  kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
  conv_init: nn.initializers.Initializer = initializers.TORCH_KERNEL
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    head_dim = self._check()
    types: dict[str, Any] = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    wanted = self.qk_dim or max(1, self.dim // 3 * 2)
    groups = -(-wanted // self.group_width)
    qk_dim = groups * self.group_width

    def layer(dim: int, size: int, fan_in: int, **more: Any) -> Callable[..., Any]:
      bias_init = initializers.torch_bias(fan_in)
      return conv.Conv(dim, size, kernel_init=self.conv_init, bias_init=bias_init, **more, **types)

    project = functools.partial(layer, size=1, fan_in=x.shape[-1], use_bias=self.qkv_bias)
    query, key = (project(qk_dim, name=name)(x) for name in ('query', 'key'))
    value = project(self.num_heads * head_dim, name='value')(x)
    product = query * key * halo.factor(self.scale, head_dim)
    if self.stride > 1:
      rest = [(0, -side % self.stride) for side in x.shape[1:3]]
      product = convolution.avg_pool(
        product, window=self.stride, stride=self.stride, padding=rest, count_include_pad=False
      )
    taps = self.kernel**2
    y = layer(
      qk_dim,
      self.kernel,
      taps * self.group_width,
      groups=groups,
      padding='symmetric',
      dilation=self.dilation,
      use_bias=True,
      name='local',
    )(product)
    y = jax.nn.gelu(y, approximate=False)
    logits = layer(taps * self.num_heads, 1, qk_dim, use_bias=True, name='logits')(y)
    logits = logits.reshape(*logits.shape[:3], self.num_heads, taps)
    weights = jax.nn.softmax(logits.astype(jnp.float32))
    if self.is_mutable_collection('intermediates'):
      self.sow('intermediates', 'attention', weights.transpose(0, 3, 1, 2, 4))
    mul, add = self._ghost_head(head_dim)
    y = ghost_attention.ghost_attention(
      weights,
      value.reshape(*value.shape[:3], self.num_heads, head_dim),
      mul,
      add,
      stride=self.stride,
      dilation=self.dilation,
    )
    y = nn.Dense(self.dim, kernel_init=self.kernel_init, name='proj', **types)(
      y.reshape(*y.shape[:3], -1)
    )
    return nn.Dropout(self.dropout, deterministic=not train)(y)

  def _ghost_head(self, head_dim: int) -> tuple[Float[Array, 'k k n d'] | None, ...]:
    """Returns what multiplies attention maps and what is added to them."""
    shape = (self.kernel, self.kernel, self.num_heads * head_dim)
    split = (self.kernel, self.kernel, self.num_heads, head_dim)

    def ghost(name: str, spread: float) -> Float[Array, 'k k n d']:
      init = nn.initializers.normal(spread)
      return jnp.asarray(self.param(f'ghost_{name}', init, shape, self.param_dtype)).reshape(split)

    mul = ghost('mul', 1.0) ** int(self.mul_power) if self.mul_power else None
    add = ghost('add', 0.02) * self.add_scale if self.add_scale else None
    return mul, add

  def _check(self) -> int:
    """Returns the width of a head; see the attributes for what is refused."""
    if self.head_dim is None and self.dim % self.num_heads:
      raise ValueError(
        f'{self.num_heads} heads do not divide width {self.dim}: pass a divisor or head_dim'
      )
    errors.check_odd('kernel', self.kernel)
    if self.mul_power != int(self.mul_power) or self.mul_power < 0:
      raise ValueError(
        f'mul_power {self.mul_power} of factors that may be negative or zero must be a whole '
        f'number: the nearest is {max(0, round(self.mul_power))}'
      )
    return self.head_dim or self.dim // self.num_heads


OPERATORS = {'elsa': EnhancedLocalAttention}
