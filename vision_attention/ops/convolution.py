"""Convolution and pooling of `[b, h, w, c]` maps, in the form that the backend runs fast.

On accelerators these are `lax.conv_general_dilated` and `lax.reduce_window`, and the compiled
program is that of the plain calls. On CPU, XLA's own are several to tens of times slower than the
forms of `ops.convolution_cpu`. `lax.platform_dependent` chooses when a program is compiled, within
custom gradients: values and gradients are the same up to rounding. Forward-mode differentiation is
not supported.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.ops import convolution_cpu as cpu

Padding = str | Sequence[tuple[int, int]]
PADDINGS = ('same', 'symmetric', 'valid')
_Pads = tuple[tuple[int, int], tuple[int, int]]
# Winograd's transforms do not pay for themselves on fewer channels or smaller maps.
_MIN_WINOGRAD = (32, 4)
# More groups than this are left to XLA: a program with a convolution for each would be long.
_MAX_GROUPS = 32


class _Spec(NamedTuple):
  """What is static about a convolution."""

  stride: tuple[int, int]
  pads: _Pads
  groups: int
  dilation: tuple[int, int]


class _Forms(NamedTuple):
  """CPU forms; None where XLA's own is the best that is known."""

  forward: Callable[..., jax.Array] | None = None
  dx: Callable[..., jax.Array] | None = None
  dw: Callable[..., jax.Array] | None = None


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
  return (value, value) if isinstance(value, int) else (value[0], value[1])


def _pads(padding: Padding, size: Sequence[int], window: Sequence[int], stride) -> _Pads:
  """Returns the zeros at top and bottom, left and right."""
  if not isinstance(padding, str):
    (top, bottom), (left, right) = padding
    return (top, bottom), (left, right)
  errors.check_choice('padding', padding, PADDINGS)
  if padding == 'same':
    (top, bottom), (left, right) = lax.padtype_to_pads(size, window, stride, 'SAME')
    return (top, bottom), (left, right)
  y, x = ((k - 1) // 2 if padding == 'symmetric' else 0 for k in window)
  return (y, y), (x, x)


def conv(
  x: Float[Array, 'b h w c'],
  kernel: Float[Array, 'y x i o'],
  *,
  stride: int | Sequence[int] = 1,
  padding: Padding = 'same',
  groups: int = 1,
  dilation: int | Sequence[int] = 1,
) -> Float[Array, 'b p q o']:
  """Convolves (cross-correlates) a map with a kernel.

  Args:
    x: the map.
    kernel: `[height, width, c / groups, o]`.
    stride: step along height and width.
    padding: `same` (TensorFlow: the odd pixel goes bottom and right), `symmetric` (PyTorch's
      `(k - 1) // 2` on either side), `valid`, or pairs of zeros for height and width.
    groups: channel groups.
    dilation: distance of the kernel's taps.
  """
  stride, dilation = _pair(stride), _pair(dilation)
  window = [(k - 1) * d + 1 for k, d in zip(kernel.shape[:2], dilation, strict=True)]
  pads = _pads(padding, x.shape[1:3], window, stride)
  return _traced_conv(x, kernel, _Spec(stride, pads, groups, dilation))


def _lax_conv(x: jax.Array, kernel: jax.Array, spec: _Spec) -> jax.Array:
  return lax.conv_general_dilated(
    x,
    kernel,
    spec.stride,
    spec.pads,
    rhs_dilation=spec.dilation,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=spec.groups,
  )


def _forms(x: Any, kernel: Any, spec: _Spec) -> _Forms:
  """Returns the CPU forms for a shape."""
  (height, width, inputs, outputs), dim = kernel.shape, x.shape[-1]
  stride, plain = spec.stride[0], spec.dilation == (1, 1)
  if spec.stride[0] != spec.stride[1] or not plain or min(map(min, spec.pads)) < 0:
    return _Forms()
  if spec.groups > 1:
    if spec.groups == dim == outputs and max(height, width) <= 9:
      return _Forms(cpu.depthwise, cpu.depthwise_dx, cpu.depthwise_dw)
    if spec.groups <= _MAX_GROUPS:
      forms = (cpu.grouped, cpu.grouped_dx, cpu.grouped_dw)
      return _Forms(*(functools.partial(form, groups=spec.groups) for form in forms))
    return _Forms()
  if (height, width) == (1, 1):
    return _Forms(cpu.pointwise, cpu.pointwise_dx, cpu.pointwise_dw)
  if height == width == stride and spec.pads == ((0, 0), (0, 0)):
    return _Forms(cpu.patch, cpu.dense_dx, cpu.patch_dw)
  channels, side = min(inputs, outputs), min(x.shape[1:3])
  if (height, width) == (3, 3) and stride == 1 and spec.pads == ((1, 1), (1, 1)):
    if channels >= _MIN_WINOGRAD[0] and side >= _MIN_WINOGRAD[1]:
      return _Forms(cpu.winograd, cpu.winograd_dx, cpu.winograd_dw)
    return _Forms()
  if stride > 1 and height * width <= 49:
    return _Forms(None, cpu.dense_dx if channels >= 16 else None, cpu.dense_dw)
  return _Forms()


def _pad(x: jax.Array, pads: _Pads, value: float = 0.0) -> jax.Array:
  return jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=value)


