"""What is particular to Swin: window attention, its tables, sizes, policies and other names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vision_attention as va
from configs import swin_tiny
from tests import abstract
from vision_attention import convert
from vision_attention.attention import mhsa, relative, window
from vision_attention.models import registry, swin, tree
from vision_attention.ops import bicubic, windows

TINY = dict(depths=(2, 2), dim=8, num_heads=(1, 2), window=4)


@pytest.mark.parametrize(
  ('name', 'counted'),
  [
    ('swin_tiny', 4.494),
    ('swin_small', 8.747),
    ('swin_base', 15.438),
    ('swin_base_w12', 47.105),
    ('swin_large_w12', 103.952),
  ],
)
def test_multiply_adds_are_those_of_the_paper_and_of_its_code(name, counted):
  model, info = va.create_model(name)
  macs = abstract.macs(model, image_size=info.image_size) / 1e9
  assert macs == pytest.approx(info.flops / 1e9, rel=0.02)
  assert macs == pytest.approx(counted, rel=0.005)  # the code counts norms too


def _attention(x, **fields):
  """Returns window attention of fresh variables, and the variables."""
  module = window.WindowAttention(6, num_heads=2, window=4, **fields)
  # A table and projections with something to see.
  init = jax.nn.initializers.normal(1.0)
  module = module.copy(kernel_init=init, table_init=init)
  variables = module.init(jax.random.key(1), x, train=False)
  return jax.jit(functools.partial(module.apply, train=False)), variables


@functools.cache
def _map(height, width):
  return jax.random.normal(jax.random.key(0), (2, height, width, 6))


def test_windows_without_a_shift_move_with_the_map():
  x = _map(8, 12)
  attend, variables = _attention(x)
  moved = attend(variables, jnp.roll(x, (4, 8), (1, 2)))
  np.testing.assert_allclose(moved, jnp.roll(attend(variables, x), (4, 8), (1, 2)), atol=1e-5)
  off = attend(variables, jnp.roll(x, (2, 0), (1, 2)))
  assert jnp.abs(off - jnp.roll(attend(variables, x), (2, 0), (1, 2))).max() > 1e-2


def test_a_shift_is_a_roll_but_for_windows_at_the_border():
  x = _map(12, 12)
  plain, variables = _attention(x)
  shifted, _ = _attention(x, shift=2)
  rolled = jnp.roll(plain(variables, jnp.roll(x, (-2, -2), (1, 2))), (2, 2), (1, 2))
  differs = jnp.abs(shifted(variables, x) - rolled).max((0, 3)) > 1e-4
  border = np.ones((12, 12), bool)
  border[2:10, 2:10] = False
  np.testing.assert_array_equal(differs, border)


def test_windows_with_a_zero_table_are_plain_attention():
  x = _map(8, 12)
  attend, variables = _attention(x)
  params = dict(variables['params'])
  params['relative_position'] = jnp.zeros_like(params['relative_position'])
  cut = windows.partition(x, 4)
  plain = {key: value for key, value in params.items() if key != 'relative_position'}
  module = mhsa.MultiHeadAttention(6, 2)
  expected = module.apply({'params': plain}, cut.reshape(-1, 16, 6), train=False)
  expected = windows.merge(expected.reshape(cut.shape), 4, (8, 12))
  np.testing.assert_allclose(attend({'params': params}, x), expected, atol=1e-5)


@pytest.mark.parametrize('size', [(4, 4), (3, 2)])
def test_a_window_over_the_whole_map_is_global_attention(size):
  x = _map(*size)
  attend, variables = _attention(x, shift=2)
  expected = relative.RelativeAttention(6, 2).apply(variables, x, train=False)
  np.testing.assert_allclose(attend(variables, x), expected, atol=1e-5)


def test_maps_are_sown_per_window():
  x = _map(6, 9)
  module = window.WindowAttention(6, num_heads=2, window=4, shift=1)
  variables = module.init(jax.random.key(1), x, train=False)
  _, aux = module.apply({'params': variables['params']}, x, train=False, mutable='intermediates')
  [weights] = aux['intermediates']['attention']
  assert weights.shape == (2 * 2 * 3, 2, 16, 16)
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
  seen = np.tile(windows.visible(windows.tile((6, 9), 4, 1)), (2, 1, 1))[:, None]
  assert float(jnp.where(seen, 0, weights).max()) == 0


def test_blocks_alternate_and_the_last_map_is_one_window():
  parts = swin.build(
    num_classes=1, image_size=(224, 224), dtype=jnp.float32, param_dtype=jnp.float32,
    **registry.variant_of('swin_tiny').options,
  )  # fmt: skip
  stages = parts.backbone.keywords['stages']
  fields = [[block.keywords['attn'].keywords for block in blocks] for blocks in stages]
  assert [[f['shift'] for f in blocks] for blocks in fields[:1]] == [[(0, 0), (3, 3)]]
  assert all(f['window'] == (7, 7) for blocks in fields for f in blocks)
  assert windows.tile((7, 7), 7, fields[3][1]['shift']).shift == (0, 0)
  rates = [
    block.keywords['drop_path']
    for blocks in swin.build(
      num_classes=1, image_size=(224, 224), dtype=jnp.float32, param_dtype=jnp.float32,
      drop_path=0.2, **registry.variant_of('swin_tiny').options,
    ).backbone.keywords['stages']
    for block in blocks
  ]  # fmt: skip
  np.testing.assert_allclose(rates, np.linspace(0, 0.2, 12))


def _tables(size, **options):
  shapes = tree.flatten(abstract.variables('swin_tiny', image_size=size, **options)['params'])
  stages = range(1, 5)
  path = 'backbone/stage{}/block00/attn/relative_position'
  return [shapes[path.format(i)].shape[1:] for i in stages]


def test_window_policies():
  assert _tables(224) == _tables(256) == [(13, 13)] * 4
  # Windows are no larger than the map: 4x6 at 1/32.
  assert _tables((128, 192)) == [(13, 13)] * 3 + [(7, 11)]
  assert _tables((128, 192), fit='square') == [(13, 13)] * 3 + [(7, 7)]
  assert _tables((256, 384), window_policy='scale') == [(15, 23)] * 4
  assert _tables(250, window_policy='scale') == [(15, 15)] * 4
  with pytest.raises(ValueError, match="window_policy 'scaled' is unknown: did you mean 'scale'"):
    va.create_model('swin_tiny', window_policy='scaled')


@pytest.mark.parametrize('size', [(32, 32), (33, 61), (5, 3), (70, 18)])
@pytest.mark.parametrize('policy', swin.POLICIES)
def test_any_image_size_is_taken(size, policy):
  features = abstract.features('swin_tiny', size, window_policy=policy, **TINY)
  for i, stride in ((1, 4), (2, 8)):
    assert features[f'stage{i}'].shape[1:3] == tuple(-(-side // stride) for side in size)


def test_images_of_another_size_are_refused():
  model, info = va.create_model('swin_tiny', image_size=32, **TINY)
  shapes = convert.abstract_variables(model, info)
  with pytest.raises(ValueError, match=r'images are 64x64 but .* 32x32: pass image_size=\(64, 64'):
    jax.eval_shape(model.apply, shapes, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))


def test_other_operators_take_the_place_of_windows():
  everywhere = abstract.variables('swin_tiny', image_size=32, **TINY, attn='mhsa')
  assert not [path for path in tree.flatten(everywhere) if 'relative_position' in path]
  halo = {'name': 'halo', 'block': 4, 'halo': 1}
  mixed = tree.flatten(
    abstract.variables(
      'swin_tiny', image_size=32, **TINY, attn=[['window', halo], ['mhsa', 'relative']]
    )
  )
  tables = sorted(path.split('backbone/')[1] for path in mixed if 'attn/' in path and 'tab' in path)
  assert tables == [f'stage1/block01/attn/{axis}_table' for axis in ('height', 'width')]
  positions = [path.split('backbone/')[1] for path in mixed if path.endswith('relative_position')]
  assert positions == [
    'stage1/block00/attn/relative_position',
    'stage2/block01/attn/relative_position',
  ]


def _state(source, sides, classes=3):
  """Returns a state dict of the tiny model, by the windows' sides per stage."""
  rng = np.random.default_rng(0)
  state = {}

  def add(name, *weight, bias=True):
    state[f'{name}.weight'] = rng.standard_normal(weight)
    if bias:
      state[f'{name}.bias'] = rng.standard_normal(weight[0])

  add('patch_embed.proj', 8, 3, 4, 4)
  add('patch_embed.norm', 8)
  for i, (dim, heads, side) in enumerate(zip((8, 16), (1, 2), sides, strict=True)):
    for j in range(2):
      block = f'layers.{i}.blocks.{j}.'
      add(block + 'norm1', dim)
      add(block + 'norm2', dim)
      add(block + 'attn.qkv', 3 * dim, dim)
      add(block + 'attn.proj', dim, dim)
      add(block + 'mlp.fc1', 4 * dim, dim)
      add(block + 'mlp.fc2', dim, 4 * dim)
      offsets = (2 * side - 1) ** 2
      state[block + 'attn.relative_position_bias_table'] = rng.standard_normal((offsets, heads))
      state[block + 'attn.relative_position_index'] = np.zeros((side**2, side**2))
  merge = 'layers.0.downsample.' if source == 'official' else 'layers.1.downsample.'
  add(merge + 'norm', 32)
  add(merge + 'reduction', 16, 32, bias=False)
  add('norm', 16)
  add('head' if source == 'official' else 'head.fc', classes, 16)
  if source == 'official':
    state['layers.0.blocks.1.attn_mask'] = np.zeros((4, 16, 16))
  return state


