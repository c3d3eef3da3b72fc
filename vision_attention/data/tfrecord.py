"""TFRecord files: written with their checksums, and read at random through an index of offsets.

A record is framed by its length (8 bytes, little-endian), the masked CRC-32C of the length (4), the
content, and the masked CRC-32C of the content (4).
"""

import hashlib
import io
import json
import logging
import os
import struct
import tempfile
import zlib
from typing import Any

import google_crc32c
import numpy as np
from etils import epath

logger = logging.getLogger('vision_attention')
CACHE = 'VISION_ATTENTION_CACHE'
_FRAME = 16


class BrokenDataError(ValueError):
  """A file of a data set that is not whole; the message names it and the place in it."""


class BrokenRecordError(BrokenDataError):
  """A record that is not what was written; others of its file may be."""


def masked_crc(content: bytes) -> int:
  """Returns the checksum in the form in which the files hold it."""
  crc = google_crc32c.value(content)
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


class Writer:
  """Writes records to a file; `close` has them on the disk."""

  def __init__(self, path: str):
    self._file = open(path, 'wb')  # noqa: SIM115

  def write(self, content: bytes) -> None:
    """Appends a record."""
    length = struct.pack('<Q', len(content))
    self._file.write(length + struct.pack('<I', masked_crc(length)))
    self._file.write(content + struct.pack('<I', masked_crc(content)))

  def close(self) -> None:
    """Finishes the file."""
    with self._file:
      self._file.flush()
      os.fsync(self._file.fileno())


def _scan(path: epath.Path, size: int) -> np.ndarray:
  """Returns where every record's frame begins, and where the last one ends."""
  starts, at = [0], 0
  with path.open('rb') as file:
    while at < size:
      file.seek(at)
      header = file.read(12)
      if len(header) < 12:
        raise BrokenDataError(f'{path} is truncated at byte {at}, in the header of a record')
      length, crc = struct.unpack('<QI', header)
      if crc != masked_crc(header[:8]):
        raise BrokenDataError(f'{path} is corrupt at byte {at}: no TFRecord begins there')
      if at + _FRAME + length > size:
        raise BrokenDataError(
          f'{path} is truncated: the record at byte {at} ends at byte {at + _FRAME + length}, the '
          f'file at {size}'
        )
      at += _FRAME + length
      starts.append(at)
  return np.asarray(starts, np.int64)


def index_path(path: os.PathLike | str) -> epath.Path:
  """Returns where a file's index is kept: $VISION_ATTENTION_CACHE or ~/.cache/vision_attention."""
  folder = epath.Path(os.environ.get(CACHE) or '~/.cache/vision_attention').expanduser()
  return folder / 'tfrecord' / f'{hashlib.sha256(os.fspath(path).encode()).hexdigest()[:32]}.index'


def _save(where: epath.Path, header: dict[str, Any], starts: np.ndarray) -> None:
  """Writes an index whole or not at all."""
  buffer = io.BytesIO()
  np.save(buffer, starts)
  content = json.dumps({**header, 'crc32': zlib.crc32(buffer.getvalue())}).encode()
  content += b'\n' + buffer.getvalue()
  where.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.NamedTemporaryFile(dir=where.parent, delete=False) as file:
    try:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    except OSError:
      os.unlink(file.name)
      raise
  os.replace(file.name, where)


def _load(where: epath.Path, header: dict[str, Any]) -> np.ndarray | None:
  """Reads an index; None without one or if the file has changed since."""
  if not where.exists():
    return None
  content = where.read_bytes()
  end = content.find(b'\n')
  again = 'delete it, and it is made again'
  if end < 0:
    raise BrokenDataError(f'index {where} of {header["path"]} is cut off at byte 0: {again}')
  try:
    saved = json.loads(content[:end])
    expected = saved.pop('crc32')
  except (ValueError, KeyError) as error:
    raise BrokenDataError(
      f'index {where} of {header["path"]} is corrupt at byte 0: {again}'
    ) from error
  if saved != header:
    return None
  if zlib.crc32(content[end + 1 :]) != expected:
    raise BrokenDataError(
      f'index {where} of {header["path"]} is corrupt or cut off after byte {end + 1} (it has '
      f'{len(content)}): {again}'
    )
  return np.load(io.BytesIO(content[end + 1 :]))


class TfRecords:
  """Random access to one TFRecord file, here or at `gs://...`.

  The index is built once and saved (`index_path`), where that can be written; one of a file of
  another size or time is made anew. Lengths are held to their checksums when it is built, contents
  when they are read.

  Raises:
    BrokenDataError: for a corrupt or truncated file or index, with the byte.
    BrokenRecordError: for one record.
    FileNotFoundError: if the file is not there.
  """

  def __init__(self, path: str):
    self._path = epath.Path(path)
    stat = self._path.stat()
    where = index_path(path)
    header = {'path': str(path), 'size': int(stat.length), 'mtime': float(stat.mtime or 0)}
    starts = _load(where, header)
    if starts is None:
      starts = _scan(self._path, header['size'])
      try:
        _save(where, header, starts)
      except OSError as error:
        logger.warning('the index of %s is made anew by every process: %s', path, error)
    self._starts = starts

  def __len__(self) -> int:
    return len(self._starts) - 1

  def __getitem__(self, index: int) -> bytes:
    start, end = int(self._starts[index]), int(self._starts[index + 1])
    with self._path.open('rb') as file:
      file.seek(start + 12)
      content = file.read(end - start - 12)
    if len(content) < end - start - 12:
      raise BrokenDataError(f'{self._path} ends within the record at byte {start}')
    content, crc = content[:-4], content[-4:]
    if struct.unpack('<I', crc)[0] != masked_crc(content):
      raise BrokenRecordError(f'{self._path}: the record at byte {start} has another checksum')
    return content
