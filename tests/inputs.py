"""The input's part of a config, for tests of what reads it."""

import os
from typing import Any

import ml_collections


def config(data_dir: str | os.PathLike, **changes: Any) -> ml_collections.ConfigDict:
  """Returns `config.data` of scikit-learn's digits; `changes` replace or add values."""
  values = {
    'name': 'digits',
    'data_dir': os.fspath(data_dir),
    'train_split': 'train',
    'eval_split': 'test',
    'train_ops': ('resize(16)', 'pad_crop(2)', 'rand_augment(2, 9)'),
    'eval_ops': ('resize(16)',),
    'label_maps': '',
    'label_geometry': 'image',
    'repeats': 1,
    'on_corrupt': 'raise',
    'num_threads': 2,
    'num_workers': 0,
    'prefetch': 2,
  }
  return ml_collections.ConfigDict(values | changes)
