"""RandAugment (arXiv 1909.13719) on PIL images, with the operations and scales of timm.

Two operations out of fifteen say what "magnitude" means: see `_MOVES` and `_OPERATIONS`. Google's
recipes have another form: `data.tpu_randaugment`.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAX_LEVEL = 10.0
# ImageNet's mean, as timm rounds it: what moves into an image.
FILL = (124, 116, 104)
_RESAMPLES = {'bilinear': Image.Resampling.BILINEAR, 'bicubic': Image.Resampling.BICUBIC}
INTERPOLATIONS = (*_RESAMPLES, 'random')
Operation = Callable[[Image.Image, float, np.random.Generator], Image.Image]
# Where pixel (x, y) comes from: (a x + b y + c, d x + e y + f), corners of pixels being integers.
Matrix = tuple[float, float, float, float, float, float]


def _signed(value: float, rng: np.random.Generator) -> float:
  return -value if rng.random() > 0.5 else value


def _autocontrast(image, level, rng):
  return ImageOps.autocontrast(image)


def _equalize(image, level, rng):
  return ImageOps.equalize(image)


def _invert(image, level, rng):
  return ImageOps.invert(image)


def _rotate(size, level, rng) -> Matrix:
  angle = -math.radians(_signed(30 * level, rng))
  # Rounded as Pillow's own rotation has it.
  cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
  x, y = size[0] / 2, size[1] / 2
  return cos, sin, -cos * x - sin * y + x, -sin, cos, sin * x - cos * y + y


def _keep_bits(image: Image.Image, bits: int) -> Image.Image:
  if bits < 1:
    # No bit is kept: black, which newer versions of Pillow refuse to call posterizing.
    return Image.new('RGB', image.size)
  return image if bits >= 8 else ImageOps.posterize(image, bits)


def _posterize(image, level, rng):
  return _keep_bits(image, int(4 * level))


def _posterize_increasing(image, level, rng):
  return _keep_bits(image, max(0, 4 - int(4 * level)))


def _solarize(image, level, rng):
  return ImageOps.solarize(image, min(256, int(256 * level)))


def _solarize_increasing(image, level, rng):
  return ImageOps.solarize(image, 256 - min(256, int(256 * level)))


def _solarize_add(image, level, rng):
  add = min(128, int(110 * level))
  return image.point([min(255, i + add) if i < 128 else i for i in range(256)] * 3)


def _enhance(kind: type) -> Operation:
  def apply(image, level, rng):
    return kind(image).enhance(1.8 * level + 0.1)

  return apply


def _enhance_increasing(kind: type) -> Operation:
  def apply(image, level, rng):
    return kind(image).enhance(max(0.1, 1 + _signed(0.9 * level, rng)))

  return apply


def _shear_x(size, level, rng) -> Matrix:
  return 1, _signed(0.3 * level, rng), 0, 0, 1, 0


def _shear_y(size, level, rng) -> Matrix:
  return 1, 0, 0, _signed(0.3 * level, rng), 1, 0


def _translate_x(size, level, rng) -> Matrix:
  return 1, 0, _signed(0.45 * level, rng) * size[0], 0, 1, 0


def _translate_y(size, level, rng) -> Matrix:
  return 1, 0, 0, 0, 1, _signed(0.45 * level, rng) * size[1]


# Their order is part of what a seed means.
NAMES = (
  *('autocontrast', 'equalize', 'invert', 'rotate', 'posterize', 'solarize', 'solarize_add'),
  *('color', 'contrast', 'brightness', 'sharpness'),
  *('shear_x', 'shear_y', 'translate_x', 'translate_y'),
)
# Each takes the level, magnitude / 10.
_MOVES: dict[str, Callable[[tuple[int, int], float, np.random.Generator], Matrix]] = {
  'rotate': _rotate,
  'shear_x': _shear_x,
  'shear_y': _shear_y,
  'translate_x': _translate_x,
  'translate_y': _translate_y,
}
_OPERATIONS: dict[str, Operation] = {
  'autocontrast': _autocontrast,
  'equalize': _equalize,
  'invert': _invert,
  'posterize': _posterize,
  'solarize': _solarize,
  'solarize_add': _solarize_add,
  'color': _enhance(ImageEnhance.Color),
  'contrast': _enhance(ImageEnhance.Contrast),
  'brightness': _enhance(ImageEnhance.Brightness),
  'sharpness': _enhance(ImageEnhance.Sharpness),
}
# The same list where a larger magnitude always means a stronger change.
_INCREASING = _OPERATIONS | {
  'posterize': _posterize_increasing,
  'solarize': _solarize_increasing,
  'color': _enhance_increasing(ImageEnhance.Color),
  'contrast': _enhance_increasing(ImageEnhance.Contrast),
  'brightness': _enhance_increasing(ImageEnhance.Brightness),
  'sharpness': _enhance_increasing(ImageEnhance.Sharpness),
}


def apply(
  image: Image.Image,
  name: str,
  magnitude: float,
  rng: np.random.Generator,
  increasing: bool,
  moved: Callable[..., None] | None = None,
  *,
  fill: tuple[int, int, int] = FILL,
  interpolation: str = 'random',
) -> Image.Image:
  """Applies one operation by name at a magnitude in tenths; tells `moved` the matrix of a move."""
  level = magnitude / MAX_LEVEL
  if name not in _MOVES:
    table = _INCREASING if increasing else _OPERATIONS
    return table[name](image, level, rng)
  matrix = _MOVES[name](image.size, level, rng)
  if moved is not None:
    moved(*matrix)
  if interpolation == 'random':
    interpolation = tuple(_RESAMPLES)[rng.integers(len(_RESAMPLES))]
  resample = _RESAMPLES[interpolation]
  return image.transform(
    image.size, Image.Transform.AFFINE, matrix, resample=resample, fillcolor=tuple(fill)
  )


def rand_augment(
  image: Image.Image,
  rng: np.random.Generator,
  *,
  layers: int,
  magnitude: float,
  prob: float = 0.5,
  magnitude_std: float = 0.0,
  max_magnitude: float = MAX_LEVEL,
  increasing: bool = False,
  fill: tuple[int, int, int] = FILL,
  interpolation: str = 'random',
  moved: Callable[..., None] | None = None,
) -> Image.Image:
  """Applies `layers` random operations to an RGB image.

  Args:
    image: an RGB image.
    rng: source of randomness.
    layers: operations per image, chosen uniformly with replacement.
    magnitude: strength in tenths.
    prob: probability with which a chosen operation is applied.
    magnitude_std: standard deviation of Gaussian noise on the magnitude.
    max_magnitude: bound on the magnitude; timm's default is 10.
    increasing: whether a larger magnitude always is a stronger change (timm's `inc1`).
    fill: color of what moves into the image; in timm the mean by which the recipe normalises.
    interpolation: of moves, `bilinear`, `bicubic` or `random`, one of both; in timm that of the
      recipe's crop.
    moved: is told the six numbers of every move, see `Matrix`.
  """
  for index in rng.integers(len(NAMES), size=layers):
    if prob < 1 and rng.random() > prob:
      continue
    level = magnitude if magnitude_std == 0 else rng.normal(magnitude, magnitude_std)
    level = float(np.clip(level, 0, max_magnitude))
    image = apply(
      image,
      NAMES[index],
      level,
      rng,
      increasing,
      moved,
      fill=fill,
      interpolation=interpolation,
    )
  return image
