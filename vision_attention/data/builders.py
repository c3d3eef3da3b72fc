"""Data sets written as TFDS reads them, in ArrayRecord files, without TensorFlow."""

import dataclasses
import gzip
import io
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vision_attention.data import preprocessing, records

VERSION = '1.0.0'
_IDX_FILES = {'train': ('train', 'train'), 'test': ('t10k', 'test')}
_IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png')
# What TFDS's images are not stored as: encoded anew without loss.
_OTHER_SUFFIXES = ('.bmp', '.gif', '.tif', '.tiff', '.webp')


@dataclasses.dataclass(frozen=True)
class Raw:
  """What a data set is written from: encoded images with labels, per split.

  Attributes:
    splits: per split, pairs of image and label; read once.
    label_names: of the classes.
    shape: of the images; None where they differ.
    description: of the data set.
    files: text files to be kept beside it, by name.
  """

  splits: Mapping[str, Iterable[tuple[bytes, int]]]
  label_names: Sequence[str]
  shape: tuple[int | None, int | None, int]
  description: str
  files: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _png(pixels: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, 'PNG')
  return buffer.getvalue()


def digits() -> Raw:
  """The 1797 handwritten digits of 8x8 pixels that scikit-learn carries.

  The test split is every fifth image of each class, in the order of the file: 355 images.
  """
  from sklearn import datasets

  data: Any = datasets.load_digits()
  images = np.round(data.images * (255 / 16)).astype(np.uint8)
  rank = np.zeros(len(images), int)
  for label in range(10):
    mine = np.flatnonzero(data.target == label)
    rank[mine] = np.arange(len(mine))
  test = rank % 5 == 4

  def split(chosen: np.ndarray) -> list[tuple[bytes, int]]:
    return [(_png(images[i]), int(data.target[i])) for i in np.flatnonzero(chosen)]

  return Raw(
    {'train': split(~test), 'test': split(test)},
    [str(label) for label in range(10)],
    (8, 8, 1),
    'Handwritten digits of 8x8 pixels, from scikit-learn (UCI, Alpaydin and Kaynak 1998).',
  )


def read_idx(path: pathlib.Path) -> np.ndarray:
  """Reads an IDX file of bytes (the format of MNIST), plain or gzipped.

  Raises:
    ValueError: if the file is of another format or shorter than its header says.
  """
  content = path.read_bytes()
  content = gzip.decompress(content) if path.suffix == '.gz' else content
  if len(content) < 4 or content[:3] != b'\0\0\x08':
    raise ValueError(f'{path} is no IDX file of bytes')
  ndim = content[3]
  shape = np.frombuffer(content, '>u4', ndim, 4).astype(int)
  if len(content) != 4 + 4 * ndim + shape.prod():
    raise ValueError(f'{path} holds {len(content)} bytes, not what its shape {shape} needs')
  return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def idx(folder: pathlib.Path, label_names: Sequence[str] | None = None) -> Raw:
  """MNIST's four IDX files in one folder: `train-images-idx3-ubyte`, ..., plain or gzipped.

  Raises:
    FileNotFoundError: naming the missing file.
    ValueError: if images and labels differ in number.
  """

  def load(stem: str) -> np.ndarray:
    found = [p for suffix in ('', '.gz') if (p := folder / f'{stem}{suffix}').is_file()]
    if not found:
      raise FileNotFoundError(f'there is no {stem} or {stem}.gz in {folder}')
    return read_idx(found[0])

  arrays = {}
  for split, (prefix, _) in _IDX_FILES.items():
    images, labels = load(f'{prefix}-images-idx3-ubyte'), load(f'{prefix}-labels-idx1-ubyte')
    if len(images) != len(labels):
      raise ValueError(f'{folder} has {len(images)} {split} images but {len(labels)} labels')
    arrays[split] = images, labels
  count = 1 + max(int(labels.max()) for _, labels in arrays.values())
  height, width = arrays['train'][0].shape[1:]
  return Raw(
    {
      split: ((_png(image), int(label)) for image, label in zip(images, labels, strict=True))
      for split, (images, labels) in arrays.items()
    },
    label_names or [str(label) for label in range(count)],
    (height, width, 1),
    f'IDX files of {folder.name}.',
  )


