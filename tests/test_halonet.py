"""HaloNets: the layer against timm's, wiring, hybrids, sizes that blocks do not divide."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vision_attention as va
from configs import halonet_h0
from tests import abstract, golden
from vision_attention import convert
from vision_attention.attention import halo
from vision_attention.models import reference, registry, tree

TIMM = dict(scale='rsqrt', mask_padding=False, index='subsampled')


def _fresh(layer, x):
  """Returns a fresh layer's variables and what it gives."""
  init = functools.partial(layer.init_with_output, train=False)
  y, variables = jax.jit(init)(jax.random.key(0), x)
  return variables, y


def _run(layer, variables, x, **options):
  return jax.jit(functools.partial(layer.apply, train=False, **options))(variables, jnp.asarray(x))


def test_the_layer_is_timm_s():
  case = golden.load(golden.FOLDER / 'layers' / 'halonet__timm_haloattn_s1.npz')
  layer = halo.HaloAttention(64, num_heads=4, **TIMM)
  images = jnp.asarray(case.images())
  shapes = jax.eval_shape(functools.partial(layer.init, train=False), jax.random.key(0), images)
  rules = [
    reference.Rule('q', 'query', reference.CONV),
    reference.Rule('kv', '', reference.fused('key', 'value', heads=4)),
    reference.Rule(r'pos_embed\.(height|width)_rel', '{0}_table', reference.param('')),
  ]
  variables = convert._convert('halo', case.state(), rules, shapes)
  y, state = _run(layer, variables, images, mutable=['intermediates'])
  golden_y, stride = case.outputs['output'], case.meta['output_stride']
  ours = np.asarray(y).transpose(0, 3, 1, 2)
  assert list(ours.shape) == case.meta['output_shape']
  np.testing.assert_allclose(ours.ravel()[::stride], golden_y, atol=2e-5)
  [maps] = state['intermediates']['attention']
  assert maps.shape == (2, 4, 24, 32, 14 * 14)
  np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)
  # Each of the options shows.
  for option in (dict(scale='none'), dict(mask_padding=True), dict(position_scale='rsqrt')):
    other = halo.HaloAttention(64, num_heads=4, **(TIMM | option))
    y = np.asarray(_run(other, variables, images)).transpose(0, 3, 1, 2)
    assert np.abs(y.ravel()[::stride] - golden_y).max() > 1e-2, option


def test_blocks_that_the_stride_does_not_divide_average():
  x = jax.random.normal(jax.random.key(1), (2, 10, 10, 8))
  fields = dict(dim=8, num_heads=2, block=5, halo=1)
  variables, full = _fresh(halo.HaloAttention(**fields), x)
  mean = full.reshape(2, 5, 2, 5, 2, 8).mean((2, 4))
  y = _run(halo.HaloAttention(**fields, stride=2), variables, x)
  np.testing.assert_allclose(y, mean, atol=1e-5)
  fields['block'] = 4
  variables, full = _fresh(halo.HaloAttention(**fields), x)
  y = _run(halo.HaloAttention(**fields, stride=2), variables, x)
  np.testing.assert_allclose(y, full[:, ::2, ::2], atol=1e-5)
  y = _run(halo.HaloAttention(**fields, stride=2, avg_down=True), variables, x)
  np.testing.assert_allclose(y, full.reshape(2, 5, 2, 5, 2, 8).mean((2, 4)), atol=1e-5)


def test_shifts_by_a_block_move_the_output():
  layer = halo.HaloAttention(8, num_heads=2, block=4, halo=2)
  x = jax.random.normal(jax.random.key(0), (1, 16, 16, 8))
  variables, y = _fresh(layer, x)
  apply = jax.jit(functools.partial(layer.apply, train=False))
  for shift, same in ((4, True), (1, False), (2, False)):
    moved = jnp.roll(apply(variables, jnp.roll(x, shift, 1)), -shift, 1)
    assert (jnp.abs(moved - y)[:, 4:8, 4:8].max() < 1e-5) == same


def test_tables_per_head_and_wide_values():
  layer = halo.HaloAttention(16, num_heads=4, block=4, halo=1, value_ratio=2.5, shared=False)
  x = jax.random.normal(jax.random.key(0), (1, 7, 9, 6))
  variables, y = _fresh(layer, x)
  params = variables['params']
  assert params['height_table'].shape == (4, 9, 4)
  assert params['value']['kernel'].shape == (1, 1, 6, 40)
  assert y.shape == (1, 7, 9, 40)
  # The same vectors for all heads are one shared table.
  one = {name: params[name][0] for name in ('height_table', 'width_table')}
  copied = {name: jnp.broadcast_to(table, (4, *table.shape)) for name, table in one.items()}
  shared = layer.clone(shared=True)
  ys = [
    _run(net, {'params': params | tables}, x) for net, tables in ((layer, copied), (shared, one))
  ]
  np.testing.assert_allclose(*ys, atol=1e-6)


