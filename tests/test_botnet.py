"""BottleneckAttention against a loop and its invariants; BoTNet's blocks, sizes and tables."""

import functools
import math
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import vision_attention as va
from tests import abstract, golden
from vision_attention import convert
from vision_attention.attention import bottleneck
from vision_attention.models import botnet, byoanet_variants, reference, registry, transfer, tree


def _loop(params, x, layer):
  """The definition, query by query."""
  batch, height, width, _ = x.shape
  heads = layer.num_heads
  q, k, v = (
    (x @ params[name]['kernel']).reshape(batch, height, width, heads, -1)
    for name in ('query', 'key', 'value')
  )
  scale = q.shape[-1] ** -0.5
  out = np.zeros(v.shape)
  for b, i, j, n in np.ndindex(batch, height, width, heads):
    logits = np.zeros((height, width))
    for y, z in np.ndindex(height, width):
      query, place = q[b, i, j, n], 0.0
      if layer.position == 'relative':
        place = params['relative_height'][y - i + height - 1]
        place = place + params['relative_width'][z - j + width - 1]
      elif layer.position == 'absolute':
        place = params['absolute_height'][y] + params['absolute_width'][z]
      position = query @ place if layer.position != 'none' else 0.0
      logits[y, z] = query @ k[b, y, z, n] * scale
      logits[y, z] += position * (scale if layer.scale_position else 1.0)
    weights = np.exp(logits - logits.max())
    out[b, i, j, n] = np.einsum('yz,yzd->d', weights / weights.sum(), v[b, :, :, n])
  return out.reshape(batch, height, width, -1)


def _apply(layer, params, x) -> jax.Array:
  return layer.apply({'params': params}, x, train=False)


