"""ACmix in windows: its two branches, its sizes, its weights' names, its recipe."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vision_attention as va
from configs import acmix_swin_tiny
from tests import abstract
from vision_attention import convert
from vision_attention.attention import acmix, window
from vision_attention.models import tree
from vision_attention.ops import convolution


def _normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@functools.cache
def _layer(size, **fields):
  module = acmix.WindowAcmix(6, num_heads=2, window=4, **fields)
  x = _normal(2, *size, 6)
  shapes = jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), x)
  params = {
    path: 0.5 * _normal(*leaf.shape, seed=i)
    for i, (path, leaf) in enumerate(tree.flatten(shapes['params']).items())
  }
  return jax.jit(functools.partial(module.apply, train=False)), params, x


def _apply(apply, params, x, **changed):
  return apply({'params': tree.unflatten({**params, **changed})}, x)


@pytest.mark.parametrize(('size', 'shift'), [((8, 8), 0), ((8, 8), 2), ((6, 7), 1), ((3, 9), 2)])
def test_attention_alone_is_that_of_swin(size, shift):
  apply, params, x = _layer(size, shift=shift)
  y = _apply(apply, params, x, conv_rate=jnp.zeros(()), attention_rate=jnp.ones(()))
  swin = window.WindowAttention(6, num_heads=2, window=4, shift=shift)
  mine = {k: v for k, v in params.items() if not k.startswith('conv') and 'rate' not in k}
  expected = swin.apply({'params': tree.unflatten(mine)}, x, train=False)
  np.testing.assert_allclose(y, expected, atol=1e-5)


def _by_definition(params, x):
  """The convolution of a map: heads mixed, then convolved in a group per channel of a head."""
  of = lambda name: (params[f'{name}/kernel'], params[f'{name}/bias'])
  maps = [x @ of(name)[0] + of(name)[1] for name in ('query', 'key', 'value')]
  maps = jnp.concatenate(maps, -1).reshape(*x.shape[:3], 6, 3)
  mixed = jnp.einsum('bhwjd,jt->bhwdt', maps, params['conv/mixing']) + params['conv/bias']
  mixed = mixed.reshape(*x.shape[:3], 27)
  return jax.lax.conv_general_dilated(
    mixed,
    params['conv/kernel'],
    (1, 1),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=3,
  )


@pytest.mark.parametrize(('size', 'shift'), [((8, 8), 0), ((8, 8), 2), ((6, 7), 1)])
def test_convolution_alone_sees_the_map_as_the_windows_do(size, shift):
  """Rolled where they are shifted, and without what windows are padded by."""
  apply, params, x = _layer(size, shift=shift)
  y = _apply(apply, params, x, attention_rate=jnp.zeros(()), conv_rate=jnp.ones(()))
  rolled = jnp.roll(x, (-shift, -shift), (1, 2))
  expected = jnp.roll(_by_definition(params, rolled), (shift, shift), (1, 2))
  np.testing.assert_allclose(y, expected, atol=1e-4)


def test_branches_begin_halved_and_the_convolution_as_a_sum_of_shifts():
  module = acmix.WindowAcmix(6, num_heads=2, window=4)
  params = module.init(jax.random.key(0), _normal(1, 4, 4, 6), train=False)['params']
  assert params['attention_rate'] == params['conv_rate'] == 0.5
  kernel = params['conv']['kernel']
  assert float(kernel.sum()) == 9 * 6
  for t in range(9):
    assert (kernel[t // 3, t % 3, t] == 1).all()
  # All taps the same combination: a box filter of it.
  maps, mixing = _normal(1, 5, 5, 6, 3), jnp.zeros((6, 9)).at[4].set(1)
  y = acmix.shift_convolution.shift_convolution(maps, mixing, kernel)
  total = convolution.avg_pool(maps[..., 4, :], window=3, stride=1, padding='symmetric') * 9
  np.testing.assert_allclose(y, jnp.repeat(total, 2, -1), atol=1e-5)


@pytest.mark.parametrize(
  ('name', 'counted'), [('acmix_swin_tiny', 4.6488), ('acmix_swin_small', 8.9985)]
)
def test_multiply_adds_are_those_of_the_paper_and_of_its_code(name, counted):
  model, info = va.create_model(name)
  macs = abstract.macs(model, image_size=224) / 1e9
  assert macs == pytest.approx(info.flops / 1e9, rel=0.02)
  assert macs == pytest.approx(counted, rel=0.005)  # the code counts norms too


@pytest.mark.parametrize('size', [(32, 32), (75, 101), (224, 40)])
def test_any_image_size_is_taken(size):
  options = dict(depths=(2, 2), dim=8, num_heads=(1, 2))
  for policy in ('fixed', 'scale'):
    model, info = va.create_model(
      'acmix_swin_tiny', image_size=size, window_policy=policy, **options
    )
    shapes = convert.abstract_variables(model, info)
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    features = jax.eval_shape(functools.partial(model.apply, method='features'), shapes, images)
    assert features['stage2'].shape == (1, -(-size[0] // 8), -(-size[1] // 8), 16)


def test_stages_without_acmix_are_those_of_swin():
  model, info = va.create_model(
    'acmix_swin_tiny', image_size=32, depths=(1, 1), dim=8, num_heads=(1, 2), stages=(2,)
  )
  params = convert.abstract_variables(model, info)['params']['backbone']
  assert 'conv' not in params['stage1']['block00']['attn']
  assert 'conv' in params['stage2']['block00']['attn']


def _state():
  """Returns the state dict of a model of two stages in the code's names."""
  rng = np.random.default_rng(0)
  state = {'layers.0.blocks.1.attn.attn_mask': np.zeros((4, 49, 49))}

  def add(name, *weight, bias=True):
    state[f'{name}.weight'] = rng.standard_normal(weight)
    if bias:
      state[f'{name}.bias'] = rng.standard_normal(weight[0])

  add('patch_embed.proj', 8, 3, 4, 4)
  add('patch_embed.norm', 8)
  for i, (dim, heads) in enumerate(((8, 1), (16, 2))):
    for j in range(2):
      block = f'layers.{i}.blocks.{j}.'
      add(block + 'norm1', dim)
      add(block + 'norm2', dim)
      add(block + 'attn.qkv', 3 * dim, dim)
      add(block + 'attn.proj', dim, dim)
      add(block + 'attn.fc', 9, 3 * heads, 1, 1)
      add(block + 'attn.dep_conv', dim, 9, 3, 3, bias=False)
      state[block + 'attn.rate1'], state[block + 'attn.rate2'] = rng.standard_normal((2, 1))
      add(block + 'mlp.fc1', 4 * dim, dim)
      add(block + 'mlp.fc2', dim, 4 * dim)
      state[block + 'attn.relative_position_bias_table'] = rng.standard_normal((169, heads))
      state[block + 'attn.relative_position_index'] = np.zeros((49, 49))
  add('layers.0.downsample.norm', 32)
  add('layers.0.downsample.reduction', 16, 32, bias=False)
  add('norm', 16)
  add('head', 5, 16)
  return state


