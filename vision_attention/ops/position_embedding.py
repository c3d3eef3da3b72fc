"""Absolute position embeddings on a grid of patches."""

import jax
import numpy as np


def sincos2d(height: int, width: int, dim: int, temperature: float = 10_000.0) -> np.ndarray:
  """Returns the fixed embedding of MoCo v3 (arXiv 2104.02057) as `[height, width, dim]`.

  `[sin(x w), cos(x w), sin(y w), cos(y w)]` with `w_i = temperature^(-i / (dim / 4 - 1))`.

  Raises:
    ValueError: if 4 does not divide `dim`, or `dim` is 4 (one frequency has no spacing).
  """
  if dim % 4 or dim < 8:
    raise ValueError(f'sincos2d needs a width that is a multiple of 4 and at least 8, not {dim}')
  omega = temperature ** (-np.arange(dim // 4) / (dim / 4 - 1))
  y, x = np.mgrid[:height, :width][..., None] * omega
  return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], -1).astype(np.float32)


def _interpolation(old: int, new: int) -> np.ndarray:
  """Returns `[new, old]`, linear interpolation that maps the corners onto the corners."""
  at = np.linspace(0, old - 1, new)
  low = np.minimum(np.floor(at).astype(int), max(old - 2, 0))
  matrix = np.zeros((new, old))
  rows, part = np.arange(new), at - low
  matrix[rows, low] += 1 - part
  matrix[rows, np.minimum(low + 1, old - 1)] += part
  return matrix


def resize(table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Resizes `[height, width, dim]` bilinearly, corners onto corners.

  What ViT's code does with `scipy.ndimage.zoom(order=1)`. Neither the half-pixel centres of
  `jax.image.resize` nor PyTorch ports' bicubic give the same table.
  """
  rows, columns = _interpolation(table.shape[0], shape[0]), _interpolation(table.shape[1], shape[1])
  resized = np.einsum('yh,xw,hwd->yxd', rows, columns, table.astype(np.float64))
  return resized.astype(table.dtype)


def resize_centres(table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Resizes `[height, width, dim]` bilinearly, pixel centres onto each other, as PyTorch does."""
  return np.asarray(jax.image.resize(table, shape, 'linear', antialias=False))
