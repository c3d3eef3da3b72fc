"""ImageNet and its test sets: from the official archives to what TFDS reads, image by image."""

import functools
import gzip
import io
import json
import resource
import tarfile
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tests import archives
from vision_attention.data import imagenet, imagenet_classes, records, shards, source, tar_files

pytestmark = pytest.mark.fast
# The archives of these tests are small.
_imagenet2012 = functools.partial(imagenet.imagenet2012, partial=True)
_evaluation_set = functools.partial(imagenet.evaluation_set, partial=True)
SYNSETS = ('n01440764', 'n02105855', 'n15075141')


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
  folder = tmp_path_factory.mktemp('official')
  return folder, archives.imagenet2012(folder, SYNSETS)


@pytest.fixture(scope='module')
def prepared(inputs, tmp_path_factory):
  data_dir = tmp_path_factory.mktemp('data')
  _imagenet2012(inputs[0], data_dir, shard_bytes=20_000)
  return data_dir


def _builder(name: str, data_dir: str) -> Any:
  return tfds.builder(name, data_dir=data_dir)


def _examples(builder, split):
  raw = builder.as_data_source(split=split, decoders={'image': tfds.decode.SkipDecoding()})
  return [raw[i] for i in range(len(raw))]


def test_tfds_reads_imagenet_by_its_own_builder(inputs, prepared):
  images = inputs[1]
  builder = _builder('imagenet2012', data_dir=str(prepared))
  read_only: Any = tfds.builder_from_directory(str(prepared / 'imagenet2012/5.1.0'))
  assert builder.info.features.keys() == read_only.info.features.keys()
  assert builder.info.version == '5.1.0'
  assert builder.info.features['label'].names == read_only.info.features['label'].names
  assert len(list((prepared / 'imagenet2012/5.1.0').glob('*train*'))) > 1
  order = []
  for split, count in (('train', 18), ('validation', 8)):
    for made in (builder, read_only):
      found = _examples(made, split)
      assert len(found) == made.info.splits[split].num_examples == count
      for example in found:
        name = example['file_name'].decode()
        content = example['image']
        order.append(name)
        synset = builder.info.features['label'].int2str(example['label'])
        if split == 'train':
          assert synset == name.split('_')[0]
        else:
          assert synset == imagenet_classes.validation_labels()[int(name[-13:-5]) - 1]
        if name not in ('n01440764_0.JPEG', 'n02105855_0.JPEG'):
          assert content == images[name]
  assert order[:18] == order[18:36] != sorted(order[:18])
  assert len(set(order)) == 26


def test_images_of_other_kinds_become_rgb_jpegs(inputs, prepared):
  read = source.Source('imagenet2012', 'train', str(prepared))
  features = {r.label: r for i in range(len(read)) if (r := read[i]).image[:0] == b''}
  assert set(features) == {imagenet_classes.imagenet2012().index(s) for s in SYNSETS}
  ours = {Image.open(io.BytesIO(read[i].image)).mode for i in range(len(read))}
  kinds = {Image.open(io.BytesIO(read[i].image)).format for i in range(len(read))}
  assert (ours, kinds) == ({'RGB'}, {'JPEG'})
  remarks = (prepared / 'imagenet2012/5.1.0/remarks.csv').read_text()
  assert 'n01440764_0.JPEG,encoded anew,JPEG CMYK' in remarks
  assert 'n02105855_0.JPEG,encoded anew,PNG RGB' in remarks
  image = Image.open(io.BytesIO(inputs[1]['n01440764_0.JPEG']))
  ink = np.asarray(image, np.int32)
  rgb = np.asarray(imagenet.rgb_from_cmyk(image))
  np.testing.assert_array_equal(rgb, (255 - ink[..., :3]) * (255 - ink[..., 3:]) // 255)
  assert np.abs(rgb.astype(int) - np.asarray(image.convert('RGB'), int)).max() <= 1


def test_bytes_do_not_depend_on_processes_and_formats_hold_the_same(inputs, prepared, tmp_path):
  again = _imagenet2012(inputs[0], tmp_path, shard_bytes=20_000, workers=2)
  first = prepared / 'imagenet2012/5.1.0'
  assert {p.name: p.read_bytes() for p in again.iterdir()} == {
    p.name: p.read_bytes() for p in first.iterdir()
  }
  assert [p.name for p in again.parent.iterdir()] == ['5.1.0']
  with pytest.raises(FileExistsError, match='--overwrite'):
    _imagenet2012(inputs[0], tmp_path)
  options = {'file_format': 'tfrecord', 'shard_bytes': 20_000}
  _imagenet2012(inputs[0], tmp_path, overwrite=True, **options)
  assert _builder('imagenet2012', data_dir=str(tmp_path)).info.file_format.value == 'tfrecord'
  for split in ('train', 'validation'):
    a = source.Source('imagenet2012', split, str(prepared))
    b = source.Source('imagenet2012', split, str(tmp_path))
    assert [(a[i].image, a[i].label) for i in range(len(a))] == [
      (b[i].image, b[i].label) for i in range(len(b))
    ]


def test_a_replacement_that_was_broken_off_is_kept(inputs, tmp_path, monkeypatch):
  """The same command without --overwrite leaves it alone; with it, goes on."""
  make = functools.partial(_imagenet2012, inputs[0], tmp_path, shard_bytes=20_000)
  make()

  def killed(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(shards, '_metadata', killed)
    with pytest.raises(KeyboardInterrupt):
      make(overwrite=True, seed=5)
  with pytest.raises(FileExistsError, match=r'unfinished is what is done of its replacement'):
    make()
  (work,) = tmp_path.glob('imagenet2012/.*.unfinished')
  before = {path.name for path in (work / '5.1.0').iterdir()}
  assert any('-train.array_record-' in name for name in before)
  folder = make(overwrite=True, seed=5)
  assert before <= {path.name for path in folder.iterdir()}
  assert not work.exists()


def test_a_full_disk_leaves_nothing_under_the_name(inputs, tmp_path):
  for file_format in records.FORMATS:
    options = {'file_format': file_format, 'shard_bytes': 20_000}
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, old[1]))
    try:
      with pytest.raises(shards.PreparationError, match=r'could not write .*unit-000000-train'):
        _imagenet2012(inputs[0], tmp_path / file_format, **options)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, old)
    with pytest.raises(source.MissingDataError, match=r'prepare_data\.py imagenet2012 --input'):
      source.find('imagenet2012', str(tmp_path / file_format))
    _imagenet2012(inputs[0], tmp_path / file_format, **options)
    assert len(source.Source('imagenet2012', 'train', str(tmp_path / file_format))) == 18


