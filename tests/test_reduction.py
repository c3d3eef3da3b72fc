"""The maximum whose gradient goes to one place."""

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
