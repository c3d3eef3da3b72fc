"""Every variant's parameters and multiply-adds; every family's gradients, features, errors."""

import fnmatch
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vision_attention as va
from vision_attention import convert
from vision_attention.models import registry, transfer, tree

# Small enough to run, with every kind of block of its family.
TINY = {
  'lesa_resnet_50': dict(
    depths=(1, 2), strides=(1, 2), stages=(2,), first_conv=(), width=8, num_heads=2, image_size=32
  ),
  'acmix_resnet_26': dict(depths=(1, 1), width=8, image_size=32),
  'san10_pairwise': dict(depths=(1, 1), dims=(32, 32), kernels=(3, 3), image_size=16),
  'acmix_san10': dict(depths=(1, 1), dims=(32, 32), kernels=(3, 3), image_size=16),
  'acmix_pvt_tiny': dict(
    depths=(1, 1),
    dims=(8, 16),
    num_heads=(1, 2),
    mlp_ratios=(2, 2),
    reductions=(2, 1),
    image_size=32,
    drop_path=0.0,
  ),
  'resnet_50': dict(depths=(1, 1), width=8, image_size=32),
  'resnet_34': dict(depths=(1, 2), width=8, image_size=32),
  'resnetrs50': dict(depths=(1, 1), width=16, image_size=32),
  'skresnet18': dict(depths=(1, 1), width=16, image_size=32),
  'cbam_resnet_50': dict(depths=(1, 1), width=16, image_size=32),
  'vit_ti16': dict(dim=24, depth=2, mlp_dim=32, image_size=32, pre_logits=True),
  'vit_s16': dict(dim=24, depth=1, mlp_dim=32, num_heads=3, image_size=32, pool='map'),
  'vit_r26_s32': dict(
    stem_depths=(1, 1), dim=24, depth=1, mlp_dim=32, num_heads=3, image_size=64, pool='gap'
  ),
  'coatnet_0': dict(depths=(1, 1, 2, 1), dims=(8, 16, 32, 32), stem_dim=8, image_size=64),
  'sasa_resnet_50': dict(
    depths=(1, 1), width=0.25, num_heads=2, kernel=3, stem='attention', image_size=32
  ),
  'halonet_h4': dict(
    depths=(1, 1), width=8, num_heads=2, block=4, halo=1, final_dim=16, image_size=32
  ),
  'aa_resnet_50': dict(depths=(1, 1, 1), width=8, num_heads=2, image_size=32),
  'aa_mnasnet': dict(
    groups=((1, 3, 2, 1, 8), (1, 5, 2, 2, 8, 1.0), (1, 3, 2, 2, 16)),
    stem_dim=8,
    final_dim=16,
    num_heads=2,
    dropout=0.0,
    image_size=32,
  ),
  'ea_aa_resnet_50': dict(depths=(1, 2, 1), width=8, num_heads=2, image_size=32),
  'gc_resnet_50': dict(depths=(1, 1, 1), stages=(2, 3), width=8, image_size=32),
  'nl_resnet_50': dict(
    depths=(1, 1, 2), width=8, context={'name': 'nl', 'norm': False}, image_size=32
  ),
  'conv_attention_quadratic_general': dict(dim=16, depth=2, mlp_dim=16, num_heads=3, image_size=16),
  'conv_attention_learned_content': dict(
    dim=16, depth=1, mlp_dim=16, num_heads=2, dropout=0.1, attention_dropout=0.1, image_size=12
  ),
  'botnet_t3': dict(depths=(1, 2), attn_stages=(2,), width=8, num_heads=2, image_size=32),
  'lamhalobotnet50ts_256': dict(
    layout=('C', 'CA', 'A', 'A'),
    dims=(16, 24, 32, 32),
    gate={'name': 'gc', 'ratio': 0.5},
    final_dim=16,
    image_size=64,
  ),
  'levit_128s': dict(dims=(16, 24), depths=(1, 1), num_heads=(2, 3), head_dim=4, image_size=64),
  'mvitv2_tiny': dict(depths=(1, 1, 1), dim=8, num_heads=1, image_size=32),
  'nat_mini': dict(
    depths=(2, 1),
    dim=8,
    num_heads=(1, 2),
    kernel=3,
    dilations=((1, 2), (1,)),
    layer_scale=0.1,
    image_size=32,
  ),
  'qna_tiny': dict(
    dim=8,
    depths=(1, 0),
    window_depths=(0, 1),
    num_heads=(2, 4),
    window_heads=(1, 2),
    window=(4, 4),
    image_size=32,
  ),
  'swin_tiny': dict(depths=(2, 2), dim=8, num_heads=(1, 2), window=3, image_size=32),
  'convnext_tiny': dict(depths=(1, 1), dims=(8, 16), image_size=32),
  'hornet_tiny_gf': dict(depths=(1, 1), dim=8, orders=(1, 3), global_stages=(2,), image_size=32),
  'acmix_swin_tiny': dict(depths=(2, 1), dim=8, num_heads=(1, 2), window=3, image_size=32),
  'coatnet_7': dict(
    depths=(1, 1, 1, 1, 1), dims=(8, 8, 16, 32, 64), stem_dim=8, head_dim=32, image_size=64
  ),
}

