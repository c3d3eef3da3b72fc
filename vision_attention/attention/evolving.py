"""Evolving attention (arXiv 2102.12895): a layer's logits go on from those of the layer before.

The logits of all heads are an image of queries by keys. A layer mixes its own with the previous
layer's, convolves them, and hands the result on. The paper calls `alpha` what the released code
calls `beta`, and the other way round; the names here are the code's.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from vision_attention import errors
from vision_attention.attention import augmented
from vision_attention.ops import activation, convolution

# What the 3x3 taps of query i and key j see, as rows and columns before and after.
SUPPORTS = {
  'full': ((1, 1), (1, 1)),
  'decoder': ((2, 0), (2, 0)),
  'cross': ((2, 0), (1, 1)),
}
# Finite: a row without a key gives no NaN, and a share of it can be taken.
MASKED = -1e30


def identity_kernel(
  key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32, *, support: str = 'full'
) -> Float[Array, '3 3 n n']:
  """Initialises the convolution so that every head keeps its own logits."""
  del key
  (top, _), (left, _) = SUPPORTS[support]
  return jnp.zeros(shape, dtype).at[top, left].set(jnp.eye(shape[-1], dtype=dtype))


class EvolvingLogits(nn.Module):
  """`z = alpha act(conv(m)) + (1 - alpha) m` with `m = (1 - beta) logits + beta previous`.

  Without logits of a previous layer of the same shape, `z` is the layer's own. The convolution is
  3x3 over queries and keys, from all heads to all heads. It runs in float32.

  Attributes:
    alpha: share of the convolution; there is none at 0.
    beta: share of the previous layer's logits.
    activation: a name of `ops.activation`, after the convolution.
    support: `full`; `decoder`, for which a query sees earlier queries and earlier keys only, so
      that no output depends on a later token at any depth; or `cross`, attention of a decoder to an
      encoder: earlier queries, any key.
  """

  alpha: float = 1.0
  beta: float = 0.5
  activation: str = 'relu'
  support: str = 'full'
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    logits: Float[Array, 'b n q k'],
    previous: Float[Array, 'b m p l'] | None = None,
    *,
    mask: Bool[Array, '#b #q #k'] | None = None,
  ) -> Float[Array, 'b n q k']:
    """Returns the logits for this layer's softmax and for the next layer.

    Args:
      logits: of this layer.
      previous: what this returned in the layer before, or None.
      mask: pairs of query and key that there are: False for padding. Masked logits are zero where
        the convolution sees them, and a large negative number in the result. `decoder` masks
        later keys by itself.
    """
    errors.check_choice('support', self.support, SUPPORTS)
    heads, queries, keys = logits.shape[1:]
    if self.support == 'decoder':
      if queries != keys:
        raise ValueError(f'a decoder has as many queries as keys, not {queries} and {keys}')
      causal = jnp.tril(jnp.ones((1, queries, keys), bool))
      mask = causal if mask is None else mask & causal
    allowed = None if mask is None else mask[:, None]
    logits = logits.astype(jnp.float32)
    if previous is not None and previous.shape == logits.shape:
      mixed = (1 - self.beta) * logits + self.beta * previous
      if allowed is not None:
        mixed = jnp.where(allowed, mixed, 0.0)
      logits = mixed
      if self.alpha:
        convolved = activation.by_name(self.activation)(self._convolve(mixed, heads))
        logits = self.alpha * convolved + (1 - self.alpha) * mixed
    return logits if allowed is None else jnp.where(allowed, logits, MASKED)

  def _convolve(self, x: Float[Array, 'b n q k'], heads: int) -> Float[Array, 'b n q k']:
    kernel = self.param('kernel', self.kernel_init, (3, 3, heads, heads), self.param_dtype)
    bias = self.param('bias', nn.initializers.zeros, (heads,), self.param_dtype)
    kernel = jnp.asarray(kernel, jnp.float32)
    padding = SUPPORTS[self.support]
    y = convolution.conv(x.transpose(0, 2, 3, 1), kernel, padding=padding)
    return (y + jnp.asarray(bias, jnp.float32)).transpose(0, 3, 1, 2)


class EvolvingConv(augmented.Augmentation):
  """An augmented convolution whose attention evolves from the previous block's.

  Attributes:
    alpha: see `EvolvingLogits`.
    beta: see `EvolvingLogits`.
  """

  kappa: float = 0.25
  upsilon: float = 0.125
  min_head_dim: int = 1
  alpha: float = 1.0
  beta: float = 0.5

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b h w c'], previous: Float[Array, 'b m i j'] | None, *, train: bool
  ) -> tuple[Float[Array, 'b p q d'], Float[Array, 'b n s t'] | None]:
    """Returns the map and the logits for the next block."""

    def evolve(logits: Float[Array, 'b n s t']) -> Float[Array, 'b n s t']:
      evolving = EvolvingLogits(self.alpha, self.beta, param_dtype=self.param_dtype, name='evolve')
      return evolving(logits, previous)

    return self.augment(x, train, evolve)
