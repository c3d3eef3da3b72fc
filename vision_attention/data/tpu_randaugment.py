"""RandAugment (arXiv 1909.13719) as Google's TPU recipes have it, in TensorFlow, on arrays.

Every chosen operation is applied, a magnitude above 10 goes on beyond the tables' ends, geometry is
by the nearest pixel about the middle of the outermost ones, translations are up to 100 pixels at
magnitude 10, and Cutout is one of the 16 operations. Its contrast blends with a constant that is
the number of pixels / 256 in place of the mean grey value, and so it does here.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

FILL = 128
_TRANSLATE = 100.0
_CUTOUT = 40.0
Pixels = np.ndarray
Operation = Callable[[Pixels, float, np.random.Generator], Pixels]


def _signed(value: float, rng: np.random.Generator) -> float:
  return -value if rng.random() < 0.5 else value


def _transform(x: Pixels, matrix: tuple[float, ...]) -> Pixels:
  """Takes output pixel (x, y) from (a x + b y + c, d x + e y + f), rounded; grey from outside."""
  a, b, c, d, e, f = matrix
  height, width = x.shape[:2]
  rows, columns = np.mgrid[:height, :width].astype(np.float32)
  # Halves are rounded away from zero.
  nearest = lambda v: np.trunc(v + np.copysign(0.5, v)).astype(np.int64)
  from_x, from_y = nearest(a * columns + b * rows + c), nearest(d * columns + e * rows + f)
  inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
  taken = x[np.clip(from_y, 0, height - 1), np.clip(from_x, 0, width - 1)]
  return np.where(inside[..., None], taken, np.uint8(FILL))


def _blend(base: np.ndarray, x: Pixels, factor: float) -> Pixels:
  """`base + factor * (x - base)`, cut to 0..255 and to integers towards zero."""
  base = base.astype(np.float32)
  return np.clip(base + factor * (x - base), 0, 255).astype(np.uint8)


def _of_pil(operation: Callable[[Image.Image], Image.Image]) -> Operation:
  return lambda x, level, rng: np.asarray(operation(Image.fromarray(x)))


def _rotate(x: Pixels, level: float, rng: np.random.Generator) -> Pixels:
  angle = np.deg2rad(_signed(30 * level, rng))
  sin, cos = np.sin(angle), np.cos(angle)
  height, width = x.shape[0] - 1, x.shape[1] - 1
  left = (width - (cos * width - sin * height)) / 2
  top = (height - (sin * width + cos * height)) / 2
  return _transform(x, (cos, -sin, left, sin, cos, top))


def _posterize(x: Pixels, level: float, rng: np.random.Generator) -> Pixels:
  lost = 8 - min(8, int(4 * level))
  return ((x.astype(np.int32) >> lost) << lost).astype(np.uint8)


def _solarize(x: Pixels, level: float, rng: np.random.Generator) -> Pixels:
  return np.where(x < int(256 * level), x, 255 - x)


def _solarize_add(x: Pixels, level: float, rng: np.random.Generator) -> Pixels:
  added = np.clip(x.astype(np.int32) + int(110 * level), 0, 255).astype(np.uint8)
  return np.where(x < 128, added, x)


def _grey(x: Pixels) -> np.ndarray:
  return (x @ np.array([0.2989, 0.587, 0.114], np.float32)).astype(np.uint8)


def _color(x: Pixels, level: float, rng: np.random.Generator) -> Pixels:
  return _blend(_grey(x)[..., None].repeat(3, axis=2), x, 1.8 * level + 0.1)


def _contrast(x: Pixels, level: float, rng: np.random.Generator) -> Pixels:
  grey = np.clip(x.shape[0] * x.shape[1] / 256.0, 0, 255)
  return _blend(np.full(x.shape, np.uint8(grey)), x, 1.8 * level + 0.1)


def _brightness(x: Pixels, level: float, rng: np.random.Generator) -> Pixels:
  return _blend(np.zeros_like(x), x, 1.8 * level + 0.1)


def _sharpness(x: Pixels, level: float, rng: np.random.Generator) -> Pixels:
  wide, (height, width) = x.astype(np.float32), x.shape[:2]
  near = [wide[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3)]
  smooth = x.copy()
  # The middle counts five times; the border has no neighbours and stays.
  smooth[1:-1, 1:-1] = np.clip((sum(near) + 4 * near[4]) / 13, 0, 255).astype(np.uint8)
  return _blend(smooth, x, 1.8 * level + 0.1)


def _shear_x(x: Pixels, level: float, rng: np.random.Generator) -> Pixels:
  return _transform(x, (1, _signed(0.3 * level, rng), 0, 0, 1, 0))


def _shear_y(x: Pixels, level: float, rng: np.random.Generator) -> Pixels:
  return _transform(x, (1, 0, 0, _signed(0.3 * level, rng), 1, 0))


def _translate_x(x: Pixels, level: float, rng: np.random.Generator) -> Pixels:
  return _transform(x, (1, 0, _signed(_TRANSLATE * level, rng), 0, 1, 0))


def _translate_y(x: Pixels, level: float, rng: np.random.Generator) -> Pixels:
  return _transform(x, (1, 0, 0, 0, 1, _signed(_TRANSLATE * level, rng)))


def _cutout(x: Pixels, level: float, rng: np.random.Generator) -> Pixels:
  half = int(_CUTOUT * level)
  row, column = rng.integers(x.shape[0]), rng.integers(x.shape[1])
  found = x.copy()
  found[max(0, row - half) : row + half, max(0, column - half) : column + half] = FILL
  return found


# Each takes the level, magnitude / 10.
OPERATIONS: dict[str, Operation] = {
  'autocontrast': _of_pil(ImageOps.autocontrast),
  'equalize': _of_pil(ImageOps.equalize),
  'invert': lambda x, level, rng: 255 - x,
  'rotate': _rotate,
  'posterize': _posterize,
  'solarize': _solarize,
  'color': _color,
  'contrast': _contrast,
  'brightness': _brightness,
  'sharpness': _sharpness,
  'shear_x': _shear_x,
  'shear_y': _shear_y,
  'translate_x': _translate_x,
  'translate_y': _translate_y,
  'cutout': _cutout,
  'solarize_add': _solarize_add,
}


def rand_augment(
  image: Image.Image, rng: np.random.Generator, *, layers: int, magnitude: float
) -> Image.Image:
  """Applies `layers` operations, each chosen uniformly, at a magnitude in tenths."""
  x, names = np.asarray(image), tuple(OPERATIONS)
  for index in rng.integers(len(names), size=layers):
    x = OPERATIONS[names[index]](x, magnitude / 10.0, rng)
  return Image.fromarray(x)
