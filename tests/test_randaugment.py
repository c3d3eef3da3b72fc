"""RandAugment's operations against their definitions: PIL's results, or formulas on arrays."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from vision_attention.data import preprocessing, randaugment, tpu_randaugment

pytestmark = pytest.mark.fast


class _Fixed:
  """Stands in for a generator: one number for every sign, bilinear, given places."""

  def __init__(self, number=0.5, places=()):
    self._number, self._places = number, list(places)

  def random(self):
    return self._number

  def integers(self, high, size=None):
    return self._places.pop(0) if self._places else 0


def _image(height=24, width=32, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


MEAN = (124, 116, 104)  # round(255 * mean), as timm fills
PIL_FORM = {
  'autocontrast': lambda i: ImageOps.autocontrast(i),
  'equalize': lambda i: ImageOps.equalize(i),
  'invert': lambda i: ImageOps.invert(i),
  'posterize': lambda i: ImageOps.posterize(i, 2),
  'solarize': lambda i: ImageOps.solarize(i, 153),
  'color': lambda i: ImageEnhance.Color(i).enhance(1.18),
  'contrast': lambda i: ImageEnhance.Contrast(i).enhance(1.18),
  'brightness': lambda i: ImageEnhance.Brightness(i).enhance(1.18),
  'sharpness': lambda i: ImageEnhance.Sharpness(i).enhance(1.18),
  'rotate': lambda i: i.rotate(18, Image.Resampling.BILINEAR, fillcolor=MEAN),
  'shear_x': lambda i: _affine(i, (1, 0.18, 0, 0, 1, 0)),
  'shear_y': lambda i: _affine(i, (1, 0, 0, 0.18, 1, 0)),
  'translate_x': lambda i: _affine(i, (1, 0, 0.27 * 32, 0, 1, 0)),
  'translate_y': lambda i: _affine(i, (1, 0, 0, 0, 1, 0.27 * 24)),
}


def _affine(image, matrix):
  return image.transform(
    image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=MEAN
  )


@pytest.mark.parametrize('name', PIL_FORM)
def test_timms_form_is_pils_result_at_magnitude_6(name):
  image = Image.fromarray(_image())
  found = randaugment.apply(image, name, 6, _fixed(), increasing=False)
  np.testing.assert_array_equal(np.asarray(found), np.asarray(PIL_FORM[name](image)))


def test_moves_take_the_crops_filter_and_the_color_of_the_recipe():
  image = Image.fromarray(_image())
  found = randaugment.apply(
    image, 'rotate', 6, _fixed(), False, fill=(1, 2, 3), interpolation='bicubic'
  )
  expected = image.rotate(18, Image.Resampling.BICUBIC, fillcolor=(1, 2, 3))
  np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
  with pytest.raises(ValueError, match=r"interpolation 'cubic' is unknown: did you mean 'bicubic'"):
    preprocessing.parse('rand_augment(2, 9, interpolation="cubic")')


@pytest.mark.parametrize(
  ('name', 'expected'),
  [
    ('posterize', lambda i: ImageOps.posterize(i, 2)),  # 4 - int(2.4) bits
    ('solarize', lambda i: ImageOps.solarize(i, 256 - 153)),
    ('color', lambda i: ImageEnhance.Color(i).enhance(1.54)),
    ('sharpness', lambda i: ImageEnhance.Sharpness(i).enhance(1.54)),
  ],
)
def test_the_increasing_form_at_magnitude_6(name, expected):
  image = Image.fromarray(_image())
  found = randaugment.apply(image, name, 6, _fixed(), increasing=True)
  np.testing.assert_array_equal(np.asarray(found), np.asarray(expected(image)))


def _fixed(number=0.5, places=()) -> Any:
  return _Fixed(number, places)


def _tpu(name, x, magnitude, places=()):
  return tpu_randaugment.OPERATIONS[name](x, magnitude / 10, _fixed(places=places))


def test_the_tpu_form_has_sixteen_operations_that_leave_the_input_alone():
  assert len(tpu_randaugment.OPERATIONS) == 16
  for name in tpu_randaugment.OPERATIONS:
    x = _image()
    found = _tpu(name, x, 15, places=[3, 4])
    assert (found.shape, found.dtype) == (x.shape, np.uint8), name
    np.testing.assert_array_equal(x, _image(), err_msg=name)


@pytest.mark.parametrize('name', ['posterize', 'solarize', 'brightness', 'invert'])
def test_operations_on_values_are_pils_where_both_are_defined(name):
  image = Image.fromarray(_image())
  found = _tpu(name, np.asarray(image), 6)
  np.testing.assert_array_equal(found, np.asarray(PIL_FORM[name](image)))


def test_magnitudes_beyond_ten_go_on():
  x = _image()
  np.testing.assert_array_equal(_tpu('posterize', x, 15), x & 0b11111100)  # 6 bits
  np.testing.assert_array_equal(_tpu('solarize', x, 15), x)  # no value is above 384
  np.testing.assert_array_equal(
    _tpu('solarize_add', x, 15), np.where(x < 128, np.minimum(x.astype(int) + 165, 255), x)
  )
  bright = np.minimum(x.astype(np.float32) * np.float32(1.8 * 1.5 + 0.1), 255).astype(np.uint8)
  np.testing.assert_array_equal(_tpu('brightness', x, 15), bright)


def test_contrast_keeps_the_constant_of_the_code():
  """Not the mean grey value: the number of pixels / 256, at most 255."""
  x = _image(24, 32)
  expected = np.clip(3 + 1.18 * (x.astype(float) - 3), 0, 255)
  assert np.abs(_tpu('contrast', x, 6) - expected).max() <= 1
  large = np.full((256, 320, 3), 100, np.uint8)
  assert (_tpu('contrast', large, 5) == 100).all()  # a factor of one
  assert (_tpu('contrast', large, 0) == int(255 + 0.1 * (100 - 255))).all()


def test_color_and_sharpness_blend_with_grey_and_smooth():
  x = _image()
  grey = np.trunc(x @ np.array([0.2989, 0.587, 0.114]))[..., None]
  assert np.abs(_tpu('color', x, 6) - np.clip(grey + 1.18 * (x - grey), 0, 255)).max() <= 1
  smooth = x.astype(float)
  kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
  for i in range(1, 23):
    for j in range(1, 31):
      smooth[i, j] = np.trunc((kernel[..., None] * x[i - 1 : i + 2, j - 1 : j + 2]).sum((0, 1)))
  expected = np.clip(smooth + 1.18 * (x - smooth), 0, 255)
  assert np.abs(_tpu('sharpness', x, 6) - expected).max() <= 1.2


@given(st.integers(1, 20), st.booleans())
def test_geometry_takes_the_nearest_pixel(magnitude, positive):
  """Pixel by pixel: what lands outside is grey."""
  x, level, sign = _image(9, 11), magnitude / 10, 1 if positive else -1
  angle = np.deg2rad(sign * 30 * level)
  middle = np.array([5.0, 4.0])
  turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
  sources = {
    'shear_x': lambda p: p + np.array([sign * 0.3 * level * p[1], 0]),
    'shear_y': lambda p: p + np.array([0, sign * 0.3 * level * p[0]]),
    'translate_x': lambda p: p + np.array([sign * 100 * level, 0]),
    'translate_y': lambda p: p + np.array([0, sign * 100 * level]),
    'rotate': lambda p: turn @ (p - middle) + middle,
  }
  for name, source in sources.items():
    found = tpu_randaugment.OPERATIONS[name](x, level, _fixed(0.5 if positive else 0.1))
    for row in range(9):
      for column in range(11):
        at = source(np.array([column, row], float))
        if np.abs(at - np.floor(at) - 0.5).min() < 1e-3:
          continue  # halfway: either neighbour
        j, i = np.floor(at + 0.5).astype(int)
        inside = 0 <= i < 9 and 0 <= j < 11
        expected = x[i, j] if inside else (128,) * 3
        np.testing.assert_array_equal(
          found[row, column], expected, err_msg=f'{name} {row} {column}'
        )


def test_cutout_is_a_square_cut_at_the_border():
  x = _image(60, 80)
  found = _tpu('cutout', x, 5, places=[10, 70])
  expected = x.copy()
  expected[0:30, 50:80] = 128
  np.testing.assert_array_equal(found, expected)


def test_the_operation_of_configs_applies_every_layer():
  apply = preprocessing.compose(['rand_augment_tpu(2, 15)'])
  image = Image.fromarray(_image())
  same = [
    np.array_equal(apply(image, np.random.default_rng(seed)), np.asarray(image))
    for seed in range(60)
  ]
  assert sum(same) < 6  # solarize twice leaves all as it is
  first, again = (apply(image, np.random.default_rng(3)) for _ in range(2))
  np.testing.assert_array_equal(first, again)
  with pytest.raises(ValueError, match='must not be negative'):
    preprocessing.compose(['rand_augment_tpu(2, -1)'])