def image_folder(root: pathlib.Path) -> Raw:
  """A folder `root/split/class/*.jpg`; the bytes of JPEG and PNG files are kept as they are.

  BMP, GIF, TIFF and WebP become PNG. What has a name that begins with a dot is passed over.

  Raises:
    FileNotFoundError: if there is no such structure.
    ValueError: if splits have different classes, or a file is no image.
  """

  def folders_in(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and p.name[0] != '.')

  splits = folders_in(root) if root.is_dir() else []
  names = {s.name: [p.name for p in folders_in(s)] for s in splits}
  if not names or not all(names.values()):
    raise FileNotFoundError(f'{root} has no folders <split>/<class>/ with images')
  classes = max(names.values(), key=len)
  for split, mine in names.items():
    if unknown := set(mine) - set(classes):
      raise ValueError(f'split {split} of {root} has classes that others lack: {sorted(unknown)}')

  def read(split: pathlib.Path) -> Iterator[tuple[bytes, int]]:
    places = [p for name in names[split.name] for p in sorted((split / name).iterdir())]
    files = [p for p in places if p.name[0] != '.']
    if wrong := [p for p in files if p.suffix.lower() not in _IMAGE_SUFFIXES + _OTHER_SUFFIXES]:
      raise ValueError(
        f'{len(wrong)} files are no images, such as {wrong[0]}: allowed are '
        f'{", ".join(_IMAGE_SUFFIXES + _OTHER_SUFFIXES)}; remove or rename them'
      )
    # Shards would otherwise hold one class each.
    for i in np.random.default_rng(0).permutation(len(files)):
      content = files[i].read_bytes()
      if files[i].suffix.lower() in _OTHER_SUFFIXES:
        try:
          content = _png(np.asarray(preprocessing.decode(content)))
        except preprocessing.CorruptImageError as error:
          raise ValueError(f'{files[i]} is no whole image: {error}') from error
      yield content, classes.index(files[i].parent.name)

  return Raw(
    {split.name: read(split) for split in splits},
    classes,
    (None, None, 3),
    f'Images of {root.name}.',
  )


def write(
  name: str, raw: Raw, data_dir: pathlib.Path, *, shard_bytes: int = 2**28, overwrite: bool = False
) -> pathlib.Path:
  """Writes a data set to `data_dir/name/1.0.0`, whole or not at all.

  Args:
    name: of the data set, lower case with underscores.
    raw: what to write.
    data_dir: TFDS's folder of data sets.
    shard_bytes: a new file is begun when one is this large.
    overwrite: whether a data set of that name is replaced.

  Returns:
    The data set's folder.

  Raises:
    FileExistsError: if it exists already.
    ValueError: if a split is empty, or for another kind of name.
  """
  import tensorflow_datasets as tfds

  if not re.fullmatch('[a-z][a-z0-9_]*', name):
    raise ValueError(f'data set name {name!r} is not of a-z, 0-9 and _, beginning with a letter')
  target = data_dir / name / VERSION
  if target.exists() and not overwrite:
    raise FileExistsError(f'{target} exists: pass --overwrite to replace it')
  target.parent.mkdir(parents=True, exist_ok=True)
  features = tfds.features.FeaturesDict(
    {
      'image': tfds.features.Image(shape=raw.shape),
      'label': tfds.features.ClassLabel(names=list(raw.label_names)),
    }
  )
  with tempfile.TemporaryDirectory(dir=target.parent, prefix=f'.{VERSION}.') as temporary:
    folder = pathlib.Path(temporary) / VERSION
    folder.mkdir()
    infos = [
      _write_split(name, split, examples, folder, shard_bytes)
      for split, examples in raw.splits.items()
    ]
    tfds.folder_dataset.write_metadata(
      data_dir=folder,
      features=features,
      split_infos=infos,
      filename_template=records.TEMPLATE,
      description=raw.description,
      check_data=False,
    )
    for file, text in raw.files.items():
      (folder / file).write_text(text)
    if target.exists():
      shutil.rmtree(target)
    folder.rename(target)
  return target


def _write_split(
  name: str,
  split: str,
  examples: Iterable[tuple[bytes, int]],
  folder: pathlib.Path,
  shard_bytes: int,
):
  """Writes one split's shards, under their final names once their number is known."""
  lengths: list[int] = []
  parts: list[pathlib.Path] = []
  total = size = 0
  writer = None
  for image, label in examples:
    if writer is None:
      parts.append(folder / f'{split}-{len(parts)}.part')
      writer = records.writer(parts[-1], 'array_record')
      lengths.append(0)
      size = 0
    content = records.example(image=image, label=label)
    writer.write(content)
    lengths[-1] += 1
    size += len(content)
    total += len(content)
    if size >= shard_bytes:
      writer.close()
      writer = None
  if writer is not None:
    writer.close()
  if not parts:
    raise ValueError(f'split {split!r} of {name!r} has no images')
  for i, part in enumerate(parts):
    part.rename(folder / f'{name}-{split}.array_record-{i:05d}-of-{len(parts):05d}')
  return records.split_info(name, split, lengths, total, folder, 'array_record')
