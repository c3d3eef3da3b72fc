"""ImageNet-21k: classes, splits and bytes from an archive of archives, whatever interrupts it."""

import collections
import fcntl
import functools
import gzip
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests import archives, launcher
from vision_attention.data import classes, imagenet21k, imagenet_classes, shards, source, tar_files

pytestmark = pytest.mark.fast
# The archives of these tests are small.
_imagenet21k = functools.partial(imagenet21k.imagenet21k, partial=True)
ROOT = pathlib.Path(__file__).parents[1]
# The first and last are also ImageNet's; the archive's order is another.
SYNSETS = ('n15075141', 'n00004475', 'n01440764', 'n03931045', 'n09999999', 'n02084071')


@pytest.fixture(scope='module')
def images():
  made = iter(archives.photographs(96))
  found = {s: {f'{s}_{i}.JPEG': next(made) for i in range(15)} for s in SYNSETS}
  first = found['n00004475']
  first['n00004475_0.JPEG'] = first['n00004475_0.JPEG'][:-300]
  first['n00004475_1.JPEG'] = archives.encode('RGB', 'JPEG', (24, 64))
  first['n00004475_2.JPEG'] = archives.encode('CMYK', 'JPEG')
  first['n00004475_3.JPEG'] = archives.encode('L', 'JPEG')
  first['n00004475_4.JPEG'] = b'<html>'
  return found


@pytest.fixture(scope='module')
def plain(images, tmp_path_factory):
  path = tmp_path_factory.mktemp('archive') / 'winter21_whole.tar'
  path.write_bytes(archives.tar(archives.of_classes(images)))
  return path


@pytest.fixture(scope='module')
def prepared(plain, tmp_path_factory):
  data_dir = tmp_path_factory.mktemp('data')
  _imagenet21k(plain, data_dir, kind='winter21', validation=0.2, shard_bytes=60_000)
  return data_dir


def _bytes(folder):
  return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def _records(data_dir, split, kind='winter21'):
  read = source.Source(f'imagenet21k/{kind}', split, str(data_dir))
  return read, [read[i] for i in range(len(read))]


def test_images_labels_and_splits(images, prepared):
  folder = source.find('imagenet21k/winter21', str(prepared))
  assert len(list(folder.glob('*-train*'))) == 4
  read, train = _records(prepared, 'train')
  _, validation = _records(prepared, 'validation')
  assert read.label_names == tuple(sorted(SYNSETS))
  assert read.num_classes == 6
  expected = {
    (content, synset)
    for synset, files in images.items()
    for name, content in files.items()
    if name not in {f'n00004475_{i}.JPEG' for i in (0, 1, 2, 4)}
  }
  found = [(r.image, read.label_names[r.label]) for r in train + validation]
  assert len(found) == 6 * 15 - 3
  assert expected - set(found) == set()
  info: Any = tfds.builder_from_directory(str(folder))
  raw = info.as_data_source('validation', decoders={'image': tfds.decode.SkipDecoding()})
  for example in raw:
    name = example['file_name'].decode()
    assert name.startswith(example['synset'].decode())
    assert imagenet21k.is_validation(name, 0.2)
  assert 5 < len(validation) < 35
  remarks = (folder / 'remarks.csv').read_text().splitlines()
  assert len(remarks) == 5
  kinds = sorted(
    ','.join(line.split(',')[:2]) + ':' + line.split(',')[2][:7] for line in remarks[1:]
  )
  assert kinds == [
    'n00004475_0.JPEG,dropped:corrupt',
    'n00004475_1.JPEG,dropped:small: ',
    'n00004475_2.JPEG,encoded anew:JPEG CM',
    'n00004475_4.JPEG,dropped:corrupt',
  ]


def test_a_release_must_be_named(prepared, tmp_path):
  with pytest.raises(source.MissingDataError, match='winter21: name one, as imagenet21k/winter21'):
    source.find('imagenet21k', str(prepared))
  with pytest.raises(
    source.MissingDataError, match=r'prepare_data\.py imagenet21k --classes=fall11'
  ):
    source.find('imagenet21k/fall11', str(prepared))
  with pytest.raises(source.MissingDataError, match='--classes=winter21'):
    source.find('imagenet21k', str(tmp_path))


def test_the_thousand_classes_are_found_again(prepared):
  folder = source.find('imagenet21k/winter21', str(prepared))
  indices = json.loads((folder / 'imagenet2012_indices.json').read_text())
  assert indices['num_classes'] == 6
  assert tuple(indices['classes']) == imagenet_classes.imagenet2012()
  known = {i: n for i, n in enumerate(indices['indices']) if n >= 0}
  assert known == {0: 1, 999: 5}
  assert classes.names(str(folder / 'synsets.txt')) == tuple(sorted(SYNSETS))


