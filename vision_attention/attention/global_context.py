"""The global context block (GCNet, arXiv 1904.11492): one attention map for every query."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.layers import initializers, norm, squeeze_excite
from vision_attention.ops import activation

POOLINGS = ('att', 'avg')
FUSIONS = ('add', 'mul', 'both')


class Transform(nn.Module):
  """`W2 act(LN(W1 g + b1)) + b2` of a pooled vector; zero at first where `zero_init`.

  Attributes:
    hidden_dim: width of the bottleneck.
    activation: a name of `ops.activation`.
    norm_epsilon: of the LayerNorm.
    zero_init: whether the last layer begins at zero.
  """

  hidden_dim: int
  activation: str
  norm_epsilon: float
  zero_init: bool
  dtype: DTypeLike
  param_dtype: DTypeLike

  @nn.compact
  def __call__(self, g: Float[Array, 'b c']) -> Float[Array, 'b c']:
    def dense(dim: int, name: str, kernel_init: Any, bias_init: Any) -> nn.Dense:
      return nn.Dense(
        dim,
        kernel_init=kernel_init,
        bias_init=bias_init,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=name,
      )

    inits = initializers.TORCH_KERNEL, initializers.torch_bias(g.shape[-1])
    y = dense(self.hidden_dim, 'squeeze', *inits)(g)
    y = norm.LayerNorm(
      epsilon=self.norm_epsilon, dtype=self.dtype, param_dtype=self.param_dtype, name='norm'
    )(y)
    if self.zero_init:
      inits = nn.initializers.zeros, nn.initializers.zeros
    return dense(g.shape[-1], 'excite', *inits)(activation.by_name(self.activation)(y))


class GlobalContext(nn.Module):
  """Pools a map by one softmax over all positions, transforms the result and fuses it back.

  `g = sum_j softmax_j(w_k x_j + b) x_j`, then `x + T(g)` or `x sigmoid(T(g))` with the bottleneck
  `T` of `Transform` (section 3.3, equation 8). With `fusion='both'` the map is scaled and then
  shifted, by two transforms of the same `g`. A fresh block with `add` is the identity. The map
  `[b, 1, 1, keys]` is sown as `attention`.

  timm's `gca` has `ratio=1/8` and `norm_epsilon=1e-6`.

  Attributes:
    ratio: width of the bottleneck relative to the map's.
    divisor: the width is rounded to a multiple of this, as of `squeeze_excite.squeezed_dim`.
    pooling: `att`, or `avg` for the mean over positions.
    fusion: `add`, `mul` or `both`.
    norm_epsilon: of the bottleneck's LayerNorm.
    activation: a name of `ops.activation`, in the bottleneck.
    zero_init: whether the last layer of each transform begins at zero.
  """

  placement: ClassVar[str] = 'branch'
  ratio: float = 1 / 16
  divisor: int = 1
  pooling: str = 'att'
  fusion: str = 'add'
  norm_epsilon: float = 1e-5
  activation: str = 'relu'
  zero_init: bool = True
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool = False) -> Float[Array, 'b h w c']:
    del train
    errors.check_choice('pooling', self.pooling, POOLINGS)
    errors.check_choice('fusion', self.fusion, FUSIONS)
    batch, height, width, dim = x.shape
    hidden_dim = squeeze_excite.squeezed_dim(dim, self.ratio, self.divisor)
    x = x.astype(self.dtype)
    g = self._pool(x.reshape(batch, height * width, dim))

    def transform(name: str) -> Float[Array, 'b 1 1 c']:
      layer = Transform(
        hidden_dim,
        self.activation,
        self.norm_epsilon,
        self.zero_init,
        self.dtype,
        self.param_dtype,
        name=name,
      )
      return layer(g)[:, None, None]

    y = x
    if self.fusion in ('mul', 'both'):
      y = y * jax.nn.sigmoid(transform('mul'))
    if self.fusion in ('add', 'both'):
      y = y + transform('add')
    return y

  def _pool(self, x: Float[Array, 'b k c']) -> Float[Array, 'b c']:
    """Returns the mean of all positions, weighted by the attention or not."""
    if self.pooling == 'avg':
      return x.astype(jnp.float32).mean(1).astype(self.dtype)
    key = nn.Dense(
      1,
      kernel_init=nn.initializers.he_normal(),
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name='key',
    )
    weights = jax.nn.softmax(key(x)[..., 0].astype(jnp.float32), axis=-1)
    if self.is_mutable_collection('intermediates'):
      self.sow('intermediates', 'attention', weights[:, None, None])
    pooled = jnp.einsum(
      'bk,bkc->bc', weights.astype(self.dtype), x, preferred_element_type=jnp.float32
    )
    return pooled.astype(self.dtype)


MODULES = {'gc': GlobalContext}
