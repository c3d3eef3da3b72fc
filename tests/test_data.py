"""Data sets, preprocessing and batches: what is read is what was written, step by step."""

import io
import resource
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests import inputs, launcher
from vision_attention.data import builders, pipeline, preprocessing, randaugment, source

pytestmark = pytest.mark.fast


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  builders.write('digits', builders.digits(), folder, shard_bytes=60_000)
  return folder


def _photo(size=(60, 80), kind='JPEG'):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (size[0] // 10, size[1] // 10, 3), np.uint8)
  image = Image.fromarray(pixels).resize((size[1], size[0]))
  buffer = io.BytesIO()
  image.save(buffer, kind, quality=90)
  return buffer.getvalue()


def test_a_written_data_set_reads_back_in_several_shards(data_dir):
  raw = builders.digits()
  train = source.Source('digits', 'train', str(data_dir))
  assert len(list((data_dir / 'digits/1.0.0').glob('*train*'))) > 1
  assert (len(train), train.num_classes) == (1442, 10)
  for i, (image, label) in enumerate(raw.splits['train']):
    if i % 97 == 0:
      assert (train[i].image, train[i].label) == (image, label)
  assert len(source.Source('digits', 'train[:10%]+test', str(data_dir))) == 144 + 355
  tail = source.Source('digits', 'train[1000:]', str(data_dir))
  assert tail[3].image == train[1003].image
  with pytest.raises(ValueError, match="no split 'tset'"):
    source.Source('digits', 'tset', str(data_dir))
  with pytest.raises(FileExistsError, match='--overwrite'):
    builders.write('digits', raw, data_dir)


def test_a_full_disk_leaves_nothing(tmp_path):
  old = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, old[1]))
  try:
    with pytest.raises(RuntimeError, match=r'writing .*train-0\.part'):
      builders.write('digits', builders.digits(), tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
  assert not list((tmp_path / 'digits').iterdir())


def test_reading_needs_no_tensorflow(data_dir):
  code = (
    'import sys; from vision_attention.data import source; '
    f'source.Source("digits", "train", "{data_dir}")[0]; assert "tensorflow" not in sys.modules'
  )
  subprocess.run([sys.executable, '-c', code], check=True, timeout=launcher.PATIENCE)


def test_a_missing_data_set_is_explained_at_once(tmp_path):
  start = time.monotonic()
  with pytest.raises(source.MissingDataError) as caught:
    pipeline.dataset_info(inputs.config(tmp_path, name='imagenet2012'))
  assert time.monotonic() - start < 2
  assert str(tmp_path) in str(caught.value)
  assert 'prepare_data.py imagenet2012 --input=' in str(caught.value)


def test_batches_are_a_function_of_the_step_and_of_no_number_of_processes(data_dir):
  config = inputs.config(data_dir)

  def batches(start, count, **process):
    stream = pipeline.train_batches(config, seed=3, batch_size=8, start_step=start, **process)
    return [next(stream) for _ in range(count)]

  whole = batches(0, 200)  # beyond one epoch of 180 steps
  for a, b in zip(batches(178, 5), whole[178:183], strict=True):
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])
  shares = [batches(7, 1, process_index=i, process_count=2)[0]['image'] for i in range(2)]
  np.testing.assert_array_equal(np.concatenate(shares), whole[7]['image'])
  labels = [np.concatenate([b['label'] for b in whole[i : i + 90]]) for i in (0, 90)]
  assert not np.array_equal(*labels)
  assert np.bincount(np.concatenate([b['label'] for b in whole[:180]])).min() > 130


