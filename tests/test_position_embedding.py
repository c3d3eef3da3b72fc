"""Fixed and learned tables of positions."""

import hypothesis
import jax
import numpy as np
import pytest
import scipy.ndimage
from hypothesis import strategies as st

from vision_attention.ops import position_embedding

pytestmark = pytest.mark.fast
SIDES = st.integers(2, 9)


def _table(height, width, dim=3):
  return np.random.default_rng(0).standard_normal((height, width, dim)).astype(np.float32)


def test_sincos_is_the_formula_at_every_point():
  height, width, dim = 3, 5, 16
  table = position_embedding.sincos2d(height, width, dim)
  assert table.shape == (height, width, dim)
  assert table.dtype == np.float32
  omega = [10_000 ** (-i / 3) for i in range(4)]
  for y in range(height):
    for x in range(width):
      expected = [f(p * w) for p in (x, y) for f in (np.sin, np.cos) for w in omega]
      np.testing.assert_allclose(table[y, x], expected, atol=1e-6)


@pytest.mark.parametrize('dim', [4, 18])
def test_sincos_refuses_widths_without_four_equal_parts(dim):
  with pytest.raises(ValueError, match=f'multiple of 4 and at least 8, not {dim}'):
    position_embedding.sincos2d(2, 2, dim)


@hypothesis.given(SIDES, SIDES, SIDES, SIDES)
def test_resize_is_scipys_zoom_of_order_one(height, width, new_height, new_width):
  table = _table(height, width)
  zoom = (new_height / height, new_width / width, 1)
  resized = position_embedding.resize(table, (new_height, new_width, 3))
  np.testing.assert_allclose(resized, scipy.ndimage.zoom(table, zoom, order=1), atol=1e-5)


@hypothesis.given(SIDES, SIDES, SIDES, SIDES)
def test_resize_keeps_the_corners_and_is_exact_at_the_same_size(
  height, width, new_height, new_width
):
  table = _table(height, width)
  resized = position_embedding.resize(table, (new_height, new_width, 3))
  assert resized.dtype == table.dtype
  np.testing.assert_allclose(
    resized[:: new_height - 1, :: new_width - 1], table[:: height - 1, :: width - 1], rtol=1e-6
  )
  np.testing.assert_array_equal(position_embedding.resize(table, table.shape), table)


def test_resize_is_not_the_one_with_half_pixel_centres():
  table = _table(4, 4)
  other = jax.image.resize(table, (7, 7, 3), 'bilinear')
  assert np.abs(position_embedding.resize(table, (7, 7, 3)) - other).max() > 0.1


def test_a_single_position_fills_any_grid():
  table = _table(1, 1)
  resized = position_embedding.resize(table, (3, 2, 3))
  np.testing.assert_array_equal(resized, np.broadcast_to(table, (3, 2, 3)))
