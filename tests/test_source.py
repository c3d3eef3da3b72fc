"""Reading records: two formats that give the same, indices that are kept, faults that are named."""

import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys

import fsspec
import numpy as np
import pytest
from etils import epath
from etils.epath import backend, gpath
from fsspec.implementations import dirfs, local

from tests import archives, inputs, launcher
from vision_attention.data import imagenet, pipeline, records, source, tfrecord

pytestmark = pytest.mark.fast
SYNSETS = ('n01440764', 'n02105855', 'n15075141')


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv(tfrecord.CACHE, str(tmp_path / 'cache'))
  return tmp_path / 'cache/tfrecord'


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """The same data set in both formats, in several files."""
  folder = tmp_path_factory.mktemp('data')
  archives.imagenet2012(folder, SYNSETS)
  for file_format in records.FORMATS:
    where = folder / file_format
    imagenet.imagenet2012(folder, where, file_format=file_format, shard_bytes=20_000, partial=True)
  return folder


def _config(data_dir, **changes):
  values = {
    'name': 'imagenet2012',
    'eval_split': 'validation[1:6]',
    'train_ops': ('random_resized_crop(16)', 'flip', 'rand_augment(2, 9)'),
  }
  return inputs.config(data_dir, **(values | changes))


def _take(data_dir, start, count):
  stream = pipeline.train_batches(_config(data_dir), seed=1, batch_size=4, start_step=start)
  return [next(stream) for _ in range(count)]


def _equal(a, b):
  for mine, theirs in zip(a, b, strict=True):
    assert mine.keys() == theirs.keys()
    for key in mine:
      np.testing.assert_array_equal(mine[key], theirs[key])


def _copy(prepared, file_format, tmp_path):
  shutil.copytree(prepared / file_format, tmp_path / 'copy')
  folder = tmp_path / 'copy/imagenet2012/5.1.0'
  return tmp_path / 'copy', sorted(folder.glob('*-train*'))


def test_both_formats_give_the_same_batches_also_after_a_resume(prepared):
  whole = _take(prepared / 'array_record', 0, 9)  # two passes
  _equal(whole, _take(prepared / 'tfrecord', 0, 9))
  _equal(whole[5:], _take(prepared / 'tfrecord', 5, 4))
  _equal(
    *(
      list(pipeline.eval_batches(_config(prepared / file_format), batch_size=2))
      for file_format in records.FORMATS
    )
  )


def test_a_record_with_a_changed_byte_is_known_by_its_checksum(file):
  content = bytearray(file.read_bytes())
  content[12] ^= 1
  file.write_bytes(content)
  read = tfrecord.TfRecords(str(file))
  with pytest.raises(tfrecord.BrokenRecordError, match=r'x\.tfrecord: the record at byte 0 '):
    read[0]
  assert read[2] == b'three' * 100


@pytest.mark.parametrize('file_format', records.FORMATS)
def test_a_broken_record_is_skipped_where_corrupt_ones_are(prepared, file_format, tmp_path):
  data_dir, files = _copy(prepared, file_format, tmp_path)
  source._open.cache_clear()
  image = source.Source('imagenet2012', 'train', str(data_dir))[1].image
  source._open.cache_clear()
  content = bytearray(files[0].read_bytes())
  # What is no marker of a JPEG: the image would be decoded, to another one.
  content[content.find(image[-400:-300])] ^= 1
  files[0].write_bytes(content)
  read = source.Source('imagenet2012', 'train', str(data_dir))
  with pytest.raises(tfrecord.BrokenRecordError, match='record 1 of'):
    pipeline.Decoded(read, 'raise')[1]
  decoded = pipeline.Decoded(read, 'skip')
  assert decoded[1]['corrupt'] == 1
  assert decoded[1]['label'] == decoded[2]['label']
  assert decoded[0]['corrupt'] == 0


def test_a_place_that_takes_no_index_is_no_reason_to_stop(file, tmp_path, monkeypatch, caplog):
  (tmp_path / 'taken').write_text('a file, where a folder is wanted')
  monkeypatch.setenv(tfrecord.CACHE, str(tmp_path / 'taken'))
  assert tfrecord.TfRecords(str(file))[0] == b'one'
  assert 'made anew by every process' in caplog.text


