"""The lambda layer against a loop over queries, and what it becomes without its parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_attention.attention import lambda_layer

HEIGHT, WIDTH, DIM = 4, 5, 24


def _map():
  return jax.random.normal(jax.random.key(0), (2, HEIGHT, WIDTH, 8))


def _drawn(**fields):
  module = lambda_layer.LambdaLayer(dim=DIM, head_dim=6, **fields)
  init = jax.jit(functools.partial(module.init, train=False))
  variables = init(jax.random.key(1), _map())
  keys = iter(jax.random.split(jax.random.key(2), 100))
  stats = jax.tree.map(jnp.ones_like, variables['batch_stats'])
  params = jax.tree.map(
    lambda p: p + 0.3 * jax.random.normal(next(keys), p.shape), variables['params']
  )
  return module, {'params': params, 'batch_stats': stats}


def _apply(module, variables, x):
  return jax.jit(functools.partial(module.apply, train=False))(variables, x)


def _by_loop(variables, kernel):
  """Equations 1-3, one query after the other; returns `[b, h, w, DIM]`."""
  params = jax.tree.map(np.asarray, variables['params'])
  qkv = np.asarray(_map()) @ params['qkv']['kernel']
  query, key, value = np.split(qkv, [24, 30], -1)

  def normed(y, name):
    return (y - 1) / np.sqrt(1 + 1e-5) * params[name]['scale'] + params[name]['bias']

  query, value = normed(query, 'norm_query'), normed(value, 'norm_value')
  weights = np.exp(key) / np.exp(key).sum((1, 2), keepdims=True)
  content = np.einsum('bhwk,bhwv->bkv', weights, value)
  out = np.zeros((2, HEIGHT, WIDTH, DIM))
  for i, j in np.ndindex(HEIGHT, WIDTH):
    lambdas = content.copy()
    if kernel is not None:
      lambdas += params['position']['bias'][:, None]
    for p, q in np.ndindex(HEIGHT, WIDTH):
      if kernel is None:
        embedding = params['relative_position'][:, i - p + HEIGHT - 1, j - q + WIDTH - 1]
      elif max(abs(i - p), abs(j - q)) <= kernel // 2:
        embedding = params['position']['kernel'][p - i + kernel // 2, q - j + kernel // 2, 0]
      else:
        continue
      lambdas += embedding[:, None] * value[:, p, q, None]
    heads = query[:, i, j].reshape(2, 4, 6)
    out[:, i, j] = np.einsum('bnk,bkv->bnv', heads, lambdas).reshape(2, DIM)
  return out


@pytest.mark.parametrize('kernel', [3, 9, None])
def test_every_position_has_its_own_function(kernel):
  module, variables = _drawn(kernel=kernel)
  y = _apply(module, variables, _map())
  np.testing.assert_allclose(y, _by_loop(variables, kernel), rtol=1e-3, atol=1e-4)


def test_without_positions_it_is_global_linear_attention():
  module, variables = _drawn()
  params = dict(variables['params'])
  params['position'] = jax.tree.map(jnp.zeros_like, params['position'])
  order = np.random.default_rng(0).permutation(HEIGHT * WIDTH)

  def permuted(x):
    return x.reshape(2, HEIGHT * WIDTH, -1)[:, order].reshape(x.shape)

  without = {**variables, 'params': params}
  y = _apply(module, without, permuted(_map()))
  expected = permuted(_apply(module, without, _map()))
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
  y = _apply(module, variables, permuted(_map()))
  assert jnp.abs(y - permuted(_apply(module, variables, _map()))).max() > 1e-2


def test_the_stride_averages():
  module, variables = _drawn()
  y = _apply(module.clone(stride=2), variables, _map())
  full = _apply(module, variables, _map())
  assert y.shape == (2, 2, 3, DIM)
  np.testing.assert_allclose(y[:, 0, 0], full[:, :2, :2].mean((1, 2)), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(y[:, 1, 2], full[:, 2:, 4].mean(1), rtol=1e-4, atol=1e-5)


def test_the_keys_softmax_is_sown():
  module, variables = _drawn()
  apply = functools.partial(module.apply, train=False, mutable=['intermediates'])
  _, state = apply(variables, _map())
  [weights] = state['intermediates']['attention']
  assert weights.shape == (2, 1, 6, HEIGHT * WIDTH)
  np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)


def test_impossible_fields_are_refused():
  for fields, message in (
    (dict(num_heads=5), '5 heads do not divide width 24'),
    (dict(kernel=8), 'kernel 8 must be odd, to be centred: 7 or 9'),
    (dict(stride=4), 'stride 4 of a lambda layer must be 1 or 2'),
  ):
    with pytest.raises(ValueError, match=message):
      _drawn(**fields)