def test_phases_change_the_operations_and_nothing_else(data_dir):
  config = inputs.config(data_dir)
  phases = [(0, ('resize(8)',)), (3, ('resize(12)',)), (5, config.train_ops)]
  take = lambda start, count, **changes: [
    batch
    for batch, _ in zip(
      pipeline.train_batches(config, seed=3, batch_size=8, start_step=start, **changes),
      range(count),
      strict=False,
    )
  ]
  staged, plain = take(0, 8, phases=phases), take(0, 8)
  assert [b['image'].shape[1] for b in staged] == [8, 8, 8, 12, 12, 16, 16, 16]
  for a, b in zip(staged, plain, strict=True):
    np.testing.assert_array_equal(a['label'], b['label'])
  for a, b in zip(staged[5:], plain[5:], strict=True):
    np.testing.assert_array_equal(a['image'], b['image'])
  for start in (2, 3, 6):
    for a, b in zip(take(start, 2, phases=phases), staged[start:], strict=False):
      np.testing.assert_array_equal(a['image'], b['image'])
  shares = [take(2, 4, phases=phases, process_index=i, process_count=4) for i in range(4)]
  for *parts, whole in zip(*shares, staged[2:6], strict=True):
    np.testing.assert_array_equal(np.concatenate([b['image'] for b in parts]), whole['image'])


def test_repeats_are_copies_in_a_row_with_augmentations_of_their_own(data_dir):
  plain = inputs.config(data_dir, train_ops=('resize(8)',), repeats=3)
  first = next(pipeline.train_batches(plain, seed=0, batch_size=12, start_step=0))
  groups = first['image'].reshape(4, 3, -1)
  assert (groups == groups[:, :1]).all()
  assert len(np.unique(groups[:, 0], axis=0)) == 4
  # A pass of 1442 examples sees 481 images; the next one begins another order.
  steps = 1442 // 12 + 2
  batches = pipeline.train_batches(plain, seed=0, batch_size=12, start_step=steps - 3)
  later = [next(batches) for _ in range(3)]
  ahead = next(pipeline.train_batches(plain, seed=0, batch_size=12, start_step=steps - 1))
  np.testing.assert_array_equal(later[2]['image'], ahead['image'])
  augmented = inputs.config(data_dir, train_ops=('resize(8)', 'pad_crop(2)'), repeats=3)
  copies = next(pipeline.train_batches(augmented, seed=0, batch_size=12, start_step=0))['image']
  shares = [
    next(
      pipeline.train_batches(
        augmented, seed=0, batch_size=12, start_step=0, process_index=i, process_count=4
      )
    )
    for i in range(4)
  ]
  np.testing.assert_array_equal(np.concatenate([b['image'] for b in shares]), copies)
  copies = copies.reshape(4, 3, -1)
  assert (copies != copies[:, :1]).any()


@pytest.mark.parametrize('batch_size', [48, 384, 768])
def test_evaluation_counts_every_example_once_and_in_order(batch_size, data_dir):
  """Also where a process has no example of the last batch, or none at all."""
  config = inputs.config(data_dir)

  def read(count):
    parts = [
      pipeline.eval_batches(config, batch_size=batch_size, process_index=i, process_count=count)
      for i in range(count)
    ]
    assert all(part.num_examples == 355 for part in parts)
    steps = zip(*parts, strict=True)  # every process takes as many
    return [{key: np.concatenate([b[key] for b in step]) for key in step[0]} for step in steps]

  whole = read(1)
  records = source.Source('digits', 'test', str(data_dir))
  mask, label = (np.concatenate([b[key] for b in whole]) for key in ('mask', 'label'))
  assert (mask == (np.arange(len(mask)) < 355)).all()
  assert list(label[:355]) == [records[i].label for i in range(355)]
  for batch, expected in zip(read(3), whole, strict=True):
    assert batch.keys() == expected.keys()
    for key in batch:
      np.testing.assert_array_equal(batch[key], expected[key], key)


@pytest.mark.parametrize('kind', ['JPEG', 'PNG'])
def test_decoded_pixels_are_those_of_pil(kind):
  content = _photo(kind=kind)
  expected = np.asarray(Image.open(io.BytesIO(content)).convert('RGB'))
  np.testing.assert_array_equal(np.asarray(preprocessing.decode(content)), expected)


