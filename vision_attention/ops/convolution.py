"""Convolution and pooling of `[b, h, w, c]` maps, with `[h, w, in / groups, out]` kernels."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from vision_attention import errors

Padding = str | Sequence[tuple[int, int]]


def pads(padding: Padding, size, window, stride) -> list[tuple[int, int]]:
  if not isinstance(padding, str):
    return [tuple(p) for p in padding]
  errors.check_choice('padding', padding, ('same', 'symmetric', 'valid'))
  if padding == 'valid':
    return [(0, 0)] * len(window)
  if padding == 'symmetric':
    return [((k - 1) // 2,) * 2 for k in window]
  return list(lax.padtype_to_pads(size, window, stride, 'SAME'))


def _pair(x):
  return (x, x) if isinstance(x, int) else tuple(x)


def conv(x, kernel, *, stride=1, padding='same', groups=1, dilation=1):
  stride, dilation = _pair(stride), _pair(dilation)
  window = [(k - 1) * d + 1 for k, d in zip(kernel.shape[:2], dilation)]
  return lax.conv_general_dilated(
    x,
    kernel,
    stride,
    pads(padding, x.shape[1:3], window, stride),
    rhs_dilation=dilation,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )


def max_pool(x, *, window, stride, padding='valid'):
  window, stride = _pair(window), _pair(stride)
  return lax.reduce_window(
    x,
    -jnp.inf,
    lax.max,
    (1, *window, 1),
    (1, *stride, 1),
    [(0, 0), *pads(padding, x.shape[1:3], window, stride), (0, 0)],
  )


def avg_pool(x, *, window, stride, padding='valid', count_include_pad=True):
  window, stride = _pair(window), _pair(stride)
  padded = [(0, 0), *pads(padding, x.shape[1:3], window, stride), (0, 0)]

  def total(y):
    return lax.reduce_window(y, 0.0, lax.add, (1, *window, 1), (1, *stride, 1), padded)

  if count_include_pad:
    return total(x) / (window[0] * window[1])
  return total(x) / total(jnp.ones((1, *x.shape[1:3], 1), x.dtype))
