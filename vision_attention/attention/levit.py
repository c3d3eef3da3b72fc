"""LeViT's attention (arXiv 2104.01136, section 4.2): a bias per distance, and an activation."""

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.layers import fusable, initializers
from vision_attention.ops import activation, attention, distance_bias


class LevitAttention(nn.Module):
  """`Linear(act(softmax(q k / sqrt(d) + b) v))` on a map, every linear map with a BatchNorm.

  The bias `b` is a scalar per head and distance `(|dy|, |dx|)`, from the table `attention_bias`
  `[heads, h, w]`, which begins at zero. With a stride the attention shrinks the map (figure 5):
  queries are every `stride`-th pixel, from the first, and keys and values all pixels.

  Attributes:
    dim: output width.
    num_heads: number of heads.
    head_dim: channels of queries and keys per head; `dim / num_heads` unless given.
    stride: distance of the queries.
    value_ratio: channels of a head's values relative to `head_dim`; 2, or 4 where the map shrinks,
      unless given.
    activation: a name of `ops.activation`, before the last linear map.
    norm_epsilon: of BatchNorm.
    norm_momentum: of BatchNorm.
    scale_init: of the last norm; zeros make a residual branch begin as nothing.
    dropout: rate after the last linear map.
    fused: whether the norms are folded into the linear maps.
  """

  needs_map: ClassVar[bool] = True
  dim: int
  num_heads: int = 4
  head_dim: int | None = None
  stride: int = 1
  value_ratio: int | None = None
  activation: str = 'hard_swish'
  norm_epsilon: float = 1e-5
  norm_momentum: float = 0.9
  scale_init: nn.initializers.Initializer = nn.initializers.ones
  dropout: float = 0.0
  fused: bool = False
  kernel_init: nn.initializers.Initializer = initializers.TORCH_KERNEL
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    if self.head_dim is None and self.dim % self.num_heads:
      raise ValueError(
        f'{self.num_heads} heads do not divide width {self.dim}: pass a divisor or head_dim'
      )
    heads, stride = self.num_heads, self.stride
    head_dim = self.head_dim or self.dim // heads
    value_dim = head_dim * (self.value_ratio or (2 if stride == 1 else 4))
    batch, height, width, _ = x.shape

    def linear(x: Array, dim: int, name: str, **fields: Any) -> Array:
      layer = fusable.LinearNorm(
        dim,
        self.norm_epsilon,
        self.norm_momentum,
        kernel_init=self.kernel_init,
        fused=self.fused,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=name,
        **fields,
      )
      return layer(x, train=train)

    def split(y: Array, *dims: int) -> list[Array]:
      """Cuts `[b, h, w, heads * dims]` into `[b, q, heads, dim]` of each, head by head."""
      y = y.reshape(batch, -1, heads, sum(dims))
      return jnp.split(y, [sum(dims[:i]) for i in range(1, len(dims))], -1)

    if stride == 1:
      dims = (head_dim, head_dim, value_dim)
      query, key, value = split(linear(x, heads * sum(dims), 'qkv'), *dims)
    else:
      [query] = split(linear(x[:, ::stride, ::stride], heads * head_dim, 'query'), head_dim)
      dims = (head_dim, value_dim)
      key, value = split(linear(x, heads * sum(dims), 'kv'), *dims)
    shape = (heads, height, width)
    table = self.param('attention_bias', nn.initializers.zeros, shape, self.param_dtype)
    bias = distance_bias.distance_bias(jnp.asarray(table), stride)[None]
    if self.is_mutable_collection('intermediates'):
      self.sow('intermediates', 'attention', attention.attention_weights(query, key, bias))
    mixed = attention.dot_product_attention(query, key, value, bias)
    y = mixed.reshape(batch, -(-height // stride), -(-width // stride), heads * value_dim)
    y = activation.by_name(self.activation)(y)
    y = linear(y, self.dim, 'proj', scale_init=self.scale_init)
    return nn.Dropout(self.dropout, deterministic=not train)(y)


OPERATORS = {'levit': LevitAttention}
