"""The lambda layer: content and positions become linear functions that are applied to queries."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.layers import conv, norm
from vision_attention.ops import convolution, relative_position


class LambdaLayer(nn.Module):
  """Lambda layer of intra-depth 1 (arXiv 2102.08602, equations 1-3), in timm's form.

  Every position applies a matrix of its own, `K x V`, to its queries:
  `y[n] = (softmax_m(key)^T value + sum_m E[n, m] value[m])^T query[n]`, the same for all heads. The
  embedding `E` of offsets is a convolution of the values over their map, or a table. Query and
  value have a BatchNorm, the key has none.

  The softmax of the keys over positions, `[b, 1, K, positions]`, is sown as `attention` when the
  collection `intermediates` is mutable.

  Attributes:
    dim: output width, `num_heads` times the values' width V.
    num_heads: number of queries per position.
    head_dim: the queries' and keys' width K; 16 unless given.
    kernel: side of the convolution of values, or None for a table over all offsets, which ties the
      parameters to one size of map.
    stride: 2 averages 2x2 pixels of the result.
    qkv_bias: whether query, key and value have biases.
    dropout: rate after the layer.
    kernel_init: of the projection; a truncated normal of variance `1 / channels` unless given.
    norm_epsilon: of BatchNorm.
  """

  needs_map: ClassVar[bool] = True
  dim: int
  num_heads: int = 4
  head_dim: int | None = None
  kernel: int | None = 9
  stride: int = 1
  qkv_bias: bool = False
  dropout: float = 0.0
  kernel_init: nn.initializers.Initializer | None = None
  norm_epsilon: float = 1e-5
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    if self.dim % self.num_heads:
      raise ValueError(f'{self.num_heads} heads do not divide width {self.dim}: pass a divisor')
    if self.stride not in (1, 2):
      raise ValueError(f'stride {self.stride} of a lambda layer must be 1 or 2')
    if self.kernel is not None and self.kernel % 2 == 0:
      raise ValueError(
        f'kernel {self.kernel} must be odd, to be centred: {self.kernel - 1} or {self.kernel + 1}'
      )
    batch, height, width, channels = x.shape
    head_dim, value_dim = self.head_dim or 16, self.dim // self.num_heads
    types: dict[str, Any] = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    split = (self.num_heads * head_dim, (self.num_heads + 1) * head_dim)
    qkv = nn.Dense(
      split[1] + value_dim,
      use_bias=self.qkv_bias,
      kernel_init=self.kernel_init or nn.initializers.truncated_normal(channels**-0.5),
      name='qkv',
      **types,
    )(x)
    query, key, value = jnp.split(qkv, split, axis=-1)
    query = norm.BatchNorm(self.norm_epsilon, name='norm_query', **types)(query, train=train)
    value = norm.BatchNorm(self.norm_epsilon, name='norm_value', **types)(value, train=train)
    query = query.reshape(batch, height * width, self.num_heads, head_dim)
    weights = jax.nn.softmax(key.reshape(batch, -1, head_dim).astype(jnp.float32), axis=1)
    if self.is_mutable_collection('intermediates'):
      self.sow('intermediates', 'attention', weights.swapaxes(1, 2)[:, None])

    content = jnp.einsum(
      'bmk,bmv->bkv', weights.astype(self.dtype), value.reshape(batch, -1, value_dim)
    )
    lambdas = content[:, None] + self._positions(value, head_dim)
    y = jnp.einsum('bnhk,bnkv->bnhv', query, lambdas).reshape(batch, height, width, self.dim)
    y = nn.Dropout(self.dropout, deterministic=not train)(y)
    if self.stride == 1:
      return y
    return convolution.avg_pool(y, window=2, stride=2, padding='same', count_include_pad=False)

  def _positions(self, value: Float[Array, 'b h w v'], head_dim: int) -> Float[Array, 'b n k v']:
    """Returns `sum_m E[n, m] value[m]` for every position n."""
    batch, height, width, dim = value.shape
    if self.kernel is not None:
      # All channels of the values share one kernel: they go into the batch.
      maps = value.transpose(0, 3, 1, 2).reshape(batch * dim, height, width, 1)
      y = conv.Conv(
        head_dim,
        kernel_size=self.kernel,
        use_bias=True,
        kernel_init=nn.initializers.truncated_normal(head_dim**-0.5),
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name='position',
      )(maps)
      return y.reshape(batch, dim, height * width, head_dim).transpose(0, 2, 3, 1)
    shape = (head_dim, 2 * height - 1, 2 * width - 1)
    init = nn.initializers.truncated_normal(0.02)
    table = self.param('relative_position', init, shape, self.param_dtype)
    embedding = relative_position.relative_bias(jnp.asarray(table), height, width)
    flat = value.reshape(batch, height * width, dim)
    return jnp.einsum('knm,bmv->bnkv', embedding.astype(self.dtype), flat)


OPERATORS = {'lambda': LambdaLayer}
