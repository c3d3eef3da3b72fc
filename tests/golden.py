"""Goldens: what a reference implementation answers for weights and images that a rule makes.

A file in `tests/goldens` holds no weights. Its `meta['tensors']` lists every tensor of the
reference's state dict with the mean and spread it is drawn with, from a generator seeded by its
name.
"""

import dataclasses
import json
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parent / 'goldens'


@dataclasses.dataclass(frozen=True)
class Golden:
  """One model, by the reference that answered."""

  meta: dict[str, Any]
  outputs: dict[str, np.ndarray]

  def _draw(self, name: str, shape: list[int]) -> np.ndarray:
    seed = zlib.crc32(f'{self.meta["seed"]}:{name}'.encode())
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape, np.float32)

  def state(self) -> dict[str, np.ndarray]:
    """Returns the reference's state dict."""
    state = {}
    for name, shape, mean, std, kind in self.meta['tensors']:
      value = np.float32(mean) + np.float32(std) * self._draw(name, shape)
      state[name] = np.exp(value) if kind == 'lognormal' else value
    return state

  def images(self) -> np.ndarray:
    """Returns the images that the reference saw, `[b, h, w, c]`: coarse blocks and fine noise."""
    batch, height, width, channels = self.meta['input']
    coarse = self._draw('input.coarse', [batch, -(-height // 16), -(-width // 16), channels])
    coarse = coarse.repeat(16, 1).repeat(16, 2)[:, :height, :width]
    return 2 * coarse + np.float32(0.5) * self._draw('input.fine', self.meta['input'])

  def error(self, logits: np.ndarray) -> float:
    """Returns the largest difference, relative to the mean difference between the two images."""
    golden = self.outputs['logits']
    return float(np.abs(logits - golden).max() / np.abs(golden[0] - golden[1]).mean())

  def error_of_features(self, features: Mapping[str, np.ndarray]) -> float:
    """Returns the largest difference of the last map's samples, relative to their deviation.

    Args:
      features: of our model, `[b, h, w, c]` by stage; with a class token, `cls` `[b, c]` besides.
    """
    golden, layout = self.outputs['features'], self.meta['features_layout']
    last = features[max(key for key in features if key.startswith('stage'))]
    if 'cls first' in layout and 'cls' in features:
      tokens = last.reshape(len(last), -1, last.shape[-1])
      last = np.concatenate([features['cls'][:, None], tokens], axis=1)
    if layout.startswith('NCHW'):
      last = np.moveaxis(last, -1, 1)
    found = last.reshape(-1)[::997]
    assert found.shape == golden.shape, (last.shape, layout)
    return float(np.abs(found - golden).max() / golden.std())


def load(path: pathlib.Path) -> Golden:
  with np.load(path) as file:
    outputs = {key: file[key] for key in file.files if key != 'meta'}
    return Golden(json.loads(file['meta'].tobytes()), outputs)
