"""Operations on single images, chosen by config as text: `resize(224, interpolation=...)`.

Every operation takes an image, a generator and a `Trace`, by which something else can follow how
the image's pixels move.
"""

import ast
import inspect
import io
import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from PIL import Image, ImageFilter, ImageOps

from vision_attention import errors
from vision_attention.data import color, randaugment, tpu_randaugment

# The reader runs many threads of its own.
cv2.setNumThreads(1)
Op = Callable[[Image.Image, np.random.Generator, 'Trace'], Image.Image]
_FILTERS = {
  'nearest': Image.Resampling.NEAREST,
  'bilinear': Image.Resampling.BILINEAR,
  'bicubic': Image.Resampling.BICUBIC,
  'lanczos': Image.Resampling.LANCZOS,
}


class Trace:
  """Where the pixels of an image come from.

  Attributes:
    steps: for every move, the 3x3 matrix from the place `(x, y, 1)` of a pixel after it to that
      before it; in pixels, whose corners are at integers.
  """

  def __init__(self):
    self.steps: list[np.ndarray] = []

  def move(self, a: float, b: float, c: float, d: float, e: float, f: float) -> None:
    """Adds a move: `(x, y)` comes from `(a x + b y + c, d x + e y + f)`."""
    self.steps.append(np.array([[a, b, c], [d, e, f], [0, 0, 1]], np.float64))


def _resize(
  image: Image.Image,
  size: tuple[int, int],
  resample: Image.Resampling,
  box: tuple[int, int, int, int],
  trace: Trace,
) -> Image.Image:
  """A box of an image (left, top, right, bottom) cut out, then resized to width and height."""
  left, top, right, bottom = box
  trace.move((right - left) / size[0], 0, left, 0, (bottom - top) / size[1], top)
  # PIL's own `box` would mix pixels from beside it into its border.
  part = image if box == (0, 0, *image.size) else image.crop(box)
  return part.resize(size, resample)


# What PIL raises of bytes that it cannot read.
UNREADABLE = (OSError, SyntaxError, ValueError, NotImplementedError, Image.DecompressionBombError)


class CorruptImageError(ValueError):
  """Bytes that are no whole image."""


def decode(content: bytes) -> Image.Image:
  """Decodes JPEG, PNG, ... to RGB, to the pixel what PIL gives.

  Raises:
    CorruptImageError: if the bytes are no image, or end before it does.
  """
  try:
    image = Image.open(io.BytesIO(content))
    # OpenCV decodes the same pixels in less time, but pads a truncated file without a word.
    whole = b'\xff\xd9' in content[-1024:]
    if image.format == 'JPEG' and image.mode in ('RGB', 'L') and whole:
      flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
      pixels = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
      if pixels is not None:
        return Image.fromarray(np.ascontiguousarray(pixels[..., ::-1]))
    image.load()
    if image.mode.startswith('I'):
      # 16 bits, which PIL would cut off at 255.
      image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    return image.convert('RGB')
  except (*UNREADABLE, cv2.error) as error:
    raise CorruptImageError(str(error)) from error


def _filter(name: str) -> Image.Resampling:
  errors.check_choice('interpolation', name, _FILTERS)
  return _FILTERS[name]


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
  return (size, size) if isinstance(size, int) else (size[0], size[1])


