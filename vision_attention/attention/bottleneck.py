"""Global self-attention in place of a bottleneck's 3x3 convolution (BoTNet, arXiv 2101.11605)."""

from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.ops import attention, relative_logits

POSITIONS = ('relative', 'absolute', 'none')


class BottleneckAttention(nn.Module):
  """`softmax(q k / sqrt(d) + position) v` over all positions of a map (section 3.1, figure 4).

  The query meets a vector per vertical and one per horizontal offset of the key, or per place of
  the key; the tables are shared by the heads. There is neither an output projection nor a bias: the
  block's last 1x1 convolution follows. The map `[b, n, queries, keys]` is sown as `attention`.

  Attributes:
    dim: output width, that of all heads' values.
    num_heads: number of heads.
    head_dim: channels of a head's query and key; `dim / num_heads` unless given.
    position: `relative`, `absolute` (a table per axis too) or `none`.
    scale_position: whether `1 / sqrt(d)` scales the position's part of the logits as well, as in
      the authors' code; timm leaves it unscaled.
    kernel_init: of query, key and value.
    table_init: of the tables; normal with a spread of `d ** -0.5` unless given.
  """

  needs_map: ClassVar[bool] = True
  stages: ClassVar[tuple[int, ...]] = (4,)
  dim: int
  num_heads: int = 4
  head_dim: int | None = None
  position: str = 'relative'
  scale_position: bool = True
  kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.01)
  table_init: nn.initializers.Initializer | None = None
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b h w d']:
    del train
    errors.check_choice('position', self.position, POSITIONS)
    if self.dim % self.num_heads:
      raise ValueError(
        f'{self.num_heads} heads do not divide width {self.dim}: pass a divisor of it'
      )
    batch, height, width, _ = x.shape
    value_dim = self.dim // self.num_heads
    head_dim = self.head_dim or value_dim

    def heads(dim: int, name: str) -> Float[Array, 'b h w n d']:
      y = nn.Dense(
        self.num_heads * dim,
        use_bias=False,
        kernel_init=self.kernel_init,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=name,
      )(x)
      return y.reshape(batch, height, width, self.num_heads, dim)

    query, key, value = heads(head_dim, 'query'), heads(head_dim, 'key'), heads(value_dim, 'value')
    scale = head_dim**-0.5
    bias = self._position_logits(query * scale if self.scale_position else query)

    def tokens(y: Float[Array, 'b h w n d']) -> Float[Array, 'b k n d']:
      return y.reshape(batch, height * width, *y.shape[3:])

    query, key, value = tokens(query), tokens(key), tokens(value)
    if self.is_mutable_collection('intermediates'):
      weights = attention.attention_weights(query, key, bias, scale=scale)
      self.sow('intermediates', 'attention', weights)
    mixed = attention.dot_product_attention(query, key, value, bias, scale=scale)
    return mixed.reshape(batch, height, width, self.dim)

  def _position_logits(self, query: Float[Array, 'b h w n d']) -> Float[Array, 'b n q k'] | None:
    """Returns what position adds to the logits, or None."""
    batch, height, width, num_heads, dim = query.shape
    if self.position == 'none':
      return None
    if self.position == 'relative':
      return relative_logits.relative_logits_2d(
        query,
        self._table('relative_height', 2 * height - 1, height, dim),
        self._table('relative_width', 2 * width - 1, width, dim),
      )
    rows = self._table('absolute_height', height, height, dim)
    columns = self._table('absolute_width', width, width, dim)
    places = (rows[:, None] + columns).reshape(height * width, dim).astype(query.dtype)
    return jnp.einsum(
      'bqnd,kd->bnqk',
      query.reshape(batch, height * width, num_heads, dim),
      places,
      preferred_element_type=jnp.float32,
    )

  def _table(self, name: str, rows: int, size: int, dim: int) -> Float[Array, 'o d']:
    """Returns a table; ValueError says that one was made for another map."""
    if self.has_variable('params', name):
      found = self.get_variable('params', name).shape[0]
      if found != rows:
        made_for = (found + 1) // 2 if self.position == 'relative' else found
        raise ValueError(
          f'{name} is made for {made_for} rows or columns, the map has {size}: pass the image_size '
          'of these weights, or resize them with load_reference(..., image_size=...)'
        )
    init = self.table_init or nn.initializers.normal(dim**-0.5)
    return jnp.asarray(self.param(name, init, (rows, dim), self.param_dtype))


OPERATORS = {'bottleneck': BottleneckAttention}
