"""Every form of convolution and pooling against XLA's own: values, both gradients, types."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import strategies as st
from jax import lax

from vision_attention.ops import convolution

pytestmark = pytest.mark.fast


def _normal(shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def _plain(x, kernel, stride, padding, groups):
  if padding == 'symmetric':
    padding = [((k - 1) // 2,) * 2 for k in kernel.shape[:2]]
  return lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    padding.upper() if isinstance(padding, str) else padding,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )


def _assert_same(ours, plain, *args):
  """Values within 1e-5 and gradients within 1e-4 of their maximum."""
  y, pull = jax.vjp(jax.jit(ours), *args)
  expected, expected_pull = jax.vjp(jax.jit(plain), *args)
  assert y.dtype == expected.dtype
  np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
  g = _normal(y.shape, 7)
  for mine, theirs in zip(pull(g), expected_pull(g), strict=True):
    assert mine.dtype == theirs.dtype
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4 * max(np.abs(theirs).max(), 1e-3))


# Kernel side, input and output channels, groups, stride, map.
CASES = {
  '1x1': (1, 20, 24, 1, 1, (6, 7)),
  '1x1 stride 2 odd': (1, 8, 12, 1, 2, (7, 9)),
  'depthwise 3x3': (3, 16, 16, 16, 1, (9, 10)),
  'depthwise 3x3 stride 2 even': (3, 16, 16, 16, 2, (8, 10)),
  'depthwise 3x3 stride 2 odd': (3, 8, 8, 8, 2, (9, 7)),
  'depthwise 7x7': (7, 8, 8, 8, 1, (9, 30)),
  'depthwise wide': (3, 4, 4, 4, 1, (3, 60)),
  'winograd': (3, 32, 40, 1, 1, (7, 10)),
  'winograd large map': (3, 32, 32, 1, 1, (29, 30)),
  'dense few channels': (3, 3, 8, 1, 1, (8, 8)),
  'dense 3x3 stride 2': (3, 16, 24, 1, 2, (10, 9)),
  'stem': (7, 3, 16, 1, 2, (16, 18)),
  'grouped': (3, 16, 32, 4, 1, (6, 6)),
  'patches': (4, 3, 16, 1, 4, (12, 16)),
  'patches that do not tile': (4, 3, 8, 1, 4, (13, 15)),
}


@pytest.mark.parametrize('padding', ['same', 'symmetric', 'valid'])
@pytest.mark.parametrize('case', CASES)
def test_convolution_is_that_of_lax(case, padding):
  size, inputs, outputs, groups, stride, shape = CASES[case]
  x, kernel = _normal((2, *shape, inputs)), _normal((size, size, inputs // groups, outputs), 1)
  options = {'stride': stride, 'padding': padding, 'groups': groups}
  ours = functools.partial(convolution.conv, **options)
  _assert_same(ours, functools.partial(_plain, **options), x, kernel)


@hypothesis.given(
  st.integers(1, 4), st.integers(1, 3), st.integers(5, 12), st.integers(5, 12), st.booleans(),
  st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 2))] * 2),
)  # fmt: skip
def test_any_shape_and_padding(size, stride, height, width, depthwise, padding):
  inputs, outputs, groups = (6, 6, 6) if depthwise else (5, 4, 1)
  x = _normal((1, height, width, inputs))
  kernel = _normal((size, size, inputs // groups, outputs), 1)
  options = {'stride': stride, 'padding': padding, 'groups': groups}
  ours = functools.partial(convolution.conv, **options)
  _assert_same(ours, functools.partial(_plain, **options), x, kernel)


@hypothesis.given(
  size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
  stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
  dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
  extra=st.tuples(st.integers(0, 5), st.integers(0, 5)),
  channels=st.integers(1, 3),
)
@hypothesis.settings(max_examples=8, deadline=None)
def test_gradient_of_one_output_tap_by_tap(size, stride, dilation, extra, channels):
  """The form that TPUs have in place of a convolution, for any kernel and map."""
  height, width = ((k - 1) * d + 1 + e for k, d, e in zip(size, dilation, extra, strict=True))
  x, kernel = _normal((2, height, width, channels)), _normal((*size, channels, 1), 1)

  def plain(kernel):
    return lax.conv_general_dilated(
      x,
      kernel,
      stride,
      'VALID',
      rhs_dilation=dilation,
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )

  y, pull = jax.vjp(plain, kernel)
  g = _normal(y.shape, 2)
  found = convolution.dw_by_taps(x, g, size, stride, dilation)
  np.testing.assert_allclose(found, pull(g)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('case', ['1x1', 'depthwise 3x3', 'winograd', 'dense 3x3 stride 2'])
def test_bfloat16_stays_bfloat16(case):
  size, inputs, outputs, groups, stride, shape = CASES[case]
  x = _normal((2, *shape, inputs)).astype(jnp.bfloat16)
  kernel = _normal((size, size, inputs // groups, outputs), 1).astype(jnp.bfloat16)
  ours = functools.partial(convolution.conv, stride=stride, groups=groups)
  y, pull = jax.vjp(ours, x, kernel)
  assert [a.dtype for a in (y, *pull(y))] == [jnp.bfloat16] * 3
  expected = _plain(x.astype(jnp.float32), kernel.astype(jnp.float32), stride, 'same', groups)
  np.testing.assert_allclose(y, expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.parametrize(
  'size,stride,padding',
  [(3, 2, 'same'), (3, 2, 'symmetric'), (2, 2, 'valid'), (3, 1, 'same'), (2, 2, 'same')],
)
@pytest.mark.parametrize('shape', [(8, 8), (7, 9)])
def test_max_pool_is_that_of_lax_also_on_ties(size, stride, padding, shape):
  # Rounded and rectified: most windows have ties, and the first must win in both.
  x = jax.nn.relu(jnp.round(2 * _normal((2, *shape, 5))))
  pads = [((size - 1) // 2,) * 2] * 2 if padding == 'symmetric' else padding.upper()
  ours = functools.partial(convolution.max_pool, window=size, stride=stride, padding=padding)
  plain = functools.partial(
    nn.max_pool, window_shape=(size, size), strides=(stride, stride), padding=pads
  )
  _assert_same(ours, plain, x)


@pytest.mark.parametrize('inside', [True, False])
@pytest.mark.parametrize('size,stride,padding', [(2, 2, 'same'), (3, 2, 'same'), (2, 2, 'valid')])
def test_avg_pool_is_that_of_lax(size, stride, padding, inside):
  x = _normal((2, 7, 9, 5))
  ours = functools.partial(
    convolution.avg_pool, window=size, stride=stride, padding=padding, count_include_pad=inside
  )
  plain = functools.partial(
    nn.avg_pool,
    window_shape=(size, size),
    strides=(stride, stride),
    padding=padding.upper(),
    count_include_pad=inside,
  )
  _assert_same(ours, plain, x)


def test_unknown_padding_is_named():
  with pytest.raises(ValueError, match="padding 'smae' is unknown: did you mean 'same'"):
    convolution.conv(_normal((1, 4, 4, 2)), _normal((3, 3, 2, 2)), padding='smae')