def random_resized_crop(
  size: int | Sequence[int],
  area: Sequence[float] = (0.08, 1.0),
  ratio: Sequence[float] = (3 / 4, 4 / 3),
  interpolation: str = 'bicubic',
) -> Op:
  """A crop of random area and aspect ratio, resized: the "Inception crop".

  Args:
    size: height and width of the result, or one number for both.
    area: range of the crop's share of the image.
    ratio: range of width / height, uniform in the logarithm.
    interpolation: `nearest`, `bilinear`, `bicubic` or `lanczos`, with antialiasing; `random` for
      bilinear or bicubic (timm's default for training).
  """
  height, width = _pair(size)
  if not 0 < area[0] <= area[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
    raise ValueError(
      f'random_resized_crop has area {tuple(area)} and ratio {tuple(ratio)}: give the smaller '
      'first, of area at most 1, such as (0.08, 1.0) and (0.75, 1.33)'
    )
  names = ('bilinear', 'bicubic') if interpolation == 'random' else (interpolation,)
  filters = [_filter(name) for name in names]

  def apply(image: Image.Image, rng: np.random.Generator, trace: Trace) -> Image.Image:
    resample = filters[rng.integers(2)] if len(filters) == 2 else filters[0]
    whole_w, whole_h = image.size
    for _ in range(10):
      target = whole_w * whole_h * rng.uniform(area[0], area[1])
      aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
      w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
      if 0 < w <= whole_w and 0 < h <= whole_h:
        x, y = int(rng.integers(whole_w - w + 1)), int(rng.integers(whole_h - h + 1))
        return _resize(image, (width, height), resample, (x, y, x + w, y + h), trace)
    # No such crop lies in a very long image: take the largest in the middle.
    aspect = min(max(whole_w / whole_h, ratio[0]), ratio[1])
    w, h = min(whole_w, round(whole_h * aspect)), min(whole_h, round(whole_w / aspect))
    x, y = (whole_w - w) // 2, (whole_h - h) // 2
    return _resize(image, (width, height), resample, (x, y, x + w, y + h), trace)

  return apply


def resize(size: int | Sequence[int], interpolation: str = 'bicubic') -> Op:
  """The whole image resized to height and width, whatever its shape."""
  height, width = _pair(size)
  resample = _filter(interpolation)

  def apply(image: Image.Image, rng: np.random.Generator, trace: Trace) -> Image.Image:
    return _resize(image, (width, height), resample, (0, 0, *image.size), trace)

  return apply


def _covering(size: tuple[int, int], inner: tuple[int, int]) -> tuple[int, int]:
  """Returns width and height of an image whose smaller side is as long as `inner`, height first."""
  w, h = size
  if inner[0] == inner[1]:
    long = int(inner[0] * max(w, h) / min(w, h))
    return (inner[0], long) if w <= h else (long, inner[0])
  scale = min(h / inner[0], w / inner[1])
  return round(w / scale), round(h / scale)


def center_crop(
  size: int | Sequence[int], ratio: float = 0.875, interpolation: str = 'bicubic'
) -> Op:
  """The smaller side resized to `size / ratio`, then the middle cut out.

  To the pixel what timm and torchvision do: `size / ratio` is rounded down, and so is the longer
  side, or to the nearest where `size` is not square; half of what is cut is rounded to the nearest,
  and from the middle between two to the even one. Recipes in TensorFlow round otherwise, by a pixel
  at most.

  Args:
    size: height and width of the result, or one number for both.
    ratio: of the result to the smaller side; above 1 that side gets a black border.
    interpolation: see `random_resized_crop`.
  """
  height, width = _pair(size)
  resample = _filter(interpolation)
  if not 0 < ratio <= min(height, width):
    raise ValueError(f'center_crop({size}) has ratio {ratio}: give a positive one, such as 0.875')
  inner = math.floor(height / ratio), math.floor(width / ratio)

  def offset(have: int, want: int) -> int:
    return round((have - want) / 2) if have >= want else -((want - have) // 2)

  def apply(image: Image.Image, rng: np.random.Generator, trace: Trace) -> Image.Image:
    w, h = _covering(image.size, inner)
    image = _resize(image, (w, h), resample, (0, 0, *image.size), trace)
    x, y = offset(w, width), offset(h, height)
    trace.move(1, 0, x, 0, 1, y)
    return image.crop((x, y, x + width, y + height))

  return apply


def random_crop(
  size: int | Sequence[int],
  ratio: float = 0.875,
  interpolation: str = 'bicubic',
  square: bool = False,
) -> Op:
  """As `center_crop`, but cut out at a random place.

  Args:
    size: height and width of the result, or one number for both.
    ratio: of the result to the smaller side, at most 1.
    interpolation: see `random_resized_crop`.
    square: whether both sides are resized to `size / ratio`, whatever the image's shape.
  """
  height, width = _pair(size)
  resample = _filter(interpolation)
  if not 0 < ratio <= 1:
    raise ValueError(f'random_crop({size}) has ratio {ratio}: give one in (0, 1], such as 0.875')
  inner = math.floor(height / ratio), math.floor(width / ratio)

  def apply(image: Image.Image, rng: np.random.Generator, trace: Trace) -> Image.Image:
    w, h = (inner[1], inner[0]) if square else _covering(image.size, inner)
    image = _resize(image, (w, h), resample, (0, 0, *image.size), trace)
    x, y = int(rng.integers(w - width + 1)), int(rng.integers(h - height + 1))
    trace.move(1, 0, x, 0, 1, y)
    return image.crop((x, y, x + width, y + height))

  return apply


def pad_crop(padding: int, fill: int = 0) -> Op:
  """The image padded on all sides, then cut to its own size at a random place."""
  if padding < 0:
    raise ValueError(f'pad_crop has padding {padding}: give zero or more')

  def apply(image: Image.Image, rng: np.random.Generator, trace: Trace) -> Image.Image:
    w, h = image.size
    x, y = (int(v) for v in rng.integers(-padding, padding + 1, size=2))
    trace.move(1, 0, -x, 0, 1, -y)
    moved = Image.new('RGB', (w, h), (fill,) * 3)
    moved.paste(image, (x, y))
    return moved

  return apply


def _check_probability(name: str, prob: float) -> None:
  if not 0 <= prob <= 1:
    raise ValueError(f'{name} has prob {prob}: give a probability of 0 to 1')


def flip(prob: float = 0.5) -> Op:
  """Left and right exchanged with probability `prob`."""
  _check_probability('flip', prob)

  def apply(image: Image.Image, rng: np.random.Generator, trace: Trace) -> Image.Image:
    if rng.random() >= prob:
      return image
    trace.move(-1, 0, image.size[0], 0, 1, 0)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

  return apply


def flip_vertical(prob: float = 0.5) -> Op:
  """Top and bottom exchanged with probability `prob`."""
  _check_probability('flip_vertical', prob)

  def apply(image: Image.Image, rng: np.random.Generator, trace: Trace) -> Image.Image:
    if rng.random() >= prob:
      return image
    trace.move(1, 0, 0, 0, -1, image.size[1])
    return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)

  return apply


def rot90() -> Op:
  """A rotation by 0, 90, 180 or 270 degrees, each as likely: for images that have no top."""
  turns = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)

  def apply(image: Image.Image, rng: np.random.Generator, trace: Trace) -> Image.Image:
    turn = rng.integers(4)
    if not turn:
      return image
    w, h = image.size
    trace.move(*((0, -1, w, 1, 0, 0), (-1, 0, w, 0, -1, h), (0, 1, 0, -1, 0, h))[turn - 1])
    return image.transpose(turns[turn - 1])

  return apply


