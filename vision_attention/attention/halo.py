"""Blocked local self-attention with halos (arXiv 2103.12731)."""

from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.layers import conv
from vision_attention.ops import convolution, local_attention

SCALES = ('none', 'rsqrt')


def factor(scale: str, head_dim: int) -> float:
  """Returns the factor of logits that a name stands for: 1, or `head_dim ** -0.5`.

  Raises:
    ValueError: for an unknown name.
  """
  errors.check_choice('scale', scale, SCALES)
  return 1.0 if scale == 'none' else head_dim**-0.5


class HaloAttention(nn.Module):
  """Self-attention of the queries of a block to the block and a halo around it.

  `softmax(q.k + q.r) v`, where `r` is the sum of a vector per row offset and one per column
  offset. With a stride every other query is computed (section 3, attention down-sampling); a
  block that the stride does not divide attends everywhere and averages 2x2 pixels.

  Maps of any size: blocks that stick out at bottom and right are padded, and what is padded is
  masked. The map `[b, n, h, w, window^2]` is sown as `attention` where `intermediates` is mutable.

  Attributes:
    dim: width of queries, keys and, times `value_ratio`, of values and output.
    num_heads: number of heads.
    head_dim: channels of a head of queries and keys; `dim / num_heads` unless given.
    block: side of a block of queries.
    halo: how far keys are seen beyond the block; 0 is attention in windows that do not overlap.
    value_ratio: width of values and output relative to `dim` (`r_v`).
    stride: 1 or 2.
    avg_down: average 2x2 pixels in place of every other query, whatever the block.
    scale: of the content logits, `none` (the paper's equation) or `rsqrt` (`head_dim ** -0.5`).
    position_scale: of the position logits, the same.
    shared: whether all heads share the tables.
    mask_padding: whether pixels outside the map are masked; otherwise they are zero keys.
    index: `offset`, tables of `window + block - 1` rows, or `subsampled`, tables and rows as timm
      has them (see `ops.local_attention.Neighbourhood`).
    qkv_bias: whether query, key and value have biases.
    proj: whether an output projection mixes the heads; in a ResNet the next convolution does.
    dropout: rate at the end.
    table_init: of the tables; normal with `head_dim ** -0.5` unless given.
  """

  needs_map: ClassVar[bool] = True
  dim: int
  num_heads: int = 8
  head_dim: int | None = None
  block: int = 8
  halo: int = 3
  value_ratio: float = 1.0
  stride: int = 1
  avg_down: bool = False
  scale: str = 'none'
  position_scale: str = 'none'
  shared: bool = True
  mask_padding: bool = True
  index: str = 'offset'
  qkv_bias: bool = False
  proj: bool = False
  dropout: float = 0.0
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  table_init: nn.initializers.Initializer | None = None
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    value_dim = int(self.dim * self.value_ratio)
    if value_dim % self.num_heads or (self.head_dim is None and self.dim % self.num_heads):
      raise ValueError(
        f'{self.num_heads} heads do not divide width {self.dim} and value width {value_dim}: '
        'pass a common divisor'
      )
    if self.stride not in (1, 2):
      raise ValueError(f'stride {self.stride} of halo attention must be 1 or 2')
    head_dim = self.head_dim or self.dim // self.num_heads
    pool = self.stride > 1 and (self.avg_down or self.block % self.stride != 0)
    near = local_attention.halo(
      self.block,
      self.halo,
      stride=1 if pool else self.stride,
      mask_padding=self.mask_padding,
      index=self.index,
    )

    def heads(x: Float[Array, 'b h w c'], dim: int, name: str) -> Float[Array, 'b h w n d']:
      project = conv.Conv(
        dim,
        kernel_size=1,
        use_bias=self.qkv_bias,
        kernel_init=self.kernel_init,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=name,
      )
      y = project(x)
      return y.reshape(*y.shape[:3], self.num_heads, -1)

    query = heads(x[:, :: near.stride, :: near.stride], self.num_heads * head_dim, 'query')
    key = heads(x, self.num_heads * head_dim, 'key')
    value = heads(x, value_dim, 'value')
    init = self.table_init or nn.initializers.normal(head_dim**-0.5)
    shape = (local_attention.table_size(near), head_dim)
    shape = shape if self.shared else (self.num_heads, *shape)
    tables = [
      jnp.asarray(self.param(f'{axis}_table', init, shape, self.param_dtype))
      for axis in ('height', 'width')
    ]
    scale, position_scale = (factor(s, head_dim) for s in (self.scale, self.position_scale))
    if self.is_mutable_collection('intermediates'):
      weights = local_attention.local_attention_weights(
        query,
        key,
        *tables,
        size=(x.shape[1], x.shape[2]),
        near=near,
        scale=scale,
        position_scale=position_scale,
      )
      self.sow('intermediates', 'attention', weights)
    y = local_attention.local_attention(
      query, key, value, *tables, near=near, scale=scale, position_scale=position_scale
    )
    y = y.reshape(*y.shape[:3], value_dim)
    if pool:
      y = convolution.avg_pool(y, window=2, stride=2, padding='same', count_include_pad=False)
    if self.proj:
      y = conv.Conv(
        value_dim,
        kernel_size=1,
        use_bias=True,
        kernel_init=self.kernel_init,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name='proj',
      )(y)
    return nn.Dropout(self.dropout, deterministic=not train)(y)


OPERATORS = {'halo': HaloAttention}