@pytest.fixture
def file(tmp_path):
  path = tmp_path / 'x.tfrecord'
  writer = tfrecord.Writer(str(path))
  for record in (b'one', b'', b'three' * 100):
    writer.write(record)
  writer.close()
  return path


def test_an_index_is_built_once_and_again_when_the_file_changes(file, cache, monkeypatch):
  expected = [b'one', b'', b'three' * 100]
  read = lambda: [r[i] for r in [tfrecord.TfRecords(str(file))] for i in range(len(r))]
  assert read() == expected
  (index,) = cache.iterdir()
  scans, scan = [], tfrecord._scan
  monkeypatch.setattr(tfrecord, '_scan', lambda *args: scans.append(args) or scan(*args))
  assert read() == expected
  assert not scans
  stat = file.stat()
  content = file.read_bytes()
  file.write_bytes(content + content)
  os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  assert read() == expected * 2, 'another size'
  file.write_bytes(content)
  os.utime(file, ns=(0, 10**9))
  read()
  os.utime(file, ns=(0, 3 * 10**9))
  assert read() == expected, 'another time'
  assert len(scans) == 3
  assert list(cache.iterdir()) == [index]


@pytest.mark.parametrize('harm', ['cut', 'cut header', 'changed', 'changed header'])
def test_a_broken_index_is_named_with_the_byte(file, cache, harm):
  tfrecord.TfRecords(str(file))
  (index,) = cache.iterdir()
  content = bytearray(index.read_bytes())
  if harm == 'changed':
    content[-3] ^= 1
  elif harm == 'changed header':
    content[0] ^= 1
  else:
    del content[20 if 'header' in harm else -5 :]
  index.write_bytes(content)
  with pytest.raises(tfrecord.BrokenDataError, match=rf'{index.name} of .*x\.tfrecord .* byte \d+'):
    tfrecord.TfRecords(str(file))
  index.unlink()
  assert len(tfrecord.TfRecords(str(file))) == 3


def test_a_broken_tfrecord_file_is_named_with_the_byte(file, cache):
  content = file.read_bytes()
  file.write_bytes(content[:-3])
  with pytest.raises(tfrecord.BrokenDataError, match=r'x\.tfrecord is truncated: .* byte 35 '):
    tfrecord.TfRecords(str(file))
  file.write_bytes(content[:40])
  with pytest.raises(tfrecord.BrokenDataError, match='truncated at byte 35, in the header'):
    tfrecord.TfRecords(str(file))
  file.write_bytes(content[:19] + struct.pack('<Q', 5) + content[27:])
  with pytest.raises(tfrecord.BrokenDataError, match='corrupt at byte 19'):
    tfrecord.TfRecords(str(file))
  assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize('file_format', records.FORMATS)
