"""Attention over pairs as an addition to a backbone: double attention and dual attention."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.ops import attention


class DoubleAttention(nn.Module):
  """A2-Net's block, gathering features and handing them out (arXiv 1810.11579, eq. 2-6).

  `x + W(G softmax_n(V))` with `G = A softmax_positions(B)^T`: `dim_n` attention maps over all
  positions gather `dim_m` features each, and a second softmax over these `dim_n` gives every
  position its mixture. A ResNet has it after every other block of its third stage.

  The gathering maps, `[b, 1, dim_n, positions]`, are sown as `attention`.

  Attributes:
    dim_m: width of what is gathered; a quarter of the map's unless given (not verified).
    dim_n: number of attention maps; a quarter of the map's width unless given (not verified).
  """

  placement: ClassVar[str] = 'sites'
  dim_m: int | None = None
  dim_n: int | None = None
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool = False) -> Float[Array, 'b h w c']:
    del train
    batch, *_, dim = x.shape
    tokens = x.reshape(batch, -1, dim)

    def dense(y: Float[Array, 'b p c'], dim: int, name: str) -> Float[Array, 'b p d']:
      layer = nn.Dense(
        dim,
        kernel_init=self.kernel_init,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=name,
      )
      return layer(y)

    dim_m, dim_n = self.dim_m or max(1, dim // 4), self.dim_n or max(1, dim // 4)
    features = dense(tokens, dim_m, 'features')
    gather = jax.nn.softmax(dense(tokens, dim_n, 'gather').astype(jnp.float32), axis=1)
    distribute = jax.nn.softmax(dense(tokens, dim_n, 'distribute').astype(jnp.float32), axis=2)
    if self.is_mutable_collection('intermediates'):
      self.sow('intermediates', 'attention', gather.swapaxes(1, 2)[:, None])
    gathered = jnp.einsum('bpm,bpn->bnm', features, gather.astype(self.dtype))
    mixed = jnp.einsum('bpn,bnm->bpm', distribute.astype(self.dtype), gathered)
    return x + dense(mixed, dim, 'proj').reshape(x.shape)


class PositionAttention(nn.Module):
  """DANet's attention over positions, `x + gamma softmax(q k) v` (arXiv 1809.02983, eq. 1-2).

  The logits are not scaled. `gamma` starts at zero.

  Attributes:
    reduction: factor by which queries and keys are narrower than the map.
  """

  placement: ClassVar[str] = 'top'
  reduction: int = 8
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool = False) -> Float[Array, 'b h w c']:
    del train
    batch, *_, dim = x.shape
    tokens = x.reshape(batch, -1, dim)

    def dense(dim: int, name: str) -> Float[Array, 'b p 1 d']:
      layer = nn.Dense(
        dim,
        kernel_init=self.kernel_init,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=name,
      )
      return layer(tokens)[:, :, None]

    narrow = max(1, dim // self.reduction)
    query, key, value = dense(narrow, 'query'), dense(narrow, 'key'), dense(dim, 'value')
    if self.is_mutable_collection('intermediates'):
      weights = attention.attention_weights(query, key, scale=1.0)
      self.sow('intermediates', 'attention', weights)
    mixed = attention.dot_product_attention(query, key, value, scale=1.0)
    gamma = self.param('gamma', nn.initializers.zeros, (1,), self.param_dtype)
    return x + jnp.asarray(gamma).astype(self.dtype) * mixed.reshape(x.shape)


class ChannelAttention(nn.Module):
  """DANet's attention over channels, `x + gamma A x` (arXiv 1809.02983, equations 3-4).

  `A` is the softmax over each row of `max(E) - E` with `E` the products of channels: as in the
  authors' code, unlike channels attend most. There are no projections. `gamma` starts at zero.
  """

  placement: ClassVar[str] = 'top'
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool = False) -> Float[Array, 'b h w c']:
    del train
    tokens = x.reshape(x.shape[0], -1, x.shape[-1]).astype(self.dtype)
    energy = jnp.einsum('bpc,bpd->bcd', tokens, tokens, preferred_element_type=jnp.float32)
    # The softmax subtracts each row's maximum itself: of -E, where the code has max(E) - E.
    weights = jax.nn.softmax(-energy, axis=-1)
    if self.is_mutable_collection('intermediates'):
      self.sow('intermediates', 'attention', weights[:, None])
    mixed = jnp.einsum('bcd,bpd->bpc', weights.astype(self.dtype), tokens)
    gamma = self.param('gamma', nn.initializers.zeros, (1,), self.param_dtype)
    return x + jnp.asarray(gamma).astype(self.dtype) * mixed.reshape(x.shape)


class DualAttention(nn.Module):
  """DANet's two attentions in parallel over one shortcut, after a ResNet's last block.

  Both branches start at zero, so that the module starts as the identity. In the authors'
  segmentation head each branch has its own convolutions and shortcut, and the results are summed.

  Attributes:
    reduction: of the attention over positions.
  """

  placement: ClassVar[str] = 'top'
  reduction: int = 8
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  def setup(self):
    types: dict[str, Any] = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    self.position = PositionAttention(self.reduction, **types)
    self.channel = ChannelAttention(**types)

  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool = False) -> Float[Array, 'b h w c']:
    return self.position(x, train=train) + self.channel(x, train=train) - x


MODULES = {
  'double_attention': DoubleAttention,
  'pam': PositionAttention,
  'cam': ChannelAttention,
  'dual_attention': DualAttention,
}