def _random(variables, key, scale=1.0):
  leaves, structure = jax.tree.flatten(variables)
  keys = jax.random.split(key, len(leaves))
  drawn = [scale * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
  return jax.tree.unflatten(structure, drawn)


@hypothesis.settings(max_examples=6, deadline=None)
@hypothesis.given(
  height=st.integers(1, 4),
  width=st.integers(1, 4),
  heads=st.sampled_from([1, 2]),
  head_dim=st.sampled_from([None, 3]),
  position=st.sampled_from(bottleneck.POSITIONS),
  scale_position=st.booleans(),
)
def test_it_is_the_loop(height, width, heads, head_dim, position, scale_position):
  layer = bottleneck.BottleneckAttention(
    4, heads, head_dim, position=position, scale_position=scale_position
  )
  x = jax.random.normal(jax.random.key(0), (2, height, width, 5))
  params = _random(layer.init(jax.random.key(1), x, train=False)['params'], jax.random.key(2))
  y = _apply(layer, params, x)
  expected = _loop(jax.tree.map(np.asarray, params), np.asarray(x), layer)
  np.testing.assert_allclose(y, expected, atol=2e-5)


def test_the_layer_gives_what_timm_s_gives():
  case = golden.load(golden.FOLDER / 'layers' / 'botnet__timm_bottleneckattn_s1.npz')
  x, state = jnp.asarray(case.images()), case.state()
  layer = bottleneck.BottleneckAttention(64, 4, scale_position=False)
  init = functools.partial(layer.init, train=False)
  shapes = tree.flatten(jax.eval_shape(init, jax.random.key(0), x))
  names = byoanet_variants.attention_names('bottleneck')
  rules = [reference.Rule(theirs, ours, kind) for theirs, (ours, kind) in names.items()]
  variables = {}
  for key, array in state.items():
    goals = next(goals for rule in rules if (goals := rule.targets(key)) is not None)
    for path, change in goals:
      path = path.replace('//', '/')
      variables[path] = change(array, shapes[path].shape)
  y = layer.apply(tree.unflatten(variables), x, train=False)
  ours = np.asarray(y).transpose(0, 3, 1, 2).ravel()[:: case.meta['output_stride']]
  np.testing.assert_allclose(ours, case.outputs['output'], atol=1e-4)


def _layer(position, x, zero=()):
  """Returns a layer with random parameters, but zeros for those whose name begins as given."""
  layer = bottleneck.BottleneckAttention(8, 2, position=position)
  params = _random(layer.init(jax.random.key(1), x, train=False)['params'], jax.random.key(2))
  for name in params:
    if name.startswith(tuple(zero)):
      params[name] = jax.tree.map(jnp.zeros_like, params[name])
  return layer, params


def test_without_position_it_knows_no_order():
  x = jax.random.normal(jax.random.key(0), (1, 3, 5, 6))
  order = np.random.default_rng(0).permutation(15)
  shuffled = x.reshape(1, 15, 6)[:, order].reshape(x.shape)
  for position, zero, same in (
    ('none', (), True),
    ('relative', ('relative',), True),
    ('relative', (), False),
    ('absolute', (), False),
  ):
    layer, params = _layer(position, x, zero)
    expected = _apply(layer, params, x).reshape(1, 15, 8)[:, order].reshape(1, 3, 5, 8)
    y = _apply(layer, params, shuffled)
    assert bool(jnp.allclose(y, expected, atol=1e-5)) == same, position


def test_relative_positions_do_not_see_where_a_query_is_but_absolute_ones_do():
  """A pixel of its own kind in a uniform map, seen from a place at the same offset."""
  x = jnp.ones((1, 4, 6, 3)).at[0, 1, 2].set(5.0).at[0, 2, 3].set(-4.0)
  for position in ('relative', 'absolute'):
    layer, params = _layer(position, x)
    state: Any = layer.apply({'params': params}, x, train=False, mutable=['intermediates'])[1]
    weights = state['intermediates']['attention'][0].reshape(1, 2, 4, 6, 4, 6)
    assert weights.shape == (1, 2, 4, 6, 4, 6)
    np.testing.assert_allclose(weights.sum((-1, -2)), 1.0, rtol=1e-5)
    # Odds of two keys, from two like queries at the same offsets.
    here = weights[0, :, 0, 0, 0, 1] / weights[0, :, 0, 0, 1, 0]
    there = weights[0, :, 2, 4, 2, 5] / weights[0, :, 2, 4, 3, 4]
    assert bool(jnp.allclose(here, there, rtol=1e-4)) == (position == 'relative')


def test_zero_queries_average_and_constant_maps_stay_constant():
  x = jax.random.normal(jax.random.key(0), (2, 3, 4, 6))
  y = _apply(*_layer('relative', x, ('query',)), x)
  np.testing.assert_allclose(y, jnp.broadcast_to(y.mean((1, 2), keepdims=True), y.shape), atol=1e-5)
  y = _apply(*_layer('none', x), jnp.ones_like(x))
  np.testing.assert_allclose(y, jnp.broadcast_to(y[:, :1, :1], y.shape), atol=1e-5)


@pytest.mark.parametrize(
  ('options', 'expected'),
  [
    (dict(last_stride=1), 20_859_176),
    # A convolution of 512 channels in place of attention: ResNet and SENet.
    (dict(attn=None), 25_557_032),
    (dict(attn=None, se_ratio=1 / 16), 28_088_024),
  ],
)
def test_options_change_the_parameters_as_published(options, expected):
  model, info = va.create_model('botnet_50', **options)
  params = convert.abstract_variables(model, info)['params']
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == expected


@pytest.mark.parametrize(
  ('name', 'published', 'expected'),
  [
    ('botnet_t3', 33.5, 33_659_480),
    ('botnet_t4', 54.7, 54_898_328),
    ('botnet_t6', 53.9, 54_234_968),
    ('botnet_t7', 75.1, 75_498_392),
  ],
)
def test_published_sizes_leave_out_norms_tables_and_biases(name, published, expected):
  """The paper's numbers count squeeze-and-excitation in every block, against its text."""
  model, info = va.create_model(name, se_in_bot=True)
  paths = tree.flatten(convert.abstract_variables(model, info)['params'])
  sizes = {path: math.prod(leaf.shape) for path, leaf in paths.items()}
  assert sum(sizes.values()) == expected
  kernels = sum(size for path, size in sizes.items() if path.endswith('kernel'))
  assert kernels / 1e6 == pytest.approx(published, abs=0.08)
  text = registry.variant_of(name).params
  assert text is not None
  assert published - text / 1e6 > 2.9


@pytest.mark.parametrize(
  ('name', 'size', 'options', 'expected'),
  [
    ('botnet_50', 1024, {}, 102.99),
    ('botnet_50', 224, dict(last_stride=1), 5.42),
    ('botnet_t3', 224, {}, 7.25),
    ('botnet_t6', 320, {}, 23.32),
  ],
)
def test_multiply_adds_are_the_published_ones(name, size, options, expected):
  model, _ = va.create_model(name, image_size=size, **options)
  assert abstract.macs(model, image_size=size) / 1e9 == pytest.approx(expected, rel=2e-3)
  published = registry.variant_of(name).flops
  if published is not None:
    assert published / 1e9 == pytest.approx(expected, rel=0.01)


SMALL: dict[str, Any] = dict(depths=(1, 2), attn_stages=(2,), width=8, image_size=36, num_classes=3)


@functools.cache
def _initialised(name, **options):
  model, info = va.create_model(name, **{**SMALL, **options})
  images = jax.random.normal(jax.random.key(0), (2, *info.image_size, 3))
  return model, jax.jit(model.init)(jax.random.key(1), images), images


def test_a_strided_block_attends_before_it_averages():
  for stride, side in ((2, 5), (1, 9)):
    model, variables, images = _initialised('botnet_50', last_stride=stride)
    stage = variables['params']['backbone']['stage2']
    # 36 pixels are a map of 9, which the first block still sees whole.
    assert stage['block00']['attn']['relative_height'].shape == (17, 4)
    assert stage['block01']['attn']['relative_height'].shape == (2 * side - 1, 4)
    apply = functools.partial(model.apply, method='features', mutable=['intermediates'])
    features, state = jax.jit(apply)(variables, images)
    assert features['stage2'].shape == (2, side, side, 64)
    seen = state['intermediates']['backbone']['stage2']
    assert seen['block00']['attn']['attention'][0].shape == (2, 4, 81, 81)
    assert seen['block01']['attn']['attention'][0].shape == (2, 4, side**2, side**2)


@pytest.mark.parametrize('shortcut_activation', [True, False])
def test_a_fresh_block_is_its_shortcut(shortcut_activation):
  model, variables, images = _initialised(
    'botnet_t3', depths=(1, 1), shortcut_activation=shortcut_activation
  )
  apply = functools.partial(model.apply, capture_intermediates=True, mutable=['intermediates'])
  _, state = jax.jit(apply)(variables, images)
  block = state['intermediates']['backbone']['stage2']['block00']
  shortcut = block['shortcut']['__call__'][0]
  np.testing.assert_array_equal(block['__call__'][0], jax.nn.silu(shortcut))
  # SiLU is never below -0.28.
  assert bool(shortcut.min() > -0.3) == shortcut_activation


def test_squeezes_are_beside_convolutions_unless_asked_for():
  for options, expected in ((dict(), {'stage1'}), (dict(se_in_bot=True), {'stage1', 'stage2'})):
    _, variables, _ = _initialised('botnet_t3', **options)
    paths = tree.flatten(variables['params']['backbone'])
    assert {path.split('/')[0] for path in paths if '/module/' in path} == expected


def test_tables_are_resized_around_offset_zero():
  model, info = va.create_model('botnet_50', **SMALL)
  other, larger = va.create_model('botnet_50', **{**SMALL, 'image_size': (64, 100)})
  loaded = jax.tree.map(lambda s: np.zeros(s.shape), convert.abstract_variables(model, info))
  tables = loaded['params']['backbone']['stage2']['block00']['attn']
  tables['relative_height'] += np.arange(-8.0, 9.0)[:, None]
  target = convert.abstract_variables(other, larger)
  fitted, report = transfer.transfer('botnet_50', loaded, target, reinit=())
  assert len(report.resized) == 4
  attn = fitted['params']['backbone']['stage2']['block00']['attn']
  assert attn['relative_height'].shape == (31, 4)
  assert attn['relative_width'].shape == (49, 4)
  rows = attn['relative_height'][:, 0]
  assert rows[15] == 0.0
  np.testing.assert_allclose(rows, -rows[::-1], atol=1e-6)
  assert (np.diff(rows) >= 0).all()
  apply = jax.eval_shape(other.apply, fitted, jax.ShapeDtypeStruct((1, 64, 100, 3), jnp.float32))
  assert apply.shape == (1, 3)
  with pytest.raises(
    ValueError, match='relative_height is made for 9 rows or columns, the map has'
  ):
    jax.eval_shape(other.apply, loaded, jax.ShapeDtypeStruct((1, 64, 100, 3), jnp.float32))


def test_impossible_options_are_refused():
  with pytest.raises(ValueError, match=r'attn_stages \(5,\) must lie within 1\.\.4'):
    va.create_model('botnet_50', attn_stages=(5,))
  x = jnp.zeros((1, 2, 2, 6))
  with pytest.raises(ValueError, match='4 heads do not divide width 6'):
    bottleneck.BottleneckAttention(6).init(jax.random.key(0), x, train=False)
  with pytest.raises(ValueError, match="position 'relativ' is unknown: did you mean 'relative'"):
    bottleneck.BottleneckAttention(8, position='relativ').init(jax.random.key(0), x, train=False)
  assert set(botnet.VARIANTS) == set(va.list_models('botnet_*'))
