"""Label maps on disk: converted, found by image, and refused where they do not fit."""

import itertools
import zipfile

import numpy as np
import pytest

from tests import archives, inputs
from tools import prepare_data
from vision_attention import torch_file
from vision_attention.data import imagenet, label_maps, pipeline, source

pytestmark = pytest.mark.fast
SYNSETS = ('n01440764', 'n01443537')


def _integer(value):
  return b'J' + value.to_bytes(4, 'little')


def _text(value):
  return b'X' + len(value).to_bytes(4, 'little') + value.encode()


def _torch_file(path, values):
  """Writes half-precision numbers as `torch.save` does those of a permuted tensor."""
  stored = np.ascontiguousarray(np.moveaxis(values, 1, -1))
  strides = np.array(stored.strides)[[0, 3, 1, 2]] // 2
  numbers = lambda items: b'(' + b''.join(_integer(int(i)) for i in items) + b't'
  pid = _text('storage') + b'ctorch\nHalfStorage\n' + _text('0') + _text('cpu')
  pickled = b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(('
  pickled += pid + _integer(stored.size) + b'tQ' + _integer(0) + numbers(values.shape)
  pickled += numbers(strides) + b'\x89ccollections\nOrderedDict\n)RtR.'
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('map/data.pkl', pickled)
    archive.writestr('map/data/0', stored.tobytes())


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """ImageNet of two classes, and a map of each training image, by file name: folder and maps."""
  folder, given = tmp_path_factory.mktemp('data'), tmp_path_factory.mktemp('maps')
  archives.imagenet2012(folder, SYNSETS)
  imagenet.imagenet2012(folder, folder / 'sets', shard_bytes=20_000, partial=True)
  maps = {}
  for i, name in enumerate(f'{s}_{i}' for s in SYNSETS for i in range(6)):
    maps[name] = inputs.sparse_maps(1, (3, 3), 1000, seed=i)[0]
    if i % 2:
      _torch_file(given / f'{name}.pt', maps[name])
    else:
      (given / SYNSETS[i // 6]).mkdir(exist_ok=True)
      _torch_file(given / SYNSETS[i // 6] / f'{name}.pt', maps[name])
  arguments = ['', 'label_maps', f'--input={given}', f'--data_dir={folder / "sets"}', '--workers=0']
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('sys.argv', arguments)
    assert prepare_data.main() == 0
  return folder / 'sets', given, maps


def _config(prepared, **changes):
  values = {
    'name': 'imagenet2012',
    'eval_split': 'validation',
    'train_ops': ('flip', 'rand_augment(2, 9)', 'random_resized_crop(16)'),
    'label_maps': str(prepared[0] / 'label_maps/imagenet2012'),
  }
  return inputs.config(prepared[0], **(values | changes))


def test_a_map_is_found_by_its_image_in_any_split(prepared):
  folder, _, maps = prepared
  found = label_maps.LabelMaps(_config(prepared).label_maps, 'imagenet2012', 1000)
  assert len(found) == 12
  for split in ('train', 'train[3:8]'):
    for record in source.Source('imagenet2012', split, str(folder)):
      stem = record.file_name.removesuffix('.JPEG')
      np.testing.assert_array_equal(found.find(record.image, record.name), maps[stem])
  with pytest.raises(
    source.MissingDataError, match=r'record a:3 has no label map .* made of other'
  ):
    found.find(b'another image', 'a:3')
  few = label_maps.LabelMaps(_config(prepared).label_maps, 'imagenet2012', 10)
  with pytest.raises(ValueError, match=r'has class .* and the data set 10 classes'):
    few.find(record.image, record.name)


def test_batches_with_maps_are_a_function_of_the_step(prepared):
  config = _config(prepared)
  take = lambda start, count, **process: list(
    itertools.islice(
      pipeline.train_batches(config, seed=1, batch_size=4, start_step=start, **process), count
    )
  )
  whole = take(0, 6)
  for again, first in zip(take(4, 2), whole[4:], strict=True):
    assert again.keys() == first.keys() > {'label_map', 'label_view', 'label_bounds'}
    for key in again:
      np.testing.assert_array_equal(again[key], first[key])
  parts = [take(5, 1, process_index=i, process_count=2)[0] for i in range(2)]
  for key in ('label_map', 'label_view', 'image'):
    joined = np.concatenate([part[key] for part in parts])
    # However examples are dealt out, each goes with its own map.
    assert sorted(x.tobytes() for x in joined) == sorted(x.tobytes() for x in whole[5][key])
  plain = next(
    pipeline.train_batches(_config(prepared, label_maps=''), seed=1, batch_size=4, start_step=5)
  )
  np.testing.assert_array_equal(plain['image'], whole[5]['image'])


def test_maps_that_are_missing_or_of_another_form_are_refused(prepared, tmp_path):
  folder, given, maps = prepared
  pipeline.dataset_info(_config(prepared))
  advice = r'make them with: python tools/prepare_data\.py label_maps --name=imagenet2012'
  with pytest.raises(source.MissingDataError, match=advice):
    pipeline.dataset_info(_config(prepared, label_maps=str(tmp_path)))
  for shape, message in (((12, 5, 3, 3), 'not float16'), ((4, 2, 5, 3, 3), 'has 4 maps and')):
    there = tmp_path / str(shape)
    there.mkdir()
    np.save(there / 'keys.npy', np.arange(shape[0], dtype=np.uint64))
    np.save(there / 'maps.npy', np.zeros(shape, np.float16))
    with pytest.raises((ValueError, source.MissingDataError), match=message):
      pipeline.dataset_info(_config(prepared, label_maps=str(there)))
  train = source.Source('imagenet2012', 'train', str(folder))
  lacking = lambda path: (
    next(iter(maps.values()))[:, :1] if path.stem.endswith('_5') else maps[path.stem]
  )
  with pytest.raises(ValueError, match=r'_5\.pt has shape \(2, 1, 3, 3\), and the first'):
    label_maps.write(tmp_path / 'a', train, given, lacking)
  with pytest.raises(FileNotFoundError, match=r'n\d+_\d, has no map: .*pt is missing'):
    label_maps.write(tmp_path / 'a', train, tmp_path, lacking)
  assert not (tmp_path / 'a').exists()
  # Where the first was the wrong one and is mended, nothing is kept that has its shape.
  first = train[0].file_name.removesuffix('.JPEG')
  of_first = lambda path: maps[path.stem][:, : 1 if path.stem == first else None]
  with pytest.raises(
    ValueError, match=rf'shape \(2, 2, 3, 3\), and the first, .*{first}.pt, \(2, 1'
  ):
    label_maps.write(tmp_path / 'a', train, given, of_first)
  label_maps.write(tmp_path / 'a', train, given, lambda path: maps[path.stem])
  whole = (folder / 'label_maps/imagenet2012/maps.npy').read_bytes()
  assert (tmp_path / 'a/maps.npy').read_bytes() == whole
  with pytest.raises(FileExistsError, match='remove it'):
    label_maps.write(folder / 'label_maps/imagenet2012', train, given, lacking)


def test_maps_are_converted_on_from_where_it_broke_off(prepared, tmp_path, monkeypatch):
  """With the same result to the byte, and no file read twice but those of the last few."""
  folder, given, _ = prepared
  monkeypatch.setattr(label_maps, '_CHUNK', 3)
  train = source.Source('imagenet2012', 'train', str(folder))
  seen = []

  def breaks(path):
    seen.append(path)
    if len(seen) == 9:
      raise KeyboardInterrupt
    return torch_file.load(path)

  with pytest.raises(KeyboardInterrupt):
    label_maps.write(tmp_path / 'maps', train, given, breaks)
  assert not (tmp_path / 'maps').exists()
  label_maps.write(tmp_path / 'maps', train, given, breaks)
  # Each time the first once more, for its shape.
  assert len(seen) == 9 + 1 + 12 - 6
  for name in ('keys.npy', 'maps.npy'):
    whole = (folder / 'label_maps/imagenet2012' / name).read_bytes()
    assert (tmp_path / 'maps' / name).read_bytes() == whole
  label_maps.write(tmp_path / 'processes', train, given, torch_file.load, count=2)
  assert (tmp_path / 'processes/maps.npy').read_bytes() == whole
  # What was begun of other files is not gone on with.
  with pytest.raises(FileNotFoundError):
    label_maps.write(tmp_path / 'other', train, tmp_path, torch_file.load)
  label_maps.write(tmp_path / 'other', train, given, torch_file.load)
  assert (tmp_path / 'other/maps.npy').read_bytes() == (tmp_path / 'maps/maps.npy').read_bytes()
