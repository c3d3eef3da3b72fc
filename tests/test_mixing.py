"""Mixup and CutMix: an example is what its label says, with weights of the stated distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_attention.training import mixing

pytestmark = pytest.mark.fast
SIZE = 16


def _mixed(count=64, seed=0, **options):
  """Examples of one colour and class each, mixed; and how much each took of its partner."""
  options = {'mixup_alpha': 0.8, 'cutmix_alpha': 1.0, 'prob': 1.0, 'switch_prob': 0.5} | options
  images = jnp.broadcast_to(jnp.arange(count)[:, None, None, None] * 1.0, (count, SIZE, SIZE, 1))
  found, labels = mixing.mix(jax.random.key(seed), images, jnp.eye(count), **options)
  np.testing.assert_allclose(labels.sum(1), 1, rtol=1e-6)
  own, partner = labels[np.arange(count), np.arange(count)], labels[np.arange(count), ::-1]
  share = partner[np.arange(count), np.arange(count)]
  np.testing.assert_allclose(own + share, 1, rtol=1e-6)
  # The mean colour is that of the label, for a blend as for a rectangle.
  expected = own * np.arange(count) + share * np.arange(count)[::-1]
  np.testing.assert_allclose(found.mean((1, 2, 3)), expected, rtol=1e-4, atol=1e-4)
  flat = np.asarray(found).reshape(count, -1)
  is_cut = (
    np.isclose(flat, np.arange(count)[:, None]) | np.isclose(flat, np.arange(count)[::-1, None])
  ).all(1)
  return np.asarray(share), is_cut


@pytest.mark.parametrize('per', mixing.PER)
def test_what_is_drawn_once(per):
  for seed in range(4):
    share, is_cut = _mixed(per=per, seed=seed)
    assert (len(np.unique(share)) == 1) == (per == 'batch')
    assert (len(np.unique(is_cut)) == 1) == (per != 'example')


def test_the_chance_of_each_example():
  share, is_cut = _mixed(800, per='example', prob=0.7, switch_prob=0.25)
  mixed = share > 0
  # A rectangle may be empty, and then its image is as it was.
  assert abs(mixed.mean() - 0.7) < 0.06
  assert abs(is_cut[mixed].mean() - 0.25) < 0.06


def test_shares_are_of_their_distribution():
  share, _ = _mixed(1000, per='weight', cutmix_alpha=0.0)
  assert abs(share.mean() - 0.5) < 0.04
  assert abs(share.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.015  # of Beta(a, a)
  share, _ = _mixed(1000, per='weight', cutmix_alpha=0.0, draw='power')
  assert share.max() <= 0.5
  assert abs(share.mean() - 0.5 * 0.8 / 1.8) < 0.02  # of u ** (1 / a) / 2
  assert abs(np.quantile(2 * share, 0.5) - 0.5 ** (1 / 0.8)) < 0.05


def test_rectangles_have_the_drawn_area_but_at_the_border():
  key = jax.random.key(1)
  images = jnp.stack([jnp.zeros((64, 64, 1)), jnp.ones((64, 64, 1))] * 500)
  share = mixing.shares(key, 1.0, 1000, 'beta')
  found, visible = mixing.cutmix(key, images, share)
  taken = jnp.abs(found - images).mean((1, 2, 3))
  # The partner of an even place is an odd one: what differs is the rectangle.
  np.testing.assert_allclose(taken, visible, atol=1e-6)
  assert (visible <= share + 1e-6).all()
  # Half of the image on average, less what is cut off at the border: E[side] = 2/3 of each axis,
  # of which a centre chosen evenly leaves 1 - side / 4.
  sides = np.sqrt(np.random.default_rng(0).uniform(size=100_000))
  assert abs(taken.mean() - np.mean((sides * (1 - sides / 4)) ** 2)) < 0.03
