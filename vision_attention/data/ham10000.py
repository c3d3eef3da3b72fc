"""HAM10000, the dermatoscopic images of seven kinds of skin lesion (Tschandl et al. 2018).

The public archive is read as it comes (Harvard Dataverse, doi:10.7910/DVN/DBW86T, or the Kaggle
set "Skin Cancer MNIST"): `HAM10000_images_part_1.zip` and `_part_2.zip` or their unpacked images,
and `HAM10000_metadata` (`.csv` or `.tab`) with a row per image. Licence CC BY-NC: for research.

One lesion was photographed up to six times. Splitting by image would test on lesions that were
trained on, so lesions are split, every class in the same shares.
"""

import collections
import csv
import dataclasses
import io
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from vision_attention import errors
from vision_attention.data import builders

# Actinic keratosis, basal cell carcinoma, benign keratosis, dermatofibroma, melanoma, naevus,
# vascular lesion.
CLASSES = ('akiec', 'bcc', 'bkl', 'df', 'mel', 'nv', 'vasc')
SPLITS: Mapping[str, Mapping[str, float]] = {
  'folds': {f'fold{i}': 0.2 for i in range(5)},
  'holdout': {'train': 0.7, 'validation': 0.1, 'test': 0.2},
}
COLUMNS = ('lesion_id', 'image_id', 'dx')
_METADATA = ('HAM10000_metadata.csv', 'HAM10000_metadata', 'HAM10000_metadata.tab')
_ARCHIVES = 'HAM10000_images_part_*.zip'
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Row:
  """An image of the metadata."""

  lesion: str
  image: str
  label: int


def read_metadata(path: pathlib.Path) -> list[Row]:
  """Reads the metadata, comma- or tab-separated.

  Raises:
    ValueError: once, listing the rows that cannot be read and why, or the missing columns.
  """
  text = path.read_text(encoding='utf-8-sig')
  separator = '\t' if '\t' in text.partition('\n')[0] else ','
  reader = csv.DictReader(io.StringIO(text), delimiter=separator)
  header = reader.fieldnames or ()
  if missing := [column for column in COLUMNS if column not in header]:
    raise ValueError(f'{path} has no column {", ".join(missing)}: its header is {list(header)}')
  rows, problems, seen = [], [], set()
  for row in reader:
    lesion, image, dx = (row[column] or '' for column in COLUMNS)
    problem = ''
    if None in row or None in row.values():
      problem = f'it does not have {len(header)} fields'
    elif not lesion or not image:
      problem = 'lesion_id or image_id is empty'
    elif dx not in CLASSES:
      problem = f'dx {dx!r} is unknown: {errors.nearest(dx, CLASSES)}'
    elif image in seen:
      problem = f'image {image} stands in it a second time'
    if problem:
      problems.append(f'line {reader.line_num}: {problem}')
      continue
    seen.add(image)
    rows.append(Row(lesion, image, CLASSES.index(dx)))
  if problems or not rows:
    what = _listed(problems, '; ') if problems else 'it has none'
    raise ValueError(f'{path}: {len(problems)} rows cannot be read: {what}')
  return rows


def find_images(folder: pathlib.Path) -> dict[str, Callable[[], bytes]]:
  """Returns a reader of every JPEG in or below a folder and in its archives, by name."""
  found: dict[str, Callable[[], bytes]] = {}
  for path in sorted(folder.rglob('*.jpg')):
    found.setdefault(path.stem, path.read_bytes)
  for path in sorted(folder.rglob(_ARCHIVES)):
    try:
      archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
      raise ValueError(f'{path} is no whole archive ({error}): download it again') from error
    for name in archive.namelist():
      entry = pathlib.PurePosixPath(name)
      # A Mac's archives carry a shadow `._name.jpg` of every file.
      if entry.suffix == '.jpg' and not entry.name.startswith('.'):
        found.setdefault(entry.stem, lambda archive=archive, name=name: archive.read(name))
  return found


