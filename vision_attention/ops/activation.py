"""Activations by name. GELU has no default form: papers and ports disagree, and logits show it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vision_attention import errors

Activation = Callable[[jax.Array], jax.Array]


def gelu_tanh(x: jax.Array) -> jax.Array:
  """GELU by its tanh approximation (arXiv 1606.08415, section 2): the form of Google's code."""
  return jax.nn.gelu(x, approximate=True)


def gelu_exact(x: jax.Array) -> jax.Array:
  """GELU by the error function: PyTorch's default."""
  return jax.nn.gelu(x, approximate=False)


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
