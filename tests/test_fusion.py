"""Fences on CPU: values and gradients are those of the plain operations, programs are not."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from vision_attention.layers import conv
from vision_attention.ops import activation, fusion


def test_a_fence_changes_nothing():
  x = jnp.array([0.0, -1.5, jnp.inf, -jnp.inf, jnp.nan])
  np.testing.assert_array_equal(fusion.fence(x), x)
  np.testing.assert_array_equal(jax.grad(lambda x: (fusion.fence(x) ** 2).sum())(x[:2]), 2 * x[:2])


@pytest.mark.parametrize('shape', [(5, 7), (2, 3, 4, 7), (16_384, 7)])
def test_products_and_their_gradients_are_those_of_a_dense_layer(shape):
  rng = np.random.default_rng(0)
  x, kernel, g = (
    jnp.asarray(rng.standard_normal(s), jnp.float32) for s in (shape, (7, 3), (*shape[:-1], 3))
  )
  dimensions = (((x.ndim - 1,), (0,)), ((), ()))

  def both(product):
    def run(x, kernel):
      y, pull = jax.vjp(lambda x, kernel: product(x, kernel, dimensions, precision=None), x, kernel)
      return y, pull(g)

    return jax.tree.leaves(jax.jit(run)(x, kernel))

  for mine, expected in zip(both(fusion.dot_general), both(jax.lax.dot_general), strict=True):
    np.testing.assert_allclose(mine, expected, atol=1e-5 * np.abs(expected).max())


def test_other_products_than_those_of_a_dense_layer_are_left_alone():
  x, y = jnp.ones((2, 3, 4)), jnp.ones((2, 4, 5))
  dimensions = (((2,), (1,)), ((0,), (0,)))
  np.testing.assert_array_equal(fusion.dot_general(x, y, dimensions), jnp.full((2, 3, 5), 4.0))


def test_exact_gelu_is_the_normal_distribution_in_every_type():
  x = np.linspace(-6, 6, 97, dtype=np.float32)
  cdf = special.ndtr(x.astype(np.float64))
  slope = cdf + x * np.exp(-0.5 * x.astype(np.float64) ** 2) / np.sqrt(2 * np.pi)
  np.testing.assert_allclose(activation.gelu_exact(jnp.asarray(x)), x * cdf, atol=1e-6)
  np.testing.assert_allclose(jax.vmap(jax.grad(activation.gelu_exact))(x), slope, atol=1e-6)
  half = jnp.asarray(x, jnp.bfloat16)
  y = activation.gelu_exact(half)
  assert y.dtype == jnp.bfloat16
  expected = np.asarray(half, np.float64) * special.ndtr(np.asarray(half, np.float64))
  np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.optimized
@pytest.mark.parametrize(('side', 'dim'), [(56, 96), (14, 384)])
def test_a_depthwise_convolution_is_computed_once_for_the_norm_behind_it(side, dim):
  """By the program: its 49 products stand in one place, and no term is written out."""
  jax.config.update('jax_disable_most_optimizations', False)
  layer = conv.Conv(dim, 7, groups=dim, padding='symmetric', use_bias=True)
  x = jax.ShapeDtypeStruct((8, side, side, dim), jnp.float32)
  params = jax.eval_shape(layer.init, jax.random.key(0), x)

  def norm(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)

  @jax.jit
  def run(params, x):
    return norm(layer.apply(params, x))

  text = run.lower(params, x).compile().as_text()
  products = rf'f32\[8,{side},{side},{dim}\]\S* multiply\('
  counts = [len(re.findall(products, body)) for body in text.split('\n\n')]
  assert max(counts) >= 49
  assert sum(counts) < 60