def split_lesions(
  lesions: Sequence[str], labels: Sequence[int], shares: Sequence[float], seed: int
) -> np.ndarray:
  """Deals lesions out to splits, so that every class has its shares of images in each.

  Lesions with the most images come first, in random order among equals; each goes where its
  classes are the shortest of their share.

  Args:
    lesions: of every image.
    labels: of every image.
    shares: of the splits; they add up to 1.
    seed: of the order.

  Returns:
    The number of the split of every image.
  """
  names, lesion_of = np.unique(np.asarray(lesions), return_inverse=True)
  counts = np.zeros((len(names), max(labels) + 1), np.int64)
  np.add.at(counts, (lesion_of, np.asarray(labels)), 1)
  order = np.random.default_rng(seed).permutation(len(names))
  order = order[np.argsort(-counts[order].sum(1), kind='stable')]
  wanted = np.outer(shares, counts.sum(0))
  given = np.zeros_like(wanted)
  split_of = np.zeros(len(names), np.int64)
  for lesion in order:
    mine = counts[lesion] > 0
    filled = ((given + counts[lesion]) / np.maximum(wanted, 1e-9))[:, mine].mean(1)
    # Between splits that are alike for the class, the one with the fewest images of all.
    whole = given.sum(1) / np.asarray(shares)
    best = np.lexsort((whole, filled.round(9)))[0]
    given[best] += counts[lesion]
    split_of[lesion] = best
  return split_of[lesion_of]


def ham10000(folder: pathlib.Path, *, splits: str = 'folds', seed: int = 0) -> builders.Raw:
  """The images, whose bytes are kept, in five folds or in 70 % / 10 % / 20 %.

  Args:
    folder: of the archive.
    splits: `folds` (`fold0` to `fold4`) or `holdout` (`train`, `validation`, `test`).
    seed: of the splits.

  Raises:
    FileNotFoundError: if there is no metadata, or images of it are missing; once, for all of them.
    ValueError: for unreadable rows or archives; of a broken image when it is written.
  """
  errors.check_choice('splits', splits, SPLITS)
  shares = SPLITS[splits]
  paths = [p for name in _METADATA for p in (folder / name, folder / name.lower()) if p.is_file()]
  if not paths:
    raise FileNotFoundError(f'{folder} has none of {", ".join(_METADATA)}')
  rows, images = read_metadata(paths[0]), find_images(folder)
  if missing := [row.image for row in rows if row.image not in images]:
    raise FileNotFoundError(
      f'{len(missing)} of the {len(rows)} images of {paths[0]} are neither in {folder} nor in its '
      f'{_ARCHIVES}: {_listed(missing, ", ")}'
    )
  split_of = split_lesions(
    [row.lesion for row in rows], [row.label for row in rows], list(shares.values()), seed
  )

  def read(number: int) -> Iterator[tuple[bytes, int]]:
    mine = np.flatnonzero(split_of == number)
    # Shards would otherwise hold one class each: the metadata is sorted.
    for i in np.random.default_rng(seed).permutation(mine):
      yield _whole(rows[i].image, images[rows[i].image]), rows[i].label

  names = list(shares)
  table = ['image_id,lesion_id,dx,split']
  table += [
    f'{row.image},{row.lesion},{CLASSES[row.label]},{names[split]}'
    for row, split in zip(rows, split_of, strict=True)
  ]
  return builders.Raw(
    {name: read(number) for number, name in enumerate(names)},
    CLASSES,
    (None, None, 3),
    f'HAM10000 (Tschandl et al. 2018), split by lesion with seed {seed}.',
    {'splits.csv': '\n'.join(table) + '\n'},
  )


def summary(table: str) -> str:
  """Returns the images of every class and the lesions per split of a `splits.csv`, as text."""
  rows = list(csv.DictReader(io.StringIO(table)))
  lines = []
  for split in sorted({row['split'] for row in rows}):
    mine = [row for row in rows if row['split'] == split]
    count = collections.Counter(row['dx'] for row in mine)
    lesions = len({row['lesion_id'] for row in mine})
    each = ', '.join(f'{name} {count[name]}' for name in CLASSES)
    lines.append(f'{split}: {len(mine)} images of {lesions} lesions ({each})')
  return '\n'.join(lines)


def _whole(name: str, read: Callable[[], bytes]) -> bytes:
  try:
    content = read()
  except zipfile.BadZipFile as error:
    raise ValueError(f'image {name} cannot be unpacked ({error}): download it again') from error
  if content[:2] != b'\xff\xd8' or b'\xff\xd9' not in content[-1024:]:
    raise ValueError(f'image {name} is no whole JPEG: download it again')
  return content


def _listed(items: Sequence[str], separator: str) -> str:
  more = len(items) - _SHOWN
  return separator.join(items[:_SHOWN]) + (f'{separator}and {more} more' if more > 0 else '')
