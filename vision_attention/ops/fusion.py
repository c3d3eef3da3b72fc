"""Where XLA's CPU compiler must not join two parts of a program.

It takes the sums of a depthwise convolution into the norm that follows, and then writes every one
of their terms to memory, or computes them again for every reader; and it takes a norm or a bias
into a matrix product, and then writes the bias out for every row. `lax.optimization_barrier` does
not keep it from that: it is gone before fusion. On accelerators nothing here changes a program.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from vision_attention.ops import convolution_cpu


def _settled(x: jax.Array) -> jax.Array:
  """A comparison with itself: the identity, also for what is not a number."""
  return jnp.where(x == x, x, jnp.full_like(x, jnp.nan))


@jax.custom_vjp
def fence(x: jax.Array) -> jax.Array:
  """Returns `x`, and its gradient, through an operation at which the CPU's fusions of norms end."""
  return lax.platform_dependent(x, cpu=_settled, default=lambda x: x)


fence.defvjp(lambda x: (fence(x), None), lambda _, g: (fence(g),))


def _plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
  return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  # Only the value: the gradient is read by that of a bias as well, and would be copied.
  return lax.platform_dependent(
    x, kernel, cpu=lambda *args: _settled(_plain(*args)), default=_plain
  )


def _product_fwd(x: jax.Array, kernel: jax.Array) -> tuple[Any, Any]:
  return _product(x, kernel), (x, kernel)


def _product_bwd(saved: Any, g: jax.Array) -> Any:
  def on_cpu(x: jax.Array, kernel: jax.Array, g: jax.Array) -> Any:
    # Left to itself, XLA copies the activations to multiply them the other way around.
    dx = lax.dot_general(g, kernel, (((g.ndim - 1,), (1,)), ((), ())))
    flat = [a.reshape(-1, a.shape[-1]) for a in (x, g)]
    return dx, convolution_cpu.tall_product(*flat).astype(kernel.dtype)

  def default(x: jax.Array, kernel: jax.Array, g: jax.Array) -> Any:
    return jax.vjp(_plain, x, kernel)[1](g)

  return lax.platform_dependent(*saved, g, cpu=on_cpu, default=default)


_product.defvjp(_product_fwd, _product_bwd)


# Traced once per shape, however many layers have it.
@jax.jit
def _dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
  return _product(fence(x), kernel)


def dot_general(lhs: jax.Array, rhs: jax.Array, dimensions: Any, **options: Any) -> jax.Array:
  """`lax.dot_general` of a dense layer, for `nn.Dense(dot_general=...)`.

  On a CPU the product takes in neither what makes `lhs` nor what is added to it, and its gradients
  are products of the arrays as they lie. Other products than those of a dense layer are XLA's.
  """
  dense = (((lhs.ndim - 1,), (0,)), ((), ()))
  if dimensions != dense or any(value is not None for value in options.values()):
    return lax.dot_general(lhs, rhs, dimensions, **options)
  return _dense(lhs, rhs)