# What shifts every logit of a query alike: softmax cannot see it.
UNSEEN = ('key/bias', 'position/bias', 'logits_norm/bias')


@functools.cache
def _own_shapes(name):
  return _shapes(name)[2]


def _shapes(name, image_size=None, **options):
  model, info = va.create_model(name, image_size=image_size, **options)
  return model, info, convert.abstract_variables(model, info)


def _count(name, image_size=None, **options):
  shapes = _shapes(name, image_size, **options)[2]
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes['params']))


# The first variant of every model file.
HEADLINES = {next(iter(module.VARIANTS)) for module in registry.modules().values()}


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=[pytest.mark.fast] if name in HEADLINES else [])
    for name in va.list_models()
  ],
)
def test_parameters_are_the_published_ones(name):
  expected = registry.variant_of(name).params
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(_own_shapes(name)['params']))
  assert expected is None or count == expected
  # Linen's own names (`Dense_0`) shift when a layer is added, and then weights load wrongly.
  paths = tree.flatten(_own_shapes(name))
  assert not [path for path in paths if re.search(r'(^|/)[A-Z]\w*_\d+(/|$)', path)]


# Counts at other resolutions and with other options than the variants' own.
@pytest.mark.fast
@pytest.mark.parametrize(
  ('name', 'options', 'expected'),
  [
    ('coatnet_0', dict(pre_logits=False), 24_446_356),
    ('coatnet_0', dict(image_size=512), 25_269_364),
    ('coatnet_0', dict(source='timm'), 25_036_820),
    ('coatnet_1', dict(pre_logits=False), 41_635_312),
    ('coatnet_1', dict(image_size=512), 42_808_240),
    ('coatnet_1', dict(source='timm'), 42_225_776),
    ('coatnet_2', dict(pre_logits=False), 73_635_400),
    ('coatnet_2', dict(image_size=512), 75_461_448),
    ('coatnet_2', dict(source='timm'), 74_684_744),
    ('coatnet_3', dict(pre_logits=False), 164_605_816),
    ('coatnet_3', dict(image_size=512), 168_131_320),
    ('coatnet_3', dict(source='timm'), 166_966_264),
    ('coatnet_4', dict(image_size=224), 275_425_672),
    ('coatnet_4', dict(image_size=224, pre_logits=False), 273_064_840),
    ('coatnet_4', dict(image_size=224, source='timm'), 275_425_288),
    ('coatnet_5', dict(image_size=224), 687_053_336),
    ('coatnet_5', dict(image_size=224, source='timm'), 687_472_008),
    ('coatnet_6', dict(image_size=224), 1_471_125_616),
    ('coatnet_6', dict(image_size=224, dims=(192, 384, 768, 1536, 2048)), 1_348_435_424),
    ('coatnet_7', dict(image_size=224), 2_441_973_112),
    ('vit_ti16', dict(image_size=384), 5_790_376),
    ('vit_s32', dict(image_size=384), 22_915_432),
    ('vit_s16', dict(image_size=384), 22_196_584),
    ('vit_b32', dict(image_size=384), 88_297_192),
    ('vit_b16', dict(image_size=384), 86_859_496),
    ('vit_l32', dict(image_size=384), 306_632_680),
    ('vit_l16', dict(image_size=384), 304_715_752),
    ('vit_r_ti16', dict(image_size=384), 6_355_944),
    ('vit_r26_s32', dict(image_size=384), 36_468_392),
    ('vit_r50_b16', dict(image_size=384), 98_950_952),
    ('vit_r50_l32', dict(image_size=384), 329_092_136),
    ('vit_b16', dict(pre_logits=True), 87_158_248),
    ('vit_l16', dict(pre_logits=True), 305_376_232),
    ('vit_h14', dict(pre_logits=True), 633_685_480),
    ('vit_b16', dict(pool='gap'), 86_566_120),
    ('vit_s16', dict(pool='gap'), 22_049_896),
    ('vit_b16', dict(pool='map'), 93_653_224),
    ('vit_l16', dict(pool='map'), 316_919_784),
    ('vit_g14', dict(pool='map'), 1_037_857_384),
    ('vit_gigantic14', dict(pool='map'), 1_882_797_416),
    ('vit_s16', dict(pool='gap', position='sincos2d'), 21_974_632),
    ('vit_s16', dict(pool='gap', position='sincos2d', pre_logits=True), 22_122_472),
    ('vit_b16', dict(num_classes=21_843), 102_595_923),
    ('se_resnet_34', dict(source='timm'), 21_960_416),
    ('coatnet_3_rw_224', dict(num_classes=11_821), 181_805_305),
  ],
)
def test_parameters_with_options(name, options, expected):
  assert _count(name, **options) == expected