def test_what_follows_a_whole_jpeg_is_no_matter():
  content = _photo()
  found = preprocessing.decode(content + bytes(5000))
  np.testing.assert_array_equal(np.asarray(found), np.asarray(preprocessing.decode(content)))


def _bomb() -> bytes:
  """A JPEG that claims 60000 x 60000 pixels."""
  content = bytearray(_photo())
  frame = content.index(b'\xff\xc0')
  content[frame + 5 : frame + 9] = (60000).to_bytes(2, 'big') * 2
  return bytes(content)


@pytest.mark.parametrize('content', [_photo()[:-200], _photo()[:300], b'no image', b'', _bomb()])
def test_broken_images_are_recognised(content):
  with pytest.raises(preprocessing.CorruptImageError):
    preprocessing.decode(content)


def test_models_are_tested_on_a_split_that_has_labels(tmp_path):
  """As TFDS prepares ImageNet: its test images have the label -1."""
  for label, expected in ((0, 'test'), (-1, 'validation')):
    folder = tmp_path / expected
    splits = {'train': [(_photo(), 0)], 'validation': [(_photo(), 1)], 'test': [(_photo(), label)]}
    builders.write('photos', builders.Raw(splits, ['a', 'b'], (None, None, 3), ''), folder)
    assert source.evaluation_split('photos', str(folder)) == expected


def test_a_corrupt_record_is_named_or_counted(tmp_path):
  good = _photo()
  raw = builders.Raw(
    {'train': [(good, 0), (good[:-200], 1), (good, 2)], 'test': [(good, 0)]},
    ['a', 'b', 'c'],
    (None, None, 3),
    '',
  )
  builders.write('broken', raw, tmp_path)
  config = inputs.config(tmp_path, name='broken', train_ops=('resize(8)',))
  with pytest.raises(ValueError, match=r'record broken-train\.array_record-00000-of-00001:1 is no'):
    next(pipeline.train_batches(config, seed=0, batch_size=3, start_step=0))
  config.on_corrupt = 'skip'
  batch = next(pipeline.train_batches(config, seed=0, batch_size=3, start_step=0))
  assert batch['corrupt'].sum() == 1
  assert sorted(batch['label']) == [0, 2, 2]


def test_operations_are_parsed_and_refused_by_name():
  rng = np.random.default_rng(0)
  apply = preprocessing.compose(['random_resized_crop((12, 10), area=(0.3, 0.5))', 'flip'])
  assert apply(Image.new('RGB', (40, 30)), rng).shape == (12, 10, 3)
  for text, message in (
    ('resise(8)', "operation in 'resise.8.' 'resise' is unknown: did you mean 'resize'"),
    ('resize(8, interpolatoin="bicubic")', "did you mean 'interpolation'"),
    ('resize(8, interpolation="cubic")', "interpolation 'cubic' is unknown"),
    ('resize(__import__("os"))', 'does not read like'),
    ('rand_augment(2, 15)', 'would bound magnitude 15 at 10'),
    ('random_resized_crop(8, area=(1.0, 0.08))', 'give the smaller first'),
    ('random_resized_crop(8, ratio=(0, 1))', 'give the smaller first'),
    ('random_crop(8, ratio=1.5)', r'give one in \(0, 1\]'),
    ('flip(1.5)', 'give a probability of 0 to 1'),
    ('pad_crop(-1)', 'give zero or more'),
  ):
    with pytest.raises(ValueError, match=message):
      preprocessing.compose([text])


def test_three_augment_does_one_of_three():
  """Greyscale, solarized at 128, or blurred: each about as often."""
  image = Image.open(io.BytesIO(_photo(kind='PNG'))).convert('RGB')
  pixels = np.asarray(image)
  grey = np.asarray(image.convert('L'))[..., None].repeat(3, -1)
  solar = np.where(pixels < 128, pixels, 255 - pixels)
  rng, kinds = np.random.default_rng(0), []
  for _ in range(60):
    found = preprocessing.compose(['three_augment'])(image, rng)
    same = [(found == grey).all(), (found == solar).all()]
    kinds.append(same.index(True) if any(same) else 2)
    if not any(same):
      assert found.std() <= pixels.std()
  assert min(kinds.count(kind) for kind in range(3)) >= 10


