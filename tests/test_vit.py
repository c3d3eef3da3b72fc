"""What holds for every ViT, on models small enough to run; and other people's names of weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vision_attention as va
from vision_attention.attention import map_pool, relative
from vision_attention.models import registry

DIM, DEPTH, HEADS, HIDDEN, CLASSES = 16, 2, 2, 24, 5
TINY = dict(dim=DIM, depth=DEPTH, num_heads=HEADS, mlp_dim=HIDDEN)


@pytest.fixture(autouse=True)
def _quick_compilation():
  """Programs that run once are not worth optimising."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


def _images(*size: int) -> jax.Array:
  return jax.random.normal(jax.random.key(9), (2, *(size or (48, 48)), 3))


def _noisy(variables):
  """Adds noise to all parameters: zeros of the initialisation would hide what they multiply."""
  leaves, structure = jax.tree.flatten(variables)
  keys = jax.random.split(jax.random.key(7), len(leaves))
  noise = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  return jax.tree.unflatten(structure, noise)


@functools.cache
def _tiny(name='vit_ti16', image_size=48, **options):
  model, _ = va.create_model(name, num_classes=CLASSES, image_size=image_size, **TINY, **options)
  images = jnp.zeros((1, *np.broadcast_to(image_size, 2), 3))
  return model, jax.jit(model.init)(jax.random.key(0), images)


def _logits(model, variables, images, **kwargs):
  return np.asarray(jax.jit(functools.partial(model.apply, **kwargs))(variables, images))


def _shuffled(images: jax.Array, patch: int) -> jax.Array:
  """Puts the patches of every image in another order."""
  batch, side = images.shape[0], images.shape[1] // patch
  patches = images.reshape(batch, side, patch, side, patch, 3).swapaxes(2, 3)
  order = np.random.default_rng(0).permutation(side * side)
  patches = patches.reshape(batch, side * side, patch, patch, 3)[:, order]
  return patches.reshape(batch, side, side, patch, patch, 3).swapaxes(2, 3).reshape(images.shape)


@pytest.mark.fast
@pytest.mark.parametrize('pool', ['cls', 'gap', 'map'])
def test_patches_are_a_set_but_for_their_positions(pool):
  model, variables = _tiny(pool=pool)
  variables = _noisy(variables)
  images = _images()
  assert (
    np.abs(
      _logits(model, variables, images) - _logits(model, variables, _shuffled(images, 16))
    ).max()
    > 1e-3
  )
  variables['params']['backbone']['position'] *= 0
  np.testing.assert_allclose(
    _logits(model, variables, images), _logits(model, variables, _shuffled(images, 16)), atol=1e-5
  )


@pytest.mark.fast
def test_the_embedding_is_a_linear_map_of_flat_patches():
  # No blocks are left between the embedding and the last norm.
  model, _ = va.create_model('vit_ti16', image_size=32, **(TINY | dict(depth=0)), pool='gap')
  images = _images(32, 32)
  variables = _noisy(model.init(jax.random.key(0), images))
  params = variables['params']['backbone']
  patches = images.reshape(2, 2, 16, 2, 16, 3).swapaxes(2, 3).reshape(2, 2, 2, -1)
  y = patches @ params['embed']['kernel'].reshape(-1, DIM) + params['embed']['bias']
  y = y + params['position']
  y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
  expected = y * params['norm']['scale'] + params['norm']['bias']
  features = model.apply(variables, images, method='features')
  np.testing.assert_allclose(features['stage1'], expected, atol=1e-4)


@pytest.mark.fast
@pytest.mark.parametrize(
  'options',
  [
    dict(pool='cls'),
    dict(pool='map', pre_logits=True),
    dict(pool='gap', norm_after_pool=True, position='sincos2d'),
  ],
  ids=str,
)
def test_a_fresh_model_answers_with_the_bias_of_its_head(options):
  model, variables = _tiny(head_bias=-6.9, **options)
  logits = _logits(model, variables, _images())
  assert logits.dtype == np.float32
  np.testing.assert_array_equal(logits, np.full((2, CLASSES), np.float32(-6.9)))