# GMACs of papers and of counts layer by layer, within two per cent.
MACS = [
  *((f'coatnet_{k}', 224, {}, g) for k, g in enumerate((4.14, 8.24, 15.50, 34.37, 60.24))),
  *((f'coatnet_{k}', 384, {}, g) for k, g in enumerate((13.05, 26.60, 48.75, 105.8, 186.5))),
  ('coatnet_4', 512, {}, 351.5),
  ('coatnet_5', 512, {}, 804),
  ('coatnet_6', 512, {}, 1495),
  ('coatnet_7', 512, {}, 2538.5),
  *(
    (f'coatnet_{k}', 224, {'stride_in': 'depthwise'}, g)
    for k, g in enumerate((4.55, 8.64, 16.43, 36.45))
  ),
  *(
    (name, registry.variant_of(name).image_size, {}, registry.variant_of(name).flops / 1e9)
    for name in va.list_models('*resnet_*') + va.list_models('vit_*')
    if registry.variant_of(name).flops
  ),
  ('vit_ti16', 384, {}, 4.68),
  ('vit_s16', 384, {}, 15.49),
  ('vit_b16', 384, {}, 55.48),
  ('vit_l16', 384, {}, 191.07),
  ('vit_h14', 518, {}, 1016.7),
  ('vit_r50_b16', 384, {}, 67.2),
  ('vit_r50_l32', 384, {}, 57.1),
]


@pytest.mark.parametrize(('name', 'size', 'options', 'expected'), MACS)
def test_multiply_adds(name, size, options, expected):
  model, _ = va.create_model(name, image_size=size, **options)
  macs = va.count_macs(model, image_size=size) / 1e9
  # The counts are printed with three digits or fewer.
  assert macs == pytest.approx(expected, rel=0.02), f'{macs:.3f} G, published {expected} G'


@functools.cache
def _tiny(name):
  model, info = va.create_model(name, num_classes=5, **TINY[name])
  images = jax.random.normal(jax.random.key(1), (8, *info.image_size, 3))
  variables = jax.jit(model.init)(jax.random.key(0), images)
  return model, variables, images


@pytest.mark.parametrize('name', TINY)
def test_every_parameter_learns(name):
  model, variables, images = _tiny(name)
  params, stats = variables['params'], variables.get('batch_stats', {})
  # Zero-initialised branches and heads would hide what lies behind them.
  keys = iter(jax.random.split(jax.random.key(2), 1000))
  params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), params)

  @jax.jit
  def gradients(params):
    def loss(params):
      logits, _ = model.apply(
        {'params': params, 'batch_stats': stats},
        images,
        train=True,
        rngs={'dropout': jax.random.key(3)},
        mutable=['batch_stats'],
      )
      return jnp.square(logits - jnp.arange(5)).sum()

    return jax.grad(loss)(params)

  for path, grad in tree.flatten(gradients(params)).items():
    if not path.endswith(UNSEEN):
      assert jnp.abs(grad).max() > 0, path
    assert jnp.isfinite(grad).all(), path


@pytest.mark.parametrize('name', TINY)
def test_remat_and_bfloat16_compute_the_same(name):
  model, variables, images = _tiny(name)
  expected = jax.jit(model.apply)(variables, images)
  for options, tolerance in ((dict(remat=True), 1e-5), (dict(dtype=jnp.bfloat16), 0.2)):
    other, _ = va.create_model(name, num_classes=5, **(TINY[name] | options))
    logits = jax.jit(other.apply)(variables, images)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=tolerance)


@pytest.mark.parametrize('name', TINY)
def test_batch_statistics_move_in_training_only(name):
  model, variables, images = _tiny(name)
  if 'batch_stats' not in variables:
    pytest.skip('a model without BatchNorm')
  apply = jax.jit(functools.partial(model.apply, mutable=['batch_stats']), static_argnames='train')
  _, trained = apply(variables, images, train=True, rngs={'dropout': jax.random.key(0)})
  _, evaluated = apply(variables, images, train=False)
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), variables, variables | trained)
  assert all(jax.tree.leaves(moved['batch_stats']))
  same = jax.tree.map(lambda a, b: bool((a == b).all()), variables, variables | evaluated)
  assert all(jax.tree.leaves(same))


