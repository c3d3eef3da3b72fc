"""Stand-alone self-attention (arXiv 1906.05909): attention to the pixels that a kernel covers."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.attention import halo
from vision_attention.layers import conv, norm
from vision_attention.ops import convolution, local_attention, position_embedding

POSITIONS = ('relative', 'absolute', 'none')
BORDERS = ('mask', 'zero')
STEM_VALUES = ('mixture', 'plain', 'conv')


class StandAloneAttention(nn.Module):
  """Self-attention of every pixel to the `kernel x kernel` pixels around it (equation 3).

  `softmax(q.k + q.r) v`, where `r` is the concatenation of a vector per row offset and one per
  column offset, each of half the width of a head. Projections are dense, as the published numbers
  of parameters require (section 3.1 speaks of grouped ones). No output projection: the next 1x1
  convolution mixes the heads. The paper pools after the layer where a convolution has a stride.

  The map `[b, n, h, w, kernel^2]` is sown as `attention` where `intermediates` is mutable.

  Attributes:
    dim: width of queries, keys, values and output.
    num_heads: number of heads.
    head_dim: channels of a head of queries and keys; `dim / num_heads` unless given.
    kernel: side of the neighbourhood, odd.
    position: `relative`; `absolute`, sines and cosines added to the input; or `none` (Table 5).
    content: whether logits have `q.k`; without it there are no keys (Table 6).
    scale: of the logits, `none` (the paper's equation) or `rsqrt` (`head_dim ** -0.5`).
    border: whether pixels outside the map are left out (`mask`) or are zero keys and values that
      take part (`zero`). The paper does not say.
    shared: whether all heads share the tables.
    qkv_bias: whether query, key and value have biases.
    dropout: rate at the end.
    block: largest block of queries that are computed together; no effect on the result.
    table_init: of the tables; normal with `head_dim ** -0.5` unless given.
  """

  needs_map: ClassVar[bool] = True
  dim: int
  num_heads: int = 8
  head_dim: int | None = None
  kernel: int = 7
  position: str = 'relative'
  content: bool = True
  scale: str = 'none'
  border: str = 'mask'
  shared: bool = True
  qkv_bias: bool = False
  dropout: float = 0.0
  block: int = 8
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  table_init: nn.initializers.Initializer | None = None
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b h w d']:
    head_dim = self._check()
    size = (x.shape[1], x.shape[2])
    near = local_attention.centred(
      self.kernel, size, block=self.block, mask_padding=self.border == 'mask'
    )
    if self.position == 'absolute':
      x = x + jnp.asarray(position_embedding.sincos2d(*size, x.shape[-1]), x.dtype)

    def heads(dim: int, name: str) -> Float[Array, 'b h w n d']:
      project = conv.Conv(
        dim,
        kernel_size=1,
        use_bias=self.qkv_bias,
        kernel_init=self.kernel_init,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=name,
      )
      return project(x).reshape(*x.shape[:3], self.num_heads, -1)

    query = heads(self.num_heads * head_dim, 'query')
    key = heads(self.num_heads * head_dim, 'key') if self.content else None
    value = heads(self.dim, 'value')
    tables = []
    if self.position == 'relative':
      init = self.table_init or nn.initializers.normal(head_dim**-0.5)
      shape = (self.kernel, head_dim // 2)
      shape = shape if self.shared else (self.num_heads, *shape)
      tables = [
        jnp.asarray(self.param(f'{axis}_table', init, shape, self.param_dtype))
        for axis in ('height', 'width')
      ]
    scale = halo.factor(self.scale, head_dim)
    if self.is_mutable_collection('intermediates'):
      weights = local_attention.local_attention_weights(
        query, key, *tables, size=size, near=near, scale=scale, position_scale=scale
      )
      self.sow('intermediates', 'attention', weights)
    y = local_attention.local_attention(
      query, key, value, *tables, near=near, scale=scale, position_scale=scale
    )
    y = y.reshape(*y.shape[:3], self.dim)
    return nn.Dropout(self.dropout, deterministic=not train)(y)

  def _check(self) -> int:
    """Returns the width of a head; see the attributes for what is refused."""
    errors.check_choice('position', self.position, POSITIONS)
    errors.check_choice('border', self.border, BORDERS)
    if self.dim % self.num_heads:
      raise ValueError(f'{self.num_heads} heads do not divide width {self.dim}: pass a divisor')
    if not self.content and self.position != 'relative':
      raise ValueError(
        f"content=False leaves no logits with position={self.position!r}: pass position='relative'"
      )
    head_dim = self.head_dim or self.dim // self.num_heads
    if self.position == 'relative' and head_dim % 2:
      raise ValueError(
        f'heads of {head_dim} channels do not split into halves for rows and columns: pass '
        'another num_heads or head_dim'
      )
    return head_dim


class AttentionStem(nn.Module):
  """Attention within 4x4 pixels, norm, ReLU and a 4x4 max-pool (appendix A.1).

  RGB pixels alone say little, so the values know where in the pooling window they are: their
  matrix is a convex combination `sum_m p(a, b, m) W_m` whose weights `p = softmax_m((row_a +
  column_b) . nu_m)` all heads share. Windows of attention are those of the pool.

  The number of mixtures, the width of the embeddings, the relative logits and the activation are
  not published; four mixtures, computed one by one, cost what Table 7 prints. Here they are mixed
  before they are applied, which costs what one does.

  Attributes:
    dim: output channels.
    values: `mixture`; `plain`, one matrix for all positions; or `conv`, a 4x4 convolution.
    num_heads: number of heads.
    mixtures: number of matrices that are mixed.
    embedding_dim: width of the embeddings of rows and columns.
    window: side of the windows and of the pool.
    scale: of the logits, see `StandAloneAttention`.
  """

  dim: int
  values: str = 'mixture'
  num_heads: int = 4
  mixtures: int = 4
  embedding_dim: int = 64
  window: int = 4
  scale: str = 'none'
  norm_epsilon: float = 1e-5
  norm_momentum: float = 0.9
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    errors.check_choice('values of the stem', self.values, STEM_VALUES)
    if self.dim % (2 * self.num_heads):
      raise ValueError(
        f'{self.num_heads} heads need a width that is a multiple of {2 * self.num_heads}, '
        f'not {self.dim}'
      )
    head_dim = self.dim // self.num_heads

    def project(name: str, kernel_size: int = 1) -> Float[Array, 'b h w d']:
      return conv.Conv(
        self.dim,
        kernel_size=kernel_size,
        kernel_init=self.kernel_init,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=name,
      )(x)

    query, key = project('query'), project('key')
    if self.values == 'mixture':
      value = self._mixture(x)
    else:
      value = project('value', self.window if self.values == 'conv' else 1)
    query, key, value = (y.reshape(*y.shape[:3], self.num_heads, -1) for y in (query, key, value))
    near = local_attention.halo(self.window, 0)
    init = nn.initializers.normal(head_dim**-0.5)
    shape = (local_attention.table_size(near), head_dim // 2)
    tables = [
      jnp.asarray(self.param(f'{axis}_table', init, shape, self.param_dtype))
      for axis in ('height', 'width')
    ]
    scale = halo.factor(self.scale, head_dim)
    size = (x.shape[1], x.shape[2])
    if self.is_mutable_collection('intermediates'):
      weights = local_attention.local_attention_weights(
        query, key, *tables, size=size, near=near, scale=scale, position_scale=scale
      )
      self.sow('intermediates', 'attention', weights)
    y = local_attention.local_attention(
      query, key, value, *tables, near=near, scale=scale, position_scale=scale
    )
    batch_norm = norm.BatchNorm(
      self.norm_epsilon,
      self.norm_momentum,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name='norm',
    )
    y = jax.nn.relu(batch_norm(y.reshape(*y.shape[:3], self.dim), train=train))
    padding = [(0, -n % self.window) for n in size]
    return convolution.max_pool(y, window=self.window, stride=self.window, padding=padding)

  def _mixture(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h w d']:
    """Returns values by a matrix per position within the window."""
    init, shape = nn.initializers.normal(1.0), (self.window, self.embedding_dim)
    rows = self.param('row_embedding', init, shape, self.param_dtype)
    columns = self.param('column_embedding', init, shape, self.param_dtype)
    mixture = self.param(
      'mixture',
      nn.initializers.normal(self.embedding_dim**-0.5),
      (self.mixtures, self.embedding_dim),
      self.param_dtype,
    )
    # The leading axis counts matrices and is no part of the fan-in.
    matrix_init = jax.vmap(lambda key: self.kernel_init(key, shape, self.param_dtype))
    shape = (x.shape[-1], self.dim)
    matrices = self.param('value', lambda key: matrix_init(jax.random.split(key, self.mixtures)))
    positions = (rows[:, None] + columns[None]).astype(jnp.float32)
    share = jax.nn.softmax(jnp.einsum('abe,me->abm', positions, mixture), -1)
    kernel = jnp.einsum('abm,mcd->abcd', share, matrices).astype(self.dtype)
    batch, height, width, dim = x.shape
    bottom, right = -height % self.window, -width % self.window
    x = jnp.pad(x.astype(self.dtype), ((0, 0), (0, bottom), (0, right), (0, 0)))
    x = x.reshape(batch, -1, self.window, x.shape[2] // self.window, self.window, dim)
    y = jnp.einsum('bhawvc,avcd->bhawvd', x, kernel)
    return y.reshape(batch, height + bottom, width + right, self.dim)[:, :height, :width]


OPERATORS = {'sasa': StandAloneAttention}
