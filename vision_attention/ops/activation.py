"""Activations by name. GELU has no default form: papers and ports disagree, and logits show it."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vision_attention import errors

Activation = Callable[[jax.Array], jax.Array]


def gelu_tanh(x: jax.Array) -> jax.Array:
  """GELU by its tanh approximation (arXiv 1606.08415, section 2): the form of Google's code."""
  return jax.nn.gelu(x, approximate=True)


@jax.custom_jvp
def gelu_exact(x: jax.Array) -> jax.Array:
  """GELU by the error function, in float32: PyTorch's default, and its form.

  JAX's own takes `erfc`, which keeps digits of values near zero that nothing here needs, at several
  times the cost.
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return (wide * _normal_cdf(wide)).astype(x.dtype)


def _normal_cdf(x: jax.Array) -> jax.Array:
  return 0.5 * (1 + jax.lax.erf(x * np.asarray(math.sqrt(0.5), x.dtype)))


@gelu_exact.defjvp
def _gelu_exact_jvp(primals: Any, tangents: Any) -> Any:
  """One array is kept for the gradient."""
  (x,), (t,) = primals, tangents
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  density = jnp.exp(-0.5 * wide * wide) * np.asarray((2 * math.pi) ** -0.5, wide.dtype)
  slope = _normal_cdf(wide) + wide * density
  return gelu_exact(x), t * slope.astype(x.dtype)


def quick_gelu(x: jax.Array) -> jax.Array:
  """`x sigmoid(1.702 x)` (arXiv 1606.08415, section 2): the form of CLIP."""
  return x * jax.nn.sigmoid(1.702 * x)


_BY_NAME: dict[str, Activation] = {
  'relu': jax.nn.relu,
  'relu6': jax.nn.relu6,
  'leaky_relu': jax.nn.leaky_relu,
  'silu': jax.nn.silu,
  'hard_swish': jax.nn.hard_swish,
  'hard_sigmoid': jax.nn.hard_sigmoid,
  'sigmoid': jax.nn.sigmoid,
  'tanh': jnp.tanh,
  'gelu_tanh': gelu_tanh,
  'gelu_exact': gelu_exact,
  'quick_gelu': quick_gelu,
  'identity': lambda x: x,
}


def by_name(name: str) -> Activation:
  """Returns the activation called `name`; ValueError names the nearest one."""
  errors.check_choice('activation', name, _BY_NAME)
  return _BY_NAME[name]
