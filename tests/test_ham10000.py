"""HAM10000 from an archive of its layout: what is read, how lesions are split, what is refused."""

import csv
import io
import pathlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests import launcher
from vision_attention.data import builders, color, ham10000, preprocessing, source

pytestmark = pytest.mark.fast
HEADER = 'lesion_id,image_id,dx,dx_type,age,sex,localization'
ROOT = pathlib.Path(__file__).parents[1]
COUNTS = {'nv': 6705, 'mel': 1113, 'bkl': 1099, 'bcc': 514, 'akiec': 327, 'vasc': 142, 'df': 115}


def _jpeg(seed: int) -> bytes:
  rng = np.random.default_rng(seed)
  pixels = rng.integers(0, 256, (3, 4, 3), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).resize((40, 30)).save(buffer, 'JPEG', quality=90)
  return buffer.getvalue()


def _rows() -> list[tuple[str, str, str]]:
  """Lesion, image, dx: of every class five lesions with one, two or three images."""
  rows = []
  for dx in ham10000.CLASSES:
    for lesion in range(5):
      for _ in range(1 + lesion % 3):
        rows.append((f'HAM_{dx}{lesion}', f'ISIC_{24306 + len(rows):07d}', dx))
  return rows


def _line(lesion: str, image: str, dx: str) -> str:
  return f'{lesion},{image},{dx},histo,,male,back'  # an age is missing in the real one, too