def test_class_maps():
  counts = {'n00000002': 501, 'n00000001': 500, 'n09999999': 700}
  assert imagenet_classes.imagenet21k('winter21', counts) == tuple(sorted(counts))
  assert imagenet_classes.imagenet21k('21k_p', counts) == ('n00000002', 'n09999999')
  google = imagenet_classes.imagenet21k('google21843', counts)
  assert google == ('n00000001', 'n00000002', 'n03931044', 'n09859684', 'n09999999')
  with pytest.raises(ValueError, match='more than 500'):
    imagenet_classes.imagenet21k('21k_p', {'n00000001': 500})
  assert imagenet_classes.imagenet2012_among(['n1', 'n2']) == [-1] * 1000
  assert len(imagenet_classes.imagenet2012()) == 1000
  counted = collections.Counter(imagenet_classes.validation_labels())
  assert set(counted.values()) == {50}
  assert set(counted) == set(imagenet_classes.imagenet2012())


def test_the_share_of_validation_is_kept_for_every_release():
  chosen = [imagenet21k.is_validation(f'n00004475_{i}.JPEG', 0.1) for i in range(4000)]
  assert 300 < sum(chosen) < 500
  assert not any(imagenet21k.is_validation(f'{i}', 0.0) for i in range(100))


def test_classes_without_images_and_rare_ones(images, plain, tmp_path, monkeypatch):
  monkeypatch.setattr(imagenet_classes, '_MANY', 14)
  _imagenet21k(plain, tmp_path, kind='google21843', shard_bytes=2**20)
  read, train = _records(tmp_path, 'train', 'google21843')
  assert (read.num_classes, read.label_names[3]) == (8, 'n03931044')
  assert not {3, read.label_names.index('n09859684')} & {r.label for r in train}
  few = {**images, 'n00004475': dict(list(images['n00004475'].items())[:14])}
  path = tmp_path / 'fall11_whole.tar'
  path.write_bytes(archives.tar(archives.of_classes(few)))
  _imagenet21k(path, tmp_path, kind='21k_p')
  assert _records(tmp_path, 'train', '21k_p')[0].label_names == tuple(sorted(SYNSETS))[1:]


