"""The classes of ImageNet-21k in its releases, and where the 1000 of ImageNet are among them."""

import pathlib
from collections.abc import Mapping, Sequence

import tensorflow_datasets as tfds

from vision_attention.data import classes

# Classes of the whole archives: the releases of 2011 and of 2021 (people taken out). 21k-P counts
# 11221 of the first and 10450 of the second (arXiv 2104.10972); Google's list is the first with two
# classes that have no images.
COUNTS = {
  'winter21': (19167,),
  'fall11': (21841,),
  '21k_p': (10450, 11221),
  'google21843': (21843,),
}
_WITHOUT_IMAGES = ('n03931044', 'n09859684')
# 21k-P keeps the classes of more than 500 images.
_MANY = 500


def imagenet2012() -> tuple[str, ...]:
  """Returns the 1000 synsets of ImageNet in their order, from TFDS."""
  path = pathlib.Path(tfds.core.tfds_path('datasets/imagenet2012/labels.txt'))
  return tuple(path.read_text().split())


def validation_labels() -> tuple[str, ...]:
  """Returns the synset of every validation image of ImageNet, by its number, from TFDS."""
  path = pathlib.Path(tfds.core.tfds_path('datasets/imagenet2012/validation_labels.txt'))
  return tuple(path.read_text().split())


def imagenet21k(kind: str, images: Mapping[str, int]) -> tuple[str, ...]:
  """Returns the classes of a release in their order, which is that of the synsets' names.

  Args:
    kind: of `COUNTS`.
    images: the archive's number of images of every synset.

  Raises:
    ValueError: if no class is left.
  """
  found = set(images)
  if kind == '21k_p':
    found = {synset for synset, count in images.items() if count > _MANY}
  elif kind == 'google21843':
    found |= set(_WITHOUT_IMAGES)
  if not found:
    raise ValueError(f'{kind}: none of the {len(images)} classes has more than {_MANY} images')
  return tuple(sorted(found))


def imagenet2012_among(theirs: Sequence[str]) -> list[int]:
  """Returns the number of each of ImageNet's 1000 classes among others, -1 for one they lack."""
  ours = imagenet2012()
  if not set(ours) & set(theirs):
    return [-1] * len(ours)
  return classes.index_map(theirs, ours)
