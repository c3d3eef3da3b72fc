"""Label maps: what a network says about every place of an image, kept beside the data set.

Those of arXiv 2104.10858 (github.com/zihangJiang/TokenLabeling) hold, for each of 18x18 cells of
the middle square of an image of ImageNet-1k, the five largest logits of an NFNet-F6 and their
classes. `write` makes a folder of them with three files:

  maps.npy  float16 [images, 2, classes per cell, height, width]: logits, and numbers of classes.
  keys.npy  uint64 [images]: of the encoded images, by which a map is found; so it does not matter
            in what order, format or split a data set holds them.
  origin.json  what they are made of.
"""

import functools
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from vision_attention import errors, folders
from vision_attention.data import preprocessing, source, workers

_CHUNK = 1000  # images between two writes
GEOMETRIES = ('image', 'released')
_ADVICE = (
  'make them with: python tools/prepare_data.py label_maps --name={name} '
  "--input=<folder of <synset>/*.pt>; or label tokens by config.tokens.labels='image'"
)
# Of axes: x before y, as pixels have it, and y before x, as arrays have it.
_SWAP = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]], np.float64)


def key(image: bytes) -> np.uint64:
  """Returns the number that an encoded image's map is found by."""
  return np.uint64(int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), 'little'))


class LabelMaps:
  """The maps of a folder, by image; the files are opened once in every process that reads.

  Args:
    folder: see `write`.
    name: of the data set, for messages.
    num_classes: of the data set.

  Raises:
    source.MissingDataError: if there are none.
    ValueError: if the files are of another form.
  """

  def __init__(self, folder: str | os.PathLike, name: str, num_classes: int):
    self._folder, self._name, self._num_classes = os.fspath(folder), name, num_classes
    try:
      keys, _, maps = _open(self._folder)
    except FileNotFoundError as error:
      raise source.MissingDataError(
        f'config.data.label_maps {self._folder!r} has no label maps ({error.filename} is missing): '
        f'{_ADVICE.format(name=name)}'
      ) from error
    if maps.ndim != 5 or maps.shape[1] != 2 or maps.dtype != np.float16 or len(maps) != len(keys):
      raise ValueError(
        f'{self._folder} holds {len(keys)} keys and {maps.dtype} maps of shape {maps.shape}, not '
        f'float16 [images, 2, classes, height, width]: {_ADVICE.format(name=name)}'
      )

  def __len__(self) -> int:
    return len(_open(self._folder)[0])

  def find(self, image: bytes, record: str) -> np.ndarray:
    """Returns the map of an encoded image, float16 `[2, classes, height, width]`.

    Raises:
      source.MissingDataError: if it has none.
      ValueError: for a map of classes that the data set does not have.
    """
    keys, order, maps = _open(self._folder)
    wanted = key(image)
    place = int(np.searchsorted(keys, wanted))
    if place == len(keys) or keys[place] != wanted:
      raise source.MissingDataError(
        f'record {record} has no label map in {self._folder}, which was made of other images: '
        f'{_ADVICE.format(name=self._name)}'
      )
    found = np.array(maps[order[place]])
    if found[1].max() >= self._num_classes:
      raise ValueError(
        f'the label map of {record} in {self._folder} has class {int(found[1].max())} and the data '
        f'set {self._num_classes} classes: it is of another data set'
      )
    return found