def test_a_compressed_archive_and_processes_give_the_same_bytes(plain, prepared, tmp_path):
  path = tmp_path / 'winter21_whole.tar.gz'
  path.write_bytes(gzip.compress(plain.read_bytes(), 1))
  options: dict[str, Any] = {'kind': 'winter21', 'validation': 0.2, 'shard_bytes': 60_000}
  folder = _imagenet21k(path, tmp_path, workers=2, **options)
  mine, first = _bytes(folder), _bytes(source.find('imagenet21k/winter21', str(prepared)))
  # The description names the archive.
  assert mine.pop('dataset_info.json') != first.pop('dataset_info.json')
  assert mine == first
  assert sorted(p.name for p in folder.parent.iterdir()) == ['1.0.0']
  cut = path.read_bytes()
  for end in (len(cut) // 2, len(cut) - 4):
    path.write_bytes(cut[:end])
    with pytest.raises(tar_files.ArchiveError, match=r'winter21_whole\.tar\.gz .*byte \d+'):
      _imagenet21k(path, tmp_path / 'cut', **options)
  assert not list((tmp_path / 'cut').rglob('1.0.0'))


_CHILD = """
import os, pathlib, signal, sys
from vision_attention.data import imagenet21k
writes, limit = [], int(sys.argv[3])
def counted(name):
  real = getattr(os, name)
  def call(*args, **kwargs):
    writes.append(name)
    if len(writes) > limit:
      os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
  setattr(os, name, call)
for name in ('replace', 'rename', 'fsync', 'mkdir', 'unlink'):
  counted(name)
imagenet21k.imagenet21k(
  pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), kind='winter21', validation=0.2,
  shard_bytes=60_000, file_format='tfrecord', partial=True,
)
"""


def _forked(plain, data_dir, limit):
  """Prepares in a child that kills itself before its operation number `limit` on files."""
  child = os.fork()
  if child == 0:
    sys.argv = ['', str(plain), str(data_dir), str(limit)]
    sys.stdout = open(os.devnull, 'w')  # noqa: SIM115
    try:
      exec(_CHILD, {})
      os._exit(0)
    except BaseException:
      os._exit(1)
  return os.waitpid(child, 0)[1]


@pytest.mark.filterwarnings('ignore:.*fork.*:DeprecationWarning', 'ignore:.*fork.*:RuntimeWarning')
def test_killed_before_any_operation_on_files_it_ends_the_same(plain, tmp_path):
  options = {'validation': 0.2, 'shard_bytes': 60_000, 'file_format': 'tfrecord'}
  first = _imagenet21k(plain, tmp_path, kind='winter21', **options)
  name = first.relative_to(tmp_path)
  kills = 0
  for limit in range(1, 200, 4):
    data_dir = tmp_path / str(limit)
    status = _forked(plain, data_dir, limit)
    if os.WIFSIGNALED(status):
      kills += 1
      if (data_dir / name).exists():
        assert _bytes(data_dir / name) == _bytes(first), f'killed at {limit}: not whole'
      else:
        finished = len(list(data_dir.rglob('unit-*.json')))
        assert _forked(plain, data_dir, 10**9) == 0
        assert finished <= 4
    else:
      assert status == 0
    assert _bytes(data_dir / name) == _bytes(first), f'killed at {limit}'
    if not os.WIFSIGNALED(status):
      break
  assert kills > 8


def test_killed_with_its_processes_it_goes_on_where_it_was(plain, prepared, tmp_path):
  command = [
    sys.executable, 'tools/prepare_data.py', 'imagenet21k', f'--input={plain}',
    f'--data_dir={tmp_path}', '--workers=2', '--shard_megabytes=0', '--validation=0.2',
    '--partial',
  ]  # fmt: skip
  process = subprocess.Popen(command, cwd=ROOT)
  work = tmp_path / 'imagenet21k/winter21/.1.0.0.unfinished'
  deadline = time.monotonic() + 60
  while not list(work.glob('unit-*.json')) and time.monotonic() < deadline:
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  finished = {p: p.stat().st_mtime_ns for p in work.glob('unit-00000[0-9]-train-*[0-9]')}
  assert finished
  subprocess.run(command, cwd=ROOT, check=True, timeout=launcher.PATIENCE)
  read, train = _records(tmp_path, 'train')
  _, expected = _records(prepared, 'train')
  assert sorted(r.image for r in train) == sorted(r.image for r in expected)
  assert np.bincount([r.label for r in train]).tolist() == read.class_counts().tolist()


def test_unfinished_work_of_another_archive_is_not_gone_on_with(plain, tmp_path, monkeypatch):
  made, calls = imagenet21k.make, []

  def stop(group, **options):
    calls.append(group)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return made(group, **options)

  monkeypatch.setattr(imagenet21k, 'make', stop)
  options = {'kind': 'winter21', 'shard_bytes': 60_000}
  with pytest.raises(KeyboardInterrupt):
    _imagenet21k(plain, tmp_path, **options)
  with pytest.raises(shards.PreparationError, match='other archives or options'):
    _imagenet21k(plain, tmp_path, seed=1, **options)
  _imagenet21k(plain, tmp_path, **options)
  assert [group.number for group in calls] == [0, 1, 1, 2, 3], 'a finished unit is not made again'


def test_only_one_process_writes_a_data_set(plain, tmp_path):
  work = tmp_path / 'imagenet21k/fall11/.1.0.0.unfinished'
  work.mkdir(parents=True)
  with (work / 'lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(shards.PreparationError, match='another process is writing'):
      _imagenet21k(plain, tmp_path, kind='fall11')
  _imagenet21k(plain, tmp_path, kind='fall11')


def test_what_cannot_be_done_is_said(plain, tmp_path):
  with pytest.raises(ValueError, match="did you mean 'winter21'"):
    _imagenet21k(plain, tmp_path, kind='winter2021')
  with pytest.raises(FileNotFoundError, match='there is no archive'):
    _imagenet21k(tmp_path / 'x.tar', tmp_path, kind='fall11')
  with pytest.raises(ValueError, match='is no share'):
    _imagenet21k(plain, tmp_path, kind='fall11', validation=1.0)
  with pytest.raises(shards.PreparationError, match='copy the finished folder to the bucket'):
    _imagenet21k(plain, pathlib.Path('gs://bucket/data'), kind='fall11')
  (tmp_path / 'x.tar').write_bytes(archives.tar({'cats.tar': archives.tar({})}))
  with pytest.raises(ValueError, match=r"'cats\.tar' is no archive of a class"):
    _imagenet21k(tmp_path / 'x.tar', tmp_path, kind='fall11')


def test_an_archive_of_other_classes_is_refused_under_the_official_name(plain, tmp_path):
  with pytest.raises(shards.PreparationError, match=r'6 classes of winter21 in .* and not 19,167'):
    imagenet21k.imagenet21k(plain, tmp_path, kind='winter21')
  assert not (tmp_path / 'imagenet21k/winter21/1.0.0').exists()
