"""Heads: from a backbone's features to logits."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

ModuleDef = Callable[..., nn.Module]


class LinearHead(nn.Module):
  """`pool -> norm -> Dense + tanh -> dropout -> Dense`, of which all but the last are optional.

  Attributes:
    num_classes: outputs; 0 leaves the last layer out and gives what it would have seen.
    feature: name of the feature that is pooled.
    pool: `gap` (mean over all positions), `none` (the feature is `[b, c]` already), or a module
      from the feature to `[b, c]`.
    norm: a normalisation after pooling, or None.
    hidden_dim: width of the `Dense + tanh` before the classifier, or 0 for none.
    dropout: rate before the classifier.
  """

  num_classes: int
  feature: str
  pool: str | ModuleDef = 'gap'
  norm: ModuleDef | None = None
  hidden_dim: int = 0
  dropout: float = 0.0
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  bias_init: nn.initializers.Initializer = nn.initializers.zeros
  hidden_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, features: Mapping[str, Float[Array, 'b ...']], *, train: bool
  ) -> Float[Array, 'b k']:
    x = features[self.feature]
    if self.pool == 'gap':
      x = x.astype(jnp.float32).mean(tuple(range(1, x.ndim - 1))).astype(self.dtype)
    elif callable(self.pool):
      x = self.pool(name='pool')(x, train=train)
    elif self.pool != 'none':
      raise ValueError(f'pool {self.pool!r} is unknown: allowed are gap, none or a module')
    if not callable(self.pool) and self.has_variable('params', 'pool'):
      raise ValueError(
        'the variables have a pooling layer that this model lacks: '
        "create it with their pooling, for example pool='map'"
      )
    if self.norm is not None:
      x = self.norm(name='norm')(x, train=train)
    if self.hidden_dim:
      hidden = nn.Dense(
        self.hidden_dim,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        kernel_init=self.hidden_init,
        name='pre_logits',
      )
      x = jnp.tanh(hidden(x))
    elif self.has_variable('params', 'pre_logits'):
      raise ValueError(
        'the variables have a layer before the classifier that this model lacks: '
        'create it with pre_logits=True'
      )
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    if not self.num_classes:
      return x.astype(jnp.float32)
    logits = nn.Dense(
      self.num_classes,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      kernel_init=self.kernel_init,
      bias_init=self.bias_init,
      name='classifier',
    )(x)
    return logits.astype(jnp.float32)
