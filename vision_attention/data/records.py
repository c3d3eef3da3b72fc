"""Files of records in the two formats that TFDS reads: written, opened, and described to it."""

import pathlib
from collections.abc import Sequence
from typing import Any

from etils import epath

from vision_attention import errors
from vision_attention.data import tfrecord

FORMATS = ('array_record', 'tfrecord')
TEMPLATE = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'


def example(**features: bytes | str | int | Sequence[int]) -> bytes:
  """Returns a `tf.train.Example`, the same bytes for the same values."""
  from tensorflow_datasets.proto import tf_example_pb2

  found = tf_example_pb2.Example()  # pyright: ignore[reportAttributeAccessIssue]
  for key, value in features.items():
    feature = found.features.feature[key]
    if isinstance(value, bytes | str):
      value = value.encode() if isinstance(value, str) else value
      feature.bytes_list.value.append(value)
    else:
      feature.int64_list.value.extend([value] if isinstance(value, int) else value)
  return found.SerializeToString(deterministic=True)


def writer(path: pathlib.Path, file_format: str) -> Any:
  """Opens a file of records for writing."""
  errors.check_choice('file_format', file_format, FORMATS)
  if file_format == 'tfrecord':
    return tfrecord.Writer(str(path))
  import array_record.python.array_record_module as array_record_module

  # One record per group: what random access needs.
  return array_record_module.ArrayRecordWriter(str(path), 'group_size:1')


def reader(path: pathlib.Path, file_format: str) -> Any:
  """Opens a file of records for reading by number."""
  if file_format == 'tfrecord':
    return tfrecord.TfRecords(str(path))
  from array_record.python import array_record_data_source

  return array_record_data_source.ArrayRecordDataSource([str(path)])


def split_info(
  name: str,
  split: str,
  lengths: Sequence[int],
  num_bytes: int,
  folder: pathlib.Path,
  file_format: str,
) -> Any:
  """Returns what TFDS wants to know of a split: its files' numbers of records and their bytes."""
  import tensorflow_datasets as tfds

  return tfds.core.SplitInfo(
    name=split,
    shard_lengths=list(lengths),
    num_bytes=num_bytes,
    filename_template=tfds.core.ShardedFileTemplate(
      dataset_name=name,
      data_dir=epath.Path(folder),
      split=split,
      filetype_suffix=file_format,
      template=TEMPLATE,
    ),
  )
