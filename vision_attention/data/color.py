"""Colour jitter on PIL images, to the pixel what torchvision's ColorJitter does to them."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def shift_hue(image: Image.Image, turns: float) -> Image.Image:
  """Turns the hue round the colour circle, in 256 steps.

  Args:
    image: RGB.
    turns: in [-0.5, 0.5], of the whole circle.
  """
  hue, saturation, value = image.convert('HSV').split()
  # The shift is cut to an integer towards zero, and goes round at 256.
  shifted = (np.asarray(hue, np.int32) + int(turns * 255)) % 256
  moved = Image.fromarray(shifted.astype(np.uint8))
  return Image.merge('HSV', (moved, saturation, value)).convert('RGB')


def jitter(
  brightness: float, contrast: float, saturation: float, hue: float
) -> Callable[[Image.Image, np.random.Generator], Image.Image]:
  """Makes the operation; a strength of 0 leaves that property alone.

  Raises:
    ValueError: for a negative strength, or a hue above 0.5.
  """
  strengths = (brightness, contrast, saturation)
  if min(*strengths, hue) < 0:
    raise ValueError(f'color_jitter{(*strengths, hue)} has a negative strength: 0 switches one off')
  if hue > 0.5:
    raise ValueError(f'color_jitter cannot shift the hue by {hue}: 0.5 is all the way round')

  def apply(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    factors = [rng.uniform(max(0.0, 1 - s), 1 + s) for s in strengths]
    turns = rng.uniform(-hue, hue)
    for which in rng.permutation(4):
      if which == 3:
        image = shift_hue(image, turns) if hue else image
      elif strengths[which]:
        image = _ENHANCERS[which](image).enhance(factors[which])
    return image

  return apply
