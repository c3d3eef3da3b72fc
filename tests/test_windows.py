"""Windows against their definition, pixel by pixel; tables against PyTorch's interpolation."""

import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from vision_attention.ops import bicubic, relative_position, windows

pytestmark = pytest.mark.fast
SIDES = st.integers(1, 9)
WINDOWS = st.integers(1, 5)


def _map(height, width, dim=3, batch=2):
  shape = (batch, height, width, dim)
  return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


@hypothesis.given(st.integers(1, 3), st.integers(1, 3), WINDOWS, WINDOWS)
def test_partition_and_grid_have_inverses(rows, columns, height, width):
  size, window = (rows * height, columns * width), (height, width)
  x = _map(*size)
  for cut, undo in (
    (windows.partition, windows.merge),
    (windows.grid_partition, windows.grid_merge),
  ):
    parts = jax.jit(cut, static_argnums=1)(x, window)
    assert parts.shape == (2, rows * columns, height * width, 3)
    np.testing.assert_array_equal(jax.jit(undo, static_argnums=(1, 2))(parts, window, size), x)


def test_partition_is_row_by_row_and_a_grid_spans_the_map():
  x = jnp.arange(24.0).reshape(1, 4, 6, 1)
  np.testing.assert_array_equal(windows.partition(x, (2, 3))[0, 1, :, 0], [3, 4, 5, 9, 10, 11])
  np.testing.assert_array_equal(windows.partition(x, (2, 3))[0, 2, 0, 0], 12)
  # Cells of 2x2: the second lattice has the upper right pixel of each.
  np.testing.assert_array_equal(
    windows.grid_partition(x, (2, 3))[0, 1, :, 0], [1, 3, 5, 13, 15, 17]
  )
  # As large as the map, both are the whole map.
  np.testing.assert_array_equal(windows.partition(x, (4, 6)), windows.grid_partition(x, (4, 6)))


@hypothesis.given(SIDES, SIDES, WINDOWS, st.data(), st.sampled_from(windows.PADDINGS))
def test_join_undoes_split_at_any_size(height, width, window, data, padding):
  shift = data.draw(st.integers(0, window - 1))
  tiling = windows.tile((height, width), window, shift, padding=padding)
  x = _map(height, width)
  back = jax.jit(lambda x: windows.join(windows.split(x, tiling), tiling))(x)
  np.testing.assert_array_equal(back, x)


# One program compiles sooner than its operations one by one.
@functools.partial(jax.jit, static_argnums=1)
def _attend(x, tiling, bias=None):
  cut = windows.split(x, tiling)[:, :, :, None]
  logits = windows.window_logits(cut, 0.5 * cut, bias, windows.visible(tiling))
  return windows.join(windows.window_attention(logits, cut)[:, :, :, 0], tiling)


def _by_definition(x, window, shift, table):
  """Attention of every pixel to those of its window, `floor((i - shift) / window)` per axis."""
  x = np.asarray(x)
  height, width = x.shape[1:3]
  of = lambda i, axis: (i - shift[axis]) // window[axis]
  out = np.zeros_like(x)
  for i, j in itertools.product(range(height), range(width)):
    near = [
      (p, q)
      for p, q in itertools.product(range(height), range(width))
      if (of(i, 0), of(j, 1)) == (of(p, 0), of(q, 1))
    ]
    rows, columns = np.array(near).T
    keys = x[:, rows, columns]
    logits = 0.5 * x.shape[-1] ** -0.5 * np.einsum('bc,bkc->bk', x[:, i, j], keys)
    logits = logits + table[0, i - rows + window[0] - 1, j - columns + window[1] - 1]
    weights = np.exp(logits)
    out[:, i, j] = np.einsum('bk,bkc->bc', weights / weights.sum(-1, keepdims=True), keys)
  return out


@hypothesis.given(SIDES, SIDES, WINDOWS, WINDOWS, st.data())
def test_attention_is_the_definition_at_any_size(height, width, rows, columns, data):
  """Windows that stick out of the map see what lies inside, and only that."""
  shift = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
  tiling = windows.tile((height, width), (rows, columns), shift)
  (rows, columns), x = tiling.window, _map(height, width)
  table = np.random.default_rng(1).standard_normal((1, 2 * rows - 1, 2 * columns - 1))
  bias = relative_position.relative_bias(jnp.asarray(table, jnp.float32), rows, columns)
  got = _attend(x, tiling, bias)
  np.testing.assert_allclose(got, _by_definition(x, tiling.window, tiling.shift, table), atol=1e-5)


