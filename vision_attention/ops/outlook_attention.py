"""Outlook attention: a pixel says with what weights its neighbours see each other (VOLO).

Every window of `kernel x kernel` pixels has a matrix of weights, `kernel^2` queries by as many keys
(arXiv 2106.13112, section 3.1). What a pixel gets from all windows that it lies in is summed, and
not divided by their number. Windows are cut and put together along one axis after the other, from
slices of blocks of `step` pixels: neither a gather nor a scatter.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vision_attention import errors


class Windows(NamedTuple):
  """Square windows around every `step`-th pixel along either axis, from the first.

  Attributes:
    kernel: side of a window, odd.
    step: distance of the windows' centres.
  """

  kernel: int
  step: int

  def count(self, size: int) -> int:
    """Returns how many windows an axis of `size` pixels has."""
    return -(-size // self.step)


def windows(kernel: int, step: int) -> Windows:
  """Returns windows that cover a map.

  Raises:
    ValueError: for an even kernel, or one that leaves pixels between the windows.
  """
  errors.check_odd('kernel', kernel)
  if not 1 <= step <= kernel:
    raise ValueError(f'step {step} leaves pixels between windows of {kernel}: pass 1 to {kernel}')
  return Windows(kernel, step)


def _blocks(size: int, cut: Windows) -> int:
  """Returns how many blocks of `step` pixels the windows along an axis cover."""
  return cut.count(size) - 1 + -(-cut.kernel // cut.step)


def _unfold(x: jax.Array, axis: int, at: int, cut: Windows) -> jax.Array:
  """Replaces `axis` by that of the windows and puts that of their taps at `at`, counted before."""
  size, count, blocks = x.shape[axis], cut.count(x.shape[axis]), _blocks(x.shape[axis], cut)
  first = cut.kernel // 2
  # The last block may reach beyond what windows see, and windows beyond the map.
  last = blocks * cut.step - first - size
  outside = [(0, 0)] * x.ndim
  outside[axis] = (first, max(last, 0))
  x = jnp.pad(x, outside)
  x = jax.lax.slice_in_dim(x, 0, blocks * cut.step, axis=axis)
  x = x.reshape(*x.shape[:axis], blocks, cut.step, *x.shape[axis + 1 :])
  taps = []
  for tap in range(cut.kernel):
    block, offset = divmod(tap, cut.step)
    tap_ = jax.lax.slice_in_dim(x, block, block + count, axis=axis)
    taps.append(jax.lax.index_in_dim(tap_, offset, axis + 1, keepdims=False))
  return jnp.stack(taps, at)


def _fold(x: jax.Array, axis: int, at: int, size: int, cut: Windows) -> jax.Array:
  """Transposes `_unfold`: sums the taps at `at` to the pixels of an axis of `size`."""
  count, blocks = x.shape[axis], _blocks(size, cut)
  offsets: list[jax.Array] = []
  for offset in range(cut.step):
    total: jax.Array | None = None
    for block, tap in enumerate(range(offset, cut.kernel, cut.step)):
      piece = jax.lax.index_in_dim(x, tap, at, keepdims=False)
      outside = [(0, 0)] * piece.ndim
      outside[axis] = (block, blocks - count - block)
      piece = jnp.pad(piece, outside)
      total = piece if total is None else total + piece
    assert total is not None
    offsets.append(total)
  y = jnp.stack(offsets, axis + 1)
  y = y.reshape(*y.shape[:axis], blocks * cut.step, *y.shape[axis + 2 :])
  first = cut.kernel // 2
  missing = [(0, 0)] * y.ndim
  missing[axis] = (0, max(first + size - blocks * cut.step, 0))
  return jax.lax.slice_in_dim(jnp.pad(y, missing), first, first + size, axis=axis)


def unfold(x: Float[Array, 'b h w n d'], cut: Windows) -> Float[Array, 'b p q n taps d']:
  """Returns the pixels of every window, row by row; those outside the map are zeros."""
  rows = _unfold(x, 1, 4, cut)  # b p w n y d
  both = _unfold(rows, 2, 5, cut)  # b p q n y x d
  return both.reshape(*both.shape[:4], cut.kernel**2, both.shape[-1])


def fold(
  x: Float[Array, 'b p q n taps d'], size: tuple[int, int], cut: Windows
) -> Float[Array, 'b h w n d']:
  """Sums, per pixel of a map of height and width `size`, what all windows have for it."""
  x = x.reshape(*x.shape[:4], cut.kernel, cut.kernel, x.shape[-1])
  columns = _fold(x, 2, 5, size[1], cut)
  return _fold(columns, 1, 4, size[0], cut)


def outlook_attention(
  value: Float[Array, 'b h w n d'], logits: Float[Array, 'b p q n r t'], *, step: int
) -> Float[Array, 'b h w n d']:
  """Returns `fold(softmax(logits) unfold(value))`; the softmax runs in float32.

  Args:
    value: `n` heads of `d` channels at every pixel.
    logits: per window and head, those of `r` queries for `t` keys, both the window's `kernel^2`
      pixels row by row.
    step: distance of the windows' centres.

  Raises:
    ValueError: if the logits are not those of the windows of such a map.
  """
  taps = logits.shape[-1]
  cut = windows(math.isqrt(taps), step)
  height, width = value.shape[1:3]
  expected = (cut.count(height), cut.count(width), taps, cut.kernel**2)
  if (*logits.shape[1:3], *logits.shape[4:]) != expected:
    raise ValueError(
      f'logits {logits.shape} are not those of a map of {height}x{width}, which has '
      f'{expected[0]}x{expected[1]} windows at step {step}, with a square matrix each'
    )
  weights = jax.nn.softmax(logits.astype(jnp.float32), -1).astype(value.dtype)
  mixed = jnp.einsum(
    'bpqnrt,bpqntd->bpqnrd', weights, unfold(value, cut), preferred_element_type=jnp.float32
  )
  return fold(mixed, (height, width), cut).astype(value.dtype)
