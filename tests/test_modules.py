"""Every module in every kind of residual block; parameters and multiply-adds; the recipe."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vision_attention as va
from configs import attention_modules
from vision_attention import convert
from vision_attention.attention import operators
from vision_attention.models import registry, tree
from vision_attention.training import optimizer

# In training a bias before a norm, and one that shifts all logits of a query alike, change nothing.
BLIND = re.compile(r'squeeze/bias|spatial_conv\d/bias|(key|key_conv|gather|context)/bias')


@functools.cache
def _shapes(name, **options):
  model, info = va.create_model(name, **options)
  return convert.abstract_variables(model, info)['params']


def _size(params):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _with_blocks(params, depths, more):
  """Returns the parameters of a deeper network: the second block of a stage, some more times."""
  stages = [params['backbone'][f'stage{i}']['block01'] for i in range(1, len(depths) + 1)]
  return _size(params) + sum((m - d) * _size(s) for d, m, s in zip(depths, more, stages))


# ResNet-18, -34, -50 and -101 with 1000 classes at 224 pixels.
PARAMS = {
  'none': (11_689_512, 21_797_672, 25_557_032, 44_549_160),
  'se': (11_778_592, 21_958_868, 28_088_024, 49_326_872),
  'cbam': (11_779_392, 21_960_468, 28_089_624, 49_330_172),
  'bam': (11_712_503, 21_820_663, 25_915_099, 44_907_227),
  'eca': (11_689_548, 21_797_746, 25_557_118, 44_549_331),
  'eca_3': (11_689_536, 21_797_720, 25_557_080, 44_549_259),
  'srm': (11_697_192, 21_812_776, 25_617_448, 44_679_208),
  'ge_minus': (11_689_512, 21_797_672, 25_557_032, 44_549_160),
  'ge': (12_445_992, 23_185_064, 31_106_600, 53_545_512),
  'ge_plus': (12_535_072, 23_346_260, 33_637_592, 58_323_224),
  'triplet': (11_691_912, 21_802_472, 25_561_832, 44_559_060),
  'gc': (11_780_760, 21_963_132, 28_105_032, 49_363_481),
  'coordinate': (11_764_248, 21_933_168, 27_474_864, 48_174_608),
}


@pytest.mark.parametrize('module', PARAMS)
def test_parameters_are_those_counted_by_hand(module):
  spec = {'none': None, 'eca_3': operators.module({'name': 'eca', 'kernel_size': 3})}
  chosen = spec.get(module, module)
  twice = (2, 2, 2, 2)
  shallow, deep = (_shapes(f'resnet_{k}', module=chosen, depths=twice) for k in (18, 50))
  found = (
    _size(shallow),
    _with_blocks(shallow, twice, (3, 4, 6, 3)),
    _with_blocks(deep, twice, (3, 4, 6, 3)),
    _with_blocks(deep, twice, (3, 4, 23, 3)),
  )
  assert found == PARAMS[module]


def test_fewer_classes_have_fewer_parameters():
  seven = _size(_shapes('resnet_18', module='eca', num_classes=7))
  assert PARAMS['eca'][0] - seven == 509_409


def test_sknet_101_is_a_little_smaller_than_its_table_says():
  """The authors' table has 48.9 M; their SKNet-50 of 27.5 M is met."""
  assert registry.variant_of('sknet_101').params == 48_736_040
  assert registry.variant_of('sknet_50').params == registry.variant_of('skresnext50_32x4d').params
  assert registry.variant_of('sknet_50').params == pytest.approx(27.5e6, rel=1e-3)


# Millions of multiply-adds that a module adds to ResNet-50 at 224 pixels.
MACS = {
  'se': 2.5,
  'ge': 5.5,
  'cbam': 6.4,
  'gc': 13.6,
  'coordinate': 27,
  'triplet': 46,
  'bam': 82,
  'srm': 0,
  'ge_minus': 0,
  'eca': 0,
}