@pytest.mark.fast
def test_initial_values():
  model, _ = va.create_model('vit_ti16', dim=96, depth=1, num_heads=2, mlp_dim=128, image_size=128)
  params = model.init(jax.random.key(0), jnp.zeros((1, 128, 128, 3)))['params']
  backbone, block = params['backbone'], params['backbone']['stage1']['block00']
  assert backbone['position'].std() == pytest.approx(0.02, rel=0.1)
  assert backbone['cls_position'].std() == pytest.approx(0.02, rel=0.3)
  assert not backbone['cls'].any()
  assert backbone['embed']['kernel'].std() == pytest.approx(1 / np.sqrt(16 * 16 * 3), rel=0.1)
  assert not backbone['embed']['bias'].any()
  xavier = {
    **{name: np.sqrt(6 / (96 + 96)) for name in ('query', 'key', 'value', 'proj')},
    **{name: np.sqrt(6 / (96 + 128)) for name in ('expand', 'project')},
  }
  for name, bound in xavier.items():
    layer = (block['attn'] | block['mlp'])[name]
    assert 0.98 * bound < jnp.abs(layer['kernel']).max() <= bound
    spread = 1e-6 if name in block['mlp'] else 0.0
    assert layer['bias'].std() == pytest.approx(spread, rel=0.3)


@pytest.mark.fast
def test_attention_maps_of_all_blocks_are_distributions():
  model, variables = _tiny()
  _, aux = model.apply(_noisy(variables), _images(), mutable=['intermediates'])
  stage = aux['intermediates']['backbone']['stage1']
  assert set(stage) == {f'block{i:02d}' for i in range(DEPTH)}
  for block in stage.values():
    (weights,) = block['attn']['attention']
    assert weights.shape == (2, HEADS, 1 + 9, 1 + 9)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


@pytest.mark.fast
def test_noise_is_drawn_in_training_only():
  images = _images()
  for options in (dict(dropout=0.5), dict(drop_path=0.5)):
    model, variables = _tiny(**options)
    variables = _noisy(variables)
    expected = _logits(_tiny()[0], variables, images)
    np.testing.assert_array_equal(_logits(model, variables, images), expected)
    runs = [
      _logits(model, variables, images, train=True, rngs={'dropout': jax.random.key(seed)})
      for seed in (0, 1, 1)
    ]
    assert np.abs(runs[0] - runs[1]).max() > 1e-3
    np.testing.assert_array_equal(runs[1], runs[2])


@pytest.mark.fast
def test_images_need_not_be_square():
  model, variables = _tiny(image_size=(32, 64), position='sincos2d')
  features = model.apply(variables, _images(32, 64), method='features')
  assert features['stage1'].shape == (2, 2, 4, DIM)
  assert features['cls'].shape == (2, DIM)


@pytest.mark.fast
def test_any_operator_on_maps_fits_where_there_is_no_class_token():
  model, variables = _tiny(pool='gap', attn=relative.RelativeAttention)
  block = variables['params']['backbone']['stage1']['block01']
  assert block['attn']['relative_position'].shape == (HEADS, 5, 5)
  assert np.isfinite(_logits(model, variables, _images())).all()
  with pytest.raises(ValueError, match="class token has no place in one: pass pool='gap'"):
    va.create_model('vit_ti16', attn=relative.RelativeAttention)


@pytest.mark.fast
@pytest.mark.parametrize(
  ('theirs', 'ours', 'message'),
  [
    (dict(), dict(pool='gap'), "have 'cls', .* create it with pool='cls'"),
    (dict(), dict(position='sincos2d'), "have 'position', .* with position='learned'"),
    (dict(pool='map'), dict(pool='gap'), "a pooling layer .* for example pool='map'"),
    (dict(pool='gap'), dict(pool='gap', norm_after_pool=True), 'with norm_after_pool=False'),
    (dict(pre_logits=True), dict(), 'create it with pre_logits=True'),
  ],
  ids=str,
)
def test_variables_of_another_kind_are_refused(theirs, ours, message):
  variables = _tiny(**theirs)[1]
  with pytest.raises(ValueError, match=message):
    _tiny(**ours)[0].apply(variables, _images())


@pytest.mark.fast
def test_options_that_contradict_are_refused():
  with pytest.raises(ValueError, match="pass pool='gap', not 'cls'"):
    va.create_model('vit_ti16', norm_after_pool=True)
  with pytest.raises(ValueError, match="pool 'tok' is unknown"):
    va.create_model('vit_ti16', pool='tok')
  with pytest.raises(ValueError, match=r'patches of 32 pixels do not tile .* 224 and 256'):
    va.create_model('vit_r_ti16', image_size=240)


