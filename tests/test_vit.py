"""What holds for every ViT, on models small enough to run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vision_attention as va
from tests import abstract
from vision_attention.attention import map_pool, relative
from vision_attention.models import registry

DIM, DEPTH, HEADS, HIDDEN, CLASSES = 16, 2, 2, 24, 5
TINY = dict(dim=DIM, depth=DEPTH, num_heads=HEADS, mlp_dim=HIDDEN)


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
  assert abstract.macs(model, image_size=size) / 1e9 == pytest.approx(gmacs, rel=0.02)


@pytest.mark.fast
def test_every_size_comes_with_every_patch():
  names = set(va.list_models('vit_*'))
  sizes = ('ti', 's', 'm', 'b', 'l', 'so400m', 'h', 'g', 'gigantic')
  assert {f'vit_{size}{patch}' for size in sizes for patch in (8, 14, 16, 32)} <= names
  assert {'vit_r_ti16', 'vit_r26_s32', 'vit_r26_b32', 'vit_r50_b16', 'vit_r50_l32'} <= names
  assert registry.variant_of('vit_gigantic14').options['dim'] == 1664
