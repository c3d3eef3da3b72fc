"""Normalisations, called `norm(x, train=train)`. No epsilon has a default: each model states it."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class BatchNorm(nn.Module):
  """Batch normalisation (arXiv 1502.03167) over all axes but the last.

  Under `jit` over a sharded batch the statistics are those of the global batch. The running
  variance is the biased one, as in TensorFlow.

  Attributes:
    epsilon: added to the variance.
    momentum: share of the old running statistics that one step keeps (0.9 is PyTorch's 0.1).
  """

  epsilon: float
  momentum: float = 0.9
  scale_init: nn.initializers.Initializer = nn.initializers.ones
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, '*b c'], *, train: bool) -> Float[Array, '*b c']:
    dim = (x.shape[-1],)
    scale = self.param('scale', self.scale_init, dim, self.param_dtype)
    bias = self.param('bias', nn.initializers.zeros, dim, self.param_dtype)
    running_mean = self.variable('batch_stats', 'mean', jnp.zeros, dim, jnp.float32)
    running_var = self.variable('batch_stats', 'var', jnp.ones, dim, jnp.float32)
    if train:
      # One pass over the activations, and one reduction across devices, for both moments.
      axes = tuple(range(x.ndim - 1))
      wide = x.astype(jnp.float32)
      mean = wide.mean(axes)
      var = jnp.maximum(jnp.square(wide).mean(axes) - jnp.square(mean), 0.0)
      if not self.is_initializing():
        running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
        running_var.value = self.momentum * running_var.value + (1 - self.momentum) * var
    else:
      mean, var = running_mean.value, running_var.value
    factor = scale * jax.lax.rsqrt(var + self.epsilon)
    return (x * factor + (bias - mean * factor)).astype(self.dtype)


class LayerNorm(nn.Module):
  """Layer normalisation (arXiv 1607.06450) over the last axis, in float32."""

  epsilon: float
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, '*b c'], *, train: bool = False) -> Float[Array, '*b c']:
    del train
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],), self.param_dtype)
    bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    var = jnp.square(centred).mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(var + self.epsilon) * scale + bias).astype(self.dtype)


class GroupNorm(nn.Module):
  """Group normalisation (arXiv 1803.08494) of `[b, h, w, c]` maps, in float32.

  Raises:
    ValueError: if `groups` does not divide the channels.
  """

  epsilon: float
  groups: int = 32
  scale_init: nn.initializers.Initializer = nn.initializers.ones
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool = False) -> Float[Array, 'b h w c']:
    del train
    *outer, dim = x.shape
    if dim % self.groups:
      raise ValueError(f'{self.groups} groups do not divide {dim} channels')
    scale = self.param('scale', self.scale_init, (dim,), self.param_dtype)
    bias = self.param('bias', nn.initializers.zeros, (dim,), self.param_dtype)
    wide = x.astype(jnp.float32).reshape(*outer, self.groups, dim // self.groups)
    centred = wide - wide.mean((1, 2, 4), keepdims=True)
    var = jnp.square(centred).mean((1, 2, 4), keepdims=True)
    normed = (centred * jax.lax.rsqrt(var + self.epsilon)).reshape(x.shape)
    return (normed * scale + bias).astype(self.dtype)