def _padded(size: Sequence[int], pads: _Pads) -> tuple[int, int]:
  return size[0] + sum(pads[0]), size[1] + sum(pads[1])


def _unpad(x: jax.Array, pads: _Pads, size: Sequence[int]) -> jax.Array:
  (top, _), (left, _) = pads
  return x[:, top : top + size[0], left : left + size[1]]


def _choose(on_cpu: Callable | None, default: Callable, *args: jax.Array) -> jax.Array:
  if on_cpu is None:
    return default(*args)
  return lax.platform_dependent(*args, cpu=on_cpu, default=default)


def dw_by_taps(
  x: Float[Array, 'b h w c'],
  g: Float[Array, 'b p q 1'],
  size: Sequence[int],
  stride: tuple[int, int],
  dilation: tuple[int, int],
) -> Float[Array, 'y x c 1']:
  """Returns the gradient of a kernel with one output channel, a sum per tap, from a padded map.

  Over the convolution that it is, of a large batch, the compiler for TPUs takes many minutes.
  """
  rows, columns = g.shape[1:3]
  taps = []
  for i in range(size[0]):
    for j in range(size[1]):
      top, left = i * dilation[0], j * dilation[1]
      seen = x[:, top :: stride[0], left :: stride[1]][:, :rows, :columns]
      taps.append(jnp.sum(seen.astype(jnp.float32) * g.astype(jnp.float32), (0, 1, 2)))
  return jnp.stack(taps).reshape(*size, -1, 1).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x: jax.Array, kernel: jax.Array, spec: _Spec) -> jax.Array:
  form = _forms(x, kernel, spec).forward

  def on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
    assert form is not None
    return form(_pad(x, spec.pads), kernel, spec.stride[0]).astype(x.dtype)

  return _choose(form and on_cpu, lambda x, kernel: _lax_conv(x, kernel, spec), x, kernel)


def _conv_fwd(x: jax.Array, kernel: jax.Array, spec: _Spec) -> tuple[Any, Any]:
  return _conv(x, kernel, spec), (x, kernel)


def _conv_bwd(spec: _Spec, saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
  x, kernel = saved
  forms, stride = _forms(x, kernel, spec), spec.stride[0]
  shape, size = x.shape, kernel.shape[:2]

  def dx_cpu(kernel: jax.Array, g: jax.Array) -> jax.Array:
    assert forms.dx is not None
    padded = forms.dx(g, kernel, _padded(shape[1:3], spec.pads), stride)
    return _unpad(padded, spec.pads, shape[1:3]).astype(g.dtype)

  def dw_cpu(x: jax.Array, g: jax.Array) -> jax.Array:
    assert forms.dw is not None
    return forms.dw(_pad(x, spec.pads), g, size, stride).astype(x.dtype)

  def dx_lax(kernel: jax.Array, g: jax.Array) -> jax.Array:
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.linear_transpose(lambda a: _lax_conv(a, kernel, spec), like)(g)[0]

  def dw_lax(x: jax.Array, g: jax.Array) -> jax.Array:
    like = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)
    return jax.linear_transpose(lambda a: _lax_conv(x, a, spec), like)(g)[0]

  dx = _choose(forms.dx and dx_cpu, dx_lax, kernel, g)
  if kernel.shape[-1] > 1 or size == (1, 1) or min(map(min, spec.pads)) < 0:
    return dx, _choose(forms.dw and dw_cpu, dw_lax, x, g)
  by_taps = lambda x, g: dw_by_taps(_pad(x, spec.pads), g, size, spec.stride, spec.dilation)
  on_cpu = dw_cpu if forms.dw else dw_lax
  return dx, lax.platform_dependent(x, g, cpu=on_cpu, tpu=by_taps, default=dw_lax)


_conv.defvjp(_conv_fwd, _conv_bwd)
# Traced once per shape, however many layers have it: half of the time to trace a deep network.
_traced_conv = jax.jit(_conv, static_argnums=2)


class _Pool(NamedTuple):
  """What is static about a pooling."""

  size: tuple[int, int]
  stride: tuple[int, int]
  pads: _Pads


def _pool_spec(x: Any, window: Any, stride: Any, padding: Padding) -> _Pool:
  size, step = _pair(window), _pair(stride)
  return _Pool(size, step, _pads(padding, x.shape[1:3], size, step))


