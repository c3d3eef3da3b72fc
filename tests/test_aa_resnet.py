"""Attention-augmented convolution: against loops, its symmetries, and the published sizes."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import vision_attention as va
from configs import aa_resnet50, ea_aa_resnet50
from tests import abstract, golden
from vision_attention import planning
from vision_attention.attention import augmented
from vision_attention.models import aa_mnasnet, aa_resnet, aa_wide_resnet, transfer, tree
from vision_attention.ops import relative_logits, resize
from vision_attention.training import optimizer, schedule


def _map(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _init(layer, x, seed=0):
  """Returns variables with every parameter drawn, biases too."""
  shapes = jax.eval_shape(functools.partial(layer.init, train=False), jax.random.key(0), x)
  rng = np.random.default_rng(seed)
  drawn = jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32) / 3, shapes['params'])
  return {'params': drawn}


def _apply(layer, variables, x, **options):
  return jax.jit(functools.partial(layer.apply, train=False, **options))(variables, x)


def _looked_up(query, rows, columns):
  """`query . (rows[dy] + columns[dx])` for every pair, by explicit offsets."""
  batch, height, width, heads, _ = query.shape
  logits = np.zeros((batch, heads, height * width, height * width), np.float32)
  for q in range(height * width):
    for k in range(height * width):
      (i, j), (y, x) = divmod(q, width), divmod(k, width)
      vector = rows[y - i + height - 1] + columns[x - j + width - 1]
      logits[:, :, q, k] = query[:, i, j] @ vector
  return logits


def _softmax(logits):
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


@hypothesis.given(height=st.integers(1, 6), width=st.integers(1, 6), heads=st.integers(1, 3))
@hypothesis.example(height=5, width=7, heads=2)
def test_position_logits_are_those_of_a_table(height, width, heads):
  query = _map(2, height, width, heads, 3)
  rows, columns = _map(2 * height - 1, 3, seed=1), _map(2 * width - 1, 3, seed=2)
  expected = _looked_up(query, rows, columns)
  logits = relative_logits.relative_logits_2d(*map(jnp.asarray, (query, rows, columns)))
  np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_tables_of_another_map_are_refused_and_can_be_resized():
  query = jnp.zeros((1, 4, 5, 1, 2))
  with pytest.raises(ValueError, match='belong to a map of 4x4, not 4x5'):
    relative_logits.relative_logits_2d(query, jnp.zeros((7, 2)), jnp.zeros((7, 2)))
  table = np.abs(np.arange(-3, 4))[:, None].astype(np.float32)
  resized = relative_logits.resize_offsets(table, (13, 1))[:, 0]
  np.testing.assert_allclose(resized[6:].min(), resized[6], atol=0.3)
  np.testing.assert_allclose(resized, resized[::-1], atol=1e-5)
  np.testing.assert_array_equal(relative_logits.resize_offsets(table, (7, 1)), table)


@pytest.mark.parametrize('stride', [1, 2])
def test_the_layer_is_its_definition(stride):
  height, width, heads, dim = 5, 7, 2, 10
  layer = augmented.AugmentedConv(dim, heads, stride=stride, kappa=0.6, upsilon=0.4, min_head_dim=1)
  x = _map(2, height, width, 6)
  variables = _init(layer, x)
  params = variables['params']
  narrow = augmented.AugmentedConv(dim - 4, heads, stride=stride, upsilon=0.0)
  convolved = _apply(narrow, {'params': {'conv': params['conv']}}, x)
  if stride == 2:
    # The mean over the pixels of a 3x3 window that exist; TensorFlow pads 5x7 by one all around.
    x = np.array(
      [
        [[a[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean((0, 1)) for j in (0, 2, 4, 6)]
         for i in (0, 2, 4)]
        for a in x
      ]
    )  # fmt: skip
  query, key, value = (
    (x @ params[n]['kernel'] + params[n]['bias']).reshape(*x.shape[:3], heads, -1)
    for n in ('query', 'key', 'value')
  )
  assert query.shape[-1] == 3
  query = query / math.sqrt(3)
  flat = [a.reshape(2, -1, heads, a.shape[-1]) for a in (query, key, value)]
  logits = np.einsum('bqnd,bknd->bnqk', *flat[:2])
  logits += _looked_up(query, params['height_offsets'], params['width_offsets'])
  mixed = np.einsum('bnqk,bknd->bqnd', _softmax(logits), flat[2]).reshape(*x.shape[:3], 4)
  attended = mixed @ params['proj']['kernel'] + params['proj']['bias']
  expected = np.concatenate([convolved, attended], -1)
  np.testing.assert_allclose(
    _apply(layer, variables, _map(2, height, width, 6)), expected, atol=1e-5
  )


def test_without_a_convolution_it_is_timm_s_bottleneck_attention():
  case = golden.load(golden.FOLDER / 'layers' / 'botnet__timm_bottleneckattn_s1.npz')
  state = case.state()
  layer = augmented.AugmentedConv(64, 4, kappa=1.0, upsilon=1.0, min_head_dim=1)
  weights = state['qkv.weight'][:, :, 0, 0].T.reshape(64, 3, 64)
  zeros = np.zeros(64, np.float32)
  params = {
    name: {'kernel': weights[:, i], 'bias': zeros}
    for i, name in enumerate(('query', 'key', 'value'))
  }
  params['proj'] = {'kernel': np.eye(64, dtype=np.float32), 'bias': zeros}
  # timm leaves the query of the position logits unscaled.
  for side in ('height', 'width'):
    params[f'{side}_offsets'] = 4 * state[f'pos_embed.{side}_rel']
  y = _apply(layer, {'params': params}, case.images())
  mine = np.asarray(y.transpose(0, 3, 1, 2)).reshape(-1)[:: case.meta['output_stride']]
  np.testing.assert_allclose(mine, case.outputs['output'], atol=1e-4)


def test_shares_of_nothing_and_of_everything():
  x = _map(1, 4, 4, 6)
  none = augmented.AugmentedConv(8, 2, upsilon=0.0)
  assert set(_init(none, x)['params']) == {'conv'}
  everything = augmented.AugmentedConv(8, 2, kappa=1.0, upsilon=1.0)
  variables = _init(everything, x)
  assert 'conv' not in variables['params']
  assert _apply(everything, variables, x).shape == (1, 4, 4, 8)


def test_zero_values_leave_a_narrow_convolution():
  layer = augmented.AugmentedConv(8, 2, kappa=0.5, upsilon=0.5)
  x = _map(1, 4, 5, 6)
  variables = _init(layer, x)
  variables['params']['proj'] = jax.tree.map(np.zeros_like, variables['params']['proj'])
  y = _apply(layer, variables, x)
  narrow = augmented.AugmentedConv(4, 2, upsilon=0.0)
  conv = _apply(narrow, {'params': {'conv': variables['params']['conv']}}, x)
  np.testing.assert_allclose(y[..., :4], conv, atol=1e-6)
  assert not y[..., 4:].any()


@pytest.mark.parametrize('position', augmented.POSITIONS)
def test_only_positions_tell_pixels_apart(position):
  layer = augmented.AugmentedConv(8, 2, kappa=1.0, upsilon=1.0, position=position)
  x = _map(2, 3, 4, 8)
  order = np.random.default_rng(0).permutation(12)

  def shuffled(a):
    return np.asarray(a).reshape(2, 12, 8)[:, order].reshape(2, 3, 4, 8)

  variables = _init(layer, x)
  difference = shuffled(_apply(layer, variables, x)) - _apply(layer, variables, shuffled(x))
  assert (np.abs(difference).max() > 1e-2) == (position != 'none')
  if position == 'relative':
    for side in ('height', 'width'):
      variables['params'][f'{side}_offsets'] *= 0
    difference = shuffled(_apply(layer, variables, x)) - _apply(layer, variables, shuffled(x))
    assert np.abs(difference).max() < 1e-5


@hypothesis.given(
  height=st.integers(1, 9),
  width=st.integers(1, 9),
  stride=st.sampled_from((1, 2)),
  downsample=st.sampled_from((1, 2)),
  dim=st.integers(2, 20),
)
def test_any_map_is_taken_and_attention_maps_are_sown(height, width, stride, downsample, dim):
  layer = augmented.AugmentedConv(dim, 2, stride=stride, downsample=downsample)
  x = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)

  def run(x):
    variables = layer.init(jax.random.key(0), x, train=False)
    return layer.apply(variables, x, train=False, mutable=['intermediates'])

  y, state = jax.eval_shape(run, x)
  size = [-(-n // stride) for n in (height, width)]
  assert y.shape == (1, *size, dim)
  inside = math.prod(-(-n // downsample) for n in size)
  assert state['intermediates']['attention'][0].shape == (1, 2, inside, inside)


def test_rows_of_attention_sum_to_one_and_pooled_maps_come_back():
  layer = augmented.AugmentedConv(8, 2, downsample=2)
  x = _map(1, 7, 6, 4)
  variables = _init(layer, x)
  y, state = _apply(layer, variables, x, mutable=['intermediates'])
  weights = state['intermediates']['attention'][0]
  assert y.shape == (1, 7, 6, 8)
  assert weights.shape == (1, 2, 12, 12)
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


def test_interpolation_keeps_pixels_and_puts_means_between():
  x = _map(1, 2, 3, 2)
  y = np.asarray(resize.bilinear_corner(jnp.asarray(x), 4, 6))
  np.testing.assert_allclose(y[:, ::2, ::2], x, rtol=1e-6)
  np.testing.assert_allclose(y[:, 0, 1], (x[:, 0, 0] + x[:, 0, 1]) / 2, rtol=1e-5)
  np.testing.assert_allclose(y[:, 0, 5], x[:, 0, 2], rtol=1e-6)
  np.testing.assert_allclose(resize.bilinear_corner(jnp.asarray(x), 2, 3), x, rtol=1e-6)


@pytest.mark.parametrize(('init', 'mean', 'std'), [('intended', 0, 0.25), ('literal', 0.25, 1)])
def test_tables_begin_as_meant_or_as_listed(init, mean, std):
  layer = augmented.AugmentedConv(64, 4, kappa=1.0, min_head_dim=1, table_init=init)
  x = jnp.zeros((1, 40, 40, 2))
  table = jax.jit(functools.partial(layer.init, train=False))(jax.random.key(0), x)
  table = table['params']['height_offsets']
  assert table.shape == (79, 16)
  np.testing.assert_allclose((table.mean(), table.std()), (mean, std), atol=0.1 * std + 0.01)


def test_heads_have_twenty_channels_at_least_and_values_are_rounded_down():
  params = abstract.variables('aa_resnet_50')['params']['backbone']
  for stage, dim, values, side in ((2, 128, 8, 14), (3, 256, 24, 14), (4, 512, 48, 7)):
    for block in params[f'stage{stage}'].values():
      attn = block['attn']
      assert attn['query']['kernel'].shape[1] == attn['key']['kernel'].shape[1] == 160
      assert attn['value']['kernel'].shape == (attn['query']['kernel'].shape[0], values)
      assert attn['conv']['kernel'].shape[-1] == dim - values
      assert attn['height_offsets'].shape == attn['width_offsets'].shape == (2 * side - 1, 20)
  assert 'attn' not in params['stage1']['block00']


# Thousands of parameters of Tables 2 and 5, and the integers that the printed ones round.
@pytest.mark.parametrize(
  ('name', 'options', 'expected', 'printed'),
  [
    ('aa_resnet_50', {'pooled_stages': ()}, 25_818_672, 25.8),
    ('aa_resnet_50', {'upsilon': 0.0}, 25_557_032, 25.6),
    ('aa_resnet_50', {'kappa': 0.25, 'upsilon': 0.25}, 24_309_680, 24.3),
    ('aa_resnet_50', {'kappa': 0.5, 'upsilon': 0.5}, 22_351_000, 22.3),
    ('aa_resnet_50', {'kappa': 0.75, 'upsilon': 0.75}, 20_746_760, 20.7),
    ('aa_resnet_50', {'kappa': 1.0, 'upsilon': 1.0}, 19_398_152, 19.4),
  ],
)
def test_shares_change_the_size_as_published(name, options, expected, printed):
  assert abstract.count(name, **options) == expected
  # 20.751 and 22.351 are printed as 20.7 and 22.3: cut, not rounded.
  assert abs(expected / 1e6 - printed) < 0.06


def test_sizes_that_are_printed_otherwise():
  wide = aa_wide_resnet.VARIANTS['aa_wide_resnet_28_10']
  # Printed: 36.2M parameters and 10.9 billion operations.
  assert (wide.params, 2 * wide.flops / 1e9) == (36_058_836, pytest.approx(12.38))
  large = aa_resnet.VARIANTS['aa_resnet_152']
  # Printed: 23.8 billion operations.
  assert 2 * large.flops / 1e9 == pytest.approx(24.3)


@pytest.mark.parametrize(
  ('width', 'plain', 'expected', 'printed'),
  [
    (0.75, 2_912_278, 3_015_710, 3.02),
    (1.0, 3_887_038, 4_062_670, 4.06),
    (1.25, 5_255_486, 5_531_068, 5.53),
    (1.4, 6_105_992, 6_442_926, 6.44),
  ],
)
def test_mnasnets_have_the_published_sizes(width, plain, expected, printed):
  assert abstract.count('aa_mnasnet', width=width, augmented=False) == plain
  assert abstract.count('aa_mnasnet', width=width) == expected
  assert round(expected / 1e6, 2) == printed


def test_mnasnets_attend_in_twelve_blocks_with_four_heads():
  paths = tree.flatten(abstract.variables('aa_mnasnet')['params']['backbone'])
  tables = {path: leaf.shape for path, leaf in paths.items() if path.endswith('height_offsets')}
  assert len(tables) == 12
  assert {path.split('/')[0] for path in tables} == {f'group{i}' for i in (3, 4, 5, 6, 7)}
  assert {shape[0] for shape in tables.values()} == {27, 13}
  assert tables['group3/block01/attn/height_offsets'] == (27, 3)
  assert aa_mnasnet.scaled(40, 0.75) == 32
  assert aa_mnasnet.scaled(24, 1.4) == 32


def test_weights_go_to_another_resolution():
  options = dict(depths=(1, 1, 1), width=8, num_heads=2)
  small, large = (
    va.create_model('aa_resnet_50', num_classes=3, image_size=size, **options)[0]
    for size in (32, 48)
  )
  loaded = jax.jit(small.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  init = jax.eval_shape(large.init, jax.random.key(0), jnp.zeros((1, 48, 48, 3)))
  variables, report = transfer.transfer('aa_resnet_50', loaded, init)
  assert len(report.resized) == 4
  assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, init)
  with pytest.raises(ValueError, match='pass image_size to create_model'):
    jax.eval_shape(small.apply, loaded, jnp.zeros((1, 48, 48, 3)))


def test_wide_resnets_take_any_operator():
  options = dict(depth=10, width=1, image_size=8, num_classes=3)
  for name, more in (('aa_wide_resnet_28_10', {}), ('wide_resnet_28_10', {'attn': 'relative'})):
    model, _ = va.create_model(name, **options, **more)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    blocks = [shapes['params']['backbone'][f'stage{i}']['block00'] for i in (1, 2, 3)]
    assert all('attn' in block and 'conv1' not in block for block in blocks)


def test_impossible_choices_are_refused():
  for options, message in (
    (dict(position='relatve'), "position 'relatve' is unknown: did you mean 'relative'"),
    (dict(table_init='literally'), "did you mean 'literal'"),
    (dict(kappa=0.0), 'kappa=0.0 must be positive'),
    (dict(width=4, num_heads=32, depths=(1, 1)), '32 heads have no channel each .* of 8 channels'),
  ):
    with pytest.raises(ValueError, match=message):
      abstract.variables('aa_resnet_50', image_size=32, **options)
  with pytest.raises(ValueError, match='width 0 must be positive'):
    va.create_model('aa_mnasnet', width=0)


def test_mnasnets_cost_what_is_published():
  # Two operations to a multiply-add: 0.70 billion printed, 0.711 counted; 0.63 without attention.
  for options, expected in (({}, 0.711), ({'augmented': False}, 0.623)):
    model, _ = va.create_model('aa_mnasnet', **options)
    assert 2 * abstract.macs(model, image_size=224) / 1e9 == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize('name', ['aa_resnet_50', 'ea_aa_resnet_50'])
def test_recipes_decay_everything_but_batch_norm(name):
  recipe = {'aa_resnet_50': aa_resnet50, 'ea_aa_resnet_50': ea_aa_resnet50}[name].get_config()
  assert recipe.optimizer.learning_rate == pytest.approx(0.128 * recipe.batch_size / 256)
  params = abstract.variables(name, image_size=32, width=8, num_heads=2, depths=(1, 1, 2))['params']
  decays = tree.flatten(optimizer.matches(params, recipe.optimizer.weight_decay_mask))
  assert all(decayed == ('norm' not in path) for path, decayed in decays.items())
  assert sum('offsets' in path for path in decays) == 6


def test_aa_mnasnet_ends_at_the_rate_of_its_baseline():
  config = aa_resnet50.get_config('variant=aa_mnasnet')
  plan = planning.prepare(config, with_data=False)
  factor = schedule.relative(
    config.schedule,
    total=plan.total,
    to_steps=lambda text: schedule.steps(text, num_examples=1_281_167, batch_size=1024),
  )
  last = config.optimizer.learning_rate * float(factor(plan.total - 1))
  assert last == pytest.approx(0.064 * 0.97**145, rel=1e-4)
  decays = tree.flatten(
    optimizer.matches(plan.shapes[0].params, config.optimizer.weight_decay_mask)
  )
  assert all(decayed == ('norm' not in path) for path, decayed in decays.items())


def test_recipes_that_are_not_there_are_refused():
  for config, arg in ((aa_resnet50, 'local,batch=8'), (ea_aa_resnet50, 'local,batch=8')):
    with pytest.raises(ValueError, match='local is a model and recipe of its own'):
      config.get_config(arg)
  wide = aa_resnet50.get_config('variant=aa_wide_resnet_28_10,data=cifar100')
  assert (wide.image_size, wide.total, wide.optimizer.learning_rate) == (32, '500 epochs', 0.2)