@functools.cache
def _open(folder: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Keys in order, the row of each, and the maps, which stay on disk."""
  keys = np.load(os.path.join(folder, 'keys.npy'))
  maps = np.load(os.path.join(folder, 'maps.npy'), mmap_mode='r')
  order = np.argsort(keys, kind='stable')
  return keys[order], order, maps


def check_operations(texts: Sequence[str], geometry: str) -> None:
  """Refuses operations that no map can follow.

  Raises:
    ValueError: naming the operation.
  """
  errors.check_choice('config.data.label_geometry', geometry, GEOMETRIES)
  for text in texts:
    if text.startswith('rand_augment_tpu'):
      raise ValueError(f'{text!r} does not say how pixels move, for label maps: use rand_augment')
  if geometry == 'released' and not (texts and texts[-1].startswith('random_resized_crop')):
    raise ValueError(
      "config.data.label_geometry='released' crops last: put random_resized_crop at the end of "
      "config.data.train_ops, or set it to 'image'"
    )


def view(
  trace: preprocessing.Trace, before: tuple[int, int], after: tuple[int, int], geometry: str
) -> dict[str, np.ndarray]:
  """Returns where in a map the result of operations lies, as `ops.label_maps.align` takes it.

  Only the first image's borders are known: what one move takes out of the image and the next brings
  back, filled, keeps the label that it had.

  Args:
    trace: of the operations.
    before: width and height of the whole image.
    after: those of the result.
    geometry: `image`, in which a map is of the image's middle square, as it was made, and a token's
      label is that of the token's place; or `released`, the published code's, which takes the map
      for one of the whole image, and a crop's top and bottom for left and right.

  Returns:
    `label_view` float32 `[2, 3]` and `label_bounds` float32 `[2, 2]`.
  """
  whole = np.array(before, np.float64)
  side = whole if geometry == 'released' else np.full(2, whole.min())
  corner = (whole - side) / 2
  to_map = np.diag([*(1 / side), 1.0])
  to_map[:2, 2] = -corner / side
  *moves, last = [np.eye(3), *trace.steps]
  moved = to_map @ functools.reduce(np.matmul, moves, np.eye(3))
  cut = last @ np.diag([*after, 1.0])
  if geometry == 'released':
    cut = np.linalg.inv(to_map) @ _SWAP @ to_map @ cut @ _SWAP
  found = _SWAP @ moved @ cut @ _SWAP
  bounds = np.stack([-corner / side, (whole - corner) / side], 1)[::-1]
  return {
    'label_view': found[:2].astype(np.float32),
    'label_bounds': bounds.astype(np.float32),
  }


def write(
  folder: pathlib.Path,
  records: source.Source,
  maps: pathlib.Path,
  read: Callable[[pathlib.Path], Any],
  count: int = 0,
) -> pathlib.Path:
  """Writes the maps of a split, of one file per image, as `LabelMaps` reads them.

  Killed or failed, and called again, it goes on where it was. The result is the same for any number
  of processes.

  Args:
    folder: appears when it is whole.
    records: the images, which have file names, as ImageNet's have.
    maps: folder of `<synset>/<stem>.pt` or `<stem>.pt`, each `[2, classes, height, width]`.
    read: makes an array of such a file.
    count: of processes; 0 for this one.

  Raises:
    FileExistsError: if the folder is there.
    FileNotFoundError: naming the image without a map.
    ValueError: naming a map of another shape than the first.
  """
  if folder.exists():
    raise FileExistsError(f'{folder} is there already: remove it to write it anew')
  first = _map_of(records[0], maps)
  shape = np.shape(read(first))
  if len(shape) != 4 or shape[0] != 2:
    raise ValueError(f'{first} has shape {shape}, not [2, classes, height, width]')
  partial = folder.with_name(f'{folder.name}.partial')
  made_of = {'images': len(records), 'data': str(records.folder), 'maps': str(maps.absolute())}
  made_of |= {'shape': list(shape)}
  origin = partial / 'origin.json'
  if not origin.exists() or json.loads(origin.read_text()) != made_of:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    folders.write(origin, json.dumps(made_of))
  keys = _array(partial / 'keys.npy', np.uint64, (len(records),))
  rows = _array(partial / 'maps.npy', np.float16, (len(records), *shape))
  chunks = (
    start + np.flatnonzero(keys[start : start + _CHUNK] == 0)
    for start in range(0, len(records), _CHUNK)
  )
  convert = functools.partial(_convert, records, maps, read, shape)
  for chunk, values, found in workers.results(convert, filter(len, chunks), count):
    rows[chunk] = values
    rows.flush()
    # A key that is there says that the map is on disk.
    keys[chunk] = found
    keys.flush()
  partial.rename(folder)
  return folder


def _convert(
  records: source.Source,
  maps: pathlib.Path,
  read: Callable[[pathlib.Path], Any],
  shape: tuple[int, ...],
  chunk: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, list[np.uint64]]:
  """Returns numbers of images, their maps, and the keys by which these are found."""
  values, keys = np.empty((len(chunk), *shape), np.float16), []
  for i, number in enumerate(map(int, chunk)):
    record = records[number]
    path = _map_of(record, maps)
    found = np.asarray(read(path))
    if found.shape != shape:
      raise ValueError(
        f'{path} has shape {found.shape}, and the first, {_map_of(records[0], maps)}, {shape}: '
        'mend what is wrong, and repeat'
      )
    values[i] = found
    keys.append(key(record.image))
  return chunk, values, keys


def _array(path: pathlib.Path, dtype: DTypeLike, shape: Sequence[int]) -> np.memmap:
  """Opens an array on disk, which is made of zeros where it is not."""
  if not path.exists():
    begun = path.with_suffix('.begun')
    np.lib.format.open_memmap(begun, 'w+', dtype, tuple(shape)).flush()
    begun.rename(path)
  return np.lib.format.open_memmap(path, 'r+')


def _map_of(record: Any, maps: pathlib.Path) -> pathlib.Path:
  """Returns the file of an image's map."""
  stem = pathlib.PurePath(record.file_name).stem
  if not stem:
    raise ValueError(f'record {record.name} has no file name by which a map could be found')
  places = [maps / stem.split('_')[0] / f'{stem}.pt', maps / f'{stem}.pt']
  path = next((p for p in places if p.is_file()), None)
  if path is None:
    raise FileNotFoundError(f'record {record.name}, {stem}, has no map: {places[0]} is missing')
  return path