@pytest.mark.fast
def test_map_pooling_with_a_blind_query_is_the_mean():
  x = jax.random.normal(jax.random.key(1), (2, 3, 4, DIM))
  layer = map_pool.MapPool(HEADS, HIDDEN, 'gelu_tanh', 1e-6)
  variables = _noisy(layer.init(jax.random.key(0), x, train=False))
  params = variables['params']
  sighted = layer.apply(variables, x, train=False)
  params['query'] = jax.tree.map(jnp.zeros_like, params['query'])
  z = x.mean((1, 2)) @ params['value']['kernel'] + params['value']['bias']
  z = z @ params['proj']['kernel'] + params['proj']['bias']
  y = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6)
  y = y * params['norm']['scale'] + params['norm']['bias']
  y = jax.nn.gelu(y @ params['mlp']['expand']['kernel'] + params['mlp']['expand']['bias'])
  expected = z + y @ params['mlp']['project']['kernel'] + params['mlp']['project']['bias']
  np.testing.assert_allclose(layer.apply(variables, x, train=False), expected, atol=1e-4)
  assert jnp.abs(sighted - expected).max() > 1e-3


@pytest.mark.fast
def test_the_stem_of_a_hybrid_ignores_the_scale_of_its_kernels():
  model, variables = _tiny('vit_r26_s32', image_size=32, stem_depths=(1, 1))
  variables, images = _noisy(variables), _images(32, 32)
  expected = _logits(model, variables, images)
  stem = variables['params']['backbone']['stem']
  assert expected.std() > 1e-2

  def doubled(path, leaf):
    return 2 * leaf if path[-1].key == 'kernel' else leaf

  variables['params']['backbone']['stem'] = jax.tree_util.tree_map_with_path(doubled, stem)
  np.testing.assert_allclose(_logits(model, variables, images), expected, atol=1e-3)


# Names of other people's files.


def _flax_state(
  *, cls=True, grid=3, classes=CLASSES, rep=False, pool_head=False, numbers=(0, 1, 2, 3)
):
  """Random weights under the names of a flax file; `numbers` are those of a block's parts."""
  shapes = {'embedding/kernel': (16, 16, 3, DIM), 'embedding/bias': (DIM,)}
  heads = (HEADS, DIM // HEADS)

  def norm(name):
    shapes.update({f'{name}/scale': (DIM,), f'{name}/bias': (DIM,)})

  def attention(name):
    for part in ('query', 'key', 'value'):
      shapes.update({f'{name}/{part}/kernel': (DIM, *heads), f'{name}/{part}/bias': heads})
    shapes.update({f'{name}/out/kernel': (*heads, DIM), f'{name}/out/bias': (DIM,)})

  def mlp(name):
    for i, (a, b) in enumerate(((DIM, HIDDEN), (HIDDEN, DIM))):
      shapes.update({f'{name}/Dense_{i}/kernel': (a, b), f'{name}/Dense_{i}/bias': (b,)})

  for i in range(DEPTH):
    block = f'Transformer/encoderblock_{i}'
    norm(f'{block}/LayerNorm_{numbers[0]}')
    attention(f'{block}/MultiHeadDotProductAttention_{numbers[1]}')
    norm(f'{block}/LayerNorm_{numbers[2]}')
    mlp(f'{block}/MlpBlock_{numbers[3]}')
  norm('Transformer/encoder_norm')
  positions = grid * grid + cls
  shapes['Transformer/posembed_input/pos_embedding'] = (1, positions, DIM)
  if cls:
    shapes['cls'] = (1, 1, DIM)
  if pool_head:
    shapes['MAPHead_0/probe'] = (1, 1, DIM)
    attention('MAPHead_0/MultiHeadDotProductAttention_0')
    norm('MAPHead_0/LayerNorm_0')
    mlp('MAPHead_0/MlpBlock_0')
  if rep:
    shapes.update({'pre_logits/kernel': (DIM, DIM), 'pre_logits/bias': (DIM,)})
  if classes:
    shapes.update({'head/kernel': (DIM, classes), 'head/bias': (classes,)})
  rng = np.random.default_rng(0)
  return {name: rng.standard_normal(shape, np.float32) / 3 for name, shape in shapes.items()}


def _load(state, name='vit_ti16', source='official', **options):
  return va.load_reference(name, state, source=source, **TINY, **options)


def _assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a['params'], b['params'])


