"""Random access to the encoded images of a TFDS data set, in ArrayRecord or TFRecord files.

Both may be local or at `gs://...`: ArrayRecord's library reads buckets itself, TFRecord files go
through `etils.epath`, which needs gcsfs or TensorFlow for it.
"""

import bisect
import dataclasses
import functools
import os
import resource
from collections.abc import Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_data_source
from etils import epath

from vision_attention.data import tfrecord

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
  'imagenet2012': (
    'python tools/prepare_data.py imagenet2012 --input=<folder of ILSVRC2012_img_train.tar and '
    'ILSVRC2012_img_val.tar>'
  ),
  'imagenet2012_real': (
    'python tools/prepare_data.py imagenet2012_real --input=<folder of ILSVRC2012_img_val.tar and '
    'real.json>'
  ),
  'imagenet_v2': (
    'python tools/prepare_data.py imagenet_v2 --variant={config} --input=<folder of '
    'imagenetv2-*.tar.gz>'
  ),
  'imagenet_a': 'python tools/prepare_data.py imagenet_a --input=<folder of imagenet-a.tar>',
  'imagenet_r': 'python tools/prepare_data.py imagenet_r --input=<folder of imagenet-r.tar>',
  'imagenet_sketch': (
    'python tools/prepare_data.py imagenet_sketch --input=<folder of ImageNet-Sketch.zip>'
  ),
  'imagenet21k': (
    'python tools/prepare_data.py imagenet21k --classes={config} --input=<winter21_whole.tar.gz or '
    'fall11_whole.tar>'
  ),
}

_OTHER_FILES = 512
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
    file_name: of the image before it came into the data set; empty if that does not say.
  """

  image: bytes
  labels: tuple[int, ...]
  name: str
  file_name: str = ''

  @property
  def label(self) -> int:
    """The first class, -1 where there is none."""
    return self.labels[0] if self.labels else -1


def _prepare(stem: str) -> str:
  """Returns how a data set is prepared."""
  name, _, config = stem.partition('/')
  if how := _PREPARE.get(name):
    default = {'imagenet_v2': 'matched-frequency', 'imagenet21k': 'winter21'}.get(name, '')
    return how.replace('{config}', config or default)
  return f'tfds build {stem} --file_format=array_record'


def find(name: str, data_dir: str | None = None) -> epath.Path:
  """Returns the folder of a prepared data set.

  Args:
    name: `imagenet2012`, or with a config or version, `imagenet_v2/matched-frequency:3.0.0`.
    data_dir: where to look, also `gs://...`; else `$TFDS_DATA_DIR`, `~/tensorflow_datasets` and
      `data`.

  Raises:
    MissingDataError: if it is not there, or the place cannot be reached.
  """
  stem, _, version = name.partition(':')
  environment = os.environ.get('TFDS_DATA_DIR')
  places = [data_dir] if data_dir else [*filter(None, [environment]), *DEFAULT_DIRS]
  looked = [epath.Path(place).expanduser() / stem for place in places]
  for folder in looked:
    try:
      found = [p.parent for p in folder.glob(f'{version or "*"}/dataset_info.json')]
    except (OSError, ImportError, ValueError) as error:
      raise MissingDataError(f'data set {name!r}: {folder} cannot be read: {error}') from error
    if found:
      return max(found, key=lambda p: [int(n) for n in p.name.split('.') if n.isdigit()])
    if configs := sorted(p.parent.parent.name for p in folder.glob('*/*/dataset_info.json')):
      raise MissingDataError(
        f'data set {name!r} in {folder} has the configs {", ".join(configs)}: name one, as '
        f'{stem}/{configs[0]}'
      )
  raise MissingDataError(
    f'data set {name!r} is not in {", ".join(str(p) for p in looked)}. Prepare it with: '
    f'{_prepare(stem)}; or name its place by config.data.data_dir or TFDS_DATA_DIR'
  )


@functools.cache
def _builder(folder: epath.Path):
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


def splits(name: str, data_dir: str | None = None) -> list[str]:
  """Returns the names of a prepared data set's splits; raises MissingDataError without one."""
  return sorted(_builder(find(name, data_dir)).info.splits)


def evaluation_split(name: str, data_dir: str | None = None) -> str:
  """Returns the split of a prepared data set that models are tested on.

  Raises:
    MissingDataError: if it is not on disk.
    ValueError: if it has none.
  """
  there = splits(name, data_dir)
  # TFDS's ImageNet has test images too, whose labels nobody has published.
  if 'validation' in there and ('test' not in there or Source(name, 'test', data_dir)[0].label < 0):
    return 'validation'
  if 'test' in there:
    return 'test'
  raise ValueError(f'{name} has no split test or validation: it has {", ".join(there)}')


