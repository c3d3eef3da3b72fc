"""ImageNet-21k from its archive of archives: one tar, or tar.gz, of `nXXXXXXXX.tar`.

The archive is gone through once for its classes (and, where they matter or it is compressed, for
their numbers of images), and once for the images; nothing is extracted. A plain tar is read by all
processes at once; of a compressed one this process reads and they check and write. A file of the
data set holds consecutive classes, its images in a shuffled order; training shuffles all anyway,
because it reads at random.

Images that cannot be decoded to their end, and those with a side of less than 32 pixels, are left
out; what is no RGB or grey JPEG is encoded anew. `remarks.csv` lists all of them. An image whose
file name's SHA-256 says so is of the validation split, whatever the release.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from vision_attention import errors, folders
from vision_attention.data import (
  imagenet,
  imagenet_classes,
  preprocessing,
  records,
  shards,
  tar_files,
)

VERSION = '1.0.0'
MIN_SIDE = 32
ARCHIVES = ('winter21_whole.tar.gz', 'winter21_whole.tar', 'fall11_whole.tar')
_SUFFIXES = ('.jpeg', '.jpg')


@dataclasses.dataclass(frozen=True)
class _Group:
  """Consecutive classes of the archive: what a unit is made of."""

  number: int
  archive: str
  inner: tuple[tar_files.Member, ...]


def is_validation(file_name: str, share: float) -> bool:
  """Whether an image is of the validation split: by the hash of its name, for good."""
  digest = hashlib.sha256(file_name.encode()).digest()
  return int.from_bytes(digest[:8], 'big') < share * 2**64


def synset(member: tar_files.Member) -> str:
  """Returns the class of an inner archive.

  Raises:
    ValueError: if its name is none of `n01234567.tar`.
  """
  path = pathlib.PurePosixPath(member.name)
  if path.suffix != '.tar' or path.stem[:1] != 'n' or not path.stem[1:].isdigit():
    raise ValueError(f'{member.name!r} is no archive of a class: they are named n01234567.tar')
  return path.stem


def count_images(path: pathlib.Path, kind: str) -> dict[str, int]:
  """Returns the classes of an archive with their numbers of images.

  The numbers are 0 where they are not needed and would cost a look at every image's header.
  """
  counts = {}
  for inner in tar_files.stream(path):
    images = 0
    if inner.content or kind == '21k_p':
      members = tar_files.inner_members(path, inner)
      images = sum(m.name.lower().endswith(_SUFFIXES) for m in members)
    counts[synset(inner)] = images
  return counts


def _check(content: bytes) -> tuple[bytes, str, str]:
  """Returns an image as it is to be written, why it was encoded anew, or why it is dropped."""
  content, changed = imagenet.fixed(content)
  try:
    size = preprocessing.decode(content).size
  except preprocessing.CorruptImageError as error:
    # PIL names the object in memory, which is another one every time.
    return content, changed, f'corrupt: {re.sub(" <.*?>", "", str(error))}'
  if min(size) < MIN_SIDE:
    return content, changed, f'small: {size[0]}x{size[1]}'
  return content, changed, ''


def make(
  group: _Group, *, classes: Sequence[str], validation: float, seed: int
) -> Iterator[shards.Written | shards.Remark]:
  """Yields the examples of a unit, shuffled."""
  numbers = {name: i for i, name in enumerate(classes)}
  path = pathlib.Path(group.archive)
  images = [
    (synset(inner), member)
    for inner in group.inner
    for member in tar_files.inner_members(path, inner)
    if member.name.lower().endswith(_SUFFIXES)
  ]
  for i in np.random.default_rng((seed, group.number)).permutation(len(images)):
    name, member = images[i]
    content, changed, dropped = _check(tar_files.read(path, member))
    file_name = pathlib.PurePosixPath(member.name).name
    if dropped:
      yield shards.Remark(file_name, 'dropped', dropped)
      continue
    if changed:
      yield shards.Remark(file_name, 'encoded anew', changed)
    yield shards.Written(
      'validation' if is_validation(file_name, validation) else 'train',
      records.example(image=content, label=numbers[name], synset=name, file_name=file_name),
    )


def _groups(path: pathlib.Path, classes: Sequence[str], shard_bytes: int) -> Iterator[_Group]:
  """Cuts the archive into groups of classes of about `shard_bytes`."""
  kept, inner, size, number = set(classes), [], 0, 0
  for member in tar_files.stream(path):
    if synset(member) not in kept:
      continue
    inner.append(member)
    size += member.size
    if size >= shard_bytes:
      yield _Group(number, str(path), tuple(inner))
      inner, size, number = [], 0, number + 1
  if inner:
    yield _Group(number, str(path), tuple(inner))


def _counted(path: pathlib.Path, kind: str, where: pathlib.Path) -> dict[str, int]:
  """Counts as `count_images`; what an earlier call found in the same archive is read again."""
  stamp = [*imagenet.stamp(path), kind == '21k_p']
  if where.exists():
    saved = json.loads(where.read_text())
    if saved['stamp'] == stamp:
      return saved['counts']
  counts = count_images(path, kind)
  where.parent.mkdir(parents=True, exist_ok=True)
  folders.write(where, json.dumps({'stamp': stamp, 'counts': counts}))
  return counts


def imagenet21k(
  path: pathlib.Path,
  data_dir: pathlib.Path,
  *,
  kind: str,
  file_format: str = 'array_record',
  workers: int = 0,
  overwrite: bool = False,
  validation: float = 0.01,
  shard_bytes: int = 2**28,
  seed: int = 0,
  partial: bool = False,
) -> pathlib.Path:
  """Writes `imagenet21k/<kind>`.

  Beside it: `imagenet2012_indices.json`, the number of each of ImageNet's 1000 classes among these
  (-1 for one that they lack), and `synsets.txt`.

  Args:
    path: the archive, or a folder with one of `ARCHIVES`.
    data_dir: TFDS's folder of data sets.
    kind: of `imagenet_classes.COUNTS`.
    file_format: see `shards.Spec`.
    workers: see `shards.build`.
    overwrite: see `shards.build`.
    validation: share of images of the validation split.
    shard_bytes: about the size of a file.
    seed: of the order within files.
    partial: whether another number of classes than the published is written.

  Raises:
    FileNotFoundError: if there is no such archive.
    ValueError: for an unknown kind, or an archive that is not whole or of another layout.
    shards.PreparationError: see `shards.build`, and for another number of classes.
  """
  errors.check_choice('classes', kind, imagenet_classes.COUNTS)
  if not 0 <= validation < 1:
    raise ValueError(f'validation {validation} is no share of the images: 0.01 is usual')
  if path.is_dir():
    path = imagenet.archive(path, *ARCHIVES)
  if not path.is_file():
    raise FileNotFoundError(f'there is no archive {path}')
  plain = shards.Spec('imagenet21k', VERSION, {}, config=kind, file_format=file_format)
  shards.refuse_existing(plain, data_dir, overwrite)
  counts = _counted(path, kind, plain.folder(data_dir).parent / '.classes.json')
  classes = imagenet_classes.imagenet21k(kind, counts)
  published = imagenet_classes.COUNTS[kind]
  imagenet.check_count(f'classes of {kind} in {path}', len(classes), published, partial=partial)
  features: dict[str, Any] = {
    'image': tfds.features.Image(encoding_format='jpeg'),
    'label': tfds.features.ClassLabel(names=list(classes)),
    'synset': tfds.features.Text(),
    'file_name': tfds.features.Text(),
  }
  known = imagenet_classes.imagenet2012()
  indices = {
    'classes': list(known),
    'indices': imagenet_classes.imagenet2012_among(classes),
    'num_classes': len(classes),
  }
  spec = dataclasses.replace(
    plain,
    features=features,
    description=(
      f'ImageNet-21k, {kind}: {len(classes)} classes of {path.name} (published: '
      f'{" or ".join(map(str, published))}).'
    ),
    homepage='https://image-net.org/',
    files={
      'imagenet2012_indices.json': json.dumps(indices),
      'synsets.txt': '\n'.join(classes) + '\n',
    },
    merged=('validation',),
    shard_bytes=shard_bytes,
  )
  found = shards.build(
    spec,
    data_dir,
    lambda: _groups(path, classes, shard_bytes),
    functools.partial(make, classes=classes, validation=validation, seed=seed),
    source=[imagenet.stamp(path), validation, seed],
    workers=workers,
    overwrite=overwrite,
  )
  (found.parent / '.classes.json').unlink(missing_ok=True)
  return found