@pytest.mark.fast
def test_old_and_new_flax_names_load_alike():
  old = _flax_state()
  expected = _load(old)
  new = dict(zip(_flax_state(numbers=(0, 0, 1, 0)), old.values(), strict=True))
  assert set(new) != set(old)
  _assert_same(_load(new), expected)
  _assert_same(_load({f'opt/target/{key}': value for key, value in old.items()}), expected)
  beside = {'opt/0/mu/cls': np.ones(3), 'opt/0/count': np.zeros(())}
  _assert_same(_load({f'params/{key}': value for key, value in new.items()} | beside), expected)
  # Blocks that were scanned over are stacked.
  stack = 'Transformer/encoderblock_'
  scanned = {key: value for key, value in new.items() if stack not in key}
  for key, value in new.items():
    if key.startswith(f'{stack}0/'):
      part = key.removeprefix(f'{stack}0/')
      scanned[f'Transformer/encoderblock/{part}'] = np.stack(
        [new[f'{stack}{i}/{part}'] for i in range(DEPTH)]
      )
      assert value.shape == scanned[f'Transformer/encoderblock/{part}'].shape[1:]
  assert len(scanned) < len(new)
  _assert_same(_load(scanned, source='big_vision'), expected)


@pytest.mark.fast
def test_a_class_token_may_come_with_or_without_its_own_position():
  theirs = _flax_state()
  table = theirs.pop('Transformer/posembed_input/pos_embedding')
  shifted = {**theirs, 'pos_embedding': table[:, 1:], 'cls': theirs['cls'] + table[:, :1]}
  theirs['Transformer/posembed_input/pos_embedding'] = table
  model, _ = _tiny()
  a, b = _load(theirs), _load(shifted, source='big_vision')
  assert not b['params']['backbone']['cls_position'].any()
  images = _images()
  np.testing.assert_allclose(
    _logits(model, a, images), _logits(model, b, images), rtol=1e-5, atol=1e-5
  )


@pytest.mark.fast
@pytest.mark.parametrize(
  ('state', 'options'),
  [
    (dict(grid=4), dict(image_size=64)),
    (dict(cls=False), dict(pool='gap')),
    (dict(cls=False, pool_head=True), dict(pool='map')),
    (dict(rep=True), dict(pre_logits=True)),
    (dict(classes=0), dict(num_classes=0)),
    (dict(classes=21), dict(num_classes=21)),
  ],
  ids=str,
)
def test_kind_and_size_are_read_off_the_weights(state, options):
  variables = _load(_flax_state(**state))
  model, info = va.create_model(
    'vit_ti16', **(dict(num_classes=CLASSES, image_size=48) | TINY | options)
  )
  images = _images(*info.image_size)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)['params']
  assert jax.tree.map(np.shape, variables['params']) == jax.tree.map(np.shape, shapes)
  assert _logits(model, variables, images).shape == (2, info.num_classes or DIM)


@pytest.mark.fast
def test_another_resolution_resizes_the_grid_and_keeps_the_class_token():
  state = _flax_state(rep=True, classes=21)
  small, large = _load(state), _load(state, image_size=80)
  before, after = small['params']['backbone'], large['params']['backbone']
  np.testing.assert_allclose(after['position'][::2, ::2], before['position'], atol=1e-6)
  np.testing.assert_array_equal(after['cls_position'], before['cls_position'])
  np.testing.assert_array_equal(
    large['params']['head']['classifier']['kernel'], state['head/kernel']
  )


def _timm_state(*, pool='cls', stem=None, late_norm=False):
  """Random weights under timm's names; `stem` is where a hybrid's root lies."""
  inputs, patch = (3, 16) if stem is None else (64, 8)
  shapes = {'pos_embed': (1, 9 + (pool == 'cls'), DIM)}

  def dense(name, a, b):
    shapes.update({f'{name}.weight': (b, a), f'{name}.bias': (b,)})

  def norm(name, dim=DIM):
    shapes.update({f'{name}.weight': (dim,), f'{name}.bias': (dim,)})

  if pool == 'cls':
    shapes['cls_token'] = (1, 1, DIM)
  if stem is not None:
    shapes[f'{stem}conv.weight'] = (64, 3, 7, 7)
    norm(f'{stem}norm', 64)
  shapes['patch_embed.proj.weight'] = (DIM, inputs, patch, patch)
  shapes['patch_embed.proj.bias'] = (DIM,)
  for i in range(DEPTH):
    norm(f'blocks.{i}.norm1')
    dense(f'blocks.{i}.attn.qkv', DIM, 3 * DIM)
    dense(f'blocks.{i}.attn.proj', DIM, DIM)
    norm(f'blocks.{i}.norm2')
    dense(f'blocks.{i}.mlp.fc1', DIM, HIDDEN)
    dense(f'blocks.{i}.mlp.fc2', HIDDEN, DIM)
  norm('fc_norm' if late_norm else 'norm')
  if pool == 'map':
    shapes['attn_pool.latent'] = (1, 1, DIM)
    dense('attn_pool.q', DIM, DIM)
    dense('attn_pool.kv', DIM, 2 * DIM)
    dense('attn_pool.proj', DIM, DIM)
    norm('attn_pool.norm')
    dense('attn_pool.mlp.fc1', DIM, HIDDEN)
    dense('attn_pool.mlp.fc2', HIDDEN, DIM)
  dense('head', DIM, CLASSES)
  rng = np.random.default_rng(0)
  return {name: rng.standard_normal(shape, np.float32) / 3 for name, shape in shapes.items()}