def test_what_is_unknown_is_refused(inputs, tmp_path):
  with pytest.raises(ValueError, match="did you mean 'topimages'"):
    _evaluation_set('imagenet_v2', tmp_path, tmp_path, variant='top-images')
  with pytest.raises(ValueError, match="did you mean 'tfrecord'"):
    _imagenet2012(inputs[0], tmp_path, file_format='tfrecords')


def test_archives_that_are_not_whole_are_named(inputs, tmp_path):
  with pytest.raises(FileNotFoundError, match=r'no ILSVRC2012_img_train\.tar in'):
    _imagenet2012(tmp_path, tmp_path)
  for name in (imagenet.TRAIN, imagenet.VALIDATION):
    (tmp_path / name).write_bytes((inputs[0] / name).read_bytes())
  whole = (tmp_path / imagenet.TRAIN).read_bytes()
  member = next(tar_files.members(tmp_path / imagenet.TRAIN))
  for end in (len(whole) // 2, member.offset + member.size + -member.size % 512):
    (tmp_path / imagenet.TRAIN).write_bytes(whole[:end])
    with pytest.raises(tar_files.ArchiveError, match=r'ILSVRC2012_img_train\.tar .*byte \d+'):
      _imagenet2012(tmp_path, tmp_path / 'data')
  assert not list((tmp_path / 'data/imagenet2012').glob('[0-9]*'))


def _evaluation_archives(folder):
  a, b = archives.photographs(2)
  sketch = {'sketch/n01440764/sketch_1.JPEG': a, 'sketch/n15075141/sketch_2.JPEG': b}
  (folder / 'ImageNet-Sketch.tar.gz').write_bytes(archives.tar(sketch, 'w:gz'))
  top = 'imagenetv2-matched-frequency-format-val'
  (folder / 'imagenetv2-matched-frequency.tar.gz').write_bytes(
    archives.tar({f'{top}/0/x.jpeg': a, f'{top}/999/y.jpeg': b}, 'w:gz')
  )
  for name in ('imagenet-a', 'imagenet-r'):
    files = {f'{name}/README.txt': b'', f'{name}/n01440764/1.jpg': a, f'{name}/n15075141/2.jpg': b}
    (folder / f'{name}.tar').write_bytes(archives.tar(files))


@pytest.mark.parametrize(
  ('name', 'files'),
  [
    ('imagenet_v2/matched-frequency', ('0/x.jpeg', '999/y.jpeg')),
    ('imagenet_a', ('1.jpg', '2.jpg')),
    ('imagenet_r', ('n01440764/1.jpg', 'n15075141/2.jpg')),
    ('imagenet_sketch', ('n01440764/sketch_1.JPEG', 'n15075141/sketch_2.JPEG')),
  ],
)
def test_tfds_reads_the_test_sets(name, files, tmp_path):
  _evaluation_archives(tmp_path)
  _evaluation_set(name.split('/')[0], tmp_path, tmp_path)
  builder = _builder(name, data_dir=str(tmp_path))
  fresh = _builder(name, data_dir=str(tmp_path / 'none'))
  assert builder.info.features.to_json() == fresh.info.features.to_json()
  assert builder.info.supervised_keys == fresh.info.supervised_keys
  found = _examples(builder, 'test')
  assert tuple(e['file_name'].decode() for e in found) == files
  assert [e['label'] for e in found] == [0, 999]
  assert [e['image'] for e in found] == archives.photographs(2)
  read = source.Source(name, 'test', str(tmp_path))
  assert (read.num_classes, read[1].label, read[1].labels) == (1000, 999, (999,))


def test_real_labels_are_any_number(inputs, tmp_path):
  folder = inputs[0]
  real = [[i, i + 1] if i % 3 else [] for i in range(8)]
  (folder / 'real.json').write_text(json.dumps(real))
  _evaluation_set('imagenet2012_real', folder, tmp_path)
  builder = _builder('imagenet2012_real', data_dir=str(tmp_path))
  fresh = _builder('imagenet2012_real', data_dir=str(tmp_path / 'none'))
  assert builder.info.features.to_json() == fresh.info.features.to_json()
  found = _examples(builder, 'validation')
  read = source.Source('imagenet2012_real', 'validation', str(tmp_path))
  assert (read.num_classes, read.label_names) == (1000, imagenet_classes.imagenet2012())
  for i, example in enumerate(found):
    assert list(example['real_label']) == real[i] == list(read[i].labels)
    original = builder.info.features['original_label'].int2str(example['original_label'])
    assert original == imagenet_classes.validation_labels()[i]
    assert read[i].label == (real[i] or [-1])[0]
  assert read.class_counts().sum() == sum(map(len, real))


@pytest.mark.parametrize('where', ['between members', 'in a header'])
def test_a_broken_tar_is_refused_compressed_or_not(tmp_path, where):
  """`tarfile` takes what it cannot read for the end, and the rest of the classes is gone."""
  members = {f'n0144076{i}/a.JPEG': bytes(1000) for i in range(3)}
  whole = archives.tar(members)
  begins = [whole.index(name.encode()) for name in members]
  broken = whole[: begins[1]] if where == 'between members' else bytearray(whole)
  if where == 'in a header':
    broken[begins[1] + 150] ^= 1  # in its checksum
  (tmp_path / 'a.tar').write_bytes(broken)
  (tmp_path / 'a.tar.gz').write_bytes(gzip.compress(bytes(broken)))
  for name in ('a.tar', 'a.tar.gz'):
    with pytest.raises(tar_files.ArchiveError):
      list(tar_files.stream(tmp_path / name))
  (tmp_path / 'b.tar.gz').write_bytes(gzip.compress(whole))
  assert [m.name for m in tar_files.stream(tmp_path / 'b.tar.gz')] == list(members)


def test_archives_that_are_not_whole_are_refused_under_the_official_name(inputs, tmp_path):
  with pytest.raises(
    shards.PreparationError, match=r'18 images in train of imagenet2012 and not 1,281,167: .*--part'
  ):
    imagenet.imagenet2012(inputs[0], tmp_path)
  assert not list(tmp_path.rglob('dataset_info.json'))
  _imagenet2012(inputs[0], tmp_path)
  _evaluation_archives(tmp_path)
  for name, counts in imagenet.COUNTS.items():
    if name in ('imagenet_v2', 'imagenet_a', 'imagenet_r', 'imagenet_sketch'):
      said = f'2 images in test of .*{counts["test"]:,}'
      with pytest.raises(shards.PreparationError, match=said):
        imagenet.evaluation_set(name, tmp_path, tmp_path)


def test_what_a_mac_leaves_in_an_archive_is_no_image(tmp_path):
  with tarfile.open(tmp_path / 'imagenet-r.tar', 'w') as tar:
    [photo] = archives.photographs(1)
    for name in ('n01440764/1.jpg', 'n01440764/._1.jpg', '__MACOSX/n01440764/1.jpg'):
      member = tarfile.TarInfo(f'imagenet-r/{name}')
      member.size = len(photo)
      tar.addfile(member, io.BytesIO(photo))
  _evaluation_set('imagenet_r', tmp_path, tmp_path)
  [example] = _examples(_builder('imagenet_r', data_dir=str(tmp_path)), 'test')
  assert example['file_name'] == b'n01440764/1.jpg'