def color_jitter(
  brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0, hue: float = 0.0
) -> Op:
  """Brightness, contrast, saturation and hue changed in random order; see `data.color`.

  Args:
    brightness: the factor is uniform in `[max(0, 1 - brightness), 1 + brightness]`.
    contrast: likewise.
    saturation: likewise.
    hue: the shift is uniform in `[-hue, hue]` turns of the colour circle; at most 0.5.
  """
  jitter = color.jitter(brightness, contrast, saturation, hue)
  return lambda image, rng, trace: jitter(image, rng)


def three_augment() -> Op:
  """One of greyscale, solarization and Gaussian blur, each as likely (arXiv 2204.07118, figure 3).

  Solarization inverts pixels of 128 and more; the blur's radius is uniform in [0.1, 2]. The paper
  goes on with `color_jitter(0.3, 0.3, 0.3)`.
  """

  def apply(image: Image.Image, rng: np.random.Generator, trace: Trace) -> Image.Image:
    which = rng.integers(3)
    if which == 0:
      return image.convert('L').convert('RGB')
    if which == 1:
      return ImageOps.solarize(image, 128)
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))

  return apply


def rand_augment(
  layers: int,
  magnitude: float,
  prob: float = 0.5,
  magnitude_std: float = 0.0,
  max_magnitude: float = randaugment.MAX_LEVEL,
  increasing: bool = False,
  fill: tuple[int, int, int] = randaugment.FILL,
  interpolation: str = 'random',
) -> Op:
  """RandAugment; see `data.randaugment`."""
  errors.check_choice('interpolation', interpolation, randaugment.INTERPOLATIONS)
  if magnitude > max_magnitude:
    raise ValueError(
      f'rand_augment would bound magnitude {magnitude} at {max_magnitude}: pass max_magnitude='
      f'{magnitude} to mean it, or magnitude={max_magnitude}'
    )

  def apply(image: Image.Image, rng: np.random.Generator, trace: Trace) -> Image.Image:
    return randaugment.rand_augment(
      image,
      rng,
      layers=layers,
      magnitude=magnitude,
      prob=prob,
      magnitude_std=magnitude_std,
      max_magnitude=max_magnitude,
      increasing=increasing,
      fill=fill,
      interpolation=interpolation,
      moved=trace.move,
    )

  return apply


