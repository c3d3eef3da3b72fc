"""HorNet: the recursive gated convolution, its global filter, sizes, and other people's names."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import vision_attention as va
from configs import hornet_tiny
from tests import abstract
from vision_attention import convert
from vision_attention.attention import gated_convolution
from vision_attention.models import hornet, tree
from vision_attention.ops import convolution, global_filter

TINY = dict(depths=(1, 1, 1), dim=8, orders=(1, 2, 3), global_stages=(3,))


def _normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def _drawn(module, x, scale=0.5):
  shapes = jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), x)
  leaves, structure = jax.tree.flatten(shapes)
  return jax.tree.unflatten(
    structure, [scale * _normal(*leaf.shape, seed=i + 1) for i, leaf in enumerate(leaves)]
  )


def test_order_one_is_a_gated_convolution():
  x = _normal(2, 5, 6, 4)
  module = gated_convolution.RecursiveGatedConv(8, order=1, kernel_size=3, scale=0.7)
  variables = _drawn(module, x)
  p = variables['params']
  both = x @ p['proj_in']['kernel'] + p['proj_in']['bias']
  mixed = convolution.conv(both[..., 8:], p['depthwise']['kernel'], groups=8)
  gated = both[..., :8] * 0.7 * (mixed + p['depthwise']['bias'])
  expected = gated @ p['proj_out']['kernel'] + p['proj_out']['bias']
  np.testing.assert_allclose(module.apply(variables, x, train=False), expected, atol=1e-5)


@pytest.mark.parametrize('order', [1, 2, 4])
def test_without_biases_it_is_a_polynomial_of_degree_order_plus_one(order):
  x = _normal(1, 4, 4, 8)
  module = gated_convolution.RecursiveGatedConv(8, order=order)
  variables = tree.unflatten(
    {k: v * (not k.endswith('bias')) for k, v in tree.flatten(_drawn(module, x)).items()}
  )
  y, scaled = (module.apply(variables, a, train=False) for a in (x, 2 * x))
  np.testing.assert_allclose(scaled, 2 ** (order + 1) * y, rtol=1e-4, atol=1e-3)
  assert jnp.abs(y).max() > 1e-4


def test_gates_grow_by_doubling_up_to_the_width():
  assert gated_convolution.widths(64, 1) == [64]
  assert gated_convolution.widths(512, 5) == [32, 64, 128, 256, 512]
  with pytest.raises(ValueError, match='halves width 24 4 times: it must lie between 1 and 4'):
    gated_convolution.widths(24, 5)


def test_it_moves_with_the_map_away_from_the_border():
  module = gated_convolution.RecursiveGatedConv(4, order=2, kernel_size=3)
  x = _normal(1, 8, 8, 4)
  variables = _drawn(module, x)
  y, moved = (module.apply(variables, a, train=False) for a in (x, jnp.roll(x, (2, 1), (1, 2))))
  np.testing.assert_allclose(moved[:, 3:-1, 2:-1], y[:, 1:-3, 1:-2], atol=1e-5)


sizes = st.tuples(st.integers(1, 7), st.integers(1, 7))


@pytest.mark.parametrize('size', [(4, 6), (5, 3), (1, 2)])
def test_a_filter_is_a_circular_convolution(size):
  x, kernel = _normal(2, *size, 2), _normal(*size, 2, seed=1)
  spectrum = np.fft.rfft2(np.asarray(kernel), axes=(0, 1))
  filters = jnp.stack([jnp.asarray(spectrum.real), jnp.asarray(spectrum.imag)])
  expected = sum(kernel[i, j] * np.roll(x, (i, j), (1, 2)) for i, j in np.ndindex(*size))
  np.testing.assert_allclose(global_filter.global_filter(x, filters), expected, atol=1e-4)


@hypothesis.given(sizes, sizes)
def test_filters_are_resized_with_their_corners_on_each_other(old, new):
  filters = np.asarray(_normal(2, *old, 3))
  mine = global_filter.resize(filters, (2, *new, 3))
  assert mine.shape == (2, *new, 3)
  np.testing.assert_allclose(mine[:, 0, 0], filters[:, 0, 0], rtol=1e-6)
  if min(new) > 1:
    np.testing.assert_allclose(mine[:, -1, -1], filters[:, -1, -1], rtol=1e-5)
  np.testing.assert_allclose(global_filter.resize(filters, filters.shape), filters, rtol=1e-6)
  # Linear functions of the place stay linear.
  ramp = np.linspace(0, 1, old[0])[None, :, None, None] * np.ones((2, *old, 1))
  expected = np.linspace(0, ramp.max(), new[0]) if new[0] > 1 else np.zeros(1)
  again = global_filter.resize(ramp, (2, *new, 1))
  np.testing.assert_allclose(again[0, :, 0, 0], expected, atol=1e-12)


def test_a_filter_of_another_map_is_resized_on_the_way():
  x, filters = _normal(1, 6, 5, 2), _normal(2, 4, 3, 2)
  resized = jnp.asarray(global_filter.resize(np.asarray(filters), (2, 6, 3, 2)))
  np.testing.assert_allclose(
    global_filter.global_filter(x, filters), global_filter.global_filter(x, resized), atol=1e-5
  )


def test_halves_alternate_between_two_norms():
  """With a filter of ones and a kernel that is one pixel, the layer only reorders."""
  x = _normal(2, 4, 4, 6)
  layer = gated_convolution.GlobalLocalFilter()
  p = layer.init(jax.random.key(0), x)['params']
  p['filter'] = jnp.zeros_like(p['filter']).at[0].set(1)
  p['local']['kernel'] = jnp.zeros((3, 3, 1, 3)).at[1, 1].set(1)
  norm = lambda x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
  expected = norm(norm(x)[..., jnp.array([0, 3, 1, 4, 2, 5])])
  np.testing.assert_allclose(layer.apply({'params': p}, x), expected, atol=1e-5)


@pytest.mark.parametrize('name', ['hornet_tiny_7x7', 'hornet_tiny_gf', 'hornet_base_gf'])
def test_multiply_adds_are_the_published_ones(name):
  model, info = va.create_model(name)
  macs = abstract.macs(model, image_size=info.image_size)
  assert macs == pytest.approx(info.flops, rel=0.02), f'{macs / 1e9:.2f} G'


@pytest.mark.parametrize(('size', 'last'), [((32, 32), (2, 2)), ((75, 101), (4, 6))])
def test_any_image_size_is_taken_and_filters_are_made_for_it(size, last):
  model, info = va.create_model('hornet_tiny_gf', image_size=size, **TINY)
  shapes = convert.abstract_variables(model, info)
  filters = shapes['params']['backbone']['stage3']['block00']['attn']['depthwise']['filter']
  assert filters.shape == (2, last[0], last[1] // 2 + 1, 28)
  images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
  features = jax.eval_shape(functools.partial(model.apply, method='features'), shapes, images)
  assert features['stage3'].shape == (2, *last, 32)


def test_branches_scaled_by_zero_are_nothing():
  model, info = va.create_model('hornet_tiny_7x7', image_size=32, layer_scale=0.0, **TINY)
  images = _normal(1, *info.image_size, 3)
  variables = jax.jit(model.init)(jax.random.key(0), images)
  bare, _ = va.create_model('hornet_tiny_7x7', image_size=32, **{**TINY, 'depths': (0, 0, 0)})
  params = variables['params']['backbone']
  kept = {k: v if not k.startswith('stage') else {} for k, v in params.items()}
  np.testing.assert_allclose(
    jax.jit(model.apply)(variables, images),
    jax.jit(bare.apply)({'params': {**variables['params'], 'backbone': kept}}, images),
    atol=1e-6,
  )


def test_options_that_cannot_be_are_refused():
  with pytest.raises(ValueError, match='must lie between 1 and 7'):
    va.create_model('hornet_tiny_7x7', dim=8, orders=(2, 3, 4, 9))
  with pytest.raises(ValueError, match='one entry per stage'):
    va.create_model('hornet_tiny_7x7', num_heads=(1, 2))
  with pytest.raises(ValueError, match='global_stages'):
    va.create_model('hornet_tiny_7x7', global_stages=(5,))
  with pytest.raises(ValueError, match='kernel_size 6 has no centre: pass 7 or 5'):
    abstract.variables('hornet_tiny_7x7', kernel_size=6)
  with pytest.raises(ValueError, match="spatial 'gf' is unknown"):
    abstract.variables('vit_s16', pool='gap', attn={'name': 'gnconv', 'spatial': 'gf'})


def _state(filters, classes=5):
  """Returns a state dict of the tiny model in the code's names, with a filter of that size."""
  rng = np.random.default_rng(0)
  state = {}

  def add(name, *weight, bias=True):
    state[f'{name}.weight'] = rng.standard_normal(weight)
    if bias:
      state[f'{name}.bias'] = rng.standard_normal(weight[0])

  add('downsample_layers.0.0', 8, 3, 4, 4)
  add('downsample_layers.0.1', 8)
  for i in (1, 2):
    add(f'downsample_layers.{i}.0', 4 * 2**i)
    add(f'downsample_layers.{i}.1', 8 * 2**i, 4 * 2**i, 2, 2)
  for i, (dim, order) in enumerate(((8, 1), (16, 2), (32, 3))):
    block = f'stages.{i}.0.'
    dims = gated_convolution.widths(dim, order)
    state[block + 'gamma1'], state[block + 'gamma2'] = rng.standard_normal((2, dim))
    add(block + 'norm1', dim)
    add(block + 'norm2', dim)
    add(block + 'gnconv.proj_in', 2 * dim, dim, 1, 1)
    add(block + 'gnconv.proj_out', dim, dim, 1, 1)
    for k in range(order - 1):
      add(block + f'gnconv.pws.{k}', dims[k + 1], dims[k], 1, 1)
    mixer = block + 'gnconv.dwconv'
    if i < 2:
      add(mixer, sum(dims), 1, 7, 7)
    else:
      half = sum(dims) // 2
      add(mixer + '.dw', half, 1, 3, 3, bias=False)
      state[mixer + '.complex_weight'] = rng.standard_normal((half, *filters, 2))
      add(mixer + '.pre_norm', sum(dims))
      add(mixer + '.post_norm', sum(dims))
    add(block + 'pwconv1', 4 * dim, dim)
    add(block + 'pwconv2', dim, 4 * dim)
  add('norm', 32)
  add('head', classes, 32)
  return state


