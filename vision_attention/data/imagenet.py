"""ImageNet (ILSVRC 2012) and its test sets V2, A, R, Sketch and ReaL, from their archives.

Names, versions and features are those of TFDS, which reads what is written here. Two kinds of
training images are encoded anew, as TFDS does: 22 JPEGs in CMYK and one PNG. Their colours follow
the same formula; the bytes of these 23 differ, for the JPEG encoder is another.
"""

import dataclasses
import functools
import io
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from vision_attention import errors
from vision_attention.data import imagenet_classes, preprocessing, records, shards, tar_files

TRAIN, VALIDATION = 'ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'
VARIANTS = {
  'matched-frequency': 'imagenetv2-matched-frequency.tar.gz',
  'threshold-0.7': 'imagenetv2-threshold0.7.tar.gz',
  'topimages': 'imagenetv2-top-images.tar.gz',
}
TEST_SETS = ('imagenet_v2', 'imagenet_a', 'imagenet_r', 'imagenet_sketch', 'imagenet2012_real')
_ARCHIVES = {
  'imagenet_a': ('imagenet-a.tar',),
  'imagenet_r': ('imagenet-r.tar',),
  'imagenet_sketch': ('ImageNet-Sketch.zip', 'imagenet-sketch.zip', 'ImageNet-Sketch.tar.gz'),
  'imagenet2012_real': (VALIDATION,),
}
_VERSIONS = {
  'imagenet_v2': '3.0.0',
  'imagenet_a': '0.1.0',
  'imagenet_r': '0.2.0',
  'imagenet_sketch': '1.0.0',
  'imagenet2012_real': '1.0.0',
}
# Published numbers of images.
COUNTS = {
  'imagenet2012': {'train': 1_281_167, 'validation': 50_000},
  'imagenet_v2': {'test': 10_000},
  'imagenet_a': {'test': 7_500},
  'imagenet_r': {'test': 30_000},
  'imagenet_sketch': {'test': 50_889},
  'imagenet2012_real': {'validation': 50_000},
}
_SUFFIXES = ('.jpg', '.jpeg', '.png')


@dataclasses.dataclass(frozen=True, slots=True)  # there are a million
class _Image:
  """An image of an archive, with what is known of it."""

  member: tar_files.Member
  archive: str
  split: str
  file_name: str
  labels: tuple[tuple[str, int | tuple[int, ...]], ...]


