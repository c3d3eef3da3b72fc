"""Attention with pooled queries, keys and values (arXiv 2112.01526, section 4.1, figure 2)."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.layers import initializers, norm
from vision_attention.ops import attention, convolution, decomposed_position, windows

_HIDDEN = -1e9


class HeadPool(nn.Module):
  """A depthwise convolution with one kernel for all heads, `[k, k, 1, head_dim]`."""

  num_heads: int
  kernel_size: int
  stride: int
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b p q c']:
    dim, size = x.shape[-1], self.kernel_size
    shape = (size, size, 1, dim // self.num_heads)
    kernel = self.param('kernel', initializers.TORCH_KERNEL, shape, self.param_dtype)
    kernel = jnp.tile(jnp.asarray(kernel).astype(self.dtype), self.num_heads)
    return convolution.conv(x, kernel, stride=self.stride, padding='symmetric', groups=dim)


def split_class(
  x: Float[Array, 'b ...'], size: tuple[int, int] | None
) -> tuple[Float[Array, 'b 1 c'] | None, Float[Array, 'b h w c']]:
  """Takes tokens apart into the class token and the map; a map without one has no `size`."""
  if size is None:
    return None, x
  return x[:, :1], x[:, 1:].reshape(len(x), *size, x.shape[-1])


def join_class(
  token: Float[Array, 'b 1 c'] | None, x: Float[Array, 'b h w c']
) -> Float[Array, 'b ...']:
  """Undoes `split_class`."""
  if token is None:
    return x
  return jnp.concatenate([token, x.reshape(len(x), -1, x.shape[-1])], 1)


class PoolingAttention(nn.Module):
  """`softmax(q k / sqrt(d) + E) v + q` of queries, keys and values that are pooled on their map.

  Pooling is a depthwise convolution with a stride, shared by the heads, and a LayerNorm. `E` is
  `q . (R_h[dy] + R_w[dx])` from the tables `relative_height` and `relative_width`; it is not scaled
  by `1 / sqrt(d)`, as in all the authors' code and against equation 3. Adding the queries is
  residual pooling.

  Attributes:
    dim: output width.
    num_heads: number of heads.
    head_dim: channels of a head; `dim / num_heads` unless given.
    stride: of the queries, so of the result.
    kv_stride: of keys and values.
    kernel_size: of the pooling.
    qkv_bias: whether query, key and value have biases.
    residual_pooling: whether queries are added to what attention gives.
    size: of the map if the input is tokens, a class token and then the map; None for a map.
    residual_class: whether the class token's query is added too (timm).
    window: side of the windows on the input's map that attention stays in, or None. Pooling looks
      across their borders. An axis that is no longer than a window is one.
    padding: of a map that windows do not tile: `mask`, or `attend`: zeros at bottom and right are
      keys like others (the authors' detection code).
    dropout: rate after the output projection.
    norm_epsilon: of LayerNorm.
    table_init: of the tables.
  """

  needs_map: ClassVar[bool] = True
  dim: int
  num_heads: int = 4
  head_dim: int | None = None
  stride: int = 1
  kv_stride: int = 1
  kernel_size: int = 3
  qkv_bias: bool = True
  residual_pooling: bool = True
  size: tuple[int, int] | None = None
  residual_class: bool = False
  window: int | None = None
  padding: str = 'mask'
  dropout: float = 0.0
  norm_epsilon: float = 1e-6
  kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
  table_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b ... c'], *, train: bool) -> Float[Array, 'b ... d']:
    if self.head_dim is None and self.dim % self.num_heads:
      raise ValueError(
        f'{self.num_heads} heads do not divide width {self.dim}: pass a divisor or head_dim'
      )
    head_dim = self.head_dim or self.dim // self.num_heads
    inner = self.num_heads * head_dim
    self._check()

    def dense(dim: int, name: str, use_bias: bool = True) -> nn.Dense:
      return nn.Dense(
        dim,
        use_bias=use_bias,
        kernel_init=self.kernel_init,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=name,
      )

    def pooled(name: str, stride: int) -> tuple[Array | None, Array]:
      """Returns the class token `[b, 1, n, d]` or None, and the map `[b, h, w, n, d]`."""
      token, y = split_class(dense(inner, name, self.qkv_bias)(x), self.size)
      types: Any = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
      pool = HeadPool(self.num_heads, self.kernel_size, stride, **types, name=f'pool_{name}')
      y = join_class(token, pool(y))
      y = y.reshape(*y.shape[:-1], self.num_heads, head_dim)
      y = norm.LayerNorm(self.norm_epsilon, **types, name=f'norm_{name}')(y)
      if token is None:
        return None, y
      # A convolution rounds up.
      size = [-(-side // stride) for side in self.size or ()]
      return y[:, :1], y[:, 1:].reshape(len(y), *size, self.num_heads, head_dim)

    token, query = pooled('query', self.stride)
    parts = [(token, query), *(pooled(name, self.kv_stride) for name in ('key', 'value'))]
    if self.window is None:
      mixed, class_mixed = self._attend(parts, None)
    else:
      mixed, class_mixed = self._in_windows([y for _, y in parts], self.window, x.shape[1:3])
    if self.residual_pooling:
      mixed = mixed + query
      if class_mixed is not None and token is not None and self.residual_class:
        class_mixed = class_mixed + token
    mixed = mixed.reshape(*mixed.shape[:-2], inner)
    if class_mixed is not None:
      mixed = join_class(class_mixed.reshape(-1, 1, inner), mixed)
    y = dense(self.dim, 'proj')(mixed)
    return nn.Dropout(self.dropout, deterministic=not train)(y)

  def _check(self) -> None:
    errors.check_choice('padding', self.padding, ('mask', 'attend'))
    errors.check_odd('kernel_size', self.kernel_size)
    if self.window is None:
      return
    if self.size is not None:
      raise ValueError('a class token has no place in windows: pass window=None or drop the token')
    if self.window % self.stride or self.window % self.kv_stride:
      raise ValueError(
        f'window {self.window} must be a multiple of stride {self.stride} and of kv_stride '
        f'{self.kv_stride}'
      )

  def _attend(
    self, parts: list[tuple[Array | None, Array]], seen: np.ndarray | None
  ) -> tuple[Array, Array | None]:
    """Returns what attention gives to the map and to the class token.

    Args:
      parts: query, key and value; of each, the class token `[b, 1, n, d]` or None, and the map.
      seen: `[windows, 1, 1, keys]`, the keys that are no padding, or None for all.
    """
    (token, query), (_, key), _ = parts
    batch, _, _, heads, head_dim = query.shape
    keys = key.shape[1:3]
    tables = []
    for axis, name in enumerate(('relative_height', 'relative_width')):
      count = decomposed_position.length(query.shape[1 + axis], keys[axis])
      table = self.param(name, self.table_init, (count, head_dim), self.param_dtype)
      tables.append(jnp.asarray(table))
    bias = decomposed_position.decomposed_logits(query, tables[0], tables[1], (keys[0], keys[1]))
    if token is not None:
      bias = jnp.pad(bias, ((0, 0), (0, 0), (1, 0), (1, 0)))
    if seen is not None:
      bias = bias.reshape(-1, len(seen), *bias.shape[1:]) + jnp.where(seen, 0.0, _HIDDEN)
      bias = windows.fold(bias)
    flat = [y.reshape(batch, -1, heads, head_dim) for _, y in parts]
    if token is not None:
      tokens = (jnp.asarray(t) for t, _ in parts)
      flat = [jnp.concatenate([t, y], 1) for t, y in zip(tokens, flat, strict=True)]
    logits = attention.attention_logits(flat[0], flat[1], bias)
    if self.is_mutable_collection('intermediates'):
      self.sow('intermediates', 'attention', jax.nn.softmax(logits))
    mixed = attention.attend(logits, flat[2])
    if token is None:
      return mixed.reshape(query.shape), None
    return mixed[:, 1:].reshape(query.shape), mixed[:, :1]

  def _in_windows(
    self, maps: list[Array], window: int, size: tuple[int, ...]
  ) -> tuple[Array, Array | None]:
    """Returns what attention within windows gives to the map of queries."""
    strides = (self.stride, self.kv_stride, self.kv_stride)
    cut, seen = [], np.ones(0, bool)
    for y, stride in zip(maps, strides, strict=True):
      extent = y.shape[1:3]
      sides = [
        n if side <= window else window // stride for n, side in zip(extent, size, strict=True)
      ]
      padded = [-(-n // m) * m for n, m in zip(extent, sides, strict=True)]
      below = [(0, p - n) for p, n in zip(padded, extent, strict=True)]
      flat = y.reshape(*y.shape[:3], -1)
      pixels = windows.partition(jnp.pad(flat, ((0, 0), *below, (0, 0))), sides)
      cut.append((None, pixels.reshape(-1, *sides, *y.shape[3:])))
      inside = np.zeros((1, *padded, 1), bool)
      inside[:, : extent[0], : extent[1]] = True
      seen = _cells(inside, sides)
    hidden = self.padding == 'mask' and not seen.all()
    mixed, _ = self._attend(cut, seen if hidden else None)
    query, (rows, columns) = maps[0], cut[0][1].shape[1:3]
    extent = query.shape[1:3]
    padded = [-(-n // m) * m for n, m in zip(extent, (rows, columns), strict=True)]
    pixels = mixed.reshape(len(query), -1, rows * columns, mixed.shape[-2] * mixed.shape[-1])
    joined = windows.merge(pixels, (rows, columns), padded)[:, : extent[0], : extent[1]]
    return joined.reshape(query.shape), None


def _cells(inside: np.ndarray, sides: list[int]) -> np.ndarray:
  """Cuts a mask of a map into windows, `[windows, 1, 1, keys]`."""
  _, height, width, _ = inside.shape
  rows, columns = sides
  cells = inside.reshape(height // rows, rows, width // columns, columns).transpose(0, 2, 1, 3)
  return cells.reshape(-1, 1, 1, rows * columns)


OPERATORS = {'pooling': PoolingAttention}
