"""Evolving attention: the residual convolution over logits, its masks, and the chain of blocks."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import vision_attention as va
from vision_attention import convert
from vision_attention.attention import augmented, evolving
from vision_attention.models import ea_resnet, registry, tree

TINY = dict(depths=(1, 1, 2, 1), width=8, num_heads=2, num_classes=3, image_size=64)


def _draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def _evolve(layer, *args, kernel=None, bias=None, **options):
  """Applies `EvolvingLogits` with given parameters, or drawn ones."""
  heads = args[0].shape[1]
  kernel = _draw(3, 3, heads, heads, seed=7) / 3 if kernel is None else kernel
  bias = _draw(heads, seed=8) if bias is None else bias
  return np.asarray(layer.apply({'params': {'kernel': kernel, 'bias': bias}}, *args, **options))


@hypothesis.given(
  queries=st.integers(1, 6),
  keys=st.integers(1, 6),
  heads=st.integers(1, 3),
  alpha=st.sampled_from((0.0, 0.3, 1.0)),
  beta=st.sampled_from((0.0, 0.5, 1.0)),
)
def test_it_is_its_definition(queries, keys, heads, alpha, beta):
  logits, previous = _draw(2, heads, queries, keys), _draw(2, heads, queries, keys, seed=1)
  kernel, bias = _draw(3, 3, heads, heads, seed=7), _draw(heads, seed=8)
  layer = evolving.EvolvingLogits(alpha, beta)
  mixed = (1 - beta) * logits + beta * previous
  padded = np.pad(mixed, ((0, 0), (0, 0), (1, 1), (1, 1)))
  convolved = bias[:, None, None] + sum(
    np.einsum('bmqk,mn->bnqk', padded[:, :, i : i + queries, j : j + keys], kernel[i, j])
    for i in range(3)
    for j in range(3)
  )
  expected = alpha * np.maximum(convolved, 0) + (1 - alpha) * mixed
  z = _evolve(layer, logits, previous, kernel=kernel, bias=bias)
  np.testing.assert_allclose(z, expected, atol=1e-4)


def test_the_first_layer_and_a_change_of_shape_begin_anew():
  logits = _draw(1, 2, 4, 4)
  layer = evolving.EvolvingLogits()
  for previous in (None, _draw(1, 2, 9, 9), _draw(1, 3, 4, 4)):
    z, variables = layer.init_with_output(jax.random.key(0), logits, previous)
    np.testing.assert_array_equal(z, logits)
    assert not variables
  assert layer.init(jax.random.key(0), logits, logits)['params']['kernel'].shape == (3, 3, 2, 2)


def test_without_shares_it_is_the_identity():
  logits, previous = _draw(1, 2, 4, 4), _draw(1, 2, 4, 4, seed=1)
  plain, variables = evolving.EvolvingLogits(0.0, 0.0).init_with_output(
    jax.random.key(0), logits, previous
  )
  np.testing.assert_array_equal(plain, logits)
  assert not variables


@pytest.mark.parametrize('support', evolving.SUPPORTS)
def test_an_identity_kernel_keeps_every_logit(support):
  logits, previous = _draw(1, 2, 5, 5), _draw(1, 2, 5, 5, seed=1)
  init = functools.partial(evolving.identity_kernel, support=support)
  layer = evolving.EvolvingLogits(0.4, 0.0, support=support, kernel_init=init)
  z, _ = layer.init_with_output(jax.random.key(0), logits, previous)
  expected = 0.4 * np.maximum(logits, 0) + 0.6 * logits
  seen = np.tril(np.ones((5, 5), bool)) if support == 'decoder' else np.ones((5, 5), bool)
  np.testing.assert_allclose(z[:, :, seen], expected[:, :, seen], atol=1e-6)
  assert (z[:, :, ~seen] == evolving.MASKED).all()


def _decoder(x, memory, support):
  """Three layers of attention whose logits evolve; returns what each position ends with."""
  key_from = (lambda x: x) if memory is None else (lambda x: memory)
  previous = None
  for depth in range(3):
    query, key, value = (
      a @ _draw(6, 6, seed=10 * depth + i) for i, a in enumerate((x, key_from(x), key_from(x)))
    )
    logits = np.einsum('bqnd,bknd->bnqk', *(a.reshape(1, -1, 2, 3) for a in (query, key)))
    kernel = _draw(3, 3, 2, 2, seed=100 + depth) / 3
    layer = evolving.EvolvingLogits(0.5, 0.5, support=support)
    previous = jnp.asarray(_evolve(layer, jnp.asarray(logits), previous, kernel=kernel))
    weights = np.asarray(jax.nn.softmax(previous, -1))
    mixed = np.einsum('bnqk,bknd->bqnd', weights, value.reshape(1, -1, 2, 3))
    x = np.tanh(x + mixed.reshape(1, -1, 6))
  return x


@pytest.mark.parametrize(('support', 'causal'), [('decoder', True), ('full', False)])
def test_decoders_do_not_see_later_tokens(support, causal):
  x = _draw(1, 7, 6)
  before = _decoder(x, None, support)
  changed = np.abs(_decoder(x.at[:, 4].add(1), None, support) - before).max((0, 2)) > 1e-6
  assert changed[4:].all()
  assert changed[:4].any() != causal


@pytest.mark.parametrize(('support', 'causal'), [('cross', True), ('full', False)])
def test_decoders_see_all_of_the_encoder_but_no_later_query(support, causal):
  x, memory = _draw(1, 5, 6), _draw(1, 7, 6, seed=1)
  before = _decoder(x, memory, support)
  changed = np.abs(_decoder(x.at[:, 3].add(1), memory, support) - before).max((0, 2)) > 1e-6
  assert changed[:3].any() != causal
  memory = memory.at[:, 6].add(1)
  assert (np.abs(_decoder(x, memory, support) - before).max((0, 2)) > 1e-6).all()


@pytest.mark.parametrize('support', ['full', 'decoder'])
def test_padding_changes_nothing(support):
  logits, previous = _draw(1, 2, 6, 6), _draw(1, 2, 6, 6, seed=1)
  layer = evolving.EvolvingLogits(0.5, 0.5, support=support)
  short = _evolve(layer, logits[:, :, :4, :4], previous[:, :, :4, :4])
  there = np.arange(6) < 4
  mask = jnp.asarray(there[None, :, None] & there[None, None])
  z = _evolve(layer, logits, previous, mask=mask)
  np.testing.assert_allclose(z[:, :, :4, :4], short, atol=1e-5)
  assert (z[:, :, :, 4:] == evolving.MASKED).all()
  assert np.isfinite(jax.nn.softmax(z, -1)).all()
  again = _evolve(layer, logits, jnp.where(mask[:, None], previous, evolving.MASKED), mask=mask)
  np.testing.assert_allclose(again[:, :, :4, :4], short, atol=1e-5)


def test_decoders_have_as_many_queries_as_keys():
  with pytest.raises(ValueError, match='as many queries as keys, not 3 and 4'):
    _evolve(evolving.EvolvingLogits(support='decoder'), _draw(1, 2, 3, 4))
  with pytest.raises(ValueError, match="support 'causal' is unknown"):
    _evolve(evolving.EvolvingLogits(support='causal'), _draw(1, 2, 4, 4))


def test_without_shares_the_convolution_is_an_augmented_one():
  x, fields = _draw(2, 4, 5, 6), dict(kappa=0.5, upsilon=0.5, min_head_dim=1)
  plain = augmented.AugmentedConv(8, 2, **fields)
  variables = plain.init(jax.random.key(0), x, train=False)
  previous = _draw(2, 2, 20, 20)
  layer = evolving.EvolvingConv(8, 2, **fields, alpha=0.0, beta=0.0)
  y, _ = layer.apply(variables, x, previous, train=False)
  np.testing.assert_array_equal(y, plain.apply(variables, x, train=False))


@functools.cache
def _tiny(**options):
  model, info = va.create_model('ea_aa_resnet_50', **(TINY | options))
  images = jax.random.normal(jax.random.key(0), (2, *info.image_size, 3))
  return model, jax.jit(model.init)(jax.random.key(1), images), images


@functools.cache
def _abstract(name, **options):
  # At 64 pixels the grids relate as at 224; the width changes no layer.
  model, info = va.create_model(name, **{'width': 8, 'num_heads': 2, 'image_size': 64, **options})
  return convert.abstract_variables(model, info)


def _chain(shapes):
  """Blocks with attention and, of them, those whose logits are convolved."""
  paths = tree.flatten(shapes['params']['backbone'])
  return (
    [path.split('/attn')[0] for path in paths if path.endswith('attn/proj/kernel')],
    [path.split('/attn')[0] for path in paths if path.endswith('attn/evolve/kernel')],
  )


@pytest.mark.parametrize(
  ('name', 'attended', 'convolved'),
  [('ea_aa_resnet_50', 13, 11), ('ea_aa_resnet_101', 30, 28), ('ea_aa_resnet_34', 13, 11)],
)
def test_chains_run_through_the_second_and_third_stage(name, attended, convolved):
  every, evolving_ones = _chain(_abstract(name))
  assert (len(every), len(evolving_ones)) == (attended, convolved)
  assert set(every) - set(evolving_ones) == {'stage2/block00', 'stage4/block00'}


def test_chains_can_end_with_their_stage():
  options = {'depths': TINY['depths'], 'across_stages': False}
  every, evolving_ones = _chain(_abstract('ea_aa_resnet_50', **options))
  assert set(every) - set(evolving_ones) == {f'stage{i}/block00' for i in (2, 3, 4)}


def test_attention_maps_can_be_taken_out():
  model, variables, images = _tiny()
  apply = functools.partial(model.apply, mutable=['intermediates'])
  _, state = jax.jit(apply)(variables, images)
  maps = tree.flatten(state['intermediates'])
  sizes = {path.split('/')[1]: weights.shape for path, [weights] in maps.items()}
  assert sizes == {'stage2': (2, 2, 16, 16), 'stage3': (2, 2, 16, 16), 'stage4': (2, 2, 4, 4)}
  for [weights] in maps.values():
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize(('beta', 'reaches'), [(0.5, True), (0.0, False)])
def test_queries_of_the_first_block_learn_through_the_chain(beta, reaches):
  """With the first block's own output cut, only the last blocks' softmax sees its queries."""
  model, variables, images = _tiny(beta=beta, alpha=0.5, depths=(1, 1, 1), image_size=32)
  params = jax.tree.map(lambda x: x, variables['params'])
  first = params['backbone']['stage2']['block00']['attn']
  first['proj'] = jax.tree.map(jnp.zeros_like, first['proj'])

  @jax.jit
  def gradient(params):
    def loss(params):
      logits = model.apply({**variables, 'params': params}, images)
      return jnp.square(logits).sum()

    grads = jax.grad(loss)(params)
    return grads['backbone']['stage2']['block00']['attn']['query']['kernel']

  assert (jnp.abs(gradient(params)).max() > 0) == reaches


@pytest.mark.parametrize('name', ['ea_aa_resnet_50', 'ea_aa_resnet_101'])
def test_every_variable_has_one_name_in_the_released_code(name):
  paths = set(tree.flatten(_abstract(name)))
  rules = ea_resnet.REFERENCES['official'].rules_of(registry.variant_of(name).options)
  targets = [
    '/'.join(part for part in (leaf.collection, rule.target, leaf.path) if part)
    for rule in rules
    for leaves in rule.kind.values()
    for leaf in leaves
  ]
  assert len(targets) == len(set(targets))
  # A convolution's rule also knows a bias, which not every convolution has, and every block's that
  # of logits, which not every block convolves.
  assert paths <= set(targets)
  extra = set(targets) - paths
  assert all(path.endswith('/bias') or '/evolve/' in path for path in extra)
  every = {rule.pattern.rsplit('/', 1)[-1] for rule in rules}
  last = {
    'ea_aa_resnet_50': 'batch_normalization_52',
    'ea_aa_resnet_101': 'batch_normalization_103',
  }
  assert last[name] in every
