"""Layers against their formulas, on random inputs of all shapes."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import strategies as st

from vision_attention.attention import mhsa
from vision_attention.layers import conv, drop_path, heads, mlp, norm, squeeze_excite
from vision_attention.ops import activation, attention

pytestmark = pytest.mark.fast
SIZES = st.sampled_from([1, 2, 5])


def _normal(*shape: int, seed: int = 0) -> jax.Array:
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


@hypothesis.given(SIZES, SIZES, SIZES, st.integers(0, 99))
def test_batch_norm_gives_zero_mean_unit_variance_and_follows_the_batch(b, h, w, seed):
  hypothesis.assume(b * h * w > 1)
  x = 3 + 2 * _normal(b, h, w, 5, seed=seed)
  layer = norm.BatchNorm(epsilon=1e-5, momentum=0.9)
  variables = layer.init(jax.random.key(0), x, train=False)
  y, changed = layer.apply(variables, x, train=True, mutable=['batch_stats'])
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), atol=2e-3)
  np.testing.assert_allclose(changed['batch_stats']['mean'], 0.1 * mean, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(changed['batch_stats']['var'], 0.9 + 0.1 * var, rtol=1e-4)
  # In inference it uses the running statistics, not the batch.
  np.testing.assert_allclose(layer.apply(variables, x, train=False), x / np.sqrt(1 + 1e-5), 1e-5)


@hypothesis.given(SIZES, SIZES, st.integers(2, 40), st.floats(-100, 100), st.integers(0, 99))
def test_layer_norm_ignores_shift_and_scale(b, n, c, shift, seed):
  x = _normal(b, n, c, seed=seed)
  layer = norm.LayerNorm(epsilon=0.0)
  variables = layer.init(jax.random.key(0), x, train=False)
  expected = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
  np.testing.assert_allclose(layer.apply(variables, x), expected, atol=1e-2)
  np.testing.assert_allclose(layer.apply(variables, 4 * x + shift), expected, atol=2e-2)


def test_group_norm_normalises_each_group_of_each_image():
  x = _normal(2, 3, 5, 8)
  layer = norm.GroupNorm(epsilon=1e-6, groups=4)
  y = layer.apply(layer.init(jax.random.key(0), x), x)
  grouped = np.asarray(y).reshape(2, 15, 4, 2)
  np.testing.assert_allclose(grouped.mean((1, 3)), 0, atol=1e-6)
  np.testing.assert_allclose(grouped.std((1, 3)), 1, atol=1e-4)
  with pytest.raises(ValueError, match='3 groups do not divide 8 channels'):
    norm.GroupNorm(epsilon=1e-6, groups=3).init(jax.random.key(0), x)


def test_conv_refuses_groups_that_do_not_divide():
  with pytest.raises(ValueError, match='3 groups'):
    conv.Conv(6, groups=3).init(jax.random.key(0), _normal(1, 4, 4, 4))


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
  layer = drop_path.DropPath(0.25)
  x = jnp.ones((4000, 2, 3))
  y = np.asarray(layer.apply({}, x, train=True, rngs={'dropout': jax.random.key(0)}))
  kept = y[:, 0, 0] > 0
  assert abs(kept.mean() - 0.75) < 0.03
  np.testing.assert_allclose(y, np.where(kept, 1 / 0.75, 0)[:, None, None] * np.ones((1, 2, 3)))
  np.testing.assert_array_equal(layer.apply({}, x, train=False), x)
  with pytest.raises(ValueError, match='drop_path 1'):
    drop_path.DropPath(1.0).apply({}, x, train=True)


@hypothesis.given(st.floats(0, 0.9), st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_drop_path_rates_grow_linearly(rate, depths):
  for last in (True, False):
    rates = drop_path.linear_rates(rate, depths, last=last)
    assert [len(stage) for stage in rates] == depths
    flat = [r for stage in rates for r in stage]
    assert flat[0] == 0
    np.testing.assert_allclose(np.diff(flat, 2), 0, atol=1e-9)
    expected = rate if last else rate * (len(flat) - 1) / len(flat)
    assert len(flat) == 1 or flat[-1] == pytest.approx(expected)


def test_squeeze_excite_gates_channels_by_the_mean():
  x = _normal(2, 4, 4, 6)
  layer = squeeze_excite.SqueezeExcite(3, activation='silu')
  variables = layer.init(jax.random.key(1), x)
  p = variables['params']
  mean = x.mean((1, 2))
  hidden = nn.silu(mean @ p['squeeze']['kernel'][0, 0] + p['squeeze']['bias'])
  gate = nn.sigmoid(hidden @ p['excite']['kernel'][0, 0] + p['excite']['bias'])
  np.testing.assert_allclose(layer.apply(variables, x), x * gate[:, None, None], rtol=1e-5)


def test_mlp_is_two_layers():
  x = _normal(2, 5, 4)
  layer = mlp.Mlp(8, 'gelu_exact')
  variables = layer.init(jax.random.key(0), x, train=False)
  p = variables['params']
  hidden = nn.gelu(x @ p['expand']['kernel'] + p['expand']['bias'], approximate=False)
  expected = hidden @ p['project']['kernel'] + p['project']['bias']
  np.testing.assert_allclose(layer.apply(variables, x, train=False), expected, atol=1e-5)


def test_activation_forms_differ_and_misspelt_ones_are_named():
  x = jnp.linspace(-3, 3, 50)
  forms = [activation.by_name(n)(x) for n in ('gelu_tanh', 'gelu_exact', 'quick_gelu')]
  assert 1e-5 < jnp.abs(forms[0] - forms[1]).max() < 1e-3
  assert 1e-3 < jnp.abs(forms[0] - forms[2]).max() < 3e-2
  with pytest.raises(ValueError, match=r"activation 'gelu_tahn' is unknown.*'gelu_tanh'"):
    activation.by_name('gelu_tahn')


@hypothesis.given(SIZES, SIZES, SIZES, st.integers(1, 3), st.integers(0, 99))
def test_attention_is_a_weighted_mean_of_values(b, q, k, n, seed):
  query, key, value = (_normal(b, m, n, 4, seed=seed + i) for i, m in enumerate((q, k, k)))
  bias = _normal(1, n, q, k, seed=seed)
  weights = np.asarray(attention.attention_weights(query, key, bias))
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
  mixed = attention.dot_product_attention(query, key, value, bias)
  np.testing.assert_allclose(mixed, np.einsum('bnqk,bknd->bqnd', weights, value), atol=1e-5)
  # A constant on all logits of a query changes nothing, however large.
  shifted = attention.dot_product_attention(query, key, value, bias + 1e4)
  np.testing.assert_allclose(shifted, mixed, atol=2e-2)


def test_attention_sows_its_map_and_learns_everywhere():
  x = _normal(2, 3, 5, 8)
  layer = mhsa.MultiHeadAttention(8, num_heads=2)
  variables = layer.init(jax.random.key(0), x, train=False)
  y, aux = layer.apply(variables, x, train=False, mutable=['intermediates'])
  (weights,) = aux['intermediates']['attention']
  assert y.shape == x.shape
  assert weights.shape == (2, 2, 15, 15)
  # Positions are a set: permuting them permutes the output.
  order = np.random.default_rng(0).permutation(15)
  tokens = x.reshape(2, 15, 8)
  permuted = layer.apply(variables, tokens[:, order], train=False)
  np.testing.assert_allclose(permuted, y.reshape(2, 15, 8)[:, order], atol=1e-5)

  def loss(params):
    return jnp.square(layer.apply({'params': params}, x, train=False)).sum()

  grads = jax.grad(loss)(variables['params'])
  # A key bias adds the same number to every logit of a query, so softmax cannot see it.
  assert jnp.abs(grads['key'].pop('bias')).max() < 1e-4
  assert all(jnp.abs(g).max() > 1e-6 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize('num_classes', [0, 3])
def test_linear_head_pools_norms_and_classifies(num_classes):
  features = {'stage4': _normal(2, 3, 3, 4), 'cls': _normal(2, 4)}
  layer_norm = functools.partial(norm.LayerNorm, epsilon=1e-6)
  head = heads.LinearHead(num_classes, 'stage4', norm=layer_norm, hidden_dim=6)
  variables = head.init(jax.random.key(0), features, train=False)
  out = head.apply(variables, features, train=False)
  assert out.shape == (2, num_classes or 6)
  with pytest.raises(ValueError, match="pool 'avg'"):
    heads.LinearHead(3, 'stage4', pool='avg').init(jax.random.key(0), features, train=False)
