"""Stand-alone attention: the layer's options, the stem's values, the counts of the tables."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vision_attention as va
from configs import sasa_resnet50
from tests import abstract
from vision_attention import convert
from vision_attention.attention import halo, sasa
from vision_attention.models import registry, tree
from vision_attention.ops import convolution, position_embedding


def _fresh(layer, x):
  init = functools.partial(layer.init_with_output, train=False)
  y, variables = jax.jit(init)(jax.random.key(0), x)
  return variables, y


def _run(layer, variables, x, **options):
  return jax.jit(functools.partial(layer.apply, train=False, **options))(variables, x)


def _shapes(name, **options):
  model, info = va.create_model(name, **options)
  return convert.abstract_variables(model, info)['params']


def _count(name, **options):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(_shapes(name, **options)))


def _images(*shape):
  return jax.random.normal(jax.random.key(1), shape)


@pytest.mark.parametrize('border', sasa.BORDERS)
def test_it_is_halo_attention_of_single_pixels(border):
  """With tables whose vectors fill one half each and are zero in the other."""
  x = _images(2, 9, 7, 8)
  variables, y = _fresh(sasa.StandAloneAttention(8, num_heads=2, kernel=5, border=border), x)
  params = dict(variables['params'])
  params['height_table'] = jnp.pad(params['height_table'], ((0, 0), (0, 2)))
  params['width_table'] = jnp.pad(params['width_table'], ((0, 0), (2, 0)))
  layer = halo.HaloAttention(8, num_heads=2, block=1, halo=2, mask_padding=border == 'mask')
  np.testing.assert_allclose(_run(layer, {'params': params}, x), y, atol=1e-5)


def test_zero_borders_are_a_zero_padded_image():
  """Without biases, pixels of zero have zero keys and values."""
  x = _images(1, 6, 6, 8)
  layer = sasa.StandAloneAttention(8, num_heads=2, kernel=3, border='zero')
  variables, y = _fresh(layer, x)
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  inner = _run(layer.clone(border='mask'), variables, padded)[:, 1:-1, 1:-1]
  np.testing.assert_allclose(y, inner, atol=1e-5)
  masked = _run(layer.clone(border='mask'), variables, x)
  np.testing.assert_allclose(y[:, 1:-1, 1:-1], masked[:, 1:-1, 1:-1], atol=1e-5)
  assert jnp.abs(y - masked)[:, 0].max() > 1e-3


def test_interior_outputs_move_pixel_by_pixel():
  layer = sasa.StandAloneAttention(8, num_heads=2, kernel=3)
  x = _images(1, 12, 12, 8)
  variables, y = _fresh(layer, x)
  moved = layer.apply(variables, jnp.roll(x, (1, 3), (1, 2)), train=False)
  moved = jnp.roll(moved, (-1, -3), (1, 2))
  np.testing.assert_allclose(moved[:, 2:8, 2:8], y[:, 2:8, 2:8], atol=1e-5)


def test_attention_by_position_alone_has_no_keys():
  x = _images(1, 6, 7, 8)
  layer = sasa.StandAloneAttention(8, num_heads=2, kernel=3)
  variables, _ = _fresh(layer, x)
  params = dict(variables['params'])
  params['key'] = {'kernel': 0 * params['key']['kernel']}
  expected = _run(layer, {'params': params}, x)
  del params['key']
  other = layer.clone(content=False)
  assert 'key' not in _fresh(other, x)[0]['params']
  y, state = _run(other, {'params': params}, x, mutable=['intermediates'])
  np.testing.assert_allclose(y, expected, atol=1e-6)
  [maps] = state['intermediates']['attention']
  assert maps.shape == (1, 2, 6, 7, 9)
  np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)


def test_queries_of_zero_average_the_values():
  x = _images(1, 5, 6, 8)
  layer = sasa.StandAloneAttention(8, num_heads=2, kernel=3)
  params = dict(_fresh(layer, x)[0]['params'])
  params['query'] = {'kernel': 0 * params['query']['kernel']}
  y = _run(layer, {'params': params}, x)
  value = x @ params['value']['kernel'][0, 0]
  mean = convolution.avg_pool(value, window=3, stride=1, padding='same', count_include_pad=False)
  np.testing.assert_allclose(y, mean, atol=1e-5)


def test_scale_and_positions_are_options():
  x = _images(1, 6, 6, 8)
  layer = sasa.StandAloneAttention(8, num_heads=2, kernel=3)
  variables, y = _fresh(layer, x)
  scaled = _run(layer.clone(scale='rsqrt'), variables, x)
  params = dict(variables['params'])
  params['query'] = {'kernel': params['query']['kernel'] / 2}
  np.testing.assert_allclose(scaled, _run(layer, {'params': params}, x), atol=1e-5)
  assert jnp.abs(scaled - y).max() > 1e-3
  none, absolute = (layer.clone(position=position) for position in ('none', 'absolute'))
  params = {name: variables['params'][name] for name in ('query', 'key', 'value')}
  assert set(_fresh(absolute, x)[0]['params']) == set(params)
  table = position_embedding.sincos2d(6, 6, 8)
  np.testing.assert_allclose(
    _run(absolute, {'params': params}, x),
    _run(none, {'params': params}, x + table),
    atol=1e-6,
  )
  # Without positions the layer cannot tell left from right.
  flipped = _run(none, {'params': params}, x[:, :, ::-1])[:, :, ::-1]
  np.testing.assert_allclose(flipped, _run(none, {'params': params}, x), atol=1e-5)


@pytest.mark.parametrize('values', sasa.STEM_VALUES)
def test_stems_quarter_any_image(values):
  stem = sasa.AttentionStem(16, values=values)
  for height, width in ((8, 12), (9, 14)):
    x = _images(1, height, width, 3)
    variables, y = _fresh(stem, x)
    assert y.shape == (1, -(-height // 4), -(-width // 4), 16)
    assert (y >= 0).all()
  params = variables['params']
  assert params['height_table'].shape == (7, 2)
  assert ('row_embedding' in params) == (values == 'mixture')
  _, state = _run(stem, variables, x, mutable=['intermediates'])
  [maps] = state['intermediates']['attention']
  assert maps.shape == (1, 4, 9, 14, 16)
  np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize('values', ['mixture', 'plain'])
def test_the_stem_sees_no_further_than_its_windows(values):
  """Permuting whole windows permutes the outputs; padding at the border changes nothing."""
  stem = sasa.AttentionStem(8, values=values)
  x = _images(1, 8, 8, 3)
  variables, y = _fresh(stem, x)
  np.testing.assert_allclose(
    stem.apply(variables, jnp.roll(x, (4, 4), (1, 2)), train=False),
    jnp.roll(y, (1, 1), (1, 2)),
    atol=1e-5,
  )
  cut = _run(stem, variables, x[:, :4, :4])
  np.testing.assert_allclose(cut, y[:, :1, :1], atol=1e-5)


def test_one_mixture_per_position_is_a_strided_convolution():
  """With uniform attention and one matrix per position, before the norm and the pool."""
  stem = sasa.AttentionStem(8, mixtures=16, embedding_dim=8, num_heads=2)
  x = _images(1, 8, 8, 3)
  variables, _ = _fresh(stem, x)
  params = dict(variables['params'])
  # Rows and columns are one-hot, so that each mixture finds its own position.
  params['row_embedding'] = jnp.eye(4, 8)
  params['column_embedding'] = jnp.eye(8)[4:]
  params['mixture'] = 1e3 * (jnp.eye(4, 8)[:, None] + jnp.eye(8)[None, 4:]).reshape(16, 8)
  params['query'] = {'kernel': 0 * params['query']['kernel']}
  variables = {**variables, 'params': params}
  _, state = _run(stem, variables, x, capture_intermediates=True)
  normed = state['intermediates']['norm']['__call__'][0]
  kernel = params['value'].reshape(4, 4, 3, 8) / 16
  y = jax.lax.conv_general_dilated(
    x, kernel, (4, 4), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  expected = y.repeat(4, 1).repeat(4, 2) / jnp.sqrt(1 + 1e-5)
  np.testing.assert_allclose(normed, expected, atol=1e-5)


def test_the_mixture_is_convex_and_shared_by_the_heads():
  stem = sasa.AttentionStem(8, num_heads=2)
  x = _images(1, 4, 4, 3)
  variables, y = _fresh(stem, x)
  params = dict(variables['params'])
  # The same matrix in all mixtures leaves only that one.
  params['value'] = jnp.broadcast_to(params['value'][:1], params['value'].shape)
  y = _run(stem, {**variables, 'params': params}, x)
  plain = {name: params[name] for name in ('query', 'key', 'norm', 'height_table', 'width_table')}
  plain['value'] = {'kernel': params['value'][0][None, None]}
  other = _run(stem.clone(values='plain'), {**variables, 'params': plain}, x)
  np.testing.assert_allclose(y, other, atol=1e-5)


# Millions of parameters: Table 3, which stages convolve (its other rows are sums of these), Table
# 6, and Table 1.
@pytest.mark.parametrize(
  ('options', 'millions'),
  [
    (dict(conv_stages=(1,)), 18.09),
    (dict(conv_stages=(1, 2)), 18.48),
    (dict(conv_stages=(1, 2, 3)), 20.84),
    (dict(conv_stages=(4,)), 22.73),
    (dict(content=False), 16.76),
    (dict(stem='attention'), 18.01),
  ],
)
def test_parameters_are_those_of_the_tables(options, millions):
  assert _count('sasa_resnet_50', **options) / 1e6 == pytest.approx(millions, abs=5e-3)


def test_stages_convolve_or_attend():
  paths = tree.flatten(_shapes('sasa_resnet_26', conv_stages=(1, 3))['backbone'])
  assert {path[5] for path in paths if '/attn/' in path} == {'2', '4'}
  assert {path[5] for path in paths if '/conv2/' in path} == {'1', '3'}
  kernels = [_count('sasa_resnet_26', kernel=kernel) for kernel in (3, 7)]
  # Only the tables grow, by half a head's width per row and axis.
  rows = sum(n * c for n, c in zip((1, 2, 4, 1), (8, 16, 32, 64), strict=True))
  assert kernels[1] - kernels[0] == 4 * rows


def test_operations_are_a_few_per_cent_below_the_printed_ones():
  """4.5, 5.7 and 7.0 billion in Table 1, two per multiply-add."""
  printed = {'sasa_resnet_26': 4.5, 'sasa_resnet_38': 5.7, 'sasa_resnet_50': 7.0}
  for name, billions in printed.items():
    assert 0.97 < 2 * registry.variant_of(name).flops / 1e9 / billions < 0.985
  # The form computes products with masked keys, which are no part of the operator.
  model, _ = va.create_model('sasa_resnet_26')
  assert abstract.macs(model) == pytest.approx(2.195e9, rel=1e-3)


def test_widths_multiply_every_layer():
  shapes = _shapes('sasa_resnet_26', width=0.25, stem='attention')['backbone']
  assert shapes['stem']['value'].shape == (4, 3, 16)
  assert shapes['stage4']['block00']['conv3']['kernel'].shape == (1, 1, 128, 512)
  with pytest.raises(ValueError, match=r'width 0.3 gives 19 channels, .* multiples of 0.25'):
    va.create_model('sasa_resnet_26', width=0.3)


def test_impossible_options_are_refused():
  x, key = jnp.zeros((1, 8, 8, 16)), jax.random.key(0)
  for fields, message in (
    (dict(kernel=4), 'kernel 4 has no centre: pass 5'),
    (dict(num_heads=3), '3 heads do not divide width 16'),
    (dict(num_heads=16), 'heads of 1 channels do not split into halves'),
    (dict(position='sinusoid'), "position 'sinusoid' is unknown"),
    (dict(border='reflect'), "border 'reflect' is unknown"),
    (dict(content=False, position='none'), 'content=False leaves no logits'),
  ):
    with pytest.raises(ValueError, match=message):
      sasa.StandAloneAttention(16, **fields).init(key, x, train=False)
  with pytest.raises(ValueError, match='4 heads need a width that is a multiple of 8, not 12'):
    sasa.AttentionStem(12).init(key, x, train=False)
  with pytest.raises(ValueError, match="stem 'attn' is unknown"):
    va.create_model('sasa_resnet_50', stem='attn')
  with pytest.raises(ValueError, match=r'conv_stages \(5,\) must lie within 1\.\.4'):
    va.create_model('sasa_resnet_50', conv_stages=(5,))


def test_the_config_has_the_values_of_the_appendix():
  config = sasa_resnet50.get_config('stem=attention,kernel=9')
  assert (config.total, config.batch_size, config.schedule.warmup) == (
    '130 epochs',
    4096,
    '10 epochs',
  )
  sgd = config.optimizer
  assert (sgd.name, sgd.learning_rate, sgd.nesterov) == ('sgd', 1.6, True)
  assert (config.ema.decay, config.model.options.norm_momentum) == (0.9999, 0.9999)
  shapes = _shapes('sasa_resnet_26', **config.model.options)['backbone']
  assert shapes['stage1']['block00']['attn']['height_table'].shape == (9, 4)
  assert 'mixture' in shapes['stem']
  with pytest.raises(ValueError, match='local is a model and recipe of its own'):
    sasa_resnet50.get_config('local,kernel=3')
