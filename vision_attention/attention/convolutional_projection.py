"""Self-attention whose queries, keys and values are made by convolutions (arXiv 2103.15808)."""

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.layers import conv, initializers, norm
from vision_attention.ops import attention

PROJECTIONS = ('conv', 'linear')
SCALES = ('dim', 'head_dim')


class ConvolutionalProjectionAttention(nn.Module):
  """Multi-head attention with convolutional projection (arXiv 2103.15808, section 3.2, eq. 2).

  Query, key and value each have a depthwise convolution, BatchNorm and a linear layer of their own,
  without an activation. A stride in keys and values leaves a query fewer of them. The attention map
  `[b, n, q, k]` is sown as `attention` where `intermediates` is mutable.

  Attributes:
    dim: output width.
    num_heads: number of heads.
    head_dim: channels of a head; `dim / num_heads` unless given.
    stride: of the queries' convolution; the output is that much smaller.
    kv_stride: of the keys' and values' convolution, relative to the input.
    kernel: side of the convolutions.
    projection: `conv`, or `linear` for linear layers alone (Table 8), which have no stride.
    map_size: if given, the input is tokens `[b, 1 + h w, c]`, a class token before a map of this
      height and width; it is query, key and value too, but takes part in no convolution.
    scale: the width whose square root divides the products: `dim` in the authors' code, `head_dim`
      in other attention.
    qkv_bias: whether the linear layers of query, key and value have biases.
    dropout: rate after the output projection.
    norm_epsilon: of BatchNorm.
    norm_momentum: of BatchNorm's running statistics.
  """

  needs_map: ClassVar[bool] = True
  dim: int
  num_heads: int = 4
  head_dim: int | None = None
  stride: int = 1
  kv_stride: int = 2
  kernel: int = 3
  projection: str = 'conv'
  map_size: tuple[int, int] | None = None
  scale: str = 'dim'
  qkv_bias: bool = True
  dropout: float = 0.0
  norm_epsilon: float = 1e-5
  norm_momentum: float = 0.9
  # The authors' truncated distribution is cut a hundred times its spread away.
  kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b ... c'], *, train: bool) -> Float[Array, 'b ... d']:
    errors.check_choice('projection', self.projection, PROJECTIONS)
    errors.check_choice('scale', self.scale, SCALES)
    if self.head_dim is None and self.dim % self.num_heads:
      raise ValueError(
        f'{self.num_heads} heads do not divide width {self.dim}: pass a divisor or head_dim'
      )
    errors.check_odd('kernel', self.kernel)
    if self.projection == 'linear' and self.stride > 1:
      raise ValueError("a linear projection has no stride: pass stride=1 or projection='conv'")
    head_dim = self.head_dim or self.dim // self.num_heads
    pixels, cls = self._split(x)
    types: dict[str, Any] = {'dtype': self.dtype, 'param_dtype': self.param_dtype}

    def convolve(name: str, stride: int) -> Float[Array, 'b p q c']:
      if self.projection == 'linear':
        return pixels
      y = conv.Conv(
        pixels.shape[-1],
        self.kernel,
        stride,
        groups=pixels.shape[-1],
        padding='symmetric',
        kernel_init=initializers.TORCH_KERNEL,
        name=f'{name}_conv',
        **types,
      )(pixels)
      batch_norm = norm.BatchNorm(
        self.norm_epsilon, self.norm_momentum, name=f'{name}_norm', **types
      )
      return batch_norm(y, train=train)

    def dense(dim: int, name: str, use_bias: bool = True) -> nn.Dense:
      return nn.Dense(dim, use_bias=use_bias, kernel_init=self.kernel_init, name=name, **types)

    def project(name: str, stride: int) -> tuple[Float[Array, 'b q n d'], tuple[int, ...]]:
      y = convolve(name, stride)
      size = y.shape[1:3]
      tokens = y.reshape(len(y), -1, y.shape[-1])
      if cls is not None:
        tokens = jnp.concatenate([cls.astype(tokens.dtype), tokens], 1)
      heads = dense(self.num_heads * head_dim, name, self.qkv_bias)(tokens)
      return heads.reshape(*heads.shape[:2], self.num_heads, head_dim), size

    (query, size), (key, _), (value, _) = (
      project(name, stride)
      for name, stride in (
        ('query', self.stride),
        ('key', self.kv_stride),
        ('value', self.kv_stride),
      )
    )
    factor = (self.dim if self.scale == 'dim' else head_dim) ** -0.5
    if self.is_mutable_collection('intermediates'):
      weights = attention.attention_weights(query, key, scale=factor)
      self.sow('intermediates', 'attention', weights)
    mixed = attention.dot_product_attention(query, key, value, scale=factor)
    y = dense(self.dim, 'proj')(mixed.reshape(*mixed.shape[:2], -1))
    y = y if cls is not None else y.reshape(len(y), *size, self.dim)
    return nn.Dropout(self.dropout, deterministic=not train)(y)

  def _split(
    self, x: Float[Array, 'b ... c']
  ) -> tuple[Float[Array, 'b h w c'], Float[Array, 'b 1 c'] | None]:
    """Returns the map and the class token, or None without one."""
    if self.map_size is None:
      if x.ndim != 4:
        raise ValueError(
          f'convolutions need a map [b, h, w, c], not {x.ndim} axes: pass map_size for tokens'
        )
      return x, None
    height, width = self.map_size
    if x.ndim != 3 or x.shape[1] != 1 + height * width:
      raise ValueError(
        f'map_size {height}x{width} needs {1 + height * width} tokens [b, t, c], not {x.shape}'
      )
    return x[:, 1:].reshape(len(x), height, width, x.shape[-1]), x[:, :1]


OPERATORS = {'convolutional_projection': ConvolutionalProjectionAttention}
