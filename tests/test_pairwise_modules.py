"""Double and dual attention, each against its equations written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_attention.attention import operators

NAMES = ('double_attention', 'pam', 'cam', 'dual_attention')


def _map():
  return 0.5 * jax.random.normal(jax.random.key(0), (2, 3, 5, 16))


@functools.cache
def _initial(name):
  module = operators.module(name)()
  return module, jax.jit(module.init)(jax.random.key(1), _map())


def _drawn(name):
  module, variables = _initial(name)
  keys = iter(jax.random.split(jax.random.key(2), 100))
  return module, jax.tree.map(lambda p: p + 0.3 * jax.random.normal(next(keys), p.shape), variables)


def _softmax(x, axis):
  e = np.exp(x - x.max(axis, keepdims=True))
  return e / e.sum(axis, keepdims=True)


def _dense(x, params):
  return x @ np.asarray(params['kernel']) + np.asarray(params['bias'])


@pytest.mark.parametrize('name', ['pam', 'cam', 'dual_attention'])
def test_danet_starts_as_the_identity(name):
  module, variables = _initial(name)
  np.testing.assert_array_equal(module.apply(variables, _map()), _map())


def test_double_attention_gathers_and_distributes():
  module, variables = _drawn('double_attention')
  params, tokens = variables['params'], np.asarray(_map()).reshape(2, 15, 16)
  gather = _softmax(_dense(tokens, params['gather']), 1)  # over positions
  distribute = _softmax(_dense(tokens, params['distribute']), 2)  # over maps
  gathered = np.einsum('bpm,bpn->bmn', _dense(tokens, params['features']), gather)
  mixed = np.einsum('bmn,bpn->bpm', gathered, distribute)
  expected = tokens + _dense(mixed, params['proj'])
  np.testing.assert_allclose(
    module.apply(variables, _map()).reshape(tokens.shape), expected, rtol=1e-4, atol=1e-5
  )


def test_uniform_maps_gather_the_mean():
  module, variables = _drawn('double_attention')
  params = dict(variables['params'])
  params['gather'] = jax.tree.map(jnp.zeros_like, params['gather'])
  mean = _dense(np.asarray(_map()).mean((1, 2)), params['features'])
  y = module.apply({'params': params}, _map()) - _map()
  expected = jnp.broadcast_to(_dense(mean, params['proj'])[:, None, None], y.shape)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_position_attention_does_not_scale_its_logits():
  module, variables = _drawn('pam')
  params, tokens = variables['params'], np.asarray(_map()).reshape(2, 15, 16)
  energy = _dense(tokens, params['query']) @ _dense(tokens, params['key']).swapaxes(1, 2)
  mixed = _softmax(energy, 2) @ _dense(tokens, params['value'])
  expected = tokens + np.asarray(params['gamma']) * mixed
  np.testing.assert_allclose(
    module.apply(variables, _map()).reshape(tokens.shape), expected, rtol=1e-4, atol=1e-5
  )


def test_unlike_channels_attend_most():
  module, variables = _drawn('cam')
  x = np.asarray(_map()).reshape(2, 15, 16)
  energy = x.swapaxes(1, 2) @ x
  weights = _softmax(energy.max(2, keepdims=True) - energy, 2)
  expected = x + np.asarray(variables['params']['gamma']) * (x @ weights.swapaxes(1, 2))
  y, state = module.apply(variables, _map(), mutable=['intermediates'])
  np.testing.assert_allclose(y.reshape(x.shape), expected, rtol=1e-4, atol=1e-5)
  [sown] = state['intermediates']['attention']
  np.testing.assert_allclose(sown[:, 0], weights, rtol=1e-4)
  # No channel attends to itself as much as to the mean channel.
  assert (np.einsum('bcc->bc', weights) < 1 / 16).all()


def test_dual_attention_sums_its_branches_over_one_shortcut():
  module, variables = _drawn('dual_attention')
  x, params = _map(), variables['params']
  branches = [
    operators.module(name)().apply({'params': params[key]}, x) - x
    for name, key in (('pam', 'position'), ('cam', 'channel'))
  ]
  np.testing.assert_allclose(module.apply(variables, x), x + sum(branches), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', NAMES)
def test_pairs_of_positions_have_no_place(name):
  module, variables = _drawn(name)
  order = np.random.default_rng(0).permutation(15)

  def permuted(x):
    return x.reshape(2, 15, 16)[:, order].reshape(x.shape)

  y = module.apply(variables, permuted(_map()))
  expected = permuted(module.apply(variables, _map()))
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_channel_attention_commutes_with_the_order_of_channels():
  module, variables = _drawn('cam')
  y = module.apply(variables, _map()[..., ::-1])
  np.testing.assert_allclose(y, module.apply(variables, _map())[..., ::-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', NAMES)
def test_maps_of_attention_sum_to_one(name):
  module, variables = _drawn(name)
  y, state = module.apply(variables, _map(), mutable=['intermediates'])
  assert y.shape == _map().shape
  sown = jax.tree.leaves(state['intermediates'])
  assert {w.shape for w in sown} <= {(2, 1, 15, 15), (2, 1, 16, 16), (2, 1, 4, 15)}
  for weights in sown:
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
