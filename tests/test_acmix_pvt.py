"""The own reading of ACmix-PVT, and attention to fewer keys beneath it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vision_attention as va
from tests import abstract
from vision_attention.attention import mhsa, spatial_reduction


# Published millions of PVT (arXiv 2102.12122, Table 3) and of ACmix in it.
@pytest.mark.parametrize(
  ('name', 'host', 'depths', 'mixed'),
  [('acmix_pvt_tiny', 13.2, (2, 2, 2, 2), 13), ('acmix_pvt_small', 24.5, (3, 4, 6, 3), 25)],
)
def test_parameters_are_near_the_published(name, host, depths, mixed):
  plain, ours = abstract.count(name, attn='spatial_reduction'), abstract.count(name)
  # PVT has a class token and a position for it.
  assert plain / 1e6 + 1024 / 1e6 == pytest.approx(host, abs=0.05)
  assert ours / 1e6 == pytest.approx(mixed, abs=0.5)
  blocks = zip(depths, (64, 128, 320, 512), (1, 2, 5, 8), strict=True)
  assert ours - plain == sum(n * (27 * heads + 9 + 81 * dim + 2) for n, dim, heads in blocks)


def _init(layer, x):
  return jax.jit(functools.partial(layer.init, train=False))(jax.random.key(0), x)['params']


def test_without_reduction_and_convolution_it_is_plain_attention():
  x = jax.random.normal(jax.random.key(1), (2, 4, 6, 8))
  options = dict(dim=8, num_heads=2)
  for conv in (False, True):
    layer = spatial_reduction.SpatialReductionAttention(reduction=1, conv=conv, **options)
    params = _init(layer, x)
    own = {name: params[name] for name in ('query', 'key', 'value', 'proj')}
    expected = mhsa.MultiHeadAttention(**options).apply({'params': own}, x, train=False)
    if conv:
      params |= {'attention_rate': 1.0, 'conv_rate': 0.0}
    y = layer.apply({'params': params}, x, train=False)
    np.testing.assert_allclose(y, expected, atol=1e-6)


def test_keys_are_patches():
  x = jax.random.normal(jax.random.key(1), (1, 4, 6, 8))
  layer = spatial_reduction.SpatialReductionAttention(8, 2, 2)
  params = _init(layer, x)
  _, state = layer.apply({'params': params}, x, train=False, mutable=['intermediates'])
  [weights] = jax.tree.leaves(state['intermediates'])
  assert weights.shape == (1, 2, 24, 6)
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
  # What is left over at the edges makes no key.
  wide = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
  y, z = (layer.apply({'params': params}, a, train=False) for a in (x, wide))
  np.testing.assert_allclose(z[:, :4, :6], y, atol=1e-6)
  with pytest.raises(ValueError, match='reduction 2 leaves no key of a 1x4 map: pass at most 1'):
    _init(layer, x[:, :1, :4])
  with pytest.raises(ValueError, match=r'must be multiples of 32: pass \(224, 256\)'):
    va.create_model('acmix_pvt_tiny', image_size=(230, 250))


def test_a_small_one_computes():
  options = dict(depths=(1, 1), dims=(8, 16), num_heads=(1, 2), mlp_ratios=(2, 2))
  model, _ = va.create_model(
    'acmix_pvt_tiny', num_classes=3, image_size=32, reductions=(2, 1), **options
  )
  images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
  logits, variables = jax.jit(model.init_with_output)(jax.random.key(1), images)
  assert logits.shape == (2, 3)
  assert jnp.isfinite(logits).all()
  assert 'conv' in variables['params']['backbone']['stage2']['block00']['attn']
