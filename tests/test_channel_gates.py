"""Gates per channel: values at the start, what they commute with, and each by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vision_attention.attention import channel_gates, operators


def _map(seed=0, shape=(2, 5, 7, 32)):
  return jax.random.normal(jax.random.key(seed), shape)


def _drawn(spec, x, seed=1):
  """Returns a module and variables of which none is at its initial value."""
  module = operators.module(spec)()
  variables = jax.jit(functools.partial(module.init, train=False))(jax.random.key(0), x)
  keys = iter(jax.random.split(jax.random.key(seed), 100))
  moved = jax.tree.map(
    lambda p: p + 0.3 * jnp.abs(jax.random.normal(next(keys), p.shape)), variables
  )
  return module, moved


def _apply(module, variables, x, train=False):
  apply = functools.partial(module.apply, train=train, mutable=['batch_stats'] if train else False)
  y = jax.jit(apply)(variables, x)
  return y[0] if train else y


def _initial(spec, x):
  module = operators.module(spec)()
  return module, jax.jit(functools.partial(module.init, train=False))(jax.random.key(0), x)


def _zeroed(variables, *names):
  """Returns variables with the parameters of the named submodules, or the named ones, at zero."""
  params = {
    name: jax.tree.map(jnp.zeros_like, value) if name in names else value
    for name, value in variables.get('params', {}).items()
  }
  return {**variables, 'params': params}


@pytest.mark.parametrize(
  ('name', 'zero'), [('se', 'excite'), ('ese', 'excite'), ('eca', 'kernel'), ('ge_plus', 'excite')]
)
def test_a_gate_without_logits_is_a_half(name, zero):
  x = _map()
  module, variables = _initial(name, x)
  np.testing.assert_allclose(_apply(module, _zeroed(variables, zero), x), x / 2, rtol=1e-6)


@pytest.mark.parametrize('train', [False, True])
def test_style_recalibration_starts_at_a_half(train):
  x = _map()
  module, variables = _initial('srm', x)
  assert not variables['params']['style'].any()
  np.testing.assert_array_equal(_apply(module, variables, x, train), x / 2)


def test_a_gate_of_the_mean_of_a_centred_map_is_a_half():
  x = _map()
  x = x - x.mean((1, 2), keepdims=True)
  module, variables = _initial('ge_minus', x)
  assert not variables
  np.testing.assert_allclose(_apply(module, variables, x), x / 2, atol=1e-6)


POSITIONS = {'se': True, 'ese': True, 'eca': True, 'srm': True, 'ge_minus': True, 'ge': False}


@pytest.mark.parametrize(('name', 'commutes'), POSITIONS.items())
def test_channel_gates_do_not_see_where(name, commutes):
  x = _map()
  module, variables = _drawn(name, x)
  order = np.random.default_rng(0).permutation(35)

  def permuted(x):
    return x.reshape(2, 35, 32)[:, order].reshape(x.shape)

  y = _apply(module, variables, permuted(x))
  expected = permuted(_apply(module, variables, x))
  assert bool(jnp.allclose(y, expected, atol=1e-5)) == commutes


@pytest.mark.parametrize('name', ['srm', 'ge', 'ge_minus', 'eca'])
def test_the_order_of_channels_matters_to_a_convolution_along_them_alone(name):
  x = _map()
  module, variables = _drawn(name, x)
  order = np.random.default_rng(0).permutation(32)

  def permuted(p):
    axes = [axis for axis, n in enumerate(p.shape) if n == 32]
    return p if not axes else jnp.take(p, order, axis=axes[-1])

  y = _apply(module, jax.tree.map(permuted, variables), x[..., order])
  expected = _apply(module, variables, x)[..., order]
  assert bool(jnp.allclose(y, expected, atol=1e-5)) == (name != 'eca')


def test_the_number_of_taps_grows_with_the_width():
  widths = (64, 128, 256, 512, 1024, 2048)
  assert [channel_gates.adaptive_kernel_size(c) for c in widths] == [3, 5, 5, 5, 5, 7]


@given(st.integers(1, 4096))
def test_the_number_of_taps_is_odd_and_three_or_more(dim):
  assert channel_gates.adaptive_kernel_size(dim) % 2 == 1
  assert channel_gates.adaptive_kernel_size(dim) >= 3


def test_eca_correlates_along_the_channels():
  x = jnp.broadcast_to(jnp.asarray([1.0, 10.0, 100.0, 1000.0]), (1, 2, 2, 4))
  module = channel_gates.EfficientChannelAttention(kernel_size=3)
  kernel = jnp.asarray([1e-3, 2e-3, 5e-3])
  for circular, logits in (
    (False, [0.052, 0.521, 5.21, 2.1]),
    (True, [1.052, 0.521, 5.21, 2.105]),
  ):
    y = module.clone(circular=circular).apply({'params': {'kernel': kernel}}, x)
    np.testing.assert_allclose(y[0, 0, 0] / x[0, 0, 0], jax.nn.sigmoid(jnp.asarray(logits)), 1e-5)


def test_one_tap_gates_each_channel_by_its_own_mean():
  x = _map()
  module = channel_gates.EfficientChannelAttention(kernel_size=1)
  y = module.apply({'params': {'kernel': jnp.asarray([0.7])}}, x)
  np.testing.assert_allclose(y, x * jax.nn.sigmoid(0.7 * x.mean((1, 2)))[:, None, None], rtol=1e-5)
  with pytest.raises(ValueError, match='kernel_size 4 must be odd, to be centred: 3 or 5'):
    module.clone(kernel_size=4).init(jax.random.key(0), x)


@given(st.integers(0, 31))
def test_circular_channels_have_no_first_one(shift):
  x = _map(shape=(1, 2, 2, 32))
  module = channel_gates.EfficientChannelAttention(circular=True)
  variables = {'params': {'kernel': jnp.asarray([0.5, -1.0, 2.0])}}
  y = module.apply(variables, jnp.roll(x, shift, -1))
  np.testing.assert_allclose(y, jnp.roll(module.apply(variables, x), shift, -1), rtol=1e-5)


def test_style_is_mean_and_unbiased_deviation():
  x = _map()
  module, variables = _drawn('srm', x)
  params, stats = variables['params'], variables['batch_stats']['norm']
  wide = np.asarray(x, np.float64).reshape(2, 35, 32)
  std = np.sqrt(wide.var(1, ddof=1) + 1e-5)
  z = params['style'][:, 0] * wide.mean(1) + params['style'][:, 1] * std
  z = (z - stats['mean']) / np.sqrt(stats['var'] + 1e-5)
  gate = jax.nn.sigmoid(z * params['norm']['scale'] + params['norm']['bias'])
  np.testing.assert_allclose(_apply(module, variables, x), x * gate[:, None, None], atol=1e-5)
  single = x[:, :1, :1]
  assert jnp.isfinite(_apply(module, variables, single)).all()


def test_a_global_gather_belongs_to_one_size_of_map():
  x = _map()
  module, variables = _drawn('ge', x)
  assert variables['params']['gather']['kernel'].shape == (5, 7, 1, 32)
  params, stats = variables['params'], variables['batch_stats']['norm']
  kernel = params['gather']['kernel'][:, :, 0]
  z = (np.einsum('bhwc,hwc->bc', x, kernel) - stats['mean']) / np.sqrt(stats['var'] + 1e-5)
  gate = jax.nn.sigmoid(z * params['norm']['scale'] + params['norm']['bias'])
  np.testing.assert_allclose(_apply(module, variables, x), x * gate[:, None, None], atol=1e-5)
  with pytest.raises(ValueError, match='was made for 5x7 maps, not 7x5'):
    module.apply(variables, x.swapaxes(1, 2), train=False)


def test_a_local_gather_sees_its_neighbourhood_alone():
  x = _map(shape=(1, 16, 16, 4))
  for spec in ({'name': 'ge_minus', 'extent': 4}, {'name': 'ge', 'extent': 4}):
    module, variables = _drawn(spec, x)
    gate = _apply(module, variables, x) / x
    # One gate for 4x4 positions, which the far corner does not touch.
    np.testing.assert_allclose(gate[0, :4, :4], jnp.broadcast_to(gate[0, 0, 0], (4, 4, 4)), 1e-4)
    assert jnp.abs(gate[0, 0, 0] - gate[0, 4, 4]).max() > 1e-3
    moved = _apply(module, variables, x.at[0, 12:, 12:].add(1.0))
    np.testing.assert_allclose(moved[0, :4, :4], (x * gate)[0, :4, :4], rtol=1e-5)
  with pytest.raises(ValueError, match='extent 3 must be 0'):
    _initial({'name': 'ge', 'extent': 3}, x)


@pytest.mark.parametrize('name', [*POSITIONS, 'ge_plus'])
def test_gates_keep_shape_and_type(name):
  x = _map(shape=(2, 3, 3, 16)).astype(jnp.bfloat16)
  module = functools.partial(operators.module(name), dtype=jnp.bfloat16)()
  y, variables = module.init_with_output(jax.random.key(0), x, train=True)
  assert y.shape == x.shape
  assert y.dtype == jnp.bfloat16
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