def test_projection_and_dropout_are_optional():
  layer = halo.HaloAttention(8, num_heads=2, block=2, halo=1, proj=True, qkv_bias=True, dropout=0.5)
  x = jax.random.normal(jax.random.key(0), (1, 4, 4, 8))
  variables, y = _fresh(layer, x)
  assert {'proj', 'query', 'key', 'value'} <= set(variables['params'])
  assert 'bias' in variables['params']['key']
  trained = layer.apply(variables, x, train=True, rngs={'dropout': jax.random.key(0)})
  zero = trained == 0
  np.testing.assert_allclose(trained[~zero], 2 * y[~zero], rtol=1e-5)
  assert 0.2 < zero.mean() < 0.8


@pytest.mark.parametrize(
  ('name', 'options', 'expected'),
  [
    # Tables of 2 window - 1 rows, four heads in the first stage.
    ('halonet_h0', dict(index='subsampled'), 5_502_248),
    ('halonet_h1', dict(source='timm'), 8_100_056),
    # The paper prints 85M for H4 of twice the width, and 87M with convolutions in two stages. No
    # reading gives that exactly: as H4 it has 68.4M; with an expansion of 4 and no `d_f`, 84.5M and
    # 86.0M.
    ('halonet_h4', dict(width=128), 68_402_664),
    ('halonet_h4', dict(width=128, expansion=4, final_dim=0), 84_511_720),
    ('halonet_h4', dict(width=128, expansion=4, final_dim=0, conv_stages=(1, 2)), 85_975_912),
  ],
)
def test_parameters_with_options(name, options, expected):
  assert abstract.count(name, **options) == expected


def test_hybrids_cost_what_is_published():
  for stages, millions in (((1,), 19.17), ((1, 2), 19.46), ((1, 2, 3), 24.16)):
    shapes = abstract.variables('halonet_h4', conv_stages=stages)['params']
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) / 1e6 == pytest.approx(
      millions, abs=5e-3
    )
    paths = tree.flatten(shapes['backbone'])
    attends = {int(path[5]) for path in paths if '/attn/' in path}
    convolves = {int(path[5]) for path in paths if '/conv2/' in path}
    assert (attends, convolves) == ({1, 2, 3, 4} - set(stages), set(stages))


@pytest.mark.parametrize('name', ['halonet_h0', 'halonet_h7'])
def test_multiply_adds(name):
  variant = registry.variant_of(name)
  model, _ = va.create_model(name)
  macs = abstract.macs(model, image_size=variant.image_size)
  assert macs == pytest.approx(variant.flops, rel=0.02)


