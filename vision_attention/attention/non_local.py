"""Non-local blocks (arXiv 1711.07971), as analysed and simplified by GCNet (arXiv 1904.11492)."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.layers import norm as norms
from vision_attention.layers import squeeze_excite
from vision_attention.ops import convolution, non_local

FORMS = ('gaussian', 'embedded_gaussian', 'dot_product', 'concatenation')
POOLS = ('none', 'inputs', 'outputs')
INIT = nn.initializers.normal(0.01)


class NonLocal(nn.Module):
  """`x_i + W_z sum_j f(x_i, x_j) W_v x_j` with a normalised pairwise function `f`.

  gaussian: softmax of `x_i . x_j`; embedded_gaussian: of `W_q x_i . W_k x_j`; dot_product:
  `W_q x_i . W_k x_j / N`; concatenation: `relu(w_f . [W_q x_i; W_k x_j]) / N` (arXiv 1711.07971,
  equations 2-5). The map `f`, `[b, 1, queries, keys]`, is sown as `attention`; its rows sum to one
  for the first two. A fresh block is the identity.

  Attributes:
    form: the pairwise function.
    ratio: inner width relative to the map's.
    divisor: the inner width is rounded to a multiple of this (timm: 8, with `ratio=1/8` and
      `scale='inverse_sqrt_input'`).
    scale: of the logits of the two softmax forms; see `ops.non_local.scale_of`.
    sub_sample: whether keys and values come from a map of half the size: `inputs`, from max-pooled
      inputs, or `outputs`, max-pooled themselves (mmcv; one pool for either is the same but for
      the order).
    norm: whether a BatchNorm, whose scale begins at zero, follows `W_z`. Without it `W_z` itself
      does.
    norm_epsilon: of the BatchNorm.
    norm_momentum: of its running statistics.
  """

  placement: ClassVar[str] = 'sites'
  form: str = 'embedded_gaussian'
  ratio: float = 1 / 2
  divisor: int = 1
  scale: str = 'none'
  sub_sample: str = 'none'
  norm: bool = True
  norm_epsilon: float = 1e-5
  norm_momentum: float = 0.9
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b h w c']:
    errors.check_choice('form', self.form, FORMS)
    errors.check_choice('sub_sample', self.sub_sample, POOLS)
    batch, height, width, dim = x.shape
    if self.sub_sample != 'none' and min(height, width) < 2:
      raise ValueError(
        f'sub_sample={self.sub_sample!r} halves the map, which is {height}x{width} already: pass '
        "sub_sample='none' or larger images"
      )
    x = x.astype(self.dtype)
    inner = squeeze_excite.squeezed_dim(dim, self.ratio, self.divisor)

    def pooled(y: Float[Array, 'b h w d'], place: str) -> Float[Array, 'b p q d']:
      if self.sub_sample != place:
        return y
      return convolution.max_pool(y, window=2, stride=2)

    def tokens(y: Float[Array, 'b h w d']) -> Float[Array, 'b n d']:
      return y.reshape(batch, -1, y.shape[-1])

    def dense(dim: int, name: str, init: nn.initializers.Initializer = INIT) -> nn.Dense:
      return nn.Dense(
        dim, kernel_init=init, dtype=self.dtype, param_dtype=self.param_dtype, name=name
      )

    small = pooled(x, 'inputs')
    value = tokens(pooled(dense(inner, 'value')(small), 'outputs'))
    if self.form == 'gaussian':
      query, key = tokens(x), tokens(pooled(small, 'outputs'))
    else:
      query = tokens(dense(inner, 'query')(x))
      key = tokens(pooled(dense(inner, 'key')(small), 'outputs'))

    scale = non_local.scale_of(self.scale, query.shape[-1], dim)
    y = self._mix(query, key, value, scale).reshape(batch, height, width, inner)
    y = dense(dim, 'proj', INIT if self.norm else nn.initializers.zeros)(y)
    if self.norm:
      y = norms.BatchNorm(
        epsilon=self.norm_epsilon,
        momentum=self.norm_momentum,
        scale_init=nn.initializers.zeros,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name='norm',
      )(y, train=train)
    return x + y

  def _mix(
    self,
    query: Float[Array, 'b q d'],
    key: Float[Array, 'b k d'],
    value: Float[Array, 'b k e'],
    scale: float,
  ) -> Float[Array, 'b q e']:
    """Returns what each query gathers, and sows the map."""
    sow = self.is_mutable_collection('intermediates')
    if self.form == 'concatenation':
      half = (query.shape[-1],)
      # The kernel of w_f without a bias: its upper half is for queries, its lower for keys.
      of_query = self.param('query_score', INIT, (*half, 1), self.param_dtype)
      of_key = self.param('key_score', INIT, (*half, 1), self.param_dtype)
      weights = non_local.concatenation_weights(
        (query @ of_query.astype(self.dtype))[..., 0], (key @ of_key.astype(self.dtype))[..., 0]
      )
      mixed = non_local.mix(weights, value)
    elif self.form == 'dot_product':
      weights = non_local.dot_product_weights(query, key) if sow else None
      mixed = non_local.dot_product_mix(query, key, value)
    else:
      weights = non_local.softmax_weights(query, key, scale) if sow else None
      mixed = non_local.softmax_mix(query, key, value, scale)
    if sow:
      assert weights is not None
      self.sow('intermediates', 'attention', weights[:, None])
    return mixed


class SimplifiedNonLocal(nn.Module):
  """`x_i + W_v sum_j softmax_j(w_k x_j + b) x_j`: the same sum for every position (equation 4).

  `W_z` is dropped, and `W_v` moves out of the sum. The map `[b, 1, 1, keys]` is sown as
  `attention`. A fresh block is the identity.
  """

  placement: ClassVar[str] = 'sites'
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool = False) -> Float[Array, 'b h w c']:
    del train
    batch, _, _, dim = x.shape
    x = x.astype(self.dtype)
    tokens = x.reshape(batch, -1, dim)

    def dense(dim: int, init: nn.initializers.Initializer, use_bias: bool, name: str) -> nn.Dense:
      return nn.Dense(
        dim,
        use_bias=use_bias,
        kernel_init=init,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        name=name,
      )

    logits = dense(1, INIT, True, 'key')(tokens)[..., 0]
    weights = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)[:, None]
    if self.is_mutable_collection('intermediates'):
      self.sow('intermediates', 'attention', weights[:, None])
    pooled = non_local.mix(weights, tokens)
    y = dense(dim, nn.initializers.zeros, False, 'value')(pooled)
    return x + y[:, :, None]


MODULES = {'nl': NonLocal, 'snl': SimplifiedNonLocal}