def test_weights_load_under_their_official_names_and_tables_are_resized():
  state, options = _state(), dict(depths=(2, 2), dim=8, num_heads=(1, 2), window_policy='scale')
  load = functools.partial(va.load_reference, 'acmix_swin_tiny', state, source='official')
  attn = load(**options)['params']['backbone']['stage2']['block01']['attn']
  block = 'layers.1.blocks.1.attn.'
  for ours, theirs in (('attention_rate', 'rate1'), ('conv_rate', 'rate2')):
    assert attn[ours] == np.float32(state[block + theirs][0])
  fc = state[block + 'fc.weight'].astype(np.float32)
  np.testing.assert_array_equal(attn['conv']['mixing'], fc[..., 0, 0].T)
  kernel = state[block + 'dep_conv.weight'].astype(np.float32)
  np.testing.assert_array_equal(attn['conv']['kernel'], kernel.transpose(2, 3, 1, 0))
  larger = load(image_size=96, **options)['params']['backbone']['stage2']['block01']['attn']
  assert larger['relative_position'].shape == (2, 23, 23)


def test_the_recipe_is_that_of_the_code():
  config = acmix_swin_tiny.get_config('variant=acmix_swin_small')
  assert (config.batch_size, config.optimizer.learning_rate, config.total) == (
    1024,
    1e-3,
    '300 epochs',
  )
  assert (config.optimizer.weight_decay, config.optimizer.clip_norm) == (0.05, 5.0)
  assert (config.schedule.warmup, config.schedule.final) == ('20 epochs', 0.01)
  assert config.model.options.to_dict() == {'drop_path': 0.3}
  with pytest.raises(ValueError, match="'swin_tiny' is not of this recipe"):
    acmix_swin_tiny.get_config('variant=swin_tiny')
