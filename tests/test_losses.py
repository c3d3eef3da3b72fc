"""Losses against their sums written out, at the logits where 16-bit arithmetic fails."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_attention.training import losses

pytestmark = pytest.mark.fast


def _data(classes: int = 7):
  rng = np.random.default_rng(0)
  logits = jnp.asarray(rng.normal(size=(5, classes)), jnp.float32) * 3
  return logits, jnp.asarray(rng.integers(0, classes, 5))


def test_softmax_is_the_log_likelihood():
  logits, labels = _data()
  got = losses.classification(logits, losses.smooth(labels, 7, 0.0, 'softmax'), 'softmax')
  z = np.asarray(logits, np.float64)
  expected = np.log(np.exp(z).sum(1)) - z[np.arange(5), np.asarray(labels)]
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_smoothing_mixes_with_the_uniform_distribution():
  targets = np.asarray(losses.smooth(jnp.array([2]), 4, 0.1, 'softmax'))
  np.testing.assert_allclose(targets, [[0.025, 0.025, 0.925, 0.025]], rtol=1e-6)


def test_sigmoid_sums_over_classes():
  logits, labels = _data()
  got = losses.classification(logits, losses.smooth(labels, 7, 0.0, 'sigmoid'), 'sigmoid')
  p = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
  hot = np.eye(7)[np.asarray(labels)]
  np.testing.assert_allclose(got, -(hot * np.log(p) + (1 - hot) * np.log(1 - p)).sum(1), rtol=1e-5)


@pytest.mark.parametrize('kind', losses.KINDS)
@pytest.mark.parametrize('size', [1e4, -1e4])
def test_large_logits_stay_finite(kind, size):
  logits = jnp.array([[size, 0.0, -size]])
  targets = losses.smooth(jnp.array([2]), 3, 0.1, kind)
  value, grads = jax.value_and_grad(lambda z: losses.classification(z, targets, kind).sum())(logits)
  assert np.isfinite(value)
  assert np.isfinite(grads).all()


@pytest.mark.parametrize('kind', losses.KINDS)
def test_bfloat16_logits_are_computed_in_float32(kind):
  logits, labels = _data(1000)
  targets = losses.smooth(labels, 1000, 0.1, kind)
  short = logits.astype(jnp.bfloat16)
  got = losses.classification(short, targets, kind)
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(
    got, losses.classification(short.astype(jnp.float32), targets, kind)
  )


def test_an_unknown_kind_is_refused():
  with pytest.raises(ValueError, match="did you mean 'softmax'"):
    losses.classification(jnp.zeros((1, 2)), jnp.zeros((1, 2)), 'softmx')