@pytest.mark.parametrize(('name', 'expected'), MACS.items())
def test_multiply_adds_of_modules(name, expected):
  made = operators.module(name)
  total = 0
  for side, dim, depth in ((56, 256, 3), (28, 512, 4), (14, 1024, 6), (7, 2048, 3)):
    if operators.trait(made, 'placement', '') == 'between':
      depth = int(side > 7)
    x = jax.ShapeDtypeStruct((1, side, side, dim), jnp.float32)
    module = made()
    variables = jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), x)
    apply = functools.partial(module.apply, train=False)
    total += depth * va.count_macs(apply, variables, x) / 1e6
  assert total == pytest.approx(expected, rel=0.03, abs=0.1)


@pytest.mark.parametrize('block', ['basic', 'bottleneck'])
@pytest.mark.parametrize('name', operators.list_modules())
def test_every_module_learns_in_every_block(name, block):
  # Squeezes need more than one channel, and `between` a second stage.
  spec = operators.module(name)
  depths = (1, 1) if operators.trait(spec, 'placement', None) == 'between' else (1,)
  options = dict(depths=depths, width=16, stem='small', block=block, num_classes=3)
  module = operators.bind(spec, ratio=1 / 4)
  model, _ = va.create_model('resnet_18', image_size=8, module=module, **options)
  images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  paths = tree.flatten(shapes['params'])
  mine = [path for path in paths if re.search(r'/(module|after\d+)/', path)]
  assert bool(mine) == (name != 'ge_minus')
  # Drawn, not initialised: zero-initialised branches would hide what lies behind them.
  # Positive biases keep a squeeze of one channel alive.
  rng = np.random.default_rng(0)
  params = {path: 0.3 * rng.standard_normal(leaf.shape, np.float32) for path, leaf in paths.items()}
  for path in params:
    if path.endswith(('scale', 'bias')):
      params[path] = path.endswith('scale') + np.abs(params[path])
  stats = {'batch_stats': jax.tree.map(lambda x: jnp.ones(x.shape), shapes['batch_stats'])}

  @jax.jit
  def gradients(params):
    def loss(params):
      variables = {'params': tree.unflatten(params), **stats}
      logits, updated = model.apply(variables, images, train=True, mutable=['batch_stats'])
      return jnp.square(logits - jnp.arange(3)).sum(), (logits, updated)

    return jax.grad(loss, has_aux=True)(params)

  grads, (logits, updated) = gradients(params)
  assert logits.shape == (4, 3)
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((logits, updated, grads)))
  for path, grad in grads.items():
    assert BLIND.search(path) or jnp.abs(grad).max() > 0, path


def test_placements():
  sites = {}
  for name in ('cbam', 'bam', 'double_attention', 'dual_attention'):
    paths = tree.flatten(_shapes('resnet_18', module=name, depths=(1, 1, 2, 1))['backbone'])
    found = {'/'.join(path.split('/')[:3]) for path in paths}
    sites[name] = sorted(p for p in found if re.search('/(module|after)', p) or '/after' in p)
  assert len(sites['cbam']) == 5
  assert {s[:14] for s in sites['bam']} == {'stage1/after00', 'stage2/after00', 'stage3/after01'}
  assert {s[:14] for s in sites['double_attention']} == {'stage3/after00'}
  assert {s[:14] for s in sites['dual_attention']} == {'stage4/after00'}


def test_a_module_per_block_goes_by_name():
  module = [['eca', None], [{'name': 'eca', 'kernel_size': 7}, 'srm']]
  params = _shapes_of('resnet_18', depths=(2, 2), module=module)['backbone']
  assert params['stage1']['block00']['module']['kernel'].shape == (3,)
  assert 'module' not in params['stage1']['block01']
  assert params['stage2']['block00']['module']['kernel'].shape == (7,)
  assert params['stage2']['block01']['module']['style'].shape == (128, 2)
  with pytest.raises(ValueError, match=r'\[2\] blocks per stage are given, but depths are \[1\]'):
    va.create_model('resnet_18', depths=(1,), module=[['eca', 'eca']])
  with pytest.raises(ValueError, match='groups=32 is for bottlenecks'):
    va.create_model('resnet_18', groups=32)


def _shapes_of(name, **options):
  model, info = va.create_model(name, image_size=32, **options)
  return convert.abstract_variables(model, info)['params']