_OPTIONS = {key: value for key, value in TINY.items() if key != 'window'}


def test_official_and_timm_names_are_the_same_weights():
  loaded = [
    va.load_reference('swin_tiny', _state(source, (7, 7)), source=source, **_OPTIONS)
    for source in ('official', 'timm')
  ]
  assert jax.tree.all(jax.tree.map(np.array_equal, *(variables['params'] for variables in loaded)))
  attn = loaded[0]['params']['backbone']['stage2']['block01']['attn']
  theirs = _state('timm', (7, 7))['layers.1.blocks.1.attn.relative_position_bias_table']
  # Query two rows below and one column left of the key, second head.
  assert attn['relative_position'][1, 2 + 6, -1 + 6] == np.float32(theirs[8 * 13 + 5, 1])
  weight = _state('timm', (7, 7))['layers.1.blocks.1.attn.qkv.weight'].astype(np.float32)
  np.testing.assert_array_equal(attn['key']['kernel'], weight[16:32].T)


@pytest.mark.parametrize('sides', [(7, 7), (7, 5), (6, 3)])
def test_the_resolution_is_read_off_the_tables(sides):
  state = _state('official', sides, classes=4)
  found = swin.infer('square')(state, {})
  assert found['num_classes'] == 4
  maps = [-(-found['image_size'][0] // stride) for stride in (4, 8)]
  assert tuple(min(side, sides[0]) for side in maps) == sides


def test_tables_are_resized_with_the_windows():
  state = _state('official', (7, 7))
  options = {**_OPTIONS, 'window_policy': 'scale'}
  small = va.load_reference('swin_tiny', state, source='official', image_size=56, **options)
  large = va.load_reference('swin_tiny', state, source='official', image_size=96, **options)
  table, wide = (
    v['params']['backbone']['stage1']['block00']['attn']['relative_position']
    for v in (small, large)
  )
  assert (table.shape, wide.shape) == ((1, 13, 13), (1, 23, 23))
  np.testing.assert_allclose(wide, bicubic.resize(table, (1, 23, 23)))
  model, _ = va.create_model('swin_tiny', num_classes=3, image_size=96, **options)
  assert jnp.isfinite(jax.jit(model.apply)(large, jnp.ones((1, 96, 96, 3)))).all()


def test_recipes_are_those_of_the_code():
  config = swin_tiny.get_config('variant=swin_small')
  assert (config.batch_size, config.optimizer.learning_rate, config.total) == (
    1024,
    1e-3,
    '300 epochs',
  )
  assert (config.optimizer.weight_decay, config.optimizer.clip_norm) == (0.05, 5.0)
  assert (config.schedule.warmup, config.schedule.final) == ('20 epochs', 0.01)
  assert config.model.options.to_dict() == {'drop_path': 0.3}
  assert config.data.eval_ops == ('center_crop({size}, ratio=0.875)',)
  large = swin_tiny.get_config('variant=swin_large,data=imagenet21k')
  assert (large.batch_size, large.optimizer.learning_rate, large.total) == (4096, 1e-3, '90 epochs')
  tuned = swin_tiny.get_config('variant=swin_base_w12,init=run,pretrained=22k')
  assert (tuned.image_size, tuned.total, tuned.init.path) == (384, '30 epochs', 'run')
  assert (tuned.optimizer.learning_rate, tuned.optimizer.weight_decay) == (4e-5, 1e-8)
  assert (tuned.model.options.drop_path, tuned.mixing.cutmix_alpha) == (0.2, 1.0)
  assert tuned.data.eval_ops == ('resize({size})',)
  with pytest.raises(ValueError, match="no such recipe for 'swin_large'"):
    swin_tiny.get_config('variant=swin_large')
