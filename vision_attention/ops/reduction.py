"""Reductions whose gradient neither waits for a compiler nor depends on how it rounds."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def first_max(x: Float[Array, '...'], axis: int) -> Any:
  """Returns the maximum along an axis; its gradient goes to the first place that attains it.

  The gradient of `jnp.max` compares the input with the result and divides by the number of places
  that are equal: none, where a fused program has computed the input twice and rounded otherwise,
  and then it is not a number.
  """
  return _first_max(x, axis % x.ndim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _first_max(x: jax.Array, axis: int) -> jax.Array:
  return x.max(axis)


def _forward(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
  return x.max(axis), x


def _backward(axis: int, x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
  first = jnp.argmax(x, axis, keepdims=True)
  here = lax.broadcasted_iota(first.dtype, x.shape, axis) == first
  return (jnp.where(here, jnp.expand_dims(g, axis), 0).astype(x.dtype),)


_first_max.defvjp(_forward, _backward)


# On a CPU XLA's sum of a few long rows takes fifteen times as long as their product with ones.
_FEW = 256


@jax.custom_vjp
def add_shared(x: Float[Array, 'b *s'], shared: Float[Array, '*t']) -> Float[Array, 'b *s']:
  """Returns `x + shared`, where all examples of `x` share one array, such as a table of biases.

  The sum is that of broadcasting. Its gradient, a sum over examples, has a form of its own on CPU.
  """
  return x + shared


def _add_forward(x: jax.Array, shared: jax.Array) -> tuple[jax.Array, jax.Array]:
  return x + shared, shared


def _add_backward(shared: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
  examples = len(g)

  def by_product(g: jax.Array) -> jax.Array:
    # Eight equal rows: the product of a vector and a matrix would be a loop, too.
    rows = jnp.ones((8, examples), g.dtype) @ g.reshape(examples, -1)
    return rows[0].reshape(g.shape[1:])

  on_cpu = by_product if examples <= _FEW else lambda g: g.sum(0)
  total = lax.platform_dependent(g, cpu=on_cpu, default=lambda g: g.sum(0))
  shape = (1,) * (total.ndim - shared.ndim) + shared.shape
  axes = [i for i, size in enumerate(shape) if size == 1 != total.shape[i]]
  return g, total.sum(axes, keepdims=True).reshape(shared.shape).astype(shared.dtype)


add_shared.defvjp(_add_forward, _add_backward)
