"""Bicubic interpolation of tables as PyTorch has it: `jax.image.resize` uses another kernel."""

import numpy as np

# PyTorch and OpenCV; Keys' own choice, which `jax.image` follows, is -0.5.
_SHARPNESS = -0.75


def matrix(old: int, new: int) -> np.ndarray:
  """Returns `[new, old]`: half-pixel centres, no antialiasing, border pixels repeated."""
  at = (np.arange(new) + 0.5) * (old / new) - 0.5
  first = np.floor(at).astype(int)
  weights = np.zeros((new, old))
  for tap in range(-1, 3):
    distance = np.abs(at - (first + tap))
    np.add.at(weights, (np.arange(new), np.clip(first + tap, 0, old - 1)), _kernel(distance))
  return weights


def _kernel(distance: np.ndarray) -> np.ndarray:
  a = _SHARPNESS
  near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
  far = a * (((distance - 5) * distance + 8) * distance - 4)
  return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))


def resize(table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Resizes the last two axes of `[..., height, width]` to those of `shape`."""
  rows, columns = matrix(table.shape[-2], shape[-2]), matrix(table.shape[-1], shape[-1])
  wide = table.astype(np.float64)
  return np.einsum('yh,xw,...hw->...yx', rows, columns, wide).astype(table.dtype)
