"""Self-attention within shifted windows (arXiv 2103.14030, section 3.2)."""

from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.ops import relative_position, windows


class WindowAttention(nn.Module):
  """`softmax(q k / sqrt(d) + B) v` among the pixels of a window (equation 4), on maps of any size.

  `B` is a scalar per head and offset, query minus key, from a table `relative_position` of
  `[heads, 2 rows - 1, 2 columns - 1]`. Windows are no larger than the map, and then not shifted; a
  map that they do not tile is padded, and what is padded is masked. The attention map
  `[b * windows, n, q, k]`, images first and windows row by row, is sown as `attention` where
  `intermediates` is mutable.

  Attributes:
    dim: output width.
    num_heads: number of heads.
    head_dim: channels of a head; `dim / num_heads` unless given.
    window: side of a window, or height and width.
    shift: rows and columns before the first whole window, one number or two.
    fit: what becomes of windows larger than the map, see `ops.windows.tile`.
    padding: what padded pixels are, see `ops.windows.tile`.
    qkv_bias: whether query, key and value have biases.
    dropout: rate after the output projection.
    table_init: of the table.
  """

  needs_map: ClassVar[bool] = True
  dim: int
  num_heads: int = 4
  head_dim: int | None = None
  window: int | Sequence[int] = 7
  shift: int | Sequence[int] = 0
  fit: str = 'axis'
  padding: str = 'mask'
  qkv_bias: bool = True
  dropout: float = 0.0
  kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
  table_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b h w d']:
    if self.head_dim is None and self.dim % self.num_heads:
      raise ValueError(
        f'{self.num_heads} heads do not divide width {self.dim}: pass a divisor or head_dim'
      )
    head_dim = self.head_dim or self.dim // self.num_heads
    tiling = windows.tile(x.shape[1:3], self.window, self.shift, fit=self.fit, padding=self.padding)

    def dense(dim: int, name: str, use_bias: bool = True) -> nn.Dense:
      return nn.Dense(
        dim,
        use_bias=use_bias,
        kernel_init=self.kernel_init,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=name,
      )

    def heads(x: Float[Array, 'b g q c'], name: str) -> Float[Array, 'b g q n d']:
      y = dense(self.num_heads * head_dim, name, self.qkv_bias)(x)
      return y.reshape(*y.shape[:3], self.num_heads, head_dim)

    pixels = windows.split(x, tiling)
    query, key, value = (heads(pixels, name) for name in ('query', 'key', 'value'))
    rows, columns = tiling.window
    shape = (self.num_heads, 2 * rows - 1, 2 * columns - 1)
    table = self.param('relative_position', self.table_init, shape, self.param_dtype)
    bias = relative_position.relative_bias(jnp.asarray(table), rows, columns)
    logits = windows.window_logits(query, key, bias, windows.visible(tiling))
    if self.is_mutable_collection('intermediates'):
      self.sow('intermediates', 'attention', jax.nn.softmax(windows.fold(logits)))
    mixed = windows.window_attention(logits, value)
    y = dense(self.dim, 'proj')(mixed.reshape(*mixed.shape[:3], -1))
    y = windows.join(y, tiling)
    return nn.Dropout(self.dropout, deterministic=not train)(y)


OPERATORS = {'window': WindowAttention}
