"""What is particular to PVT: fewer keys than queries, the class token, positions of every stage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vision_attention as va
from tests import abstract
from vision_attention import convert
from vision_attention.models import depth, pvt
from vision_attention.ops import position_embedding

TINY = dict(depths=(1, 2), dims=(8, 16), num_heads=(1, 2), mlp_ratios=(2, 2), reductions=(2, 1))


@pytest.mark.parametrize(
  ('name', 'published', 'counted'),
  # Counted by fvcore, of the authors' code.
  [
    ('pvt_tiny', 1.9, 1.944),
    ('pvt_small', 3.8, 3.834),
    ('pvt_medium', 6.7, 6.686),
    ('pvt_large', 9.8, 9.851),
  ],
)
def test_multiply_adds_are_those_of_the_paper_and_of_its_code(name, published, counted):
  model, info = va.create_model(name)
  macs = abstract.macs(model)
  assert macs / 1e9 == pytest.approx(published, rel=0.02)
  # It counts five operations per element of a LayerNorm besides.
  stages = zip(info.options['depths'], (64, 128, 320, 512), (8, 4, 2, 1), (0, 0, 0, 1), strict=True)
  for i, (blocks, dim, reduced, cls) in enumerate(stages):
    positions = (56 // 2**i) ** 2
    keys = (reduced > 1) * blocks * positions // reduced**2
    macs += 5 * dim * (positions + keys + (2 * blocks + cls) * (positions + cls))
  assert macs / 1e9 == pytest.approx(counted, rel=6e-4)
  assert info.flops == published * 1e9


def _drawn(model):
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
  return abstract.drawn(shapes)


def _images(*size, batch=2):
  return jax.random.normal(jax.random.key(1), (batch, *size, 3))


def test_the_class_token_and_the_map_are_both_to_be_had():
  model, _ = va.create_model('pvt_tiny', num_classes=5, image_size=64, **TINY)
  variables = _drawn(model)
  features = model.apply(variables, _images(64, 64), method='features')
  assert {name: array.shape for name, array in features.items()} == {
    'stage1': (2, 16, 16, 8),
    'stage2': (2, 8, 8, 16),
    'cls': (2, 16),
  }
  logits = model.apply(variables, _images(64, 64))
  head = variables['params']['head']['classifier']
  expected = features['cls'] @ head['kernel'] + head['bias']
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_without_a_class_token_the_mean_is_classified():
  model, _ = va.create_model('pvt_tiny', num_classes=5, image_size=64, pool='gap', **TINY)
  variables = _drawn(model)
  assert 'cls' not in variables['params']['backbone']
  last = model.apply(variables, _images(64, 64), method='features')['stage2']
  head = variables['params']['head']['classifier']
  np.testing.assert_allclose(
    model.apply(variables, _images(64, 64)),
    last.mean((1, 2)) @ head['kernel'] + head['bias'],
    rtol=1e-4,
    atol=1e-4,
  )
  with_cls, _ = va.create_model('pvt_tiny', num_classes=5, image_size=64, **TINY)
  with pytest.raises(ValueError, match="create it with pool='cls'"):
    model.apply(_drawn(with_cls), _images(64, 64))


def test_operators_and_the_class_token():
  with pytest.raises(ValueError, match=r"'?pool='gap'"):
    va.create_model('pvt_tiny', image_size=64, attn='sasa', **TINY)
  model, _ = va.create_model(
    'pvt_tiny', num_classes=3, image_size=64, attn='sasa', pool='gap', **TINY
  )
  assert model.apply(_drawn(model), _images(64, 64)).shape == (2, 3)
  # Keys that are reduced have no place for the class token either.
  with pytest.raises(ValueError, match="pool='gap'"):
    va.create_model('pvt_tiny', image_size=64, **{**TINY, 'reductions': (2, 2)})


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'image_size': (60, 70)}, r'must be multiples of 8: pass \(64, 72\)'),
    ({'dims': (8, 16, 32)}, 'must have one entry per stage'),
    ({'num_heads': (1, 3)}, 'do not divide the widths'),
    ({'pool': 'cl'}, "did you mean 'cls'"),
  ],
)
def test_what_does_not_fit_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    va.create_model('pvt_tiny', **{'image_size': 64, **TINY, **options})


def test_positions_are_resized_by_centres():
  table = np.arange(4, dtype=np.float32).reshape(2, 2, 1)
  found = position_embedding.resize_centres(table, (4, 4, 1))[..., 0]
  # A quarter of the way from each centre, and no further than the border.
  rows = np.array([0, 0.25, 0.75, 1])
  np.testing.assert_allclose(found, 2 * rows[:, None] + rows, atol=1e-6)


def test_what_leads_into_a_stage_goes_with_its_first_block():
  layers = depth.layers('pvt_tiny', abstract.variables('pvt_tiny')['params'])
  assert layers['backbone/embed1/position'] == 0
  assert layers['backbone/embed4/position'] == layers['backbone/stage4/block00/norm1/bias'] == 7
  assert layers['backbone/norm/scale'] == layers['head/classifier/kernel'] == 9


def _official():
  """The tiny model's weights under the names of the authors' code."""
  rng, state = np.random.default_rng(0), {}

  def add(module, *shape, bias=True):
    state[f'{module}.weight'] = rng.standard_normal(shape).astype(np.float32)
    if bias:
      state[f'{module}.bias'] = rng.standard_normal(shape[0]).astype(np.float32)

  before = 3
  for i, (blocks, dim, patch, reduced) in enumerate(((1, 8, 4, 2), (2, 16, 2, 1)), 1):
    add(f'patch_embed{i}.proj', dim, before, patch, patch)
    add(f'patch_embed{i}.norm', dim)
    tokens = (16 // i) ** 2 + (i == 2)
    state[f'pos_embed{i}'] = rng.standard_normal((1, tokens, dim)).astype(np.float32)
    for j in range(blocks):
      block = f'block{i}.{j}'
      for norm in ('norm1', 'norm2'):
        add(f'{block}.{norm}', dim)
      add(f'{block}.attn.q', dim, dim)
      add(f'{block}.attn.kv', 2 * dim, dim)
      add(f'{block}.attn.proj', dim, dim)
      if reduced > 1:
        add(f'{block}.attn.sr', dim, dim, reduced, reduced)
        add(f'{block}.attn.norm', dim)
      add(f'{block}.mlp.fc1', 2 * dim, dim)
      add(f'{block}.mlp.fc2', dim, 2 * dim)
    before = dim
  state['cls_token'] = rng.standard_normal((1, 1, 16)).astype(np.float32)
  add('norm', 16)
  add('head', 5, 16)
  return state


def test_weights_are_loaded_at_their_own_and_at_another_resolution():
  state = _official()
  variables = va.load_reference('pvt_tiny', state, source='official', **TINY)
  backbone = variables['params']['backbone']
  np.testing.assert_array_equal(backbone['cls_position'], state['pos_embed2'][0, 0])
  position = state['pos_embed2'][0, 1:].reshape(8, 8, 16)
  np.testing.assert_array_equal(backbone['embed2']['position'], position)
  model, _ = va.create_model('pvt_tiny', num_classes=5, image_size=64, **TINY)
  assert np.isfinite(model.apply(variables, _images(64, 64))).all()
  larger = va.load_reference('pvt_tiny', state, source='official', image_size=(64, 96), **TINY)
  resized = larger['params']['backbone']['embed2']['position']
  assert resized.shape == (8, 12, 16)
  np.testing.assert_allclose(resized[:, [0, -1]], position[:, [0, -1]], rtol=1e-5, atol=1e-5)
  model, _ = va.create_model('pvt_tiny', num_classes=5, image_size=(64, 96), **TINY)
  assert np.isfinite(model.apply(larger, _images(64, 96))).all()


def test_a_key_that_is_missing_is_named():
  state = _official()
  del state['block1.0.attn.sr.bias']
  with pytest.raises(convert.ConversionError, match='stage1/block00/attn/reduce/bias'):
    va.load_reference('pvt_tiny', state, source='official', **TINY)


def test_stochastic_depth_grows_over_all_blocks():
  assert pvt.drop_path_rates(0.3, (1, 3)) == [[0.0], [pytest.approx(r) for r in (0.1, 0.2, 0.3)]]
