"""Gates per channel and position: values at the start, symmetries, and what each one sees."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_attention.attention import operators

NAMES = ('bam', 'cbam', 'triplet', 'coordinate')


def _map(shape=(2, 5, 7, 32)):
  return jax.random.normal(jax.random.key(0), shape)


@functools.cache
def _initial(name, shape=(2, 5, 7, 32)):
  module = operators.module(name)()
  init = jax.jit(functools.partial(module.init, train=False))
  return module, init(jax.random.key(0), _map(shape))


def _drawn(name, shape=(2, 5, 7, 32)):
  """Returns a module and variables of which none is at its initial value."""
  module, variables = _initial(name, shape)
  keys = iter(jax.random.split(jax.random.key(1), 100))
  moved = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(next(keys), p.shape), variables)
  stats = jax.tree.map(lambda p: jnp.abs(p) + 0.1, moved['batch_stats'])
  return module, {**moved, 'batch_stats': stats}


def _apply(module, variables, x):
  return jax.jit(functools.partial(module.apply, train=False))(variables, x)


def _zeroed(variables, *names):
  def zero(path, p):
    return p * 0 if jax.tree_util.keystr(path, simple=True, separator='/') in names else p

  return {**variables, 'params': jax.tree_util.tree_map_with_path(zero, variables['params'])}


@pytest.mark.parametrize(
  ('name', 'zero', 'factor'),
  [
    ('cbam', ('excite/kernel', 'excite/bias'), 1 / 4),
    ('bam', ('spatial_excite/kernel', 'channel_excite/kernel'), 1.5),
    (
      'triplet',
      tuple(f'{g}/norm/scale' for g in ('channel_width', 'height_channel', 'height_width')),
      1 / 2,
    ),
    ('coordinate', ('excite_height/kernel', 'excite_width/kernel'), 1 / 4),
  ],
)
def test_gates_without_logits_are_constant(name, zero, factor):
  module, variables = _initial(name)
  y = _apply(module, _zeroed(variables, *zero), _map())
  np.testing.assert_allclose(y, factor * _map(), rtol=1e-6)


def test_the_spatial_gate_of_cbam_starts_at_a_half():
  module, variables = _initial('cbam')
  assert not variables['params']['spatial']['norm']['scale'].any()
  x = _map()
  squeeze, excite = variables['params']['squeeze'], variables['params']['excite']

  def mlp(pooled):
    hidden = jax.nn.relu(pooled @ squeeze['kernel'] + squeeze['bias'])
    return hidden @ excite['kernel'] + excite['bias']

  gate = jax.nn.sigmoid(mlp(x.mean((1, 2))) + mlp(x.max((1, 2))))
  np.testing.assert_allclose(_apply(module, variables, x), x * gate[:, None, None] / 2, rtol=1e-5)


def test_triplet_s_first_two_gates_at_zero_leave_the_third():
  module, variables = _drawn('triplet')
  zero = [f'{g}/norm/{p}' for g in ('channel_width', 'height_channel') for p in ('scale', 'bias')]
  variables = _zeroed(variables, *zero)
  third = variables['params']['height_width']
  stats = variables['batch_stats']['height_width']
  x = _map()
  planes = jnp.stack([x.max(3), x.mean(3)], -1)
  dimensions = ('NHWC', 'HWIO', 'NHWC')
  y = jax.lax.conv_general_dilated(
    planes, third['conv']['kernel'], (1, 1), 'SAME', dimension_numbers=dimensions
  )
  y = (y - stats['norm']['mean']) / jnp.sqrt(stats['norm']['var'] + 1e-5)
  gate = jax.nn.sigmoid(y * third['norm']['scale'] + third['norm']['bias'])
  np.testing.assert_allclose(_apply(module, variables, x), x / 3 + x * gate / 3, atol=1e-5)


def _transposed(name, variables):
  """Returns the variables that do to the transposed map what these do to the map."""
  flip = jax.tree.map(lambda p: p.swapaxes(0, 1) if p.ndim == 4 else p, variables)
  partners = {
    'coordinate': {'excite_height': 'excite_width'},
    'triplet': {'channel_width': 'height_channel'},
  }.get(name, {})
  partners = partners | {b: a for a, b in partners.items()}
  return {
    collection: {partners.get(key, key): value for key, value in tree.items()}
    for collection, tree in flip.items()
  }


@pytest.mark.parametrize('name', NAMES)
def test_a_transposed_map_takes_transposed_kernels(name):
  module, variables = _drawn(name)
  x = _map()
  y = _apply(module, _transposed(name, variables), x.swapaxes(1, 2)).swapaxes(1, 2)
  np.testing.assert_allclose(y, _apply(module, variables, x), atol=1e-5)


@pytest.mark.parametrize('name', NAMES)
def test_positions_matter(name):
  module, variables = _drawn(name)
  x = _map()

  def permuted(x, order):
    return x.reshape(2, 35, 32)[:, order].reshape(x.shape)

  y = _apply(module, variables, x)
  anywhere = np.random.default_rng(0).permutation(35)
  moved = _apply(module, variables, permuted(x, anywhere))
  assert jnp.abs(moved - permuted(y, anywhere)).max() > 1e-3
  # Coordinate attention sees which positions share a row or a column, but not which are next.
  rows = np.arange(35).reshape(5, 7)[np.random.default_rng(0).permutation(5)].ravel()
  moved = _apply(module, variables, permuted(x, rows))
  assert bool(jnp.allclose(moved, permuted(y, rows), atol=1e-5)) == (name == 'coordinate')


@pytest.mark.parametrize('name', ['cbam', 'triplet'])
def test_the_order_of_channels_matters_to_triplet_attention(name):
  module, variables = _drawn(name)
  x = _map()
  params = dict(variables['params'])
  if name == 'cbam':
    squeeze, excite = params['squeeze'], params['excite']
    params['squeeze'] = {**squeeze, 'kernel': squeeze['kernel'][::-1]}
    params['excite'] = {'kernel': excite['kernel'][:, ::-1], 'bias': excite['bias'][::-1]}
  y = _apply(module, {**variables, 'params': params}, x[..., ::-1])
  same = jnp.allclose(y, _apply(module, variables, x)[..., ::-1], atol=1e-5)
  assert bool(same) == (name == 'cbam')


def test_bam_sees_the_whole_of_a_wide_map():
  shape = (1, 3, 40, 32)
  module, variables = _drawn('bam', shape)
  x = _map(shape)
  y = _apply(module, variables, x)
  # Beyond the reach of the dilated convolutions, through the mean over the map alone.
  moved = _apply(module, variables, x.at[:, :, 39].add(5.0))
  assert jnp.abs(moved - y)[:, :, 0].max() > 1e-4
  other = operators.module({'name': 'bam', 'combine': 'sum'})()
  assert jnp.abs(_apply(other, variables, x) - y).max() > 1e-3
  with pytest.raises(ValueError, match="combine 'mean' is unknown"):
    operators.module({'name': 'bam', 'combine': 'mean'})().apply(variables, x, train=False)


def test_coordinate_attention_is_a_product_of_rows_and_columns():
  module, variables = _drawn('coordinate')
  gate = np.asarray(_apply(module, variables, _map()) / _map(), np.float64)
  # Every 2x2 minor of a matrix of rank one vanishes.
  np.testing.assert_allclose(
    gate[:, 1:, 1:] * gate[:, :-1, :-1], gate[:, 1:, :-1] * gate[:, :-1, 1:], rtol=1e-4
  )


@pytest.mark.parametrize('name', ['cbam', 'triplet'])
def test_plane_gates_keep_99_percent_of_their_statistics(name):
  module, variables = _initial(name)
  apply = jax.jit(functools.partial(module.apply, train=True, mutable=['batch_stats']))
  gate = 'spatial' if name == 'cbam' else 'height_width'
  means = []
  for _ in range(2):
    _, updated = apply(variables, _map())
    variables = {**variables, **updated}
    means.append(float(updated['batch_stats'][gate]['norm']['mean'][0]))
  # From zero the first step takes 1 - m of the batch's mean, and the second adds m times that.
  assert means[1] / means[0] == pytest.approx(1.99, rel=1e-4)


@pytest.mark.parametrize(
  ('name', 'expected'), [('bam', 1173), ('cbam', 680), ('triplet', 300), ('coordinate', 1688)]
)
def test_parameters_at_64_channels(name, expected):
  module = operators.module(name)()
  init = functools.partial(module.init, train=False)
  shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 4, 4, 64)))
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes['params'])) == expected


@pytest.mark.parametrize('name', NAMES)
def test_gates_keep_shape_and_type(name):
  x = _map((2, 3, 3, 16)).astype(jnp.bfloat16)
  module = functools.partial(operators.module(name), dtype=jnp.bfloat16)()
  y, variables = module.init_with_output(jax.random.key(0), x, train=True)
  assert y.shape == x.shape
  assert y.dtype == jnp.bfloat16
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