def test_no_gradient_comes_from_what_a_query_does_not_see():
  tiling = windows.tile((5, 7), 3, 1)
  x = jnp.asarray(_map(5, 7))
  grad = jax.jit(jax.grad(lambda x: _attend(x, tiling)[:, 0, 0].sum()))(x)
  # With a shift of one, the first window is one pixel.
  assert np.flatnonzero(np.abs(np.asarray(grad)).sum((0, 3))).tolist() == [0]


def test_a_shifted_map_has_four_kinds_of_windows():
  mask = np.asarray(windows.visible(windows.tile((12, 16), 4, 2)))
  kinds = {m.tobytes() for m in mask}
  assert len(kinds) == 4  # interior, right, bottom, corner
  inside = mask.reshape(3, 4, 16, 16)[:-1, :-1]
  assert inside.all()
  assert not mask.reshape(3, 4, 16, 16)[-1, -1].all()
  assert windows.visible(windows.tile((12, 16), 4)) is None


def test_masks_are_those_of_three_strips_per_axis():
  """Swin's own code labels strips of the rolled map, [0, h - m), [h - m, h - s), [h - s, h)."""
  size, window, shift = (12, 8), 4, 1
  strips = [np.digitize(np.arange(side), [side - window, side - shift]) for side in size]
  both = (3 * strips[0][:, None] + strips[1])[None, :, :, None]
  marks = np.asarray(windows.partition(jnp.asarray(both, jnp.float32), window))[0, :, :, 0]
  expected = marks[:, :, None] == marks[:, None, :]
  np.testing.assert_array_equal(windows.visible(windows.tile(size, window, shift)), expected)


@pytest.mark.parametrize('padding', ['attend', 'attend_late'])
def test_zero_pixels_may_be_keys(padding):
  x = _map(3, 5)
  tiling = windows.tile((3, 5), 3, padding=padding)
  assert windows.visible(tiling) is None
  got = _attend(x, tiling)
  whole = jnp.pad(x, ((0, 0), (0, 0), (0, 1), (0, 0)))
  np.testing.assert_allclose(got, _attend(whole, windows.tile((3, 6), 3))[:, :, :5], atol=1e-6)


def test_windows_shrink_to_the_map():
  tile = lambda size, **more: windows.tile(size, 7, 3, **more)[1:3]
  assert tile((14, 14)) == ((7, 7), (3, 3))
  assert tile((7, 7)) == ((7, 7), (0, 0))
  assert tile((4, 5)) == ((4, 5), (0, 0))
  assert tile((7, 14)) == ((7, 7), (0, 3))
  assert tile((7, 14), fit='square') == ((7, 7), (0, 0))
  assert tile((4, 8), fit='square') == ((4, 4), (0, 0))


def test_impossible_windows_are_refused():
  with pytest.raises(ValueError, match='nearest sides are 7 and 14'):
    windows.partition(_map(8, 7), 7)
  with pytest.raises(
    ValueError, match=r'shift \(4, 4\) must lie between 0 and the window \(4, 4\)'
  ):
    windows.tile((8, 8), 4, 4)
  with pytest.raises(ValueError, match="fit 'squares' is unknown: did you mean 'square'"):
    windows.tile((8, 8), 4, fit='squares')
  with pytest.raises(ValueError, match='at least one pixel'):
    windows.tile((8, 8), 0)


def test_bicubic_is_that_of_pytorch():
  """`torch.nn.functional.interpolate(table, (5, 4), mode='bicubic')`."""
  table = np.array([[(3 * i + j) ** 2 % 7 for j in range(5)] for i in range(3)], np.float32)
  expected = [
    [-0.10922, 2.26557, 2.97564, 2.16245],
    [0.89195, 2.76022, 2.62383, 1.08410],
    [1.97949, 2.91846, 2.32275, 0.07373],
    [1.44703, 1.20753, 2.81955, 1.26212],
    [0.78021, -0.22237, 3.28925, 2.44768],
  ]
  np.testing.assert_allclose(bicubic.resize(table[None], (1, 5, 4))[0], expected, atol=1e-5)


def test_bicubic_keeps_constants_and_sizes():
  matrix = bicubic.matrix(13, 23)
  np.testing.assert_allclose(matrix.sum(1), 1)
  np.testing.assert_allclose(bicubic.matrix(9, 9), np.eye(9), atol=1e-12)
  np.testing.assert_allclose(matrix[::-1, ::-1], matrix, atol=1e-12)
