"""The maximum whose gradient goes to one place, and the sum with what all examples share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vision_attention.ops import reduction

pytestmark = [pytest.mark.fast, pytest.mark.optimized]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8))
def test_the_first_of_equals_gets_the_gradient(values):
  x = jnp.asarray(values, jnp.float32)
  y, grad = jax.value_and_grad(lambda x: 2 * reduction.first_max(x, 0))(x)
  assert y == 2 * max(values)
  np.testing.assert_array_equal(grad, 2.0 * (np.arange(len(values)) == values.index(max(values))))


@pytest.mark.parametrize('axis', [0, 1, 2, -1])
def test_without_equals_it_is_the_maximum(axis):
  x = jax.random.normal(jax.random.key(0), (3, 4, 5))
  pull = jax.random.normal(jax.random.key(1), x.max(axis).shape)
  value, grad = jax.value_and_grad(lambda x: (pull * reduction.first_max(x, axis)).sum())(x)
  expected, expected_grad = jax.value_and_grad(lambda x: (pull * x.max(axis)).sum())(x)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  np.testing.assert_allclose(grad, expected_grad, rtol=1e-6)


@pytest.mark.parametrize('examples', [1, 3, 300])  # the last one in the plain form
@pytest.mark.parametrize('shape', [(2, 5), (1, 5), (5,)])
def test_what_is_shared_gets_the_sum_over_examples(examples, shape):
  x = jax.random.normal(jax.random.key(0), (examples, 2, 5))
  shared = jax.random.normal(jax.random.key(1), shape)
  pull = jax.random.normal(jax.random.key(2), x.shape)

  def both(add):
    return jax.value_and_grad(lambda x, shared: (pull * add(x, shared) ** 2).sum(), (0, 1))(
      x, shared
    )

  value, grads = both(reduction.add_shared)
  expected, expected_grads = both(jnp.add)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for grad, wanted in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(grad, wanted, rtol=1e-4, atol=1e-4)