def test_broken_files_of_a_data_set_are_named(prepared, file_format, tmp_path):
  data_dir, files = _copy(prepared, file_format, tmp_path)
  source._open.cache_clear()
  whole = files[0].read_bytes()
  files[0].write_bytes(whole[: len(whole) // 2])
  with pytest.raises(tfrecord.BrokenDataError, match=files[0].name):
    _take(data_dir, 0, 5)
  files[0].write_bytes(files[1].read_bytes() if file_format == 'tfrecord' else whole[:0])
  lengths = source.Source('imagenet2012', 'train', str(data_dir))._parts
  if file_format == 'array_record' or lengths[0][1] != lengths[1][1]:
    with pytest.raises(tfrecord.BrokenDataError, match=files[0].name):
      _take(data_dir, 0, 5)
  files[0].unlink()
  with pytest.raises(source.MissingDataError, match=rf'lacks 1 of the .*{files[0].name}'):
    pipeline.dataset_info(_config(data_dir))


def test_a_corrupt_record_is_named(prepared, tmp_path):
  data_dir, files = _copy(prepared, 'array_record', tmp_path)
  source._open.cache_clear()
  image = source.Source('imagenet2012', 'train', str(data_dir))[1].image
  source._open.cache_clear()
  content = bytearray(files[0].read_bytes())
  at = content.find(image[-400:-300])
  assert at > 0, 'JPEGs are not compressed again'
  content[at] ^= 255
  files[0].write_bytes(content)
  read = source.Source('imagenet2012', 'train', str(data_dir))
  assert read[0].image
  with pytest.raises(tfrecord.BrokenDataError, match=rf'record 1 of .*{files[0].name} cannot be'):
    read[1]
  with pytest.raises(tfrecord.BrokenDataError, match=rf'record 1 of .*{files[0].name} cannot be'):
    _take(data_dir, 0, 5)


def test_places_that_cannot_be_reached_are_named(monkeypatch):
  def refuse(*_):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(type(epath.Path('/')), 'glob', refuse)
  with pytest.raises(
    source.MissingDataError, match=r'/nowhere/imagenet2012 cannot be read: .*Perm'
  ):
    source.find('imagenet2012', '/nowhere')


def test_a_process_may_open_all_files(monkeypatch):
  limits = []
  monkeypatch.setattr(resource, 'getrlimit', lambda _: (1024, 8192))
  monkeypatch.setattr(resource, 'setrlimit', lambda _, limit: limits.append(limit))
  source._allow_open_files(500)
  assert not limits
  source._allow_open_files(5000)
  assert limits == [(5512, 8192)]
  with pytest.raises(ValueError, match='the limit is 8192'):
    source._allow_open_files(8000)


@pytest.fixture
def bucket(prepared, tmp_path, monkeypatch):
  """A bucket whose files are those of a folder."""
  (tmp_path / 'root').mkdir()
  (tmp_path / 'root/bucket').symlink_to(prepared)
  files = dirfs.DirFileSystem(str(tmp_path / 'root'), local.LocalFileSystem())
  strip = files._join
  join = lambda path: (
    [join(p) for p in path] if isinstance(path, list) else strip(str(path).removeprefix('gs://'))
  )
  monkeypatch.setattr(files, '_join', join)
  opened = []
  real = files.open
  monkeypatch.setattr(files, 'open', lambda p, *a, **k: opened.append(p) or real(p, *a, **k))
  monkeypatch.setattr(fsspec, 'filesystem', lambda *a, **k: files)
  monkeypatch.setattr(gpath, '_is_tf_installed', lambda: False)
  backend.fsspec_backend._get_filesystem.cache_clear()
  yield opened
  backend.fsspec_backend._get_filesystem.cache_clear()


def test_a_bucket_of_tfrecords_gives_the_same_batches(bucket, prepared, cache):
  source._open.cache_clear()
  _equal(_take(prepared / 'tfrecord', 3, 3), _take('gs://bucket/tfrecord', 3, 3))
  folder = source.find('imagenet2012', 'gs://bucket/tfrecord')
  assert str(folder) == 'gs://bucket/tfrecord/imagenet2012/5.1.0'
  shards = [p for p in folder.iterdir() if '-train' in p.name]
  assert len(shards) > 1
  assert {tfrecord.index_path(p) for p in shards} <= set(cache.iterdir())
  assert any('-train' in str(p) for p in bucket)
  with pytest.raises(source.MissingDataError, match=r'is not in gs://bucket/none/imagenet2012'):
    source.find('imagenet2012', 'gs://bucket/none')


def test_a_bucket_without_its_library_is_said(monkeypatch):
  def absent(*_, **__):
    raise ImportError('Please install gcsfs to access Google Storage')

  monkeypatch.setattr(fsspec, 'filesystem', absent)
  monkeypatch.setattr(gpath, '_is_tf_installed', lambda: False)
  backend.fsspec_backend._get_filesystem.cache_clear()
  with pytest.raises(source.MissingDataError, match='cannot be read: Please install gcsfs'):
    source.find('imagenet2012', 'gs://bucket/none')


def test_a_worker_has_imported_what_its_threads_read_with(prepared, tmp_path):
  # Threads that begin to import TFDS together can wait for each other forever.
  file = tmp_path / 'source'
  found = source.Source('imagenet2012', 'validation', str(prepared / 'array_record'))
  file.write_bytes(pickle.dumps(found))
  code = (
    'import pathlib, pickle, sys; from vision_attention.data import source; '
    'assert "tensorflow_datasets" not in sys.modules; '
    'pickle.loads(pathlib.Path(sys.argv[1]).read_bytes()); '
    'assert source._example_type.cache_info().currsize == 1'
  )
  subprocess.run([sys.executable, '-c', code, str(file)], check=True, timeout=launcher.PATIENCE)