def _archive(folder: pathlib.Path, rows, *, layout: str = 'zip', lines=None) -> pathlib.Path:
  """Writes the two parts and the metadata, as Dataverse (`zip`) or Kaggle (`folders`) do."""
  folder.mkdir()
  images = {image: _jpeg(i) for i, (_, image, _) in enumerate(rows)}
  names = sorted(images)
  for part, mine in ((1, names[: len(names) // 2]), (2, names[len(names) // 2 :])):
    stem = folder / f'HAM10000_images_part_{part}'
    if layout == 'zip':
      with zipfile.ZipFile(f'{stem}.zip', 'w') as archive:
        archive.writestr(f'__MACOSX/._{mine[0]}.jpg', b'shadow')
        for name in mine:
          archive.writestr(f'{name}.jpg', images[name])
    else:
      stem.mkdir()
      for name in mine:
        (stem / f'{name}.jpg').write_bytes(images[name])
  lines = [_line(*row) for row in rows] if lines is None else lines
  name = 'HAM10000_metadata' if layout == 'zip' else 'HAM10000_metadata.csv'
  (folder / name).write_text('\n'.join([HEADER, *lines]) + '\n')
  return folder


@pytest.mark.parametrize('layout', ['zip', 'folders'])
def test_images_arrive_unchanged_and_lesions_in_one_fold(tmp_path, layout):
  rows = _rows()
  folder = _archive(tmp_path / 'source', rows, layout=layout)
  written = builders.write('ham10000', ham10000.ham10000(folder), tmp_path / 'out')
  expected = sorted((_jpeg(i), ham10000.CLASSES.index(dx)) for i, (_, _, dx) in enumerate(rows))
  got, folds = [], {}
  for fold in range(5):
    read = source.Source('ham10000', f'fold{fold}', str(tmp_path / 'out'))
    assert read.label_names == ham10000.CLASSES
    folds[f'fold{fold}'] = [(read[i].image, read[i].label) for i in range(len(read))]
    assert {label for _, label in folds[f'fold{fold}']} == set(range(7))
    got += folds[f'fold{fold}']
  assert sorted(got) == expected
  assert preprocessing.decode(got[0][0]).size == (40, 30)
  # The table says which lesion went where, and the files agree.
  table = list(csv.DictReader((written / 'splits.csv').open()))
  number = {image: i for i, (_, image, _) in enumerate(rows)}
  lesions: dict[str, set[str]] = {}
  for row in table:
    lesions.setdefault(row['lesion_id'], set()).add(row['split'])
    assert _jpeg(number[row['image_id']]) in [image for image, _ in folds[row['split']]]
  assert len(table) == len(rows)
  assert {len(splits) for splits in lesions.values()} == {1}
  together = source.Source('ham10000', 'fold1+fold2+fold3+fold4', str(tmp_path / 'out'))
  assert len(together) == len(rows) - len(folds['fold0'])


def test_the_command_writes_the_holdout(tmp_path):
  folder = _archive(tmp_path / 'source', _rows())
  command = [sys.executable, 'tools/prepare_data.py', 'ham10000', f'--source={folder}']
  command += ['--splits=holdout', '--seed=3', f'--data_dir={tmp_path / "out"}']
  done = subprocess.run(
    command, cwd=ROOT, capture_output=True, text=True, timeout=launcher.PATIENCE
  )
  assert done.returncode == 0, done.stderr
  assert 'wrote ham10000_holdout' in done.stdout
  assert done.stdout.count(' lesions (akiec ') == 3
  read = source.Source('ham10000_holdout', 'train+validation+test', str(tmp_path / 'out'))
  np.testing.assert_array_equal(read.class_counts(), [9] * 7)
  (folder / 'HAM10000_images_part_2.zip').unlink()
  done = subprocess.run(
    [*command, '--overwrite'], cwd=ROOT, capture_output=True, text=True, timeout=launcher.PATIENCE
  )
  assert done.returncode == 2
  assert '32 of the 63 images' in done.stderr
  assert 'Traceback' not in done.stderr


@given(
  st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=20, max_size=200),
  st.sampled_from([(0.2,) * 5, (0.7, 0.1, 0.2), (0.5, 0.5)]),
  st.integers(0, 5),
)
def test_no_lesion_is_in_two_splits_and_every_class_has_its_share(lesions, shares, seed):
  names = [str(i) for i, (count, _) in enumerate(lesions) for _ in range(count)]
  labels = [label for count, label in lesions for _ in range(count)]
  split_of = ham10000.split_lesions(names, labels, shares, seed)
  for name in set(names):
    assert len({split for n, split in zip(names, split_of, strict=True) if n == name}) == 1
  for label in set(labels):
    mine = split_of[np.asarray(labels) == label]
    got = np.bincount(mine, minlength=len(shares))
    # A lesion of six images is the coarsest grain.
    assert (np.abs(got - np.asarray(shares) * len(mine)) <= 6).all()
  again = ham10000.split_lesions(names, labels, shares, seed)
  np.testing.assert_array_equal(again, split_of)


def test_the_real_counts_are_split_to_the_image():
  """With as many images of every class as HAM10000 has, in about as many lesions."""
  rng = np.random.default_rng(0)
  names, labels = [], []
  for label, count in enumerate(COUNTS[name] for name in ham10000.CLASSES):
    left = count
    while left:
      images = min(left, int(rng.choice([1, 2, 3, 4, 6], p=[0.74, 0.19, 0.05, 0.015, 0.005])))
      names += [f'{label}/{left}'] * images
      labels += [label] * images
      left -= images
  assert len(names) == 10_015
  folds = ham10000.split_lesions(names, labels, (0.2,) * 5, 0)
  for label in range(7):
    got = np.bincount(folds[np.asarray(labels) == label], minlength=5)
    assert np.ptp(got) <= 1
  assert np.ptp(np.bincount(folds)) <= 7
  other = ham10000.split_lesions(names, labels, (0.2,) * 5, 1)
  assert 0.7 < (other != folds).mean() < 0.9
  holdout = ham10000.split_lesions(names, labels, (0.7, 0.1, 0.2), 0)
  np.testing.assert_allclose(np.bincount(holdout) / 10_015, (0.7, 0.1, 0.2), atol=1e-3)


@pytest.mark.parametrize(
  'change, message',
  [
    ({3: 'HAM_1,ISIC_1,nvv,histo,,male,back'}, r"line 5: dx 'nvv' is unknown: did you mean 'nv'"),
    ({3: 'HAM_1,ISIC_1,nv,histo'}, 'line 5: it does not have 7 fields'),
    ({3: 'HAM_1,ISIC_1,nv,histo,1,male,back,x'}, 'line 5: it does not have 7 fields'),
    ({3: ',ISIC_1,nv,histo,,male,back'}, 'line 5: lesion_id or image_id is empty'),
    ({3: _line(*_rows()[0])}, 'line 5: image ISIC_0024306 stands in it a second time'),
    ({i: f'HAM_{i},ISIC_{i},x,,,,' for i in range(9)}, r'9 rows cannot be read: .*; and 4 more'),
  ],
)
def test_unreadable_rows_are_listed_once(tmp_path, change, message):
  rows = _rows()
  lines = [change.get(i, _line(*row)) for i, row in enumerate(rows)]
  folder = _archive(tmp_path / 'source', rows, lines=lines)
  with pytest.raises(ValueError, match=message) as caught:
    ham10000.ham10000(folder)
  assert '\n' not in str(caught.value)


def test_metadata_is_read_with_tabs_quotes_and_a_byte_order_mark(tmp_path):
  path = tmp_path / 'HAM10000_metadata.tab'
  lines = ['\t'.join(f'"{field}"' for field in _line(*row).split(',')) for row in _rows()]
  text = '\r\n'.join([HEADER.replace(',', '\t'), *lines])
  path.write_text(text, encoding='utf-8-sig')
  assert [(r.lesion, r.image, ham10000.CLASSES[r.label]) for r in ham10000.read_metadata(path)] == (
    _rows()
  )
  path.write_text('lesion,image_id,dx\n')
  with pytest.raises(ValueError, match=r"no column lesion_id: its header is .'lesion'"):
    ham10000.read_metadata(path)
  path.write_text(HEADER)
  with pytest.raises(ValueError, match='it has none'):
    ham10000.read_metadata(path)


def test_what_is_missing_or_broken_is_named_and_nothing_is_written(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'has none of HAM10000_metadata\.csv'):
    ham10000.ham10000(tmp_path)
  with pytest.raises(ValueError, match="splits 'fold' is unknown: did you mean 'folds'"):
    ham10000.ham10000(tmp_path, splits='fold')
  rows = _rows()
  folder = _archive(tmp_path / 'source', rows, layout='folders')
  path = folder / 'HAM10000_images_part_1' / f'{rows[0][1]}.jpg'
  path.write_bytes(_jpeg(0)[:-40])
  with pytest.raises(ValueError, match='image ISIC_0024306 is no whole JPEG'):
    builders.write('ham10000', ham10000.ham10000(folder), tmp_path / 'out')
  assert not list((tmp_path / 'out').glob('ham10000/*'))
  path.unlink()
  with pytest.raises(FileNotFoundError, match=r'1 of the 63 images of .* ISIC_0024306'):
    ham10000.ham10000(folder)
  (folder / 'HAM10000_images_part_1.zip').write_bytes(b'PK\x03\x04 cut short')
  with pytest.raises(ValueError, match=r'part_1\.zip is no whole archive'):
    ham10000.ham10000(folder)


def test_a_damaged_entry_of_an_archive_is_named(tmp_path):
  folder = _archive(tmp_path / 'source', _rows())
  path = folder / 'HAM10000_images_part_1.zip'
  content = bytearray(path.read_bytes())
  at = content.index(_jpeg(0)) + 300
  content[at] ^= 0xFF
  path.write_bytes(content)
  with pytest.raises(ValueError, match='image ISIC_0024306 cannot be unpacked'):
    builders.write('ham10000', ham10000.ham10000(folder), tmp_path / 'out')


# -- What images without a top may be turned into.


def test_turns_and_flips_make_the_eight_views_of_a_square():
  pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
  apply = preprocessing.compose(['flip', 'flip_vertical', 'rot90'])
  rng = np.random.default_rng(0)
  seen = {apply(Image.fromarray(pixels), rng).tobytes() for _ in range(200)}
  views = [np.rot90(p, k) for p in (pixels, pixels[:, ::-1]) for k in range(4)]
  assert seen == {np.ascontiguousarray(view).tobytes() for view in views}
  down = preprocessing.compose(['flip_vertical(prob=1.0)'])(Image.fromarray(pixels), rng)
  np.testing.assert_array_equal(down, pixels[::-1])


def test_colour_jitter_changes_what_it_says():
  image = preprocessing.decode(_jpeg(1))
  base = np.asarray(image, np.int32)

  def jittered(text, seed):
    return preprocessing.compose([text])(image, np.random.default_rng(seed)).astype(np.int32)

  np.testing.assert_array_equal(jittered('color_jitter()', 0), base)
  grey = jittered('color_jitter(saturation=1.0)', 4)
  spread = lambda pixels: np.ptp(pixels, -1).mean()
  assert spread(grey) != spread(base)
  ratios = [jittered('color_jitter(brightness=0.2)', s).mean() / base.mean() for s in range(30)]
  assert 0.78 < min(ratios) < 0.9 < 1.1 < max(ratios) < 1.22
  lightest = [jittered('color_jitter(hue=0.5)', s).max(-1).mean() for s in range(5)]
  np.testing.assert_allclose(lightest, base.max(-1).mean(), atol=3)  # HSV's value is kept
  # Values that torchvision's adjust_hue gives.
  one = Image.new('RGB', (1, 1), (200, 100, 50))
  assert color.shift_hue(one, 0.25).getpixel((0, 0)) == (78, 200, 50)
  assert color.shift_hue(one, -0.1).getpixel((0, 0)) == (200, 50, 85)
  for text in ('color_jitter(hue=0.6)', 'color_jitter(-0.1)'):
    with pytest.raises(ValueError, match='color_jitter'):
      preprocessing.compose([text])
