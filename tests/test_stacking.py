"""Scanned blocks compute what the same blocks compute one by one, from the same variables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vision_attention as va
from vision_attention.models import stacking, transfer, tree

MODELS = {
  'vit_ti16': dict(dim=16, depth=4, mlp_dim=32, num_heads=2, image_size=32),
  'convnext_tiny': dict(depths=(1, 4), dims=(8, 16), image_size=32),
  'levit_128s': dict(dims=(16, 32), depths=(3, 1), num_heads=(2, 2), head_dim=4, image_size=32),
  'nat_mini': dict(depths=(3,), dim=8, num_heads=(2,), kernel=3, image_size=32),
  'coatnet_0': dict(
    depths=(3, 3), dims=(8, 16), stem_dim=8, head_dim=8, layout='CT', strides=(2, 2), image_size=32
  ),
}


def _both(name):
  images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
  plain, scanned = (
    va.create_model(name, num_classes=3, scan=scan, **MODELS[name])[0] for scan in (False, True)
  )
  shapes = [jax.eval_shape(model.init, jax.random.key(0), images) for model in (plain, scanned)]
  rng = np.random.default_rng(0)
  draw = lambda x: (1 + 0.3 * rng.standard_normal(x.shape)).astype(np.float32)
  return plain, scanned, jax.tree.map(draw, shapes[0]), shapes[1], images


# The gradient of what shifts all logits of a query alike is rounding.
UNSEEN = 'key/bias'


@pytest.mark.parametrize(
  ('name', 'remat'), [*((name, False) for name in MODELS), ('vit_ti16', True), ('coatnet_0', True)]
)
def test_scanned_blocks_compute_the_same(name, remat):
  plain, scanned, variables, target, images = _both(name)
  if remat:
    scanned = va.create_model(name, num_classes=3, scan=True, remat=True, **MODELS[name])[0]
  stacked = stacking.stack(variables, target)
  assert jax.tree.map(np.shape, stacked) == jax.tree.map(np.shape, target)
  assert any('block01_' in path for path in tree.flatten(target))

  def run(model, variables):
    def loss(params):
      out, changed = model.apply(
        {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
      )
      return jnp.square(out).mean(), changed

    return jax.jit(jax.grad(loss, has_aux=True))(variables['params'])

  grads, changed = run(plain, variables)
  their_grads, their_changed = run(scanned, stacked)
  expected = tree.flatten({'params': grads, **changed})
  found = tree.flatten(stacking.unstack({'params': their_grads, **their_changed}))
  assert found.keys() == expected.keys()
  largest = max(float(jnp.abs(value).max()) for value in expected.values())
  for path, value in expected.items():
    if path.endswith(UNSEEN):
      assert max(jnp.abs(value).max(), jnp.abs(found[path]).max()) < 1e-5 * largest, path
      continue
    scale = float(jnp.abs(value).max())
    np.testing.assert_allclose(found[path], value, atol=1e-4 * max(scale, 1e-3), err_msg=path)


@pytest.mark.fast
@pytest.mark.parametrize('name', MODELS)
def test_stacking_and_unstacking_are_inverses(name):
  _, _, variables, target, _ = _both(name)
  back = stacking.unstack(stacking.stack(variables, target))
  jax.tree.map(np.testing.assert_array_equal, back, variables)


@pytest.mark.fast
def test_fine_tuning_goes_from_one_form_to_the_other():
  _, _, variables, target, _ = _both('vit_ti16')
  found, report = transfer.transfer('vit_ti16', variables, target)
  jax.tree.map(np.testing.assert_array_equal, found, stacking.stack(variables, target))
  assert not report.reinitialised
  again, _ = transfer.transfer('vit_ti16', found, variables)
  jax.tree.map(np.testing.assert_array_equal, again, variables)
  del variables['params']['backbone']['stage1']['block02']['mlp']
  with pytest.raises(ValueError, match=r'block02/mlp/expand/bias.* are missing'):
    stacking.stack(variables, target)


def test_scanned_blocks_keep_their_rates_of_stochastic_depth():
  """Rates that grow from 0 to almost 1: the last block hardly ever adds anything."""
  options = MODELS['vit_ti16'] | dict(depth=6, drop_path=0.999)
  model, _ = va.create_model('vit_ti16', num_classes=3, scan=True, **options)
  images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
  variables = model.init(jax.random.key(0), images)
  state = model.apply(
    variables,
    images,
    train=True,
    rngs={'dropout': jax.random.key(0)},
    capture_intermediates=lambda module, method: module.name == 'drop_path2',
    mutable=['intermediates'],
  )[1]
  flat = tree.flatten(state['intermediates'])
  [stacked] = flat['backbone/stage1/block01_05/block/drop_path2/__call__']
  assert stacked.shape[0] == 5
  assert (stacked[-1] == 0).all()
  assert (stacked[0] != 0).any()
