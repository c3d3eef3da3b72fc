"""What is particular to ResNets: their branches, shortcuts, stems and squeezes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vision_attention as va
from tests import abstract
from vision_attention import convert
from vision_attention.attention import mhsa
from vision_attention.layers import squeeze_excite
from vision_attention.models import registry, resnet, resnet_blocks, tree, wide_resnet

pytestmark = pytest.mark.fast


def _features(name, image_size, **options):
  model, info = va.create_model(name, image_size=image_size, **options)
  images = jax.ShapeDtypeStruct((1, *info.image_size, 3), jnp.float32)
  apply = functools.partial(model.apply, method='features')
  return jax.eval_shape(apply, convert.abstract_variables(model, info), images)


@functools.cache
def _initialised(name, **options):
  model, info = va.create_model(name, num_classes=3, **options)
  images = jax.random.normal(jax.random.key(0), (2, *info.image_size, 3))
  return model, jax.jit(model.init)(jax.random.key(1), images), images


@pytest.mark.parametrize(
  ('name', 'options', 'expected'),
  [
    # A -D stem adds 19,232 to any depth, its shortcuts nothing.
    ('resnet_18', dict(stem='deep', shortcut='avg'), 11_689_512 + 19_232),
    ('se_resnet_34', dict(se_divisor=8), 21_960_416),
    ('resnet_18', dict(stem='small'), 11_689_512 - 64 * 3 * (49 - 9)),
    ('resnet_18', dict(num_classes=0), 11_689_512 - 513_000),
    ('wide_resnet_28_10', dict(num_classes=10), 36_220_634),
    ('wide_resnet_28_10', dict(shortcut='conv'), 36_536_884),
    ('wide_resnet_28_10', dict(shortcut='conv', num_classes=10), 36_479_194),
  ],
)
def test_options_change_the_parameters_as_published(name, options, expected):
  assert abstract.count(name, **options) == expected


def test_every_variant_states_its_parameters_and_its_source():
  for name, variant in (resnet.VARIANTS | wide_resnet.VARIANTS).items():
    assert variant.params, name
    assert variant.source, name


@pytest.mark.parametrize(('flavour', 'expected'), [('pad', 10.43), ('conv', 10.49)])
def test_wide_resnet_flavours_cost_what_is_published(flavour, expected):
  model, _ = va.create_model('wide_resnet_28_10', shortcut=flavour)
  operations = 2 * abstract.macs(model, image_size=32) / 1e9
  assert operations == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(('dim', 'cut', 'nearest'), [(64, 4, 8), (200, 12, 16), (512, 32, 32)])
def test_squeezes_are_cut_or_rounded(dim, cut, nearest):
  assert squeeze_excite.squeezed_dim(dim, 1 / 16, 1) == cut
  assert squeeze_excite.squeezed_dim(dim, 1 / 16, 8) == nearest
  assert squeeze_excite.squeezed_dim(8, 1 / 16, 1) == 1


@pytest.mark.parametrize(
  ('size', 'last'), [(224, (7, 7)), (256, (8, 8)), (225, (8, 8)), ((97, 161), (4, 6))]
)
@pytest.mark.parametrize('name', ['resnet_18', 'resnet26d', 'resnetrs50'])
def test_any_image_size_is_taken(name, size, last):
  assert _features(name, size, depths=(1, 1, 1, 1))['stage4'].shape[1:3] == last


def test_the_small_stem_keeps_the_resolution():
  features = _features('resnet_18', 28, stem='small', depths=(1, 1, 1, 1))
  assert [features[f'stage{i}'].shape[1] for i in (1, 2, 3, 4)] == [28, 14, 7, 4]


def test_wide_resnet_features_have_strides_1_2_4():
  features = _features('wide_resnet_28_10', 32)
  shapes = [features[f'stage{i}'].shape[1:] for i in (1, 2, 3)]
  assert shapes == [(32, 32, 160), (16, 16, 320), (8, 8, 640)]
  with pytest.raises(ValueError, match='multiples of 4'):
    va.create_model('wide_resnet_28_10', image_size=30)
  with pytest.raises(ValueError, match='the nearest are 22 and 28'):
    va.create_model('wide_resnet_28_10', depth=26)


def _block(**options):
  """Returns what a fresh block and its projecting shortcut give."""
  parts = resnet.build(
    num_classes=1,
    image_size=(16, 16),
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    depths=(1, 1),
    width=4,
    **options,
  )

  @jax.jit
  def run(key):
    images = jax.random.normal(key, (2, 16, 16, 3))
    apply = functools.partial(parts.backbone().init_with_output, capture_intermediates=True)
    _, variables = apply(key, images, train=False)
    return variables['intermediates']['stage2']['block00']

  seen = run(jax.random.key(0))
  return seen['__call__'][0], seen['shortcut']['__call__'][0]


@pytest.mark.parametrize(
  'options',
  [
    {},
    {'block': 'basic'},
    {'se_ratio': 0.25, 'shortcut': 'avg', 'stem': 'deep_conv'},
    {'activation': 'silu'},
  ],
)
def test_a_fresh_block_is_its_shortcut(options):
  act = jax.nn.silu if options.get('activation') == 'silu' else jax.nn.relu
  output, shortcut = _block(**options)
  np.testing.assert_array_equal(output, act(shortcut))
  assert jnp.abs(shortcut).max() > 0
  output, shortcut = _block(**options, zero_init_last=False)
  assert jnp.abs(output - act(shortcut)).max() > 1e-3


def test_average_shortcuts_see_every_pixel_and_strided_ones_a_quarter():
  conv = functools.partial(resnet_blocks.conv.Conv, kernel_init=jax.nn.initializers.ones)
  norm = functools.partial(resnet_blocks.norm.BatchNorm, epsilon=0.0)
  image = jnp.arange(9.0).reshape(1, 3, 3, 1)
  expected = {True: [[2.0, 3.5], [6.5, 8.0]], False: [[0.0, 2.0], [6.0, 8.0]]}
  for average, values in expected.items():
    shortcut = resnet_blocks.Shortcut(2, 2, average, conv, norm)
    init = jax.jit(functools.partial(shortcut.init_with_output, train=False))
    y, _ = init(jax.random.key(0), image)
    np.testing.assert_allclose(y[0, :, :, 0], values)


def test_paddings_of_the_pool_differ_at_even_sizes_only():
  # 65 leaves an odd map to the pool, 64 an even one.
  for size, same in ((65, True), (64, False)):
    options = dict(depths=(1,), width=4, image_size=size)
    model, variables, images = _initialised('resnet_50', **options)
    other, _ = va.create_model('resnet_50', num_classes=3, pool_padding='same', **options)
    features = [functools.partial(m.apply, method='features') for m in (model, other)]
    maps = [jax.jit(apply)(variables, images)['stage1'] for apply in features]
    assert bool(jnp.allclose(*maps, atol=1e-6)) == same


def test_rates_of_stochastic_depth():
  rates = functools.partial(resnet._drop_path_rates, 0.5, depths=(1, 2, 2, 1))
  by_stage = [[0.2], [0.3, 0.3], [0.4, 0.4], [0.5]]
  by_block = [[0.0], [0.1, 0.2], [0.3, 0.4], [0.5]]
  for rule, expected in (('stage', by_stage), ('block', by_block)):
    for mine, theirs in zip(rates(rule=rule), expected, strict=True):
      np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def test_dropout_and_stochastic_depth_act_in_training_only():
  options = dict(depths=(1, 1), width=4, image_size=32, dropout=0.5, drop_path=0.5)
  model, variables, images = _initialised('resnet_50', zero_init_last=False, **options)

  @jax.jit
  def logits(seed):
    rngs = {'dropout': jax.random.key(seed)}
    return model.apply(variables, images, train=True, rngs=rngs, mutable=['batch_stats'])[0]

  assert jnp.abs(logits(0) - logits(1)).max() > 0
  np.testing.assert_array_equal(logits(0), logits(0))
  jax.eval_shape(model.apply, variables, images)  # needs no random stream


@pytest.mark.parametrize('flavour', ['pad', 'conv'])
def test_wide_resnet_learns_everywhere(flavour):
  options = dict(depth=10, width=2, image_size=8, shortcut=flavour)
  model, variables, images = _initialised('wide_resnet_28_10', **options)
  stats = {'batch_stats': variables['batch_stats']}

  @jax.jit
  def gradients(params):
    def loss(params):
      variables = {'params': params, **stats}
      logits, updated = model.apply(variables, images, train=True, mutable=['batch_stats'])
      return jnp.square(logits - 1.0).sum(), updated

    return jax.grad(loss, has_aux=True)(params)

  grads, updated = gradients(variables['params'])
  assert all(jnp.abs(grad).max() > 0 for grad in tree.flatten(grads).values())
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), stats, dict(updated))
  assert all(jax.tree.leaves(moved))


def test_padded_shortcuts_average_and_centre_their_channels():
  x = jax.random.normal(jax.random.key(0), (1, 4, 4, 2))
  y = wide_resnet.pad_shortcut(x, 6, 2)
  assert y.shape == (1, 2, 2, 6)
  np.testing.assert_allclose(y[0, 0, 0, 2:4], x[0, :2, :2].mean((0, 1)), rtol=1e-6)
  assert not y[..., :2].any()
  assert not y[..., 4:].any()


def test_attention_takes_the_place_of_the_last_stage_s_convolutions():
  options = dict(depths=(1, 1), width=8, attn=mhsa.MultiHeadAttention, attn_stages=(2,))
  model, variables, images = _initialised('resnet_50', image_size=36, **options)
  paths = tree.flatten(variables['params']['backbone'])
  assert {path.split('/')[0] for path in paths if '/attn/' in path} == {'stage2'}
  assert not [path for path in paths if path.startswith('stage2/block00/conv2')]
  apply = functools.partial(model.apply, method='features', mutable=['intermediates'])
  features, state = jax.jit(apply)(variables, images)
  # 9x9 positions attend to each other; the stride comes after.
  assert features['stage2'].shape == (2, 5, 5, 64)
  [weights] = jax.tree.leaves(state['intermediates'])
  assert weights.shape == (2, 4, 81, 81)
  with pytest.raises(ValueError, match=r'attn_stages \(5,\) must lie within 1\.\.4'):
    va.create_model('resnet_50', attn=mhsa.MultiHeadAttention, attn_stages=(5,))


def test_modules_go_where_their_class_says():
  model, variables, images = _initialised('resnet_50', image_size=32, depths=(1, 1), module='se')
  paths = tree.flatten(variables['params']['backbone'])
  assert {path.split('/')[0] for path in paths if '/module/' in path} == {'stage1', 'stage2'}
  assert model.apply(variables, images).shape == (len(images), 3)
  assert resnet._sites('between', (3, 4, 6, 3)) == [(0, 2), (1, 3), (2, 5)]
  assert resnet._sites('sites', (3, 4, 6, 3)) == [(2, 0), (2, 2), (2, 4)]
  assert resnet._sites('top', (3, 4, 6, 3)) == [(3, 2)]
  with pytest.raises(ValueError, match="module 'sse' is unknown: did you mean 'se'"):
    va.create_model('resnet_50', module='sse')
  with pytest.raises(ValueError, match=r"field of operator mhsa 'head' is unknown: did you mean"):
    va.create_model('resnet_50', attn={'name': 'mhsa', 'head': 2})
  with pytest.raises(ValueError, match='end the same branches'):
    va.create_model('se_resnet_50', module='se')
  with pytest.raises(
    ValueError, match=r"module='mhsa' is an operator, and attn='relative' is given"
  ):
    va.create_model('resnet_50', module='mhsa', attn='relative')


def test_operators_go_into_basic_blocks_too():
  model, variables, images = _initialised(
    'resnet_18', image_size=32, depths=(1, 1), width=8, attn='relative'
  )
  block = variables['params']['backbone']['stage2']['block00']
  assert 'conv1' not in block
  assert block['attn']['relative_position'].shape == (4, 15, 15)
  assert model.apply(variables, images).shape == (len(images), 3)


def test_impossible_options_are_refused():
  for options in (dict(stem='deeper'), dict(shortcut='pad'), dict(drop_path_rule='blocks')):
    with pytest.raises(ValueError, match='is unknown'):
      va.create_model('resnet_50', **options)
  with pytest.raises(ValueError, match='wide=2 widens bottlenecks'):
    va.create_model('resnet_18', wide=2)


@pytest.mark.parametrize('name', ['resnet_18', 'se_resnet_34', 'resnet26d', 'resnetrs50'])
def test_timm_s_names_are_all_known(name):
  """Names as timm writes them, by hand, against the rules; a spurious or a missing one fails."""
  variant, timm = registry.variant_of(name), registry.references_of(name)['timm']
  rules = timm.rules_of({**variant.options, **timm.options_of(variant.options)})
  expected = {
    'resnet_18': ('conv1.weight', 'layer2.0.downsample.0.weight', 'layer1.1.bn2.running_var'),
    'se_resnet_34': ('bn1.bias', 'layer4.2.se.fc1.bias', 'layer1.0.se.fc2.weight'),
    'resnet26d': ('conv1.6.weight', 'layer1.0.downsample.1.weight', 'layer4.0.downsample.2.bias'),
    'resnetrs50': ('maxpool.0.weight', 'maxpool.1.running_mean', 'conv1.4.running_mean'),
  }[name]
  paths = set(tree.flatten(abstract.variables(name, source='timm')))
  for key in (*expected, 'fc.weight', 'fc.bias'):
    goals = next(goals for rule in rules if (goals := rule.targets(key)) is not None)
    assert goals
    assert {path for path, _ in goals} <= paths, key
  assert all(rule.targets('layer1.0.downsample.3.weight') is None for rule in rules)