class Source:
  """A split of a data set, by index.

  Args:
    name: see `find`.
    split: a TFDS split, such as `train[:99%]`.
    data_dir: see `find`.

  Raises:
    MissingDataError: if the data set is not on disk.
    ValueError: for a split that it does not have, or one without images and labels.
    tfrecord.BrokenDataError: when a file that is not whole is read.
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
    self.has_several: bool = label is not info.features[self._key]
    self.num_classes: int = label.num_classes
    self.label_names: Sequence[str] = tuple(label.names or ())
    self._is_array_record = str(info.file_format.value) == 'array_record'
    instructions = info.splits[split].file_instructions
    there = {path.name for path in self.folder.iterdir()}
    if missing := [i.filename for i in instructions if os.path.basename(i.filename) not in there]:
      raise MissingDataError(
        f'data set {name!r} lacks {len(missing)} of the {len(instructions)} files of {split}, such '
        f'as {missing[0]}: copy it again, or prepare the data set again'
      )
    # Shard, records in it, first one taken, number taken.
    self._parts = [
      (
        part.filename,
        part.examples_in_shard,
        part.skip,
        part.examples_in_shard - part.skip if part.take < 0 else part.take,
      )
      for part in instructions
    ]
    if self._is_array_record:
      _allow_open_files(len(self._parts))
    self._starts = np.cumsum([0] + [take for *_, take in self._parts]).tolist()
    _example_type()

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    _example_type()

  def __len__(self) -> int:
    return self._starts[-1]

  def class_counts(self) -> np.ndarray:
    """Returns the number of examples of every class; reads the whole split."""
    counts = np.zeros(self.num_classes, np.int64)
    for i in range(len(self)):
      counts[list(self[i].labels)] += 1
    return counts

  def __getitem__(self, index: int) -> Record:
    from google.protobuf import message

    index = int(index)
    if not 0 <= index < len(self):
      raise IndexError(f'record {index} of {len(self)}')
    part = bisect.bisect_right(self._starts, index) - 1
    path, count, skip, _ = self._parts[part]
    row = index - self._starts[part] + skip
    name = f'{os.path.basename(path)}:{row}'
    try:
      content = _open(path, count, self._is_array_record)[row]
      features = _example_type().FromString(content).features.feature
      image = features['image'].bytes_list.value[0]
    except (
      RuntimeError,
      IndexError,
      message.DecodeError,
      tfrecord.BrokenRecordError,
    ) as error:
      raise tfrecord.BrokenRecordError(
        f'record {row} of {path} cannot be read ({error}): copy the file again, or prepare the '
        'data set again'
      ) from error
    labels = tuple(features[self._key].int64_list.value)
    files = features['file_name'].bytes_list.value if 'file_name' in features else ()
    return Record(image, labels, name, files[0].decode() if files else '')


@functools.cache
def _example_type() -> Any:
  """The message of a record.

  Whoever has a source has this already, also in a worker process, where it comes pickled: two
  threads that import TFDS at the same time can wait for each other forever, one for the lock of a
  module and one for that of TFDS's own lazy imports.
  """
  from tensorflow_datasets.proto import tf_example_pb2

  return tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]


def _allow_open_files(count: int) -> None:
  """Lets this process hold so many files open: a reader of ArrayRecord keeps its own.

  Raises:
    ValueError: if the system's limit is below.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  needed = count + _OTHER_FILES
  if needed <= soft or soft == resource.RLIM_INFINITY:
    return
  if resource.RLIM_INFINITY != hard < needed:
    raise ValueError(
      f'{count} files of data cannot be open at once: the limit is {hard}. Raise it by ulimit -Hn, '
      'or prepare the data set in larger files'
    )
  resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@functools.cache
def _open(path: str, count: int, is_array_record: bool):
  """Readers are shared by all threads of a process, and opened anew in a worker process."""
  try:
    if is_array_record:
      # The number of records is read here, so that a truncated file is found before any of it.
      found = array_record_data_source.ArrayRecordDataSource([path])
    else:
      found = tfrecord.TfRecords(path)
    records = len(found)
  except (RuntimeError, FileNotFoundError) as error:
    raise tfrecord.BrokenDataError(
      f'{path} cannot be read ({error}): it is missing, truncated or corrupt; copy it again'
    ) from error
  if records != count:
    raise tfrecord.BrokenDataError(
      f'{path} holds {records} records, and should hold {count}: copy it again'
    )
  return found