def test_weights_load_under_their_official_names():
  state = _state((4, 3))
  params = va.load_reference('hornet_tiny_gf', state, source='official', **TINY)['params']
  attn = params['backbone']['stage3']['block00']['attn']
  theirs = state['stages.2.0.gnconv.dwconv.complex_weight']
  assert attn['depthwise']['filter'][1, 3, 2, 9] == np.float32(theirs[9, 3, 2, 1])
  pws = state['stages.2.0.gnconv.pws.1.weight'].astype(np.float32)
  np.testing.assert_array_equal(attn['proj2']['kernel'], pws[..., 0, 0].T)
  without = {k: v for k, v in state.items() if 'gamma' not in k and not k.startswith('head')}
  params = va.load_reference('hornet_tiny_gf', without, source='official', **TINY)['params']
  assert not [path for path in tree.flatten(params) if 'layer_scale' in path]
  assert list(params['head']) == ['norm']


@pytest.mark.parametrize(
  ('filters', 'size'),
  [
    ({2: (14, 8), 3: (7, 4)}, (224, 224)),
    ({2: (24, 13), 3: (12, 7)}, (384, 384)),
    ({2: (13, 7), 3: (6, 4)}, (208, 208)),
    ({2: (12, 9), 3: (6, 5)}, (192, 256)),
    ({2: (15, 8), 3: (7, 4)}, (240, 240)),
  ],
)
def test_the_resolution_is_read_off_the_filters(filters, size):
  key = 'stages.{}.0.gnconv.dwconv.complex_weight'
  state = {key.format(i): np.zeros((1, *shape, 2)) for i, shape in filters.items()}
  assert hornet._infer(state, {})['image_size'] == size


