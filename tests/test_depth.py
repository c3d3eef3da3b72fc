"""Layer-wise decay of the learning rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import convnext_tiny, hornet_tiny
from tests import abstract
from vision_attention.models import depth, stacking, tree
from vision_attention.training import optimizer

pytestmark = pytest.mark.fast


def _layers(name, **options):
  return depth.layers(name, abstract.variables(name, **options)['params'])


def test_every_block_of_a_vit_is_a_layer():
  found = _layers('vit_ti16')
  assert found['backbone/embed/kernel'] == found['backbone/position'] == found['backbone/cls'] == 0
  assert [found[f'backbone/stage1/block{i:02d}/attn/query/kernel'] for i in range(12)] == list(
    range(1, 13)
  )
  assert found['backbone/norm/scale'] == found['head/classifier/kernel'] == 13


def test_what_leads_into_a_stage_goes_with_its_first_block():
  found = _layers('swin_tiny')
  of = lambda part: {layer for path, layer in found.items() if path.startswith(f'backbone/{part}/')}
  assert of('stem') == {0}
  assert of('stage1/block01') == {2}
  assert of('downsample2') == of('stage2/block00') == {3}
  assert of('downsample4') == of('stage4/block00') == {11}
  assert of('norm') == {13}
  found = _layers('cvt_13')
  assert of('embed1') == {0}
  assert of('embed3') == of('stage3/block00') == {4}


def test_volos_class_blocks_come_last():
  found = _layers('volo_d1')
  last = max(found.values())
  numbers = [layer for path, layer in found.items() if '/class_stage/' in path]
  assert set(numbers) == {last - 2, last - 1}
  assert max(x for p, x in found.items() if '/stage4/' in p) == last - 3


@pytest.mark.parametrize(
  ('name', 'block', 'layer'),
  [
    ('convnext_tiny', 8, 5),
    ('convnext_small', 26, 11),
    ('hornet_tiny_7x7', 17, 11),
    ('hornet_tiny_7x7', 4, 5),
  ],
)
def test_groups_of_the_code(name, block, layer):
  found = _layers(name)
  of = lambda part: {x for path, x in found.items() if path.startswith(f'backbone/{part}/')}
  assert of(f'stage3/block{block:02d}') == {layer}
  assert (of('stem'), of('downsample2'), of('downsample3')) == ({0}, {2}, {3})
  assert of('downsample4') == of('stage4/block00') == {12}
  assert {layer for path, layer in found.items() if path.startswith('head/')} == {13}


@pytest.mark.parametrize('name', ['aa_mnasnet', 'san10_pairwise', 'acmix_pvt_tiny', 'coatnet_0'])
def test_layers_reach_from_the_stem_to_the_head(name):
  found = _layers(name)
  last = max(found.values())
  assert set(found.values()) == set(range(last + 1))
  assert {x for path, x in found.items() if path.startswith('head/classifier')} == {last}


def test_stacked_blocks_have_their_own_factors():
  one, many = (abstract.variables('vit_ti16', scan=scan)['params'] for scan in (False, True))
  plain, stacked = depth.factors('vit_ti16', one, 0.75), depth.factors('vit_ti16', many, 0.75)
  assert plain['head']['classifier']['kernel'] == 1
  assert plain['backbone']['embed']['kernel'] == np.float32(0.75**13)
  values = stacking.unstack(stacked)
  for path, factor in tree.flatten(plain).items():
    assert np.asarray(tree.flatten(values)[path]).squeeze() == factor, path


def test_decay_scales_the_whole_update():
  config = convnext_tiny.get_config().optimizer
  params = {'a': jnp.ones((3, 2)), 'kernel': jnp.full((2,), 2.0)}
  grads = jax.tree.map(lambda x: x * 0.1, params)
  factors = {'a': np.array([[1.0], [0.5], [0.25]], np.float32), 'kernel': np.float32(0.1)}
  with config.unlocked():
    config.weight_decay_mask = ('kernel',)
  updates = []
  for given in (None, factors):
    tx = optimizer.make(config, lambda step: 1.0, params, given)
    updates.append(tx.update(grads, tx.init(params), params)[0])
  expected = jax.tree.map(lambda x, f: x * f, updates[0], factors)
  for ours, theirs in zip(*map(jax.tree.leaves, (updates[1], expected)), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
  assert float(optax.tree.norm(updates[0])) > 0


def test_recipes_of_fine_tuning_decay():
  config = convnext_tiny.get_config('variant=convnext_base,init=x,size=384')
  assert config.optimizer.layer_decay == 0.7
  config = hornet_tiny.get_config('variant=hornet_large_gf_img384,init=x')
  assert config.optimizer.layer_decay == 0.7
