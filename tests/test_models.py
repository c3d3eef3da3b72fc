"""Every variant's parameters and multiply-adds; features, errors, transfer."""

import fnmatch
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vision_attention as va
from tests import abstract
from tests.test_families import TINY
from vision_attention import convert
from vision_attention.models import registry, transfer, tree


def _shapes(name, image_size=None, **options):
  model, info = va.create_model(name, image_size=image_size, **options)
  return model, info, convert.abstract_variables(model, info)


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
  # Equal blocks are traced once, but for one variant of every file.
  scan = 'scan' in inspect.signature(registry.module_of(name).build).parameters
  shapes = abstract.variables(name, **({'scan': True} if scan and name not in HEADLINES else {}))
  expected = registry.variant_of(name).params
  assert expected is None or abstract.size(shapes['params']) == expected
  # Linen's own names (`Dense_0`) shift when a layer is added, and then weights load wrongly.
  paths = tree.flatten(shapes)
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
    # Heads of ImageNet-21k. HorNet's own table has 209, 211 and 216 million for the large ones,
    # which its models are not.
    ('convnext_tiny', dict(num_classes=21_841), 44_615_857),
    ('convnext_large', dict(num_classes=21_841), 229_799_953),
    ('convnext_xlarge', dict(num_classes=21_841), 392_900_177),
    ('hornet_tiny_7x7', dict(num_classes=21_841), 33_100_945),
    ('hornet_large_7x7', dict(num_classes=21_841), 226_575_121),
    ('hornet_large_gf', dict(num_classes=21_841), 228_322_129),
    ('hornet_large_gf_img384', dict(num_classes=21_841), 233_839_441),
    ('swin_tiny', dict(num_classes=21_841), 44_315_083),
    ('swin_large_w12', dict(num_classes=21_841), 228_768_133),
    ('mvitv2_base_cls', dict(num_classes=19_168), 65_444_032),
  ],
)
def test_parameters_with_options(name, options, expected):
  assert abstract.count(name, **options) == expected


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
  macs = abstract.macs(model, image_size=size) / 1e9
  # The counts are printed with three digits or fewer.
  assert macs == pytest.approx(expected, rel=0.02), f'{macs:.3f} G, published {expected} G'


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
  for size in ('224', 224.0, (224,), (0, 224), True, (224, '224')):
    with pytest.raises(ValueError, match=r'must be a positive whole number of pixels, or height'):
      va.create_model('vit_b16', image_size=size)
  for classes in ('10', -1, 10.0, True):
    with pytest.raises(ValueError, match=r'num_classes .* must be a whole number'):
      va.create_model('vit_b16', num_classes=classes)
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
@pytest.mark.parametrize('name', ['vit_ti16', 'levit_128s', 'volo_d1'])
def test_transfer_picks_classes_of_the_head(name):
  """As ImageNet-1k's out of 21k; a class that the weights lack begins fresh."""
  rng = np.random.default_rng(0)
  loaded, init = (
    jax.tree.map(
      lambda x: rng.standard_normal(x.shape).astype(np.float32),
      abstract.variables(name, num_classes=count, **TINY[name]),
    )
    for count in (7, 4)
  )
  variables, report = transfer.transfer(name, loaded, init, classes=[5, -1, 0, 5])
  assert not report.reinitialised
  assert not report.dropped
  theirs, ours, fresh = map(tree.flatten, (loaded, variables, init))
  assert set(report.picked) == {p for p in ours if np.shape(ours[p]) != np.shape(theirs[p])}
  assert len(report.picked) == {'vit_ti16': 2, 'levit_128s': 4, 'volo_d1': 4}[name]
  for path in report.picked:
    np.testing.assert_array_equal(ours[path][..., [0, 2, 3]], theirs[path][..., [5, 0, 5]])
    np.testing.assert_array_equal(ours[path][..., 1], fresh[path][..., 1])
  with pytest.raises(ValueError, match='up to number 7'):
    transfer.transfer(name, loaded, init, classes=[5, 7, 0, 5])
  # Also where both have as many classes, their order may be another.
  variables, _ = transfer.transfer(name, init, init, classes=[3, 2, 1, 0])
  for path in report.picked:
    np.testing.assert_array_equal(tree.flatten(variables)[path], fresh[path][..., ::-1])


def test_transfer_resizes_tables_and_makes_the_head_anew():
  options = {key: value for key, value in TINY['coatnet_0'].items() if key != 'image_size'}
  small, large = (
    va.create_model('coatnet_0', num_classes=k, image_size=size, **options)[0]
    for k, size in ((5, 64), (7, 96))
  )
  shapes = [
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    for model, size in ((small, 64), (large, 96))
  ]
  rng = np.random.default_rng(0)
  loaded, init = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)
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