def rgb_from_cmyk(image: Image.Image) -> Image.Image:
  """Converts to RGB as TensorFlow's decoder does: red is (255 - cyan) (255 - black) / 255."""
  light = 255 - np.asarray(image, np.int32)
  return Image.fromarray((light[..., :3] * light[..., 3:] // 255).astype(np.uint8))


def fixed(content: bytes) -> tuple[bytes, str]:
  """Returns an image as an RGB or grey JPEG, and why it was encoded anew (empty if it was not)."""
  try:
    image = Image.open(io.BytesIO(content))
    if image.format == 'JPEG' and image.mode in ('RGB', 'L'):
      return content, ''
    why = f'{image.format} {image.mode}'
    image = rgb_from_cmyk(image) if image.mode == 'CMYK' else image.convert('RGB')
  except preprocessing.UNREADABLE:
    return content, ''  # reading it says so
  buffer = io.BytesIO()
  image.save(buffer, 'JPEG', quality=100, subsampling='4:2:0')
  return buffer.getvalue(), why


def make(images: Sequence[_Image], *, fix: bool) -> Iterator[shards.Written | shards.Remark]:
  """Yields the examples of a unit."""
  for image in images:
    content = tar_files.read(pathlib.Path(image.archive), image.member)
    if fix:
      content, why = fixed(content)
      if why:
        yield shards.Remark(image.file_name, 'encoded anew', why)
    yield shards.Written(
      image.split,
      records.example(image=content, file_name=image.file_name, **dict(image.labels)),
    )


def _units(images: Iterable[_Image], shard_bytes: int) -> Iterator[list[_Image]]:
  """Cuts images into units of about `shard_bytes`, none across splits."""
  unit: list[_Image] = []
  size = 0
  for image in images:
    if unit and (size >= shard_bytes or image.split != unit[0].split):
      yield unit
      unit, size = [], 0
    unit.append(image)
    size += image.member.size
  if unit:
    yield unit


def _whole(images: Iterable[_Image], name: str, *, partial: bool) -> Iterator[_Image]:
  """Yields images, and raises at their end if they are not as many as are published."""
  found: dict[str, int] = {}
  for image in images:
    found[image.split] = found.get(image.split, 0) + 1
    yield image
  for split, count in found.items():
    check_count(f'images in {split} of {name}', count, (COUNTS[name][split],), partial=partial)


def check_count(what: str, found: int, published: Sequence[int], *, partial: bool) -> None:
  """Raises PreparationError if a count is not a published one, unless a part was asked for."""
  if found not in published and not partial:
    numbers = ' or '.join(f'{number:,}' for number in published)
    raise shards.PreparationError(
      f'there are {found:,} {what} and not {numbers}: get the whole archive, or pass --partial to '
      'write what there is under its name'
    )


def _features(encoding: str | None = 'jpeg') -> dict[str, Any]:
  return {
    'image': tfds.features.Image(encoding_format=encoding),
    'label': tfds.features.ClassLabel(names=list(imagenet_classes.imagenet2012())),
    'file_name': tfds.features.Text(),
  }


def archive(folder: pathlib.Path, *names: str) -> pathlib.Path:
  """Returns the archive of one of these names in a folder.

  Raises:
    FileNotFoundError: without one.
  """
  if found := [folder / name for name in names if (folder / name).is_file()]:
    return found[0]
  raise FileNotFoundError(f'there is no {" or ".join(names)} in {folder}')


def stamp(*paths: pathlib.Path) -> list[Any]:
  """Returns what tells files from others of their names."""
  return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def _number(file_name: str) -> int:
  """Returns the number of a validation image, from 0."""
  stem = pathlib.PurePath(file_name).stem
  digits = stem.removeprefix('ILSVRC2012_val_')
  if digits == stem or not digits.isdigit():
    raise ValueError(f'{file_name!r} is no validation image: they are ILSVRC2012_val_%08d.JPEG')
  return int(digits) - 1


def _validation(path: pathlib.Path, split: str, label: str) -> list[_Image]:
  synsets, classes = imagenet_classes.validation_labels(), imagenet_classes.imagenet2012()
  numbers = {synset: i for i, synset in enumerate(classes)}
  return [
    _Image(
      member,
      str(path),
      split,
      member.name,
      ((label, numbers[synsets[_number(member.name)]]),),
    )
    for member in sorted(tar_files.members(path), key=lambda m: m.name)
  ]


def _train(path: pathlib.Path, seed: int) -> list[_Image]:
  """Returns the training images, shuffled."""
  numbers = {synset: i for i, synset in enumerate(imagenet_classes.imagenet2012())}
  images = []
  for inner in sorted(tar_files.members(path), key=lambda m: m.name):
    synset = pathlib.PurePath(inner.name).stem
    if synset not in numbers:
      raise ValueError(f'{path} holds {inner.name}, which is none of the 1000 classes')
    for member in tar_files.inner_members(path, inner):
      labels = (('label', numbers[synset]),)
      images.append(_Image(member, str(path), 'train', member.name, labels))
  images.sort(key=lambda image: image.file_name)
  return [images[i] for i in np.random.default_rng(seed).permutation(len(images))]


def imagenet2012(
  folder: pathlib.Path,
  data_dir: pathlib.Path,
  *,
  file_format: str = 'array_record',
  workers: int = 0,
  overwrite: bool = False,
  shard_bytes: int = 2**28,
  seed: int = 0,
  partial: bool = False,
) -> pathlib.Path:
  """Writes `imagenet2012` 5.1.0 from its two archives; the training images are shuffled by `seed`.

  Archives with other numbers of images than `COUNTS` are refused unless `partial`.

  Raises:
    FileNotFoundError: if an archive is not there.
    tar_files.ArchiveError: if one is not whole.
    shards.PreparationError: see `shards.build`.
  """
  train, validation = archive(folder, TRAIN), archive(folder, VALIDATION)
  spec = shards.Spec(
    'imagenet2012',
    '5.1.0',
    _features(),
    description='ILSVRC 2012, 1000 classes.',
    homepage='https://image-net.org/',
    file_format=file_format,
    shard_bytes=shard_bytes,
  )

  def units() -> Iterator[list[_Image]]:
    for images in (_train(train, seed), _validation(validation, 'validation', 'label')):
      yield from _units(_whole(images, 'imagenet2012', partial=partial), shard_bytes)

  return shards.build(
    spec,
    data_dir,
    units,
    functools.partial(make, fix=True),
    source=[stamp(train, validation), seed],
    workers=workers,
    overwrite=overwrite,
  )


def _real(folder: pathlib.Path) -> list[_Image]:
  real = json.loads(archive(folder, 'real.json').read_text())
  return [
    dataclasses.replace(
      image, labels=(*image.labels, ('real_label', tuple(real[_number(image.file_name)])))
    )
    for image in _validation(archive(folder, VALIDATION), 'validation', 'original_label')
  ]


def _of_folders(path: pathlib.Path, name: str) -> Iterator[_Image]:
  """Yields the images of an archive of `<top>/<class>/<file>`."""
  numbers = {synset: i for i, synset in enumerate(imagenet_classes.imagenet2012())}
  for member in tar_files.stream(path):
    parts = pathlib.PurePosixPath(member.name).parts[-3:]
    if pathlib.PurePath(member.name).suffix.lower() not in _SUFFIXES:
      continue  # such as a README
    if '__MACOSX' in member.name or parts[-1].startswith('._'):
      continue  # what a Mac notes of the file of that name
    if len(parts) < 2:
      raise ValueError(f'{path} holds {member.name}, not <class>/<file>')
    where, file = parts[-2:]
    label = int(where) if name == 'imagenet_v2' and where.isdigit() else numbers.get(where, -1)
    if not 0 <= label < len(numbers):
      raise ValueError(f'{path} holds {member.name}, whose class is none of the 1000')
    file_name = file if name == 'imagenet_a' else f'{where}/{file}'
    yield _Image(member, str(path), 'test', file_name, (('label', label),))


def evaluation_set(
  name: str,
  folder: pathlib.Path,
  data_dir: pathlib.Path,
  *,
  variant: str = 'matched-frequency',
  file_format: str = 'array_record',
  workers: int = 0,
  overwrite: bool = False,
  shard_bytes: int = 2**28,
  partial: bool = False,
) -> pathlib.Path:
  """Writes one of `TEST_SETS`; images keep the archive's bytes and order.

  Args:
    name: of the data set.
    folder: of its archive; for ReaL that of validation images, and `real.json`.
    data_dir: TFDS's folder of data sets.
    variant: of ImageNet-V2.
    file_format: see `shards.Spec`.
    workers: see `shards.build`.
    overwrite: see `shards.build`.
    shard_bytes: about the size of a file.
    partial: whether another number of images than that of `COUNTS` is written.

  Raises:
    FileNotFoundError: if an archive is not there.
    ValueError: if it is not whole or of another layout.
    shards.PreparationError: see `shards.build`, and for another number of images.
  """
  errors.check_choice('data set', name, TEST_SETS)
  errors.check_choice('variant', variant, VARIANTS)
  version_2, real = name == 'imagenet_v2', name == 'imagenet2012_real'
  path = archive(folder, *((VARIANTS[variant],) if version_2 else _ARCHIVES[name]))
  features = _features(None if name == 'imagenet_sketch' else 'jpeg')
  if real:
    label = features.pop('label')
    features |= {'original_label': label, 'real_label': tfds.features.Sequence(label)}
  spec = shards.Spec(
    name,
    _VERSIONS[name],
    features,
    labels='real_label' if real else 'label',
    config=variant if version_2 else '',
    description=f'{name}, labels of the 1000 classes of ImageNet.',
    file_format=file_format,
    shard_bytes=shard_bytes,
  )
  images = _real(folder) if real else _of_folders(path, name)
  stamps = stamp(path, *([folder / 'real.json'] if real else []))
  return shards.build(
    spec,
    data_dir,
    lambda: _units(_whole(images, name, partial=partial), shard_bytes),
    functools.partial(make, fix=False),
    source=stamps,
    workers=workers,
    overwrite=overwrite,
  )
