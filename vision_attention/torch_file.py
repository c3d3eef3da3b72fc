"""PyTorch's file formats, read without PyTorch and without executing what a pickle asks for.

`torch.save` writes a pickle whose tensors refer to storages beside it: members of a zip archive
since version 1.6, blocks behind the pickle before. The unpickler here knows the few names that a
state dict needs. Any other name becomes an inert placeholder (checkpoints carry
`argparse.Namespace` and the like beside the weights), which can be built but does nothing; nothing
is ever imported.
"""

import collections
import io
import pathlib
import pickle
import sys
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
  'DoubleStorage': np.float64,
  'FloatStorage': np.float32,
  'HalfStorage': np.float16,
  'BFloat16Storage': ml_dtypes.bfloat16,
  'LongStorage': np.int64,
  'IntStorage': np.int32,
  'ShortStorage': np.int16,
  'CharStorage': np.int8,
  'ByteStorage': np.uint8,
  'BoolStorage': np.bool_,
}


class Opaque:
  """What a name outside the list becomes: takes any arguments and state, and does nothing."""

  def __init__(self, *args: Any, **kwargs: Any):
    del args, kwargs

  def __setstate__(self, state: Any) -> None:
    del state


# Names that no checkpoint needs and every exploit does. An inert placeholder in their place would
# be harmless too, but whoever made such a file meant harm: say so.
_REFUSED = ('os', 'posix', 'nt', 'subprocess', 'sys', 'builtins', '__builtin__', 'shutil', 'socket')
_HARMLESS_BUILTINS = {'set': set, 'list': list, 'dict': dict, 'tuple': tuple, 'complex': complex}


def _strided(storage: np.ndarray, offset: int, size: tuple, stride: tuple) -> np.ndarray:
  """Returns a copy of the part of a storage that a tensor shows."""
  size, stride = tuple(size), tuple(stride)
  last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
  if 0 in size:
    return np.zeros(size, storage.dtype)
  if offset < 0 or min(stride, default=0) < 0 or last >= len(storage):
    raise ValueError(f'a tensor of size {size} reaches beyond its storage of {len(storage)}')
  step = storage.dtype.itemsize
  view = np.lib.stride_tricks.as_strided(storage[offset:], size, [s * step for s in stride])
  return view.copy()


def _rebuild_tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *rest: Any):
  del rest
  return _strided(storage, offset, size, stride)


def _rebuild_parameter(data: np.ndarray, *rest: Any) -> np.ndarray:
  del rest
  return data


_KNOWN: dict[tuple[str, str], Any] = {
  ('collections', 'OrderedDict'): collections.OrderedDict,
  ('collections', 'defaultdict'): lambda *args: {},
  ('torch._utils', '_rebuild_tensor'): _rebuild_tensor,
  ('torch._utils', '_rebuild_tensor_v2'): _rebuild_tensor,
  ('torch._utils', '_rebuild_parameter'): _rebuild_parameter,
  **{('torch', name): np.dtype(dtype) for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
  """Builds arrays, containers and placeholders; resolves storages by `storage_of`."""

  def __init__(self, file: Any, storage_of: Callable[[tuple], np.ndarray]):
    super().__init__(file, encoding='latin1')
    self._storage_of = storage_of

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) in _KNOWN:
      return _KNOWN[module, name]
    if module in ('builtins', '__builtin__') and name in _HARMLESS_BUILTINS:
      return _HARMLESS_BUILTINS[name]
    if module.split('.')[0] in _REFUSED:
      raise ValueError(f'it wants to call {module}.{name}, which no weight file needs')
    return type(name, (Opaque,), {'__module__': module})

  def persistent_load(self, pid: Any) -> np.ndarray:
    if not isinstance(pid, tuple) or not pid or pid[0] != 'storage':
      raise ValueError(f'it refers to {pid!r}, which is not a storage')
    return self._storage_of(pid)


def _run(unpickler: pickle.Unpickler) -> Any:
  """Unpickles; whatever a damaged or hostile stream raises becomes a ValueError."""
  try:
    return unpickler.load()
  except ValueError:
    raise
  except Exception as error:
    raise ValueError(f'its pickle is damaged: {type(error).__name__}: {error}') from error


def _load_zip(path: pathlib.Path) -> Any:
  with zipfile.ZipFile(path) as archive:
    names = archive.namelist()
    pickles = [name for name in names if name.endswith('/data.pkl')]
    if len(pickles) != 1:
      raise ValueError('it is a zip archive, but not one of torch.save')
    root = pickles[0].removesuffix('data.pkl')
    order = archive.read(f'{root}byteorder').decode() if f'{root}byteorder' in names else 'little'
    storages: dict[str, np.ndarray] = {}

    def storage_of(pid: tuple) -> np.ndarray:
      _, dtype, key, _, length = pid
      if key not in storages:
        raw = np.frombuffer(archive.read(f'{root}data/{key}'), np.uint8)
        storages[key] = _typed(raw, dtype, length, order)
      return storages[key]

    return _run(_Unpickler(io.BytesIO(archive.read(pickles[0])), storage_of))


def _typed(raw: np.ndarray, dtype: Any, length: int, order: str) -> np.ndarray:
  if not isinstance(dtype, np.dtype):
    raise ValueError(f'it has a storage of the unknown type {getattr(dtype, "__name__", dtype)}')
  if raw.nbytes != length * dtype.itemsize:
    raise ValueError(f'a storage of {length} {dtype} holds {raw.nbytes} bytes: it is truncated')
  values = raw.view(dtype)
  return values if order == sys.byteorder else values.byteswap()


def _load_legacy(path: pathlib.Path) -> Any:
  """Magic number, protocol, system, pickle, storage keys, then length and bytes of storages."""
  storages: dict[str, np.ndarray] = {}

  def storage_of(pid: tuple) -> np.ndarray:
    _, dtype, key, _, length, view = pid
    if view is not None:
      raise ValueError('it has views of storages, as only PyTorch before 0.4 wrote them')
    if not isinstance(dtype, np.dtype):
      raise ValueError(f'it has a storage of the unknown type {dtype!r}')
    if key not in storages:
      # Filled below, after the pickle; the tensors that show it are cut out then.
      storages[key] = np.zeros(length, dtype)
    return storages[key]

  with path.open('rb') as file:
    if _run(_Unpickler(file, storage_of)) != _LEGACY_MAGIC:
      raise ValueError('it is not a file of torch.save')
    _run(_Unpickler(file, storage_of))  # protocol
    system = _run(_Unpickler(file, storage_of))
    start = file.tell()
    _run(_Unpickler(file, storage_of))
    keys = _run(_Unpickler(file, storage_of))
    order = 'little' if system.get('little_endian', True) else 'big'
    for key in keys:
      header = file.read(8)
      if key not in storages or len(header) < 8:
        raise ValueError('it is truncated')
      length = int.from_bytes(header, order)
      raw = np.frombuffer(file.read(length * storages[key].itemsize), np.uint8)
      storages[key][:] = _typed(raw, storages[key].dtype, len(storages[key]), order)
    # The first pass learned the storages' types, this one reads the tensors.
    file.seek(start)
    return _run(_Unpickler(file, storage_of))


def load(path: pathlib.Path) -> Any:
  """Returns what `torch.save` wrote, tensors as arrays.

  Raises:
    ValueError: if the file is damaged, not PyTorch's, or asks for what no weight file needs.
  """
  return _load_zip(path) if zipfile.is_zipfile(path) else _load_legacy(path)