def test_widths_heads_and_resolutions_are_those_of_the_tables():
  layers = {f'halonet_h{i}': n for i, n in enumerate((50, 59, 62, 65, 65, 98, 101, 107))}
  for name, count in layers.items():
    options = registry.variant_of(name).options
    assert 3 * sum(options['depths']) + 2 == count
    assert registry.variant_of(name).params
    size = registry.variant_of(name).image_size
    # All but H7 have maps that blocks divide; 600 pixels give 150, 75, 38 and 19.
    divides = [size // 2**k % options['block'] == 0 for k in range(2, 6)]
    assert all(divides) == (name != 'halonet_h7')
  shapes = abstract.variables('halonet_h7', depths=(1, 2, 1, 1))['params']['backbone']
  attn = shapes['stage2']['block01']['attn']
  assert attn['query']['kernel'].shape == (1, 1, 128, 128)
  assert attn['value']['kernel'].shape == (1, 1, 128, 512)
  assert attn['height_table'].shape == (25, 16)
  assert shapes['stage1']['block00']['attn']['height_table'].shape == (25, 16)
  assert shapes['stage2']['block01']['conv3']['kernel'].shape == (1, 1, 512, 448)
  assert shapes['final']['conv']['kernel'].shape == (1, 1, 1792, 2048)
  # No projection where the width stays.
  shapes = abstract.variables('halonet_h1', depths=(1, 1, 1, 1))['params']['backbone']
  assert 'shortcut' not in shapes['stage1']['block00']
  assert 'shortcut' in shapes['stage2']['block00']


def test_any_image_size_is_taken():
  for size, sides in ((600, (150, 75, 38, 19)), (97, (25, 13, 7, 4))):
    model, info = va.create_model('halonet_h7', image_size=size, depths=(1, 1, 1, 1))
    images = jax.ShapeDtypeStruct((1, *info.image_size, 3), jnp.float32)
    features = jax.eval_shape(
      functools.partial(model.apply, method='features'),
      convert.abstract_variables(model, info),
      images,
    )
    assert tuple(features[f'stage{i}'].shape[1] for i in (1, 2, 3, 4)) == sides


def test_the_patch_stem_is_a_quarter_of_the_image():
  shapes = abstract.variables('halonet_h4', stem='patch', width=128, depths=(1, 1, 1, 1))['params'][
    'backbone'
  ]
  assert shapes['stem']['conv']['kernel'].shape == (4, 4, 3, 128)
  options = dict(depths=(1, 1), width=16, block=4, halo=1, num_heads=2, num_classes=3)
  model, _ = va.create_model('halonet_h4', stem='patch', image_size=36, **options)
  images = jax.random.normal(jax.random.key(0), (1, 36, 36, 3))
  apply = functools.partial(model.init_with_output, method='features')
  features, _ = jax.eval_shape(apply, jax.random.key(0), images)
  assert features['stage1'].shape[:3] == (1, 9, 9)
  assert features['stage2'].shape[:3] == (1, 5, 5)


def test_timm_s_names_are_all_known():
  """Names as timm writes them, by hand, against the rules."""
  timm = registry.references_of('halonet_h1')['timm']
  rules = timm.rules_of({**registry.variant_of('halonet_h1').options, **timm.options})
  paths = set(tree.flatten(abstract.variables('halonet_h1', source='timm')))
  block = 'backbone/stage3/block07'
  expected = {
    'stem.conv1.conv.weight': {'params/backbone/stem/conv1/kernel'},
    'stem.conv1.bn.running_var': {'batch_stats/backbone/stem/norm1/var'},
    'stages.2.7.conv1_1x1.conv.weight': {f'params/{block}/conv1/kernel'},
    'stages.2.7.conv3_1x1.bn.bias': {f'params/{block}/norm3/bias'},
    'stages.2.7.self_attn.q.weight': {f'params/{block}/attn/query/kernel'},
    'stages.2.7.self_attn.kv.weight': {
      f'params/{block}/attn/key/kernel',
      f'params/{block}/attn/value/kernel',
    },
    'stages.2.7.self_attn.pos_embed.height_rel': {f'params/{block}/attn/height_table'},
    'stages.2.7.post_attn.running_mean': {f'batch_stats/{block}/norm2/mean'},
    'stages.1.0.shortcut.conv.weight': {'params/backbone/stage2/block00/shortcut/conv/kernel'},
    'head.fc.bias': {'params/head/classifier/bias'},
  }
  for key, ours in expected.items():
    goals = next(goals for rule in rules if (goals := rule.targets(key)) is not None)
    assert {path for path, _ in goals} == ours
    assert ours <= paths


def test_impossible_options_are_refused():
  x = jnp.zeros((1, 8, 8, 16))
  key = jax.random.key(0)
  with pytest.raises(ValueError, match='3 heads do not divide width 16'):
    halo.HaloAttention(16, num_heads=3).init(key, x, train=False)
  with pytest.raises(ValueError, match="scale 'sqrt' is unknown: did you mean 'rsqrt'"):
    halo.HaloAttention(16, scale='sqrt').init(key, x, train=False)
  with pytest.raises(ValueError, match=r'conv_stages \(0, 1\) must lie within 1\.\.4'):
    va.create_model('halonet_h4', conv_stages=(0, 1))
  with pytest.raises(ValueError, match="stem '8x8' is unknown"):
    va.create_model('halonet_h4', stem='8x8')


def test_the_config_has_the_size_and_the_stages_of_its_variant():
  for name in va.list_models('halonet_h?'):
    config = halonet_h0.get_config(f'variant={name},conv=2,batch=1024')
    assert config.image_size == registry.variant_of(name).image_size
    assert config.model.options.conv_stages == (1, 2)
    assert config.optimizer.learning_rate == pytest.approx(0.4)
    va.create_model(name, **config.model.options)
  with pytest.raises(ValueError, match="variant='halonet26t' is not of this recipe"):
    halonet_h0.get_config('variant=halonet26t')
  with pytest.raises(ValueError, match='local is a model and recipe of its own'):
    halonet_h0.get_config('local,conv=1')