def test_filters_of_another_resolution_load_resized_or_are_resized_in_the_model():
  state, options = _state((4, 3)), dict(TINY, layer_scale=1.0)
  small, large = (
    va.load_reference('hornet_tiny_gf', state, source='official', image_size=size, **options)
    for size in (None, 96)
  )
  path = 'params/backbone/stage3/block00/attn/depthwise/filter'
  assert tree.flatten(small)[path].shape == (2, 4, 3, 28)
  assert tree.flatten(large)[path].shape == (2, 6, 4, 28)
  model, _ = va.create_model('hornet_tiny_gf', num_classes=5, image_size=96, **options)
  apply = jax.jit(model.apply)
  images = _normal(1, 96, 96, 3)
  np.testing.assert_allclose(apply(small, images), apply(large, images), rtol=1e-3, atol=1e-3)


def test_recipes_are_those_of_the_code():
  config = hornet_tiny.get_config('variant=hornet_small_gf')
  assert (config.batch_size, config.optimizer.learning_rate, config.total) == (
    4096,
    4e-3,
    '300 epochs',
  )
  assert (config.optimizer.weight_decay, config.optimizer.clip_norm, config.ema.decay) == (
    0.05,
    1.0,
    0.9999,
  )
  assert (config.schedule.warmup, config.model.options.drop_path) == ('20 epochs', 0.4)
  assert config.schedule.final * config.optimizer.learning_rate == pytest.approx(1e-6)
  assert 'rand_augment(2, 12' in config.data.train_ops[2]
  assert hornet_tiny.get_config().optimizer.clip_norm == 100
  large = hornet_tiny.get_config('variant=hornet_large_7x7,data=imagenet21k')
  assert (large.total, large.optimizer.weight_decay, large.optimizer.clip_norm) == (
    '90 epochs',
    0.1,
    5.0,
  )
  assert large.ema.decay == 0
  tuned = hornet_tiny.get_config('variant=hornet_large_gf_img384,init=run')
  assert (tuned.batch_size, tuned.optimizer.learning_rate, tuned.image_size) == (512, 5e-5, 384)
  assert (tuned.total, tuned.mixing.mixup_alpha, tuned.model.options.drop_path) == (
    '30 epochs',
    0,
    0.4,
  )
  assert (tuned.optimizer.layer_decay, tuned.init.classes) == (0.7, 'imagenet21k/fall11')
  with pytest.raises(ValueError, match="no such recipe for 'hornet_large_gf'"):
    hornet_tiny.get_config('variant=hornet_large_gf')
