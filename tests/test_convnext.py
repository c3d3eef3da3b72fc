"""What is particular to ConvNeXt: its branch, its sizes, and other people's names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vision_attention as va
from configs import convnext_tiny
from tests import abstract
from vision_attention import convert
from vision_attention.models import convnext, depth, tree

TINY = dict(depths=(1, 2), dims=(8, 16))


@pytest.mark.parametrize(
  ('name', 'size', 'published'),
  [
    ('convnext_tiny', 224, 4.5),
    ('convnext_small', 224, 8.7),
    ('convnext_xlarge', 224, 60.9),
    ('convnext_base', 384, 45.0),
  ],
)
def test_multiply_adds(name, size, published):
  model, info = va.create_model(name)
  macs = abstract.macs(model, image_size=size) / 1e9
  assert macs == pytest.approx(published, rel=0.02)
  assert info.flops / 1e9 == published or size != 224


@functools.cache
def _initialised(**options):
  model, info = va.create_model('convnext_tiny', num_classes=3, image_size=32, **(TINY | options))
  images = jax.random.normal(jax.random.key(0), (2, *info.image_size, 3))
  return model, jax.jit(model.init)(jax.random.key(1), images), images


def test_a_branch_scaled_by_zero_is_nothing():
  model, variables, images = _initialised(layer_scale=0.0)
  none, short, _ = _initialised(layer_scale=0.0, depths=(1, 1))
  backbone = dict(variables['params']['backbone'])
  assert list(backbone['stage2']) == ['block00', 'block01']
  params = {
    **variables['params'],
    'backbone': {**backbone, 'stage2': short['params']['backbone']['stage2']},
  }
  np.testing.assert_array_equal(
    jax.jit(model.apply)(variables, images), jax.jit(none.apply)({'params': params}, images)
  )
  scaled = jax.tree_util.tree_map_with_path(
    lambda path, p: p + 1 if 'layer_scale' in str(path) else p, variables
  )
  features = jax.jit(functools.partial(model.apply, method='features'))
  assert (
    jnp.abs(features(scaled, images)['stage1'] - features(variables, images)['stage1']).max() > 1e-3
  )


def test_the_depthwise_convolution_is_seven_wide_and_centred():
  """One pixel moves what lies at most three away, and all of that."""
  model, variables, _ = _initialised(layer_scale=1.0, depths=(1,), dims=(8,))
  features = jax.jit(functools.partial(model.apply, method='features'))
  images = jnp.zeros((1, 64, 64, 3))
  moved = images.at[0, 32:36, 32:36].set(1.0)
  differs = jnp.abs(features(variables, moved)['stage1'] - features(variables, images)['stage1'])
  rows, columns = np.nonzero(np.asarray(differs.max((0, 3))) > 1e-6)
  assert (rows.min(), rows.max(), columns.min(), columns.max()) == (5, 11, 5, 11)
  assert len(rows) == 49


@pytest.mark.parametrize(
  ('size', 'last'), [((32, 32), (1, 1)), ((75, 101), (2, 3)), ((224, 40), (7, 1))]
)
def test_any_image_size_of_a_patch_and_more_is_taken(size, last):
  model, info = va.create_model('convnext_tiny', image_size=size, depths=(1, 1, 1, 1))
  shapes = convert.abstract_variables(model, info)
  images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
  features = jax.eval_shape(functools.partial(model.apply, method='features'), shapes, images)
  assert features['stage4'].shape == (2, *last, 768)


def test_options_that_cannot_be_are_refused():
  with pytest.raises(ValueError, match=r'31x64, of which 4 stages leave no pixel: .* is 32'):
    abstract.variables('convnext_tiny', image_size=(31, 64))
  with pytest.raises(ValueError, match='kernel_size 6 has no centre: pass 7 or 5'):
    va.create_model('convnext_tiny', kernel_size=6)
  with pytest.raises(ValueError, match='one entry per stage'):
    va.create_model('convnext_tiny', depths=(1, 1))


def test_operators_take_the_place_of_the_convolution():
  attn = [[None], [None, {'name': 'window', 'window': 2}]]
  _, variables, _ = _initialised_with(attn)
  stage = variables['params']['backbone']['stage2']
  assert 'depthwise' in stage['block00']
  assert 'depthwise' not in stage['block01']
  assert stage['block01']['attn']['relative_position'].shape == (1, 3, 3)


def _initialised_with(attn):
  model, info = va.create_model('convnext_tiny', num_classes=3, image_size=32, **TINY, attn=attn)
  images = jnp.zeros((1, *info.image_size, 3))
  return model, jax.eval_shape(model.init, jax.random.key(0), images), images


def test_the_classifier_begins_smaller_in_fine_tuning():
  kernels = [
    _initialised(head_init_scale=scale)[1]['params']['head']['classifier']['kernel']
    for scale in (1.0, 0.001)
  ]
  np.testing.assert_allclose(0.001 * kernels[0], kernels[1], rtol=1e-5)


def _state(source):
  """Returns a state dict of the tiny model."""
  rng = np.random.default_rng(0)
  state = {}

  def add(name, *weight):
    state[f'{name}.weight'] = rng.standard_normal(weight)
    state[f'{name}.bias'] = rng.standard_normal(weight[0])

  timm = source == 'timm'
  stem, between, head = (
    ('stem', 'stages.1.downsample', 'head.')
    if timm
    else ('downsample_layers.0', 'downsample_layers.1', '')
  )
  add(f'{stem}.0', 8, 3, 4, 4)
  add(f'{stem}.1', 8)
  add(f'{between}.0', 8)
  add(f'{between}.1', 16, 8, 2, 2)
  conv, up, down = ('conv_dw', 'mlp.fc1', 'mlp.fc2') if timm else ('dwconv', 'pwconv1', 'pwconv2')
  for i, j, dim in ((0, 0, 8), (1, 0, 16), (1, 1, 16)):
    block = f'stages.{i}.blocks.{j}.' if timm else f'stages.{i}.{j}.'
    state[block + 'gamma'] = rng.standard_normal(dim)
    add(block + conv, dim, 1, 7, 7)
    add(block + 'norm', dim)
    add(block + up, 4 * dim, dim)
    add(block + down, dim, 4 * dim)
  add(head + 'norm', 16)
  add('head.fc' if timm else 'head', 5, 16)
  return state


def test_official_and_timm_names_are_the_same_weights():
  loaded = [
    va.load_reference('convnext_tiny', _state(source), source=source, **TINY)['params']
    for source in ('official', 'timm')
  ]
  assert jax.tree.all(jax.tree.map(np.array_equal, *loaded))
  kernel = loaded[0]['backbone']['stage2']['block01']['depthwise']['kernel']
  theirs = _state('official')['stages.1.1.dwconv.weight'].astype(np.float32)
  assert kernel[2, 5, 0, 7] == theirs[7, 0, 2, 5]


def test_weights_without_a_layer_scale_and_head_load():
  state = {
    key: value
    for key, value in _state('timm').items()
    if not key.endswith('gamma') and not key.startswith('head.fc')
  }
  params = va.load_reference('convnext_tiny', state, source='timm', **TINY)['params']
  assert not [path for path in tree.flatten(params) if 'layer_scale' in path]
  assert list(params['head']) == ['norm']


def test_drop_path_grows_over_all_blocks():
  rates = convnext.drop_path_rates(0.4, (3, 3, 27, 3))
  np.testing.assert_allclose([rate for stage in rates for rate in stage], np.linspace(0, 0.4, 36))


def test_recipes_are_those_of_the_code():
  config = convnext_tiny.get_config('variant=convnext_small')
  assert (config.batch_size, config.optimizer.learning_rate, config.total) == (
    4096,
    4e-3,
    '300 epochs',
  )
  assert (config.optimizer.weight_decay, config.optimizer.clip_norm, config.ema.decay) == (
    0.05,
    0,
    0.9999,
  )
  assert (config.schedule.warmup, config.model.options.drop_path) == ('20 epochs', 0.4)
  assert config.schedule.final * config.optimizer.learning_rate == pytest.approx(1e-6)
  assert (config.mixing.mixup_alpha, config.mixing.cutmix_alpha) == (0.8, 1.0)
  large = convnext_tiny.get_config('variant=convnext_xlarge,data=imagenet21k')
  assert (large.total, large.schedule.warmup, large.model.options.drop_path) == (
    '90 epochs',
    '5 epochs',
    0.2,
  )
  with pytest.raises(ValueError, match="no such recipe for 'convnext_xlarge'"):
    convnext_tiny.get_config('variant=convnext_xlarge')


def test_the_learning_rate_falls_towards_the_stem():
  """`get_num_layer_for_convnext` of the code: 12 groups between stem and head."""
  config = convnext_tiny.get_config('variant=convnext_base,size=384,init=run')
  assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (5e-5, 1e-8)
  assert (config.batch_size, config.mixing.mixup_alpha, config.total) == (512, 0, '30 epochs')
  assert config.model.options.to_dict() == {'drop_path': 0.8, 'head_init_scale': 0.001}
  assert config.data.eval_ops == ('resize({size})',)
  params = abstract.variables('convnext_base')['params']
  factors = tree.flatten(depth.factors('convnext_base', params, config.optimizer.layer_decay))
  layers = {
    'backbone/stem/conv/kernel': 0,
    'backbone/stage1/block02/norm/scale': 1,
    'backbone/downsample2/conv/kernel': 2,
    'backbone/stage2/block00/norm/scale': 2,
    'backbone/downsample3/norm/scale': 3,
    'backbone/stage3/block02/mlp/expand/kernel': 3,
    'backbone/stage3/block03/mlp/expand/kernel': 4,
    'backbone/stage3/block26/mlp/expand/kernel': 11,
    'backbone/downsample4/norm/scale': 12,
    'backbone/stage4/block00/norm/scale': 12,
    'head/norm/scale': 13,
    'head/classifier/kernel': 13,
  }
  for path, layer in layers.items():
    assert factors[path] == pytest.approx(0.7 ** (13 - layer)), path