def _reduce(x: jax.Array, init: float, operation: Callable, spec: _Pool) -> jax.Array:
  pads = ((0, 0), *spec.pads, (0, 0))
  return lax.reduce_window(
    x, np.asarray(init, x.dtype)[()], operation, (1, *spec.size, 1), (1, *spec.stride, 1), pads
  )


def max_pool(
  x: Float[Array, 'b h w c'],
  *,
  window: int | Sequence[int],
  stride: int | Sequence[int],
  padding: Padding = 'valid',
) -> Float[Array, 'b p q c']:
  """Returns the maximum of every window; padding never is one. See `conv` for `padding`."""
  return _max_pool(x, _pool_spec(x, window, stride, padding))


def _lax_max(x: jax.Array, spec: _Pool) -> jax.Array:
  return _reduce(x, -math.inf, lax.max, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool(x: jax.Array, spec: _Pool) -> jax.Array:
  def on_cpu(x: jax.Array) -> jax.Array:
    return cpu.max_pool(_pad(x, spec.pads, -math.inf), spec.size, spec.stride[0])

  square = spec.stride[0] == spec.stride[1]
  return _choose(on_cpu if square else None, lambda x: _lax_max(x, spec), x)


def _max_pool_fwd(x: jax.Array, spec: _Pool) -> tuple[Any, Any]:
  y = _max_pool(x, spec)
  return y, (x, y)


def _max_pool_bwd(spec: _Pool, saved: Any, g: jax.Array) -> tuple[jax.Array]:
  x, y = saved

  def on_cpu(x: jax.Array, y: jax.Array, g: jax.Array) -> jax.Array:
    dx = cpu.max_pool_dx(_pad(x, spec.pads, -math.inf), y, g, spec.size, spec.stride[0])
    return _unpad(dx, spec.pads, x.shape[1:3])

  def default(x: jax.Array, y: jax.Array, g: jax.Array) -> jax.Array:
    return jax.vjp(lambda a: _lax_max(a, spec), x)[1](g)[0]

  square = spec.stride[0] == spec.stride[1]
  return (_choose(on_cpu if square else None, default, x, y, g),)


_max_pool.defvjp(_max_pool_fwd, _max_pool_bwd)


def avg_pool(
  x: Float[Array, 'b h w c'],
  *,
  window: int | Sequence[int],
  stride: int | Sequence[int],
  padding: Padding = 'valid',
  count_include_pad: bool = True,
) -> Float[Array, 'b p q c']:
  """Returns the mean of every window.

  Args:
    x: the map.
    window: height and width of a window.
    stride: step along height and width.
    padding: see `conv`.
    count_include_pad: whether a window divides by its size, or by its pixels within the map.
  """
  spec = _pool_spec(x, window, stride, padding)
  total: Any = _sum_pool(x, spec)
  if count_include_pad or spec.pads == ((0, 0), (0, 0)):
    return total / math.prod(spec.size)
  inside = _reduce(jnp.ones((1, *x.shape[1:3], 1), x.dtype), 0.0, lax.add, spec)
  return total / inside


def _lax_sum(x: jax.Array, spec: _Pool) -> jax.Array:
  return _reduce(x, 0.0, lax.add, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum_pool(x: jax.Array, spec: _Pool) -> Any:
  def on_cpu(x: jax.Array) -> jax.Array:
    return cpu.sum_pool(_pad(x, spec.pads), spec.size, spec.stride[0])

  square = spec.stride[0] == spec.stride[1]
  return _choose(on_cpu if square else None, lambda x: _lax_sum(x, spec), x)


def _sum_pool_fwd(x: jax.Array, spec: _Pool) -> tuple[Any, Any]:
  # The shape is all that the gradient needs of the input; an empty array carries it and the type.
  return _sum_pool(x, spec), jnp.zeros((*x.shape, 0), x.dtype)


def _sum_pool_bwd(spec: _Pool, saved: Any, g: jax.Array) -> tuple[jax.Array]:
  shape = saved.shape[:-1]

  def on_cpu(g: jax.Array) -> jax.Array:
    dx = cpu.sum_pool_dx(g, _padded(shape[1:3], spec.pads), spec.size, spec.stride[0])
    return _unpad(dx, spec.pads, shape[1:3])

  def default(g: jax.Array) -> jax.Array:
    like = jax.ShapeDtypeStruct(shape, saved.dtype)
    return jax.linear_transpose(lambda a: _lax_sum(a, spec), like)(g)[0]

  square = spec.stride[0] == spec.stride[1]
  return (_choose(on_cpu if square else None, default, g),)


_sum_pool.defvjp(_sum_pool_fwd, _sum_pool_bwd)
