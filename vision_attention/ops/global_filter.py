"""Filters over a whole map, in its discrete Fourier transform (arXiv 2107.00645, section 3.2).

A filter is kept for the half of the spectrum that a real map has, `w // 2 + 1` columns, as two real
planes: its real and its imaginary part.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def half(width: int) -> int:
  """Returns the columns of the half spectrum of a map of `width` columns."""
  return width // 2 + 1


def _interpolation(old: int, new: int) -> np.ndarray:
  """Returns `[new, old]`: linear, with the first and the last samples on each other."""
  at = np.linspace(0.0, old - 1, new) if new > 1 else np.zeros(1)
  low = np.minimum(np.floor(at).astype(int), max(old - 2, 0))
  rows = np.arange(new)
  matrix = np.zeros((new, old))
  matrix[rows, low] = 1 - (at - low)
  matrix[rows, np.minimum(low + 1, old - 1)] += at - low
  return matrix


def resize(filters: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Resizes the filters `[2, h, w, c]` of one map to those of another, both planes bilinearly.

  With `align_corners`, and over the half spectrum as it lies: what HorNet's code does. The mean,
  the filter's first entry, is kept.
  """
  rows, columns = (_interpolation(*sides) for sides in zip(filters.shape[1:3], shape[1:3]))
  wide = np.asarray(filters, np.float64)
  return np.einsum('yh,xw,zhwc->zyxc', rows, columns, wide).astype(filters.dtype)


def _resized(filters: jax.Array, size: tuple[int, int]) -> jax.Array:
  """As `resize`, within a program."""
  if filters.shape[1:3] == size:
    return filters
  rows, columns = (
    jnp.asarray(_interpolation(*sides), filters.dtype) for sides in zip(filters.shape[1:3], size)
  )
  return jnp.einsum('yh,xw,zhwc->zyxc', rows, columns, filters)


def global_filter(
  x: Float[Array, 'b h w c'], filters: Float[Array, 'z p q c']
) -> Float[Array, 'b h w c']:
  """Multiplies a map's spectrum, channel by channel: a circular convolution as large as the map.

  In float32. With orthonormal transforms, so that a filter of ones is the identity and the
  un-normalised transform of a spatial kernel convolves by it.

  Args:
    x: the map.
    filters: `[2, h, w // 2 + 1, c]`, or of another map, and then resized.
  """
  size = (x.shape[1], x.shape[2])
  real, imaginary = _resized(filters.astype(jnp.float32), (size[0], half(size[1])))
  spectrum = jnp.fft.rfft2(x.astype(jnp.float32), axes=(1, 2), norm='ortho')
  spectrum = spectrum * jax.lax.complex(real, imaginary)
  return jnp.fft.irfft2(spectrum, s=size, axes=(1, 2), norm='ortho').astype(x.dtype)
