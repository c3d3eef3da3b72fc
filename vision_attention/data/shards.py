"""Large data sets written shard by shard, by several processes, kill-proof, without TensorFlow.

The work is cut into units, each of which becomes one file per split. A finished unit is recorded
beside its files; a restart keeps it. The data set appears under its name when it is whole. What is
written depends on the units alone, not on the number of processes or on kills.
"""

import contextlib
import csv
import dataclasses
import fcntl
import functools
import io
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from vision_attention import errors, folders
from vision_attention.data import records, workers

_SKIPPED = ('file_name', 'what', 'why')


class PreparationError(RuntimeError):
  """A data set that could not be written; the message names the file."""


@dataclasses.dataclass(frozen=True)
class Written:
  """An example of a split, serialized."""

  split: str
  content: bytes


@dataclasses.dataclass(frozen=True)
class Remark:
  """An image that was left out or changed: which, `dropped` or `encoded anew`, and why."""

  file_name: str
  what: str
  why: str


Make = Callable[[Any], Iterator[Written | Remark]]


@dataclasses.dataclass(frozen=True)
class Spec:
  """What a data set is.

  Attributes:
    name: of the data set.
    version: `1.0.0`.
    features: by name, TFDS's feature connectors.
    labels: the feature that is the target.
    config: of the data set, or empty.
    description: of the data set.
    homepage: of the data set.
    files: text files to be kept beside it, by name.
    merged: splits whose files are joined, for they are small.
    file_format: of `records.FORMATS`.
    shard_bytes: about the size of a joined file.
  """

  name: str
  version: str
  features: Mapping[str, Any]
  labels: str = 'label'
  config: str = ''
  description: str = ''
  homepage: str = ''
  files: Mapping[str, str] = dataclasses.field(default_factory=dict)
  merged: tuple[str, ...] = ()
  file_format: str = 'array_record'
  shard_bytes: int = 2**28

  def folder(self, data_dir: pathlib.Path) -> pathlib.Path:
    """Returns where it lies."""
    return data_dir / self.name / self.config / self.version