# Names as their authors write them, by hand.
KEYS = {
  ('eca_resnet_18', 'official'): {
    'layer1.0.eca.conv.weight': 'stage1/block00/module/kernel',
  },
  ('cbam_resnet_18', 'official'): {
    'layer2.1.cbam.ChannelGate.mlp.3.bias': 'stage2/block01/module/excite/bias',
    'layer2.1.cbam.SpatialGate.spatial.bn.weight': 'stage2/block01/module/spatial/norm/scale',
  },
  ('bam_resnet_18', 'official'): {
    'bam3.channel_att.gate_c.gate_c_fc_final.weight': 'stage3/after01/channel_excite/kernel',
    'bam1.spatial_att.gate_s.gate_s_conv_di_1.bias': 'stage1/after01/spatial_conv2/bias',
  },
  ('triplet_resnet_18', 'official'): {
    'layer4.0.triplet_attention.ChannelGateW.spatial.conv.weight': (
      'stage4/block00/module/height_channel/conv/kernel'
    ),
    'layer4.0.triplet_attention.hc.conv.bn.bias': (
      'stage4/block00/module/height_channel/norm/bias'
    ),
  },
  ('srm_resnet_50', 'official'): {'layer1.0.rclb.cfc': 'stage1/block00/module/style'},
  ('skresnet18', 'timm'): {
    'layer3.0.conv1.paths.1.conv.weight': 'stage3/block00/attn/conv2/kernel',
    'layer3.0.conv1.attn.fc_select.weight': 'stage3/block00/attn/select/kernel',
    'layer3.0.conv2.bn.bias': 'stage3/block00/norm2/bias',
  },
  ('resnest14d', 'timm'): {
    'layer3.0.conv2.bn0.weight': 'stage3/block00/attn/norm/scale',
    'layer3.0.conv2.fc2.bias': 'stage3/block00/attn/select/bias',
    'conv1.3.weight': 'stem/conv2/kernel',
  },
  ('ecaresnet26t', 'timm'): {
    'layer1.1.se.conv.weight': 'stage1/block01/module/kernel',
    'layer1.1.conv2.weight': 'stage1/block01/conv2/kernel',
  },
}


@pytest.mark.parametrize(('name', 'source'), KEYS)
def test_names_of_other_people_s_weights(name, source):
  variant, theirs = registry.variant_of(name), registry.references_of(name)[source]
  rules = theirs.rules_of({**variant.options, **theirs.options_of(variant.options)})
  paths = tree.flatten(_shapes(name))
  for key, expected in KEYS[name, source].items():
    goals = next(goals for rule in rules if (goals := rule.targets(key)) is not None)
    assert [path for path, _ in goals] == [f'params/backbone/{expected}'], key
    assert f'backbone/{expected}' in paths


def _decayed(config, **options):
  params = _shapes('resnet_18', **options)
  matches = optimizer.matches(params, config.optimizer.weight_decay_mask)
  return {path for path, decays in tree.flatten(matches).items() if decays}


def test_the_recipe_is_that_of_the_authors():
  config = attention_modules.get_config('module=coordinate')
  assert config.model.name == 'resnet_50'
  assert config.model.options.module == 'coordinate'
  assert (config.batch_size, config.total, config.image_size) == (256, '100 epochs', 224)
  assert (config.optimizer.name, config.optimizer.learning_rate) == ('sgd', 0.1)
  assert (config.optimizer.momentum, config.optimizer.weight_decay) == (0.9, 1e-4)
  assert config.schedule.boundaries == ('30 epochs', '60 epochs', '90 epochs')
  assert _decayed(config, module='coordinate') == set(
    tree.flatten(_shapes('resnet_18', module='coordinate'))
  )
  srm = attention_modules.get_config('module=srm,epochs=90')
  assert srm.schedule.boundaries == ('31 epochs', '61 epochs')
  rest = set(tree.flatten(_shapes('resnet_18', module='srm'))) - _decayed(srm, module='srm')
  assert {path.split('/')[-2:][0] for path in rest} == {'module', 'norm'}
  assert all('/module/' in path for path in rest)
  assert attention_modules.get_config('module=none').model.options.module is None
  assert 'module' not in attention_modules.get_config('variant=eca_resnet_50').model.options
  with pytest.raises(ValueError, match="variant='eca_resnet_50' must be resnet_18"):
    attention_modules.get_config('local,variant=eca_resnet_50')
