"""Bilinear interpolation of `[b, h, w, c]` maps."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def _interpolation(old: int, new: int) -> np.ndarray:
  """Returns `[new, old]`: pixel `i` of the result lies at `i old / new`."""
  at = np.arange(new) * (old / new)
  low = np.minimum(np.floor(at).astype(int), old - 1)
  part = at - low
  matrix = np.zeros((new, old), np.float32)
  rows = np.arange(new)
  matrix[rows, low] += 1 - part
  matrix[rows, np.minimum(low + 1, old - 1)] += part
  return matrix


def bilinear_corner(x: Float[Array, 'b h w c'], height: int, width: int) -> Float[Array, 'b p q c']:
  """Resizes with the first pixels on each other: what TensorFlow 1 does without `align_corners`.

  Doubling keeps every pixel and puts means between them. `jax.image.resize` aligns the centres of
  pixels instead.
  """
  rows = jnp.asarray(_interpolation(x.shape[1], height), x.dtype)
  columns = jnp.asarray(_interpolation(x.shape[2], width), x.dtype)
  return jnp.einsum('qw,bpwc->bpqc', columns, jnp.einsum('ph,bhwc->bpwc', rows, x))
