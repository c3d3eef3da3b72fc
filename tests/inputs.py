"""The input's part of a config, for tests of what reads it."""

import os
from typing import Any

import ml_collections
import numpy as np


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


def sparse_maps(count, cells, classes, top=2, seed=0):
  """Float16 `[count, 2, top, h, w]`: logits, and different classes in every cell."""
  rng = np.random.default_rng(seed)
  order = rng.permuted(np.tile(np.arange(classes), (count, *cells, 1)), axis=-1)[..., :top]
  logits = rng.uniform(1, 9, order.shape)
  return np.moveaxis(np.stack([logits, order], 1), -1, 2).astype(np.float16)