@pytest.mark.fast
@pytest.mark.parametrize(
  ('name', 'size', 'strides'),
  [
    ('resnet_50', 224, (4, 8, 16, 32)),
    ('coatnet_0', 256, (4, 8, 16, 32)),
    ('coatnet_6', 224, (4, 8, 16, 32)),
    ('vit_b16', 224, (16,)),
    ('vit_r26_s32', 224, (32,)),
  ],
)
def test_features_are_maps_of_falling_resolution(name, size, strides):
  model, _, shapes = _shapes(name, size)
  images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
  features = jax.eval_shape(functools.partial(model.apply, method='features'), shapes, images)
  for i, stride in enumerate(strides, 1):
    assert features[f'stage{i}'].shape[:3] == (2, size // stride, size // stride)


@pytest.mark.fast
def test_names_options_and_sizes_are_refused_with_the_nearest():
  with pytest.raises(ValueError, match=r"model 'coatnet0' is unknown: did you mean 'coatnet_0'"):
    va.create_model('coatnet0')
  with pytest.raises(ValueError, match=r"option of coatnet_0 'dropth' is unknown: .*'dropout'"):
    va.create_model('coatnet_0', dropth=0.1)
  with pytest.raises(ValueError, match='image of side 225: the nearest sizes are 224 and 240'):
    va.create_model('vit_b16', image_size=225)
  with pytest.raises(ValueError, match="source of vit_b16 'tim' is unknown: did you mean 'timm'"):
    va.create_model('vit_b16', source='tim')
  with pytest.raises(ValueError, match='head_dim 50 does not divide the width 384'):
    va.create_model('coatnet_0', head_dim=50)
  model, _, shapes = _shapes('coatnet_0')
  with pytest.raises(ValueError, match='images are 256x256 but the model was created for 224x224'):
    jax.eval_shape(model.apply, shapes, jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32))


@pytest.mark.fast
def test_list_models_takes_wildcards():
  assert va.list_models('coatnet_[0-2]') == ['coatnet_0', 'coatnet_1', 'coatnet_2']
  assert set(va.list_models('vit_*')) == set(fnmatch.filter(va.list_models(), 'vit_*'))
  assert not va.list_models('no_such_*')


@pytest.mark.fast
def test_variables_of_another_convention_are_refused():
  model, _ = va.create_model('vit_ti16', source='official', **_small_vit())
  images = jnp.zeros((1, 32, 32, 3))
  variables = model.init(jax.random.key(0), images)
  with pytest.raises(ValueError, match="come from 'timm' but the model was created with"):
    model.apply({**variables, 'convention': {'timm': jnp.zeros(())}}, images)


def _small_vit():
  return {key: value for key, value in TINY['vit_ti16'].items() if key != 'pre_logits'}


@pytest.mark.fast
def test_conventions_follow_the_weights():
  """The same numbers under another name of origin give that origin's logits."""
  model, _ = va.create_model('vit_ti16', **_small_vit())
  images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
  variables = model.init(jax.random.key(0), images)
  head = variables['params']['head']['classifier']
  head['kernel'] = jax.random.normal(jax.random.key(2), head['kernel'].shape)
  plain = model.apply(variables, images)
  marked = {
    source: model.apply({**variables, 'convention': {source: jnp.zeros(())}}, images)
    for source in ('official', 'timm')
  }
  np.testing.assert_array_equal(marked['official'], plain)
  assert jnp.abs(marked['timm'] - plain).max() > 1e-6  # exact GELU against its approximation
  timm, _ = va.create_model('vit_ti16', source='timm', **_small_vit())
  np.testing.assert_array_equal(timm.apply(variables, images), marked['timm'])


@pytest.mark.fast
def test_transfer_resizes_tables_and_makes_the_head_anew():
  options = {key: value for key, value in TINY['coatnet_0'].items() if key != 'image_size'}
  small, large = (
    va.create_model('coatnet_0', num_classes=k, image_size=size, **options)[0]
    for k, size in ((5, 64), (7, 96))
  )
  loaded = small.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
  init = large.init(jax.random.key(1), jnp.zeros((1, 96, 96, 3)))
  variables, report = transfer.transfer('coatnet_0', loaded, init)
  assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, init)
  assert all('relative_position' in path for path in report.resized)
  assert len(report.resized) == 3
  assert all('/head/' in path for path in report.reinitialised)
  stem = variables['params']['backbone']['stem']['conv1']['kernel']
  np.testing.assert_array_equal(stem, loaded['params']['backbone']['stem']['conv1']['kernel'])
  del loaded['params']['backbone']['stem']
  with pytest.raises(ValueError, match=r'params/backbone/stem/conv1/kernel .* is missing'):
    transfer.transfer('coatnet_0', loaded, init)
