"""Convolution layers over `ops.convolution`, which picks the form that the backend runs fast."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.ops import convolution, fusion


class Conv(nn.Module):
  """2-D convolution, channels last, kernel stored `[h, w, in / groups, out]`.

  Attributes:
    dim: output channels.
    kernel_size: height and width, or one number for both.
    stride: step along height and width.
    groups: number of channel groups; `groups == dim` is depthwise.
    padding: `same` (TensorFlow: the odd pixel goes bottom and right), `symmetric` (PyTorch's
      `(k - 1) // 2` on either side) or `valid`.
    use_bias: whether a bias of `[dim]` is added.
    dilation: distance of the kernel's taps.
  """

  dim: int
  kernel_size: int | Sequence[int] = 3
  stride: int = 1
  groups: int = 1
  padding: str = 'same'
  use_bias: bool = False
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  bias_init: nn.initializers.Initializer = nn.initializers.zeros
  dilation: int = 1
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b p q d']:
    size = self.kernel_size
    height, width = (size, size) if isinstance(size, int) else size
    if x.shape[-1] % self.groups or self.dim % self.groups:
      raise ValueError(
        f'{self.groups} groups divide neither or only one of {x.shape[-1]} input and {self.dim} '
        'output channels: pass a common divisor'
      )
    shape = (height, width, x.shape[-1] // self.groups, self.dim)
    kernel = self.param('kernel', self.kernel_init, shape, self.param_dtype)
    # Loaded variables are NumPy arrays.
    kernel = self.transform(jnp.asarray(kernel)).astype(self.dtype)
    y = convolution.conv(
      x.astype(self.dtype),
      kernel,
      stride=self.stride,
      padding=self.padding,
      groups=self.groups,
      dilation=self.dilation,
    )
    if self.use_bias:
      bias = self.param('bias', self.bias_init, (self.dim,), self.param_dtype)
      y = y + bias.astype(self.dtype)
    return fusion.fence(y) if self.groups == self.dim > 1 else y

  def transform(self, kernel: Float[Array, 'h w i o']) -> Float[Array, 'h w i o']:
    """Returns the kernel that is applied; a reparametrised convolution overrides this."""
    return kernel


class StdConv(Conv):
  """Convolution with weight standardisation (arXiv 1903.10520): each output's kernel is normed.

  Attributes:
    epsilon_in: `std` divides by `std + 1e-5` (Google's BiT and ViT hybrids), `var` by
      `sqrt(var + 1e-8)` (timm's port of them).
  """

  epsilon_in: str = 'std'

  def transform(self, kernel: Float[Array, 'h w i o']) -> Float[Array, 'h w i o']:
    errors.check_choice('epsilon_in', self.epsilon_in, ('std', 'var'))
    kernel = kernel.astype(jnp.float32)
    centred = kernel - kernel.mean((0, 1, 2))
    var = jnp.square(centred).mean((0, 1, 2))
    if self.epsilon_in == 'std':
      return centred / (jnp.sqrt(var) + 1e-5)
    return centred / jnp.sqrt(var + 1e-8)