def rand_augment_tpu(layers: int, magnitude: float) -> Op:
  """RandAugment as TPU recipes have it; see `data.tpu_randaugment`. Its moves are not traced.

  Args:
    layers: operations per image.
    magnitude: strength in tenths; above 10 the operations' scales go on.
  """
  if layers < 0 or magnitude < 0:
    raise ValueError(f'rand_augment_tpu({layers}, {magnitude}) must not be negative')

  def apply(image: Image.Image, rng: np.random.Generator, trace: Trace) -> Image.Image:
    return tpu_randaugment.rand_augment(image, rng, layers=layers, magnitude=magnitude)

  return apply


_OPS = {
  op.__name__: op
  for op in (
    random_resized_crop,
    resize,
    center_crop,
    random_crop,
    pad_crop,
    flip,
    flip_vertical,
    rot90,
    color_jitter,
    three_augment,
    rand_augment,
    rand_augment_tpu,
  )
}


def parse(text: str) -> Op:
  """Makes an operation from a call in Python's syntax with literal arguments; nothing is evaluated.

  Raises:
    ValueError: for an unknown operation or argument (naming the nearest), or anything but a call.
  """
  try:
    tree = ast.parse(text, mode='eval').body
    if isinstance(tree, ast.Name):
      tree = ast.Call(tree, [], [])
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
      raise ValueError('it is not a call')
    name = tree.func.id
    args = [ast.literal_eval(node) for node in tree.args]
    kwargs = {str(node.arg): ast.literal_eval(node.value) for node in tree.keywords}
  except (SyntaxError, ValueError) as error:
    raise ValueError(f'operation {text!r} does not read like name(1, key=2): {error}') from error
  errors.check_choice(f'operation in {text!r}', name, _OPS)
  signature = inspect.signature(_OPS[name])
  for key in kwargs:
    errors.check_choice(f'argument in {text!r}', key, signature.parameters)
  try:
    signature.bind(*args, **kwargs)
  except TypeError as error:
    raise ValueError(f'operation {text!r}: {error}') from error
  return _OPS[name](*args, **kwargs)


def compose(texts: Sequence[str]) -> Callable[..., np.ndarray]:
  """Makes one function from image to `[height, width, 3]` uint8 out of operations in order."""
  ops = [parse(text) for text in texts]

  def apply(image: Image.Image, rng: np.random.Generator, trace: Trace | None = None) -> np.ndarray:
    trace = Trace() if trace is None else trace
    for op in ops:
      image = op(image, rng, trace)
    return np.asarray(image, np.uint8)

  return apply