def _sync(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def _explained(path: pathlib.Path) -> Iterator[None]:
  """Turns what the disk says into one error that names the file."""
  try:
    yield
  except (OSError, RuntimeError) as error:
    if isinstance(error, PreparationError):
      raise
    raise PreparationError(
      f"could not write {path}: {error}. Nothing stands under the data set's name; finished shards "
      'are kept, and the same command goes on with them'
    ) from error


class _Files:
  """Files of one split in a row, a new one when one is large; temporary until finished."""

  def __init__(self, stem: pathlib.Path, file_format: str, shard_bytes: int | None):
    self._stem, self._format, self._limit = stem, file_format, shard_bytes
    self._writer: Any = None
    self.parts: list[dict[str, Any]] = []

  def add(self, content: bytes) -> None:
    if self._writer is None:
      path = self._stem.with_name(f'{self._stem.name}-{len(self.parts):05d}')
      self.parts.append({'file': path.name, 'count': 0, 'bytes': 0})
      self._temporary = path.with_name(f'{path.name}.{os.getpid()}')
      with _explained(path):
        self._writer = records.writer(self._temporary, self._format)
    part = self.parts[-1]
    with _explained(self._stem.with_name(part['file'])):
      self._writer.write(content)
    part['count'] += 1
    part['bytes'] += len(content)
    if self._limit is not None and part['bytes'] >= self._limit:
      self.finish()

  def finish(self) -> list[dict[str, Any]]:
    if self._writer is not None:
      part = self.parts[-1]
      path = self._stem.with_name(part['file'])
      with _explained(path):
        self._writer.close()
        self._writer = None
        _sync(self._temporary)
        if self._format == 'array_record':
          found = len(records.reader(self._temporary, self._format))
          if found != part['count']:
            raise OSError(f'it holds {found} of {part["count"]} records')
        part['size'] = self._temporary.stat().st_size
        self._temporary.replace(path)
    return self.parts


def _run_unit(work: pathlib.Path, make: Make, file_format: str, unit: tuple[int, Any]) -> None:
  """Writes the files of a unit, which is a number and a payload, and last the record of it."""
  number, payload = unit
  files: dict[str, _Files] = {}
  remarks = []
  for found in make(payload):
    if isinstance(found, Remark):
      remarks.append(dataclasses.astuple(found))
      continue
    if found.split not in files:
      files[found.split] = _Files(work / f'unit-{number:06d}-{found.split}', file_format, None)
    files[found.split].add(found.content)
  parts = {split: mine.finish() for split, mine in files.items()}
  with _explained(work / f'unit-{number:06d}.json'):
    folders.write(
      work / f'unit-{number:06d}.json', json.dumps({'parts': parts, 'remarks': remarks})
    )


def _done(work: pathlib.Path, number: int) -> bool:
  path = work / f'unit-{number:06d}.json'
  if not path.exists():
    return False
  parts = [p for parts in json.loads(path.read_text())['parts'].values() for p in parts]
  return all(
    (work / part['file']).exists() and (work / part['file']).stat().st_size == part['size']
    for part in parts
  )


def _run(work: pathlib.Path, units: Iterable[Any], make: Make, spec: Spec, count: int) -> int:
  """Runs what is not finished in `count` processes; returns the number of units."""
  number = -1

  def unfinished() -> Iterator[tuple[int, Any]]:
    nonlocal number
    for number, payload in enumerate(units):
      if not _done(work, number):
        yield number, payload

  run = functools.partial(_run_unit, work, make, spec.file_format)
  for _ in workers.results(run, unfinished(), count):
    pass
  return number + 1


def _join(work: pathlib.Path, split: str, parts: list[dict[str, Any]], spec: Spec):
  """Copies many small files into few."""
  joined = _Files(work / f'joined-{split}', spec.file_format, spec.shard_bytes)
  for part in parts:
    source = records.reader(work / part['file'], spec.file_format)
    for i in range(len(source)):
      joined.add(source[i])
  return joined.finish()


def _collect(work: pathlib.Path, count: int, spec: Spec) -> dict[str, Any]:
  """Returns all units' files and remarks, joined where asked for; recorded when complete."""
  splits: dict[str, list[dict[str, Any]]] = {}
  remarks: list[list[str]] = []
  for number in range(count):
    unit = json.loads((work / f'unit-{number:06d}.json').read_text())
    remarks += unit['remarks']
    for split, parts in unit['parts'].items():
      splits.setdefault(split, []).extend(parts)
  for split in spec.merged:
    if split in splits:
      splits[split] = _join(work, split, splits[split], spec)
  if not splits:
    raise ValueError(f'{spec.name} has no images')
  found = {'splits': dict(sorted(splits.items())), 'remarks': remarks}
  with _explained(work / 'complete.json'):
    folders.write(work / 'complete.json', json.dumps(found))
  return found


def _metadata(folder: pathlib.Path, found: dict[str, Any], spec: Spec) -> None:
  import tensorflow_datasets as tfds

  infos = [
    records.split_info(
      spec.name,
      split,
      [part['count'] for part in parts],
      sum(part['bytes'] for part in parts),
      folder,
      spec.file_format,
    )
    for split, parts in found['splits'].items()
  ]
  core: Any = tfds.core
  identity = core.dataset_info.DatasetIdentity(
    name=spec.name,
    version=tfds.core.Version(spec.version),
    data_dir=os.fspath(folder),
    module_name='',
    config_name=spec.config or None,
  )
  info = tfds.core.DatasetInfo(
    builder=identity,
    description=spec.description,
    features=tfds.features.FeaturesDict(dict(spec.features)),
    supervised_keys=('image', spec.labels),
    homepage=spec.homepage or None,
  )
  info.set_file_format(spec.file_format)
  info.set_splits(core.splits.SplitDict(infos))
  info.write_to_directory(folder)


def _finish(work: pathlib.Path, found: dict[str, Any], spec: Spec) -> pathlib.Path:
  """Gives the files their names and writes what TFDS reads; may be done again after a kill."""
  folder = work / spec.version
  with _explained(folder):
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
      if f'.{spec.file_format}-' not in path.name:
        path.unlink()  # metadata of a call that was killed, perhaps half of it
    for split, parts in found['splits'].items():
      for i, part in enumerate(parts):
        name = f'{spec.name}-{split}.{spec.file_format}-{i:05d}-of-{len(parts):05d}'
        if (work / part['file']).exists():
          (work / part['file']).replace(folder / name)
        elif not (folder / name).exists():
          raise FileNotFoundError(f'neither {work / part["file"]} nor {folder / name} is there')
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows([_SKIPPED, *found['remarks']])
    for name, content in {'remarks.csv': text.getvalue(), **spec.files}.items():
      folders.write(folder / name, content)
    _metadata(folder, found, spec)
    for path in folder.iterdir():
      _sync(path)
    _sync(folder)
  return folder


def check_local(data_dir: pathlib.Path) -> None:
  """Raises PreparationError for a place that is no folder of this machine."""
  if str(data_dir).startswith(('gs:', 's3:')):
    raise PreparationError(
      f'{data_dir}: data sets are prepared on a local disk; copy the finished folder to the bucket'
    )


def refuse_existing(spec: Spec, data_dir: pathlib.Path, overwrite: bool) -> None:
  """Raises what `build` raises before any work."""
  errors.check_choice('file_format', spec.file_format, records.FORMATS)
  check_local(data_dir)
  target = spec.folder(data_dir)
  if target.exists() and not overwrite:
    work = target.parent / f'.{spec.version}.unfinished'
    if work.exists() and not _cleared(work, spec):
      raise FileExistsError(
        f'{target} exists, and {work} is what is done of its replacement: go on with that by '
        '--overwrite, or delete it'
      )
    raise FileExistsError(f'{target} exists: pass --overwrite to replace it')


def _cleared(work: pathlib.Path, spec: Spec) -> bool:
  """Removes a folder of work that has given away all that it held, if nobody works there.

  A kill came between the last two steps of `build`.
  """
  if not (work / 'complete.json').exists():
    return False
  with (work / 'lock').open('w') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return False
    splits = json.loads((work / 'complete.json').read_text())['splits']
    parts = [work / part['file'] for parts in splits.values() for part in parts]
    if (work / spec.version).exists() or any(path.exists() for path in parts):
      return False
    shutil.rmtree(work)
  return True


def build(
  spec: Spec,
  data_dir: pathlib.Path,
  units: Callable[[], Iterable[Any]],
  make: Make,
  *,
  source: Any,
  workers: int = 0,
  overwrite: bool = False,
) -> pathlib.Path:
  """Writes a data set, going on where a killed call of the same stopped.

  Args:
    spec: of the data set.
    data_dir: TFDS's folder of data sets.
    units: returns the units' payloads in order, always the same; sent to processes.
    make: a function of a module (or a partial of one) that yields a payload's examples.
    source: what the units come from, to be written as JSON: work on another is not gone on with.
    workers: processes; 0 for this one.
    overwrite: whether a data set of that name is replaced.

  Returns:
    The data set's folder.

  Raises:
    FileExistsError: if it exists already.
    PreparationError: if a file cannot be written, another process does it, or unfinished work there
      is of another source.
  """
  refuse_existing(spec, data_dir, overwrite)
  target = spec.folder(data_dir)
  work = target.parent / f'.{spec.version}.unfinished'
  with _explained(work):
    work.mkdir(parents=True, exist_ok=True)
    lock = (work / 'lock').open('w')
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise PreparationError(f'another process is writing {target}') from error
    plan = json.dumps([source, spec.name, spec.config, spec.file_format, spec.shard_bytes])
    kept = (work / 'plan.json').exists() and (work / 'plan.json').read_text() == plan
    if not kept and next(work.glob('unit-*.json'), None):
      raise PreparationError(
        f'{work} holds unfinished work of other archives or options: delete it, or repeat that'
      )
    if not kept:
      with _explained(work / 'plan.json'):
        folders.write(work / 'plan.json', plan)
    if (work / 'complete.json').exists():
      found = json.loads((work / 'complete.json').read_text())
    else:
      found = _collect(work, _run(work, units(), make, spec, workers), spec)
    folder = _finish(work, found, spec)
    if target.exists():
      shutil.rmtree(target)
    folder.rename(target)
    _sync(target.parent)
    shutil.rmtree(work)
  return target
