"""Folders of runs: on a disk, or in a bucket as `gs://bucket/folder`.

In a bucket an object is written whole or not at all, none is appended to or renamed, and a folder
is no more than what names begin with.
"""

import contextlib
import fcntl
import importlib
import importlib.util
import logging
import os
import pathlib
import re
import socket
import tempfile
import time
from collections.abc import Iterator

from etils import epath

logger = logging.getLogger('vision_attention')
Folder = pathlib.Path | epath.Path
_SECONDS = 30.0  # between two writes of an object that grows; a bucket takes at most one a second


def folder(path: str | os.PathLike) -> Folder:
  """Returns what a path names; of a bucket, nothing is asked yet.

  Raises:
    ValueError: for an address of another kind, a name that no bucket has, a bucket without a
      folder, or without gcsfs.
  """
  text = os.fspath(path)
  if not re.match('[a-z][a-z0-9]+:/', text):
    return pathlib.Path(text)
  if not re.match('gs://[a-z0-9][-_.a-z0-9]+[a-z0-9]/+[^/]', text):
    raise ValueError(
      f'{text} is neither a folder nor in a bucket: pass a path, or the text gs://bucket/folder'
    )
  if importlib.util.find_spec('gcsfs') is None:
    raise ValueError(
      f"{text} lies in a bucket, which needs gcsfs: pip install 'vision_attention[gcs]', or mount "
      'the bucket and name the folder there'
    )
  import fsspec.config

  # What others write (TensorStore, other processes, an earlier run) must be seen at once.
  fsspec.config.conf.setdefault('gcs', {})['use_listings_cache'] = False
  return epath.Path(text)


def of_config(text: str) -> str:
  """Returns the folder of a run that is given none, `runs/<config>`, by its config and arguments.

  Other arguments are another run: `configs/vit_b16.py:init=runs/a` has `runs/vit_b16-init=runs_a`.
  """
  path, _, arguments = text.partition(':')
  name = '-'.join(filter(None, (pathlib.Path(path).stem, arguments)))
  return 'runs/' + re.sub(r'[^\w=,.-]+', '_', name)


def is_bucket(path: str | os.PathLike) -> bool:
  """Whether a path lies in a bucket."""
  return os.fspath(path).startswith('gs://')


def absolute(path: Folder) -> Folder:
  """Returns the same folder, whatever the current one is."""
  return path if is_bucket(path) else path.absolute()


def reach(path: Folder) -> None:
  """Asks a bucket for what it is, as Orbax does, but before anything is computed.

  Raises:
    Exception: of Google's library, if there is no such bucket or the account may not ask.
  """
  if is_bucket(path):
    storage = importlib.import_module('google.cloud.storage')
    storage.Client().get_bucket(path.parts[2])


def make(path: Folder) -> None:
  """Makes a folder, with those above it."""
  if not is_bucket(path):
    path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def held(path: Folder) -> Iterator[None]:
  """Keeps other runs out of a folder; the end of this process, of whatever kind, lets them in.

  A bucket knows no locks: there nothing is held.

  Raises:
    ValueError: if a run is there already.
  """
  if is_bucket(path):
    yield
    return
  make(path)
  with (path / '.lock').open('a+') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      lock.seek(0)
      raise ValueError(
        f'{path} is held by another run ({lock.read().strip()}): wait for its end, stop it, or '
        'pass another --workdir'
      ) from error
    except OSError as error:  # a file system without locks
      logger.warning('%s cannot be held (%s): see to it that one run uses it', path, error)
    lock.truncate(0)
    lock.write(f'process {os.getpid()} of {socket.gethostname()}\n')
    lock.flush()
    yield


def write(path: Folder, text: str) -> None:
  """Writes a file whole or not at all.

  Raises:
    OSError: if it cannot be written.
  """
  if not is_bucket(path):
    partial = path.with_name(f'{path.name}.{os.getpid()}.partial')
    with partial.open('w') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    partial.replace(path)
    return
  try:
    path.write_bytes(text.encode())
  except Exception as error:  # of many kinds, by which library could not write
    raise OSError(f'{path} cannot be written ({type(error).__name__}: {error})') from error


def find(top: Folder, name: str) -> Iterator[Folder]:
  """Yields the files of a name in or below a folder; in a bucket, none below another one."""
  if not is_bucket(top):
    yield from top.rglob(name)
  elif (top / name).exists():
    yield top / name
  else:
    for path in top.iterdir() if top.exists() else ():
      if path.is_dir():
        yield from find(path, name)


class Lines:
  """A file that grows by lines.

  On a disk each is appended at once. In a bucket the object is written anew: not more often than
  twice a minute, and by `flush`, before which a kill may lose lines.

  Args:
    path: of the file, which need not be there.
  """

  def __init__(self, path: Folder):
    self._path = path
    self._bucket = is_bucket(path)
    self._held = self._read() if self._bucket else ''
    self._changed, self._written = False, time.monotonic()

  def _read(self) -> str:
    return self._path.read_text() if self._path.exists() else ''

  @property
  def text(self) -> str:
    """All lines, '' without a file."""
    return self._held if self._bucket else self._read()

  def replace(self, text: str) -> None:
    """Puts other lines in the place of all."""
    write(self._path, text)
    self._held = text

  def add(self, line: str) -> None:
    """Appends a line."""
    if not self._bucket:
      with self._path.open('a') as file:
        file.write(line + '\n')
      return
    self._held += line + '\n'
    self._changed = True
    if time.monotonic() - self._written > _SECONDS:
      self.flush()

  def flush(self) -> None:
    """Writes what a bucket does not have yet."""
    if self._changed:
      write(self._path, self._held)
      self._changed, self._written = False, time.monotonic()


class Staging:
  """A folder for libraries that write to disks only: of a bucket's, one here that is copied there.

  Args:
    target: the folder that is meant.

  Attributes:
    path: the folder to write to, which is the one that is meant if that is on a disk.
  """

  def __init__(self, target: Folder):
    self._target = target
    self._held = tempfile.TemporaryDirectory() if is_bucket(target) else None
    self.path = pathlib.Path(self._held.name if self._held else target)
    self._sizes: dict[pathlib.Path, int] = {}

  def upload(self) -> None:
    """Copies files that are new or have grown to the bucket."""
    for path in sorted(self.path.rglob('*')) if self._held else ():
      if path.is_file() and self._sizes.get(path) != path.stat().st_size:
        content = path.read_bytes()
        (self._target / path.relative_to(self.path)).write_bytes(content)
        self._sizes[path] = len(content)