def _timm_crop(image, size, ratio):
  """timm's evaluation by torchvision's rules: the short side, black borders, the middle."""
  short, long = int(np.floor(size / ratio)), int(int(np.floor(size / ratio)) * max(image.size))
  long = int(long / min(image.size))
  w, h = (short, long) if image.size[0] <= image.size[1] else (long, short)
  image = image.resize((w, h), Image.Resampling.BICUBIC)
  if w < size or h < size:
    x, y = max(0, size - w), max(0, size - h)
    image = ImageOps.expand(image, (x // 2, y // 2, (x + 1) // 2, (y + 1) // 2), 0)
  left, top = (round((side - size) / 2.0) for side in image.size)
  return np.asarray(image.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize('ratio', [0.875, 0.9, 0.96, 1.0, 1.15])
def test_center_crop_is_timms_to_the_pixel(ratio):
  """Ratios above 1, VOLO's for large models, leave a black border."""
  crop = preprocessing.compose([f'center_crop(56, ratio={ratio})'])
  for size in ((83, 125), (125, 94), (61, 62), (40, 131), (64, 64)):
    pixels = np.random.default_rng(0).integers(1, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(pixels)
    expected = _timm_crop(image, 56, ratio)
    np.testing.assert_array_equal(crop(image, np.random.default_rng(0)), expected)
    assert expected[0, 0].any() == (ratio <= 1)
  with pytest.raises(ValueError, match='give a positive one'):
    preprocessing.compose(['center_crop(56, ratio=0)'])


def test_center_crop_takes_the_middle():
  image = Image.new('RGB', (80, 40))
  image.paste((255, 255, 255), (30, 10, 50, 30))
  cropped = preprocessing.compose(['center_crop(20, ratio=0.5)'])(image, np.random.default_rng(0))
  assert cropped.shape == (20, 20, 3)
  assert cropped.min() > 250


@pytest.mark.parametrize('increasing', [False, True])
def test_rand_augment_operations_keep_size_and_grow_with_magnitude(increasing):
  image = preprocessing.decode(_photo())
  base = np.asarray(image, np.int32)

  def change(name, magnitude):
    changed = randaugment.apply(image, name, magnitude, np.random.default_rng(1), increasing)
    assert changed.size == image.size
    return np.abs(np.asarray(changed, np.int32) - base).mean()

  for name in ('rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y', 'solarize_add'):
    assert change(name, 0) < change(name, 10), name
  if increasing:
    for name in ('posterize', 'solarize', 'color', 'contrast', 'brightness', 'sharpness'):
      assert change(name, 1) < change(name, 10), name


def test_idx_files_and_image_folders(tmp_path):
  images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
  for prefix in ('train', 't10k'):
    head = b'\0\0\x08\x03' + struct.pack('>3I', *images.shape)
    (tmp_path / f'{prefix}-images-idx3-ubyte').write_bytes(head + images.tobytes())
    labels = b'\0\0\x08\x01' + struct.pack('>I', 2) + bytes([1, 0])
    (tmp_path / f'{prefix}-labels-idx1-ubyte').write_bytes(labels)
  builders.write('tiny', builders.idx(tmp_path), tmp_path / 'out')
  record = source.Source('tiny', 'train', str(tmp_path / 'out'))[0]
  assert record.label == 1
  np.testing.assert_array_equal(np.asarray(preprocessing.decode(record.image))[..., 0], images[0])
  (tmp_path / 'train-images-idx3-ubyte').write_bytes(head)
  with pytest.raises(ValueError, match='not what its shape'):
    builders.idx(tmp_path)
  for name in ('cat', 'dog'):
    folder = tmp_path / 'photos/train' / name
    folder.mkdir(parents=True)
    (folder / '1.jpg').write_bytes(_photo())
  builders.write('photos', builders.image_folder(tmp_path / 'photos'), tmp_path / 'out')
  read = source.Source('photos', 'train', str(tmp_path / 'out'))
  assert (len(read), read.label_names, read[0].image) == (2, ('cat', 'dog'), _photo())


def test_crops_hold_nothing_from_beside_them():
  """Cut out, then resized, as torchvision, timm and TensorFlow do it."""
  image = Image.open(io.BytesIO(_photo(kind='PNG'))).convert('RGB')
  apply = preprocessing.random_resized_crop((14, 12), area=(0.2, 0.4), interpolation='bicubic')
  rng = np.random.default_rng(0)
  for _ in range(5):
    trace = preprocessing.Trace()
    found = apply(image, rng, trace)
    [[x_scale, _, left], [_, y_scale, top], _] = trace.steps[0]
    box = tuple(round(v) for v in (left, top, left + 12 * x_scale, top + 14 * y_scale))
    expected = image.crop(box).resize((12, 14), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('square', [False, True])
def test_random_windows_lie_in_the_image_that_the_middle_is_cut_from(square):
  image = Image.open(io.BytesIO(_photo(kind='PNG'))).convert('RGB')
  apply = preprocessing.random_crop(12, ratio=0.75, interpolation='bilinear', square=square)
  w, h = image.size
  scale = 16 / min(w, h)
  size = (16, 16) if square else (int(w * scale), int(h * scale))
  whole = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
  rng, places = np.random.default_rng(0), set()
  for _ in range(40):
    found = np.asarray(apply(image, rng, preprocessing.Trace()))
    [place] = [
      (y, x)
      for y in range(size[1] - 11)
      for x in range(size[0] - 11)
      if (whole[y : y + 12, x : x + 12] == found).all()
    ]
    places.add(place)
  assert {y for y, _ in places} == set(range(size[1] - 11))
  middle = preprocessing.center_crop(12, ratio=0.75, interpolation='bilinear')
  if not square:
    y, x = round((size[1] - 12) / 2), round((size[0] - 12) / 2)
    expected = whole[y : y + 12, x : x + 12]
    np.testing.assert_array_equal(middle(image, rng, preprocessing.Trace()), expected)


def test_images_of_16_bits_keep_their_range():
  buffer = io.BytesIO()
  Image.fromarray(np.array([[0, 257, 65_535], [30_000, 128 * 257, 256]], np.uint16)).save(
    buffer, 'PNG'
  )
  found = np.asarray(preprocessing.decode(buffer.getvalue()))
  np.testing.assert_array_equal(found[..., 0], [[0, 1, 255], [116, 128, 0]])


def test_image_folders_take_all_images_and_no_other_files(tmp_path):
  folder = tmp_path / 'photos/train/cat'
  folder.mkdir(parents=True)
  image = Image.open(io.BytesIO(_photo(kind='PNG'))).convert('RGB')
  for suffix in ('png', 'bmp', 'tiff'):
    image.save(folder / f'1.{suffix}')
  (tmp_path / 'photos/train/.cache').mkdir()
  (tmp_path / 'photos/.git').mkdir()
  (folder / '.DS_Store').write_bytes(b'')
  builders.write('photos', builders.image_folder(tmp_path / 'photos'), tmp_path / 'out')
  read = source.Source('photos', 'train', str(tmp_path / 'out'))
  assert (len(read), read.label_names) == (3, ('cat',))
  for i in range(3):
    np.testing.assert_array_equal(preprocessing.decode(read[i].image), image)
  (folder / 'labels.csv').write_text('1,cat')
  with pytest.raises(ValueError, match=r'1 files are no images, such as .*labels\.csv'):
    builders.write('photos2', builders.image_folder(tmp_path / 'photos'), tmp_path / 'out')
  assert not (tmp_path / 'out/photos2/1.0.0').exists()
  with pytest.raises(ValueError, match="'My-photos' is not of a-z"):
    builders.write('My-photos', builders.image_folder(tmp_path / 'photos'), tmp_path / 'out')
