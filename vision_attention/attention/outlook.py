"""Outlook attention: weights for a whole window from the pixels in its middle."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.ops import convolution, outlook_attention


class OutlookAttention(nn.Module):
  """Outlook attention (arXiv 2106.13112, section 3.1) on maps of any size.

  A dense layer turns the mean of `step x step` pixels into the `kernel^2 x kernel^2` attention map
  of the window around them: no query meets a key. Every window gives its pixels mixtures of its
  values, and a pixel the sum over the windows that it lies in. Zeros beyond the map take part.

  The map `[b, n, windows * kernel^2, kernel^2]`, windows and the pixels in each row by row, is sown
  as `attention` where `intermediates` is mutable.

  Attributes:
    dim: output width.
    num_heads: number of heads.
    head_dim: channels of a head; `dim / num_heads` unless given.
    kernel: side of a window, odd.
    step: distance of the windows.
    qkv_bias: whether the values have a bias; the weights always do.
    dropout: rate after the output projection.
  """

  needs_map: ClassVar[bool] = True
  dim: int
  num_heads: int = 4
  head_dim: int | None = None
  kernel: int = 3
  step: int = 2
  qkv_bias: bool = False
  dropout: float = 0.0
  kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.02)
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b h w d']:
    if self.head_dim is None and self.dim % self.num_heads:
      raise ValueError(
        f'{self.num_heads} heads do not divide width {self.dim}: pass a divisor or head_dim'
      )
    head_dim = self.head_dim or self.dim // self.num_heads
    cut = outlook_attention.windows(self.kernel, self.step)

    def dense(dim: int, name: str, use_bias: bool = True) -> nn.Dense:
      types: dict[str, Any] = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
      return nn.Dense(dim, use_bias=use_bias, kernel_init=self.kernel_init, name=name, **types)

    batch, height, width, _ = x.shape
    value = dense(self.num_heads * head_dim, 'value', self.qkv_bias)(x)
    value = value.reshape(batch, height, width, self.num_heads, head_dim)
    taps, rest = self.kernel**2, [(0, -side % self.step) for side in (height, width)]
    centre = convolution.avg_pool(
      x, window=self.step, stride=self.step, padding=rest, count_include_pad=False
    )
    logits = dense(self.num_heads * taps**2, 'weights')(centre) * head_dim**-0.5
    logits = logits.reshape(batch, cut.count(height), cut.count(width), self.num_heads, taps, taps)
    if self.is_mutable_collection('intermediates'):
      weights = jax.nn.softmax(logits.astype(jnp.float32)).transpose(0, 3, 1, 2, 4, 5)
      weights = weights.reshape(batch, self.num_heads, -1, taps)
      self.sow('intermediates', 'attention', weights)
    y = outlook_attention.outlook_attention(value, logits, step=self.step)
    y = dense(self.dim, 'proj')(y.reshape(batch, height, width, -1))
    return nn.Dropout(self.dropout, deterministic=not train)(y)


OPERATORS = {'outlook': OutlookAttention}
