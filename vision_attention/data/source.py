"""Random access to the encoded images of a TFDS data set, in ArrayRecord or TFRecord files."""

import bisect
import dataclasses
import functools
import os
import pathlib
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_data_source

DEFAULT_DIRS = ('~/tensorflow_datasets', 'data')
_PREPARE = {
  'digits': 'python tools/prepare_data.py digits',
  'fashion_mnist': (
    'python tools/prepare_data.py idx --name=fashion_mnist '
    "--input=<folder of *-ubyte.gz, e.g. of Debian's dataset-fashion-mnist>"
  ),
  'ham10000': (
    'python tools/prepare_data.py ham10000 --source=<folder of HAM10000_images_part_1.zip, '
    'HAM10000_images_part_2.zip and HAM10000_metadata.csv>'
  ),
  'ham10000_holdout': (
    'python tools/prepare_data.py ham10000 --splits=holdout --source=<folder of '
    'HAM10000_images_part_1.zip, HAM10000_images_part_2.zip and HAM10000_metadata.csv>'
  ),
  'imagenet2012': 'tfds build imagenet2012 --file_format=array_record (needs ILSVRC2012 tars)',
}

_LABELS = ('label', 'real_label')


class MissingDataError(FileNotFoundError):
  """A data set that is not on disk; the message says where it was sought and how to make it."""


@dataclasses.dataclass(frozen=True)
class Record:
  """One example, its image still encoded.

  Attributes:
    image: as it was written.
    labels: of its classes; mostly one, but any number where the data set has a sequence of them.
    name: file and row, for messages.
  """

  image: bytes
  labels: tuple[int, ...]
  name: str

  @property
  def label(self) -> int:
    """The first class, -1 where there is none."""
    return self.labels[0] if self.labels else -1


def find(name: str, data_dir: str | None = None) -> pathlib.Path:
  """Returns the folder of a prepared data set.

  Args:
    name: `imagenet2012`, or with a config or version, `imagenet_v2/matched-frequency:3.0.0`.
    data_dir: where to look; else `$TFDS_DATA_DIR`, `~/tensorflow_datasets` and `data`.

  Raises:
    MissingDataError: if it is not there.
  """
  stem, _, version = name.partition(':')
  environment = os.environ.get('TFDS_DATA_DIR')
  places = [data_dir] if data_dir else [*filter(None, [environment]), *DEFAULT_DIRS]
  looked = [pathlib.Path(place).expanduser() / stem for place in places]
  for folder in looked:
    found = [p.parent for p in folder.glob(f'{version or "*"}/dataset_info.json')]
    if found:
      return max(found, key=lambda p: [int(n) for n in p.name.split('.') if n.isdigit()])
  how = _PREPARE.get(stem, f'tfds build {stem} --file_format=array_record')
  raise MissingDataError(
    f'data set {name!r} is not in {", ".join(str(p) for p in looked)}. Prepare it with: {how}; or '
    'name its place by config.data.data_dir or TFDS_DATA_DIR'
  )


@functools.cache
def _builder(folder: pathlib.Path):
  import tensorflow_datasets as tfds  # slow to import, and not needed to say that data is missing

  return tfds.builder_from_directory(folder)


def _label(name: str, features: Any) -> tuple[str, Any]:
  """Returns the feature of the classes, whose labels one or several of an image are, by name."""
  for key in _LABELS:
    if key in features:
      # A sequence of labels holds the feature of each.
      return key, getattr(features[key], 'feature', features[key])
  raise ValueError(
    f'data set {name!r} has no feature {" or ".join(map(repr, _LABELS))}: it has {list(features)}'
  )


def label_names(name: str, data_dir: str | None = None) -> tuple[str, ...]:
  """Returns the names of a prepared data set's classes; raises MissingDataError without one."""
  info: Any = _builder(find(name, data_dir)).info
  return tuple(_label(name, info.features)[1].names or ())


class TfRecords:
  """Random access to one TFRecord file by an index of its records' offsets."""

  def __init__(self, path: str):
    self._path = path
    self._offsets: list[tuple[int, int]] = []
    size = os.path.getsize(path)
    with open(path, 'rb') as file:
      at = 0
      while at < size:
        # Framing: length (8 bytes), its checksum (4), the record, its checksum (4).
        header = file.read(12)
        length = struct.unpack('<Q', header[:8])[0] if len(header) == 12 else size
        if at + 16 + length > size:
          raise ValueError(f'{path} is truncated at byte {at}')
        self._offsets.append((at + 12, length))
        at += 16 + length
        file.seek(at)

  def __len__(self) -> int:
    return len(self._offsets)

  def __getitem__(self, index: int) -> bytes:
    offset, length = self._offsets[index]
    with open(self._path, 'rb') as file:
      file.seek(offset)
      return file.read(length)


class Source:
  """A split of a data set, by index.

  Args:
    name: see `find`.
    split: a TFDS split, such as `train[:99%]`.
    data_dir: see `find`.

  Raises:
    MissingDataError: if the data set is not on disk.
    ValueError: for a split that it does not have, or one without images and labels.
  """

  def __init__(self, name: str, split: str, data_dir: str | None = None):
    self.folder = find(name, data_dir)
    info: Any = _builder(self.folder).info
    base = split.split('[')[0].split('+')[0]
    if base not in info.splits:
      raise ValueError(f'data set {name!r} has no split {base!r}: it has {sorted(info.splits)}')
    if 'image' not in info.features:
      raise ValueError(f"data set {name!r} has no feature 'image': it has {list(info.features)}")
    self._key, label = _label(name, info.features)
    self.num_classes: int = label.num_classes
    self.label_names: Sequence[str] = tuple(label.names or ())
    self._is_array_record = str(info.file_format.value) == 'array_record'
    # Shard, first record of it, number of records.
    self._parts = [
      (part.filename, part.skip, part.examples_in_shard - part.skip if part.take < 0 else part.take)
      for part in info.splits[split].file_instructions
    ]
    self._starts = np.cumsum([0] + [take for _, _, take in self._parts]).tolist()

  def __len__(self) -> int:
    return self._starts[-1]

  def class_counts(self) -> np.ndarray:
    """Returns the number of examples of every class; reads the whole split."""
    counts = np.zeros(self.num_classes, np.int64)
    for i in range(len(self)):
      counts[list(self[i].labels)] += 1
    return counts

  def __getitem__(self, index: int) -> Record:
    from tensorflow_datasets.proto import tf_example_pb2

    index = int(index)
    if not 0 <= index < len(self):
      raise IndexError(f'record {index} of {len(self)}')
    part = bisect.bisect_right(self._starts, index) - 1
    path, skip, _ = self._parts[part]
    row = index - self._starts[part] + skip
    content = _open(path, self._is_array_record)[row]
    example = tf_example_pb2.Example.FromString(content)  # pyright: ignore[reportAttributeAccessIssue]
    features = example.features.feature
    return Record(
      image=features['image'].bytes_list.value[0],
      labels=tuple(features[self._key].int64_list.value),
      name=f'{os.path.basename(path)}:{row}',
    )


@functools.lru_cache(maxsize=4096)
def _open(path: str, is_array_record: bool):
  """Readers are shared by all threads of a process, and opened anew in a worker process."""
  if not is_array_record:
    return TfRecords(path)
  return array_record_data_source.ArrayRecordDataSource([path])
