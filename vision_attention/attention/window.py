"""Self-attention within shifted windows (arXiv 2103.14030) and on grids (arXiv 2204.01697)."""

from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.ops import fusion, relative_position, windows


class PartitionAttention(nn.Module):
  """`softmax(q k / sqrt(d) + B) v` among the pixels of a part of the map, on maps of any size.

  `B` is a scalar per head and offset, query minus key, from a table `relative_position` of
  `[heads, 2 rows - 1, 2 columns - 1]`. The attention map `[b * parts, n, q, k]`, images first, is
  sown as `attention` where `intermediates` is mutable. A subclass calls `attend` with its parts.

  Attributes:
    dim: output width.
    num_heads: number of heads.
    head_dim: channels of a head; `dim / num_heads` unless given.
    interpolate: whether a table of another size than the part's is taken, and interpolated in the
      program, so that its gradient goes through (MaxViT's code when it fine-tunes).
    table_window: with `interpolate`, height and width of the part that a new table is made for, or
      one number; those of the part unless given.
    qkv_bias: whether query, key and value have biases.
    proj_bias: whether the output projection has one.
    dropout: rate after the output projection.
    table_init: of the table.
  """

  needs_map: ClassVar[bool] = True
  dim: int
  num_heads: int = 4
  head_dim: int | None = None
  interpolate: bool = False
  table_window: int | Sequence[int] | None = None
  qkv_bias: bool = True
  proj_bias: bool = True
  dropout: float = 0.0
  kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
  table_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  def attend(
    self, x: Float[Array, 'b h w c'], tiling: windows.Tiling, train: bool
  ) -> Float[Array, 'b h w d']:
    """Returns what the pixels of every part of a map make of each other."""
    if self.head_dim is None and self.dim % self.num_heads:
      raise ValueError(
        f'{self.num_heads} heads do not divide width {self.dim}: pass a divisor or head_dim'
      )
    head_dim = self.head_dim or self.dim // self.num_heads

    def dense(dim: int, name: str, use_bias: bool = True) -> nn.Dense:
      return nn.Dense(
        dim,
        use_bias=use_bias,
        kernel_init=self.kernel_init,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        dot_general=fusion.dot_general,
        name=name,
      )

    def heads(x: Float[Array, 'b g q c'], name: str) -> Float[Array, 'b g q n d']:
      y = dense(self.num_heads * head_dim, name, self.qkv_bias)(x)
      return y.reshape(*y.shape[:3], self.num_heads, head_dim)

    pixels = windows.split(x, tiling)
    query, key, value = (heads(pixels, name) for name in ('query', 'key', 'value'))
    rows, columns = tiling.window
    bias = relative_position.relative_bias(self._table(rows, columns), rows, columns)
    logits = windows.window_logits(query, key, bias, windows.visible(tiling))
    if self.is_mutable_collection('intermediates'):
      self.sow('intermediates', 'attention', jax.nn.softmax(windows.fold(logits)))
    mixed = windows.window_attention(logits, value)
    y = dense(self.dim, 'proj', self.proj_bias)(mixed.reshape(*mixed.shape[:3], -1))
    y = windows.join(y, tiling)
    return nn.Dropout(self.dropout, deterministic=not train)(y)

  def _table(self, rows: int, columns: int) -> Float[Array, 'n y x']:
    """Returns the table for parts of `rows` and `columns`."""
    shape = (2 * rows - 1, 2 * columns - 1)
    stored = shape
    if self.interpolate:
      height, width = windows.pair(self.table_window or (rows, columns))
      stored = (2 * height - 1, 2 * width - 1)
      if self.has_variable('params', 'relative_position'):
        # What was loaded may have been made for yet another part.
        stored = self.get_variable('params', 'relative_position').shape[1:]
    table = self.param(
      'relative_position', self.table_init, (self.num_heads, *stored), self.param_dtype
    )
    table = jnp.asarray(table)
    return table if stored == shape else relative_position.interpolate(table, *shape)


class WindowAttention(PartitionAttention):
  """Attention within windows (arXiv 2103.14030, section 3.2, equation 4).

  Windows are no larger than the map, and then not shifted; a map that they do not tile is padded,
  and what is padded is masked. In the attention map windows follow each other row by row.

  Attributes:
    window: side of a window, or height and width.
    shift: rows and columns before the first whole window, one number or two.
    fit: what becomes of windows larger than the map, see `ops.windows.tile`.
    padding: what padded pixels are, see `ops.windows.tile`.
  """

  window: int | Sequence[int] = 7
  shift: int | Sequence[int] = 0
  fit: str = 'axis'
  padding: str = 'mask'

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b h w d']:
    size = x.shape[1], x.shape[2]
    tiling = windows.tile(size, self.window, self.shift, fit=self.fit, padding=self.padding)
    return self.attend(x, tiling, train)


class GridAttention(PartitionAttention):
  """Attention among pixels that lie apart and span the map (arXiv 2204.01697, section 3.2).

  The map is cut into `grid` cells; the pixels at one place of all cells attend to each other. A
  grid is no larger than the map; a map that it does not divide is padded, and what is padded is
  masked. In the attention map the places of a cell follow each other row by row.

  Attributes:
    grid: cells along either axis, or along height and width.
  """

  grid: int | Sequence[int] = 7

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b h w d']:
    return self.attend(x, windows.lattice((x.shape[1], x.shape[2]), self.grid), train)


OPERATORS = {'window': WindowAttention, 'grid': GridAttention}
