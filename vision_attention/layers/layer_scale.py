"""A learned factor per channel at the end of a residual branch (arXiv 2103.17239, section 2)."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class LayerScale(nn.Module):
  """Multiplies the last axis by learned factors that begin at `init`."""

  init_value: float
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, '*b c']) -> Float[Array, '*b c']:
    init = nn.initializers.constant(self.init_value)
    scale = self.param('scale', init, (x.shape[-1],), self.param_dtype)
    return x * scale.astype(self.dtype)


def define(init_value: float | None, **types: Any) -> Callable[..., nn.Module] | None:
  """Returns what makes the layer, called with a name; None where there is no factor."""
  return None if init_value is None else functools.partial(LayerScale, init_value, **types)