@pytest.mark.fast
@pytest.mark.parametrize(
  ('name', 'size', 'state', 'options'),
  [
    ('vit_ti16', 48, dict(), dict()),
    ('vit_ti16', 48, dict(pool='gap'), dict(pool='gap')),
    ('vit_ti16', 48, dict(pool='gap', late_norm=True), dict(pool='gap', norm_after_pool=True)),
    ('vit_ti16', 48, dict(pool='map'), dict(pool='map')),
    ('vit_r_ti16', 96, dict(stem='patch_embed.backbone.'), dict()),
    ('vit_r_ti16', 96, dict(stem='patch_embed.backbone.stem.'), dict()),
  ],
  ids=str,
)
def test_timms_names(name, size, state, options):
  state = _timm_state(**state)
  variables = _load(state, name, 'timm')
  params = variables['params']
  assert sum(x.size for x in jax.tree.leaves(params)) == sum(x.size for x in state.values())
  model, _ = va.create_model(name, num_classes=CLASSES, image_size=size, **TINY, **options)
  logits = _logits(model, variables, _images(size, size))
  assert logits.std() > 1e-2
  # What is fused there comes apart in the right order.
  fused = state['blocks.1.attn.qkv.weight'].reshape(3, DIM, DIM)
  ours = params['backbone']['stage1']['block01']['attn']
  for part, kernel in zip(('query', 'key', 'value'), fused, strict=True):
    np.testing.assert_array_equal(ours[part]['kernel'], kernel.T)


@pytest.mark.fast
def test_weights_that_do_not_come_out_even_are_listed():
  state = _flax_state()
  del state['Transformer/encoder_norm/bias']
  state['novelty'] = np.zeros(3)
  with pytest.raises(ValueError, match='arrays do not fit vit_ti16') as error:
    _load(state)
  assert 'params/backbone/norm/bias (16,) of the model is not in the reference' in str(error.value)
  assert 'novelty (3,) of the reference is not known here' in str(error.value)
  table = 'Transformer/posembed_input/pos_embedding'
  with pytest.raises(ValueError, match='has 7 positions, which is no square grid'):
    _load({**_flax_state(), table: np.zeros((1, 8, DIM))})


# Counts that the papers' own resolutions add to those of the table.
@pytest.mark.parametrize(
  ('name', 'size', 'gmacs'),
  [
    ('vit_s32', 384, 3.44),
    ('vit_b32', 384, 13.04),
    ('vit_l32', 384, 45.28),
    ('vit_l16', 512, 362.0),
    ('vit_gigantic14', 518, 2822),
  ],
)
def test_multiply_adds_at_the_resolutions_of_fine_tuning(name, size, gmacs):
  model, _ = va.create_model(name, image_size=size)
  assert va.count_macs(model, image_size=size) / 1e9 == pytest.approx(gmacs, rel=0.02)


@pytest.mark.fast
def test_every_size_comes_with_every_patch():
  names = set(va.list_models('vit_*'))
  sizes = ('ti', 's', 'm', 'b', 'l', 'so400m', 'h', 'g', 'gigantic')
  assert {f'vit_{size}{patch}' for size in sizes for patch in (8, 14, 16, 32)} <= names
  assert {'vit_r_ti16', 'vit_r26_s32', 'vit_r26_b32', 'vit_r50_b16', 'vit_r50_l32'} <= names
  assert registry.variant_of('vit_gigantic14').options['dim'] == 1664
