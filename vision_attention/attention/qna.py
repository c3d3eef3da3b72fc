"""Query and attend: attention of learned queries to overlapping windows (arXiv 2112.11435)."""

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.ops import qna

SCALES = ('position', 'query', 'ones', 'none')


def _query_init(head_dim: int) -> nn.initializers.Initializer:
  def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    return jax.random.truncated_normal(key, -2, 2, shape, dtype) * math.sqrt(1 / head_dim)

  return init


class QueryAndAttend(nn.Module):
  """Attention to the `kernel x kernel` pixels around, by queries that all windows share.

  Per head, the sum over queries of `sum_window s softmax(k q / sqrt(d) + B) v`, with a bias `B` and
  a factor `s` by query, head and position in the window. Pixels outside the map are no keys.
  Neither keys nor attention maps are computed, see `ops.qna`.

  The maps `[b, queries * n, h, w, kernel^2]`, without the factors, are sown as `attention` where
  `intermediates` is mutable.

  Attributes:
    dim: output width.
    num_heads: number of heads.
    head_dim: channels of a head; `dim / num_heads` unless given.
    kernel: side of a window, odd.
    stride: distance of the windows; above one the map gets smaller.
    upsample: factor by which the map gets larger. The paper mentions this use and no code of it is
      public: the form is of our own design. Every one of `upsample^2` groups of queries writes one
      pixel of the square that takes the place of the window's centre.
    num_queries: learned queries, per group.
    normalize_query: whether queries are divided by their length.
    scale: the factors, one per position, query and head (`position`, or `ones` if they begin at
      one and not near zero), per query and head (`query`), or `none`.
    qkv_bias: whether values have biases; those of keys would cancel.
    proj_bias: whether the output projection has one.
    dropout: rate after the output projection.
  """

  needs_map: ClassVar[bool] = True
  dim: int
  num_heads: int = 4
  head_dim: int | None = None
  kernel: int = 3
  stride: int = 1
  upsample: int = 1
  num_queries: int = 2
  normalize_query: bool = True
  scale: str = 'position'
  qkv_bias: bool = False
  proj_bias: bool = False
  dropout: float = 0.0
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    head_dim = self._check()
    groups, width = self.upsample**2, self.num_heads * head_dim
    count = groups * self.num_queries
    x = x.astype(self.dtype)

    def dense(dim: int, name: str, use_bias: bool) -> nn.Dense:
      return nn.Dense(
        dim,
        use_bias=use_bias,
        kernel_init=self.kernel_init,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=name,
      )

    def param(name: str, init: nn.initializers.Initializer, *shape: int) -> Array:
      return jnp.asarray(self.param(name, init, shape, self.param_dtype))

    query = param('query', _query_init(head_dim), count, width)
    query = query.reshape(count, self.num_heads, head_dim)
    if self.normalize_query:
      query = qna.normalize(query)
    key = param('key', self.kernel_init, x.shape[-1], width)
    score = qna.scores(x, key.reshape(-1, self.num_heads, head_dim).astype(self.dtype), query)
    value = dense(width, 'value', self.qkv_bias)(x)
    value = value.reshape(*x.shape[:3], self.num_heads, head_dim)
    table = (self.kernel, self.kernel, count, self.num_heads)
    bias = param('position', nn.initializers.zeros, *table)
    if self.is_mutable_collection('intermediates'):
      weights = qna.attention_weights(score, bias, stride=self.stride)
      self.sow('intermediates', 'attention', weights)
    y = qna.query_and_attend(
      score, value, bias, self._factors(param, table), stride=self.stride, groups=groups
    )
    y = qna.depth_to_space(y.reshape(*y.shape[:4], width), self.upsample)
    y = dense(self.dim, 'proj', self.proj_bias)(y)
    return nn.Dropout(self.dropout, deterministic=not train)(y)

  def _factors(self, param, table: tuple[int, ...]) -> Array | None:
    """Returns the factors of the weights, or None."""
    if self.scale == 'none':
      return None
    shape = (1, 1, *table[2:]) if self.scale == 'query' else table
    init = nn.initializers.ones if self.scale == 'ones' else nn.initializers.normal(0.02)
    return jnp.broadcast_to(param('position_scale', init, *shape), table)

  def _check(self) -> int:
    """Returns the width of a head; see the attributes for what is refused."""
    errors.check_choice('scale', self.scale, SCALES)
    errors.check_odd('kernel', self.kernel)
    if self.stride > 1 and self.upsample > 1:
      raise ValueError(
        f'stride {self.stride} and upsample {self.upsample} undo each other: pass one of them'
      )
    if self.head_dim is None and self.dim % self.num_heads:
      raise ValueError(
        f'{self.num_heads} heads do not divide width {self.dim}: pass a divisor or head_dim'
      )
    return self.head_dim or self.dim // self.num_heads


OPERATORS = {'qna': QueryAndAttend}
