"""Members of tar archives, read where they are or as a stream, never extracted."""

import dataclasses
import gzip
import io
import os
import pathlib
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Self

_BLOCK = 512


class ArchiveError(ValueError):
  """An archive that is not whole; the message names it and the byte."""


@dataclasses.dataclass(frozen=True, slots=True)  # there are a million
class Member:
  """A file of an archive.

  Attributes:
    name: with its folders.
    size: bytes.
    offset: of the first byte in the archive; -1 in a compressed one.
    content: the bytes of a compressed archive's member, else empty: see `read`.
  """

  name: str
  size: int
  offset: int
  content: bytes = b''


class Window(io.RawIOBase):
  """A stretch of a file, as a file."""

  def __init__(self, file: IO[bytes], offset: int, size: int):
    self._file, self._offset, self._size, self._at = file, offset, size, 0

  def seekable(self) -> bool:
    return True

  def readable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._at

  def seek(self, offset: int, whence: int = 0) -> int:
    self._at = offset + (0, self._at, self._size)[whence]
    return self._at

  def read(self, size: int = -1) -> bytes:
    left = max(0, self._size - self._at)
    size = left if size < 0 else min(size, left)
    self._file.seek(self._offset + self._at)
    content = self._file.read(size)
    self._at += len(content)
    return content


def is_compressed(path: pathlib.Path) -> bool:
  """Whether a file is gzipped, by its first bytes."""
  with path.open('rb') as file:
    return file.read(2) == b'\x1f\x8b'


def _members(file: IO[bytes], name: str, base: int) -> Iterator[Member]:
  try:
    with tarfile.open(fileobj=file, mode='r:') as tar:
      for member in tar:
        if member.isfile():
          yield Member(member.name, member.size, base + member.offset_data)
      end = tar.offset
  except tarfile.TarError as error:
    raise ArchiveError(
      f'{name} is no whole tar archive ({error}), at byte {file.tell()}'
    ) from error
  file.seek(end)
  # An archive that was cut off between two members would pass for a whole one.
  if file.read(_BLOCK) != bytes(_BLOCK):
    raise ArchiveError(f'{name} has no end mark at byte {end}: it is truncated or corrupt there')


def members(path: pathlib.Path) -> Iterator[Member]:
  """Yields the files of a plain tar archive without their contents, or of one within it.

  Raises:
    ArchiveError: if it is truncated or no tar archive.
  """
  with path.open('rb') as file:
    yield from _members(file, str(path), 0)


def inner_members(path: pathlib.Path, inner: Member) -> Iterator[Member]:
  """Yields the files of a tar archive that is itself a member; offsets are those in `path`."""
  name = f'{inner.name} in {path}'
  if inner.content:
    for found in _members(io.BytesIO(inner.content), name, 0):
      yield dataclasses.replace(
        found, content=inner.content[found.offset : found.offset + found.size]
      )
    return
  with path.open('rb') as file:
    window = Window(file, inner.offset, inner.size)
    yield from _members(window, name, inner.offset)  # pyright: ignore[reportArgumentType]


class _Strict(tarfile.TarInfo):
  """A header that is broken, or missing where the end mark should be, is an error.

  `tarfile` takes each for the end of the archive.
  """

  @classmethod
  def frombuf(cls, buf: bytes, encoding: str, errors: str) -> Self:
    try:
      return super().frombuf(buf, encoding, errors)
    except tarfile.EOFHeaderError:  # the end mark  # pyright: ignore[reportAttributeAccessIssue]
      raise
    except tarfile.HeaderError as error:
      raise tarfile.ReadError(str(error) or 'it has no end mark') from error


def stream(path: pathlib.Path) -> Iterator[Member]:
  """Yields the files of a .tar, .tar.gz or .zip in its order, in a compressed one with contents.

  Raises:
    ArchiveError: if it is truncated, corrupt or no archive.
  """
  if zipfile.is_zipfile(path):
    try:
      with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
          if not info.is_dir():
            yield Member(info.filename, info.file_size, -1, archive.read(info))
    except (zipfile.BadZipFile, zlib.error) as error:
      raise ArchiveError(f'{path} is no whole zip ({error})') from error
    return
  if not is_compressed(path):
    yield from members(path)
    return
  with gzip.open(path) as file:
    try:
      with tarfile.open(fileobj=file, mode='r|', tarinfo=_Strict) as tar:
        for member in tar:
          if member.isfile() and (content := tar.extractfile(member)) is not None:
            yield Member(member.name, member.size, -1, content.read())
      while file.read(2**20):
        pass  # to the end, where gzip keeps its checksum
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
      raise ArchiveError(f'{path} is no whole tar.gz ({error}), at byte {file.tell()}') from error


def read(path: pathlib.Path, member: Member) -> bytes:
  """Returns a member's bytes.

  Raises:
    ArchiveError: if the archive ends before.
  """
  if member.offset < 0 or member.content:
    return member.content
  with path.open('rb') as file:
    content = os.pread(file.fileno(), member.size, member.offset)
  if len(content) < member.size:
    raise ArchiveError(f'{path} ends within {member.name}, which begins at byte {member.offset}')
  return content
