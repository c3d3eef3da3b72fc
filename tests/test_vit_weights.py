"""Other people's names of ViT's weights: flax files of several ages, and timm."""

import jax
import numpy as np
import pytest

import vision_attention as va
from tests.test_vit import (
  CLASSES,
  DEPTH,
  DIM,
  HEADS,
  HIDDEN,
  TINY,
  _images,
  _logits,
  _tiny,
)


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
