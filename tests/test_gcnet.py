"""Global context and non-local blocks: the identities that connect them, counts, placements."""

import functools
import math
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import vision_attention as va
from configs import gc_resnet50
from tests import abstract, golden
from tools import query_independence
from vision_attention import convert
from vision_attention.attention import global_context, non_local
from vision_attention.models import registry, tree
from vision_attention.ops import attention_statistics
from vision_attention.ops import non_local as math_of

# Every shape is compiled.
FEW = hypothesis.settings(max_examples=4)
SIZES = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 9))


def _noisy(variables, seed=7, scale=0.5):
  """Adds noise to all variables: zeros of the initialisation would hide what they multiply."""
  leaves, structure = jax.tree.flatten(variables)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  noise = [x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  return jax.tree.unflatten(structure, noise)


def _map(*shape):
  return jax.random.normal(jax.random.key(0), shape)


def _made(layer, x, *, noise=True):
  params = jax.jit(layer.init, static_argnames='train')(jax.random.key(1), x, train=False)['params']
  return {'params': _noisy(params) if noise else params}


def _run(layer, variables, x):
  """Returns the output and the map of attention."""
  apply = functools.partial(layer.apply, train=False, mutable=['intermediates'])
  y, state = jax.jit(apply)(variables, x)
  return y, jax.tree.leaves(state['intermediates'])[0]


def _images(case):
  return jnp.asarray(case.images())


def _linear(state, name):
  weight = state[f'{name}.weight']
  return {'kernel': weight.reshape(len(weight), -1).T, 'bias': state[f'{name}.bias']}


def _check(case, y):
  """Compares a map with the layer golden's output, which is flattened and thinned out."""
  y = y if case.meta['output_layout'] == 'NHWC' else y.transpose(0, 3, 1, 2)
  thin = np.asarray(y).ravel()[:: case.meta['output_stride']]
  np.testing.assert_allclose(thin, case.outputs['output'], atol=2e-5, rtol=1e-5)


def test_context_block_is_that_of_the_authors():
  case = golden.load(golden.FOLDER / 'layers/gcnet_block__gc_att_add.npz')
  state = case.state()
  norm = {
    ours: state[f'channel_add_conv.1.{theirs}'].ravel()
    for ours, theirs in (('scale', 'weight'), ('bias', 'bias'))
  }
  params = {
    'key': _linear(state, 'conv_mask'),
    'add': {
      'squeeze': _linear(state, 'channel_add_conv.0'),
      'norm': norm,
      'excite': _linear(state, 'channel_add_conv.3'),
    },
  }
  layer = global_context.GlobalContext(ratio=1 / 4)
  _check(case, layer.apply({'params': params}, _images(case)))
  # timm's epsilon is another function.
  other = layer.clone(norm_epsilon=1e-3).apply({'params': params}, _images(case))
  with pytest.raises(AssertionError):
    _check(case, other)


def test_non_local_block_is_that_of_the_authors():
  case = golden.load(golden.FOLDER / 'layers/gcnet_block__nl_embedded_gaussian_scale1.npz')
  state = case.state()
  names = {'query': 'theta', 'key': 'phi', 'value': 'g', 'proj': 'conv_out'}
  params = {ours: _linear(state, f'{theirs}.conv') for ours, theirs in names.items()}
  # Their code multiplies by the square root where the name says division.
  layer = non_local.NonLocal(norm=False, scale='sqrt')
  _check(case, layer.apply({'params': params}, _images(case), train=False))
  right = layer.clone(scale='inverse_sqrt').apply({'params': params}, _images(case), train=False)
  with pytest.raises(AssertionError):
    _check(case, right)


@pytest.mark.parametrize(
  ('layer', 'expected'),
  [
    (global_context.GlobalContext(), 133_313),
    (non_local.SimplifiedNonLocal(), 1_049_601),
    (non_local.NonLocal(norm=False), 2_099_712),
    (non_local.NonLocal(), 2_101_760),
    (non_local.NonLocal('gaussian', norm=False), 2_099_712 - 2 * (1024 * 512 + 512)),
    (non_local.NonLocal('concatenation', norm=False), 2_099_712 + 1024),
  ],
)
def test_parameters_of_a_block_at_1024_channels(layer, expected):
  x = jnp.zeros((1, 2, 2, 1024))
  shapes = jax.eval_shape(functools.partial(layer.init, train=False), jax.random.key(0), x)
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes['params'])) == expected


@pytest.mark.parametrize(
  ('name', 'options', 'expected'),
  [
    ('gc_resnet_50', dict(ratio=1 / 4), 35_557_941),
    ('gc_resnet_50', dict(ratio=1 / 32), 26_832_245),
    ('gc_resnet_50', dict(place='one'), 25_690_345),
    ('gc_resnet_50', dict(context='snl', place='one'), 26_606_633),
    ('gc_resnet_101', dict(ratio=1 / 4), 63_510_854),
    ('resnet_50', dict(module='gc', module_stages=(2, 3, 4)), 28_078_773),
  ],
)
def test_parameters_of_placements_and_ratios(name, options, expected):
  assert abstract.count(name, **options) == expected


def test_context_blocks_cost_what_the_paper_says_and_a_non_local_block_more():
  depths = (1, 1, 2, 1)
  plain, context, non_local_ = (
    abstract.macs(va.create_model(name, depths=depths)[0])
    for name in ('resnet_50', 'gc_resnet_50', 'nl_resnet_50')
  )

  def formula(*counts):
    """`2 N C` for the map and the mean, `2 C^2 / 16` for the bottleneck, by stage."""
    sizes = ((28, 512), (14, 1024), (7, 2048))
    return sum(
      n * (2 * side**2 * dim + dim**2 // 8) for n, (side, dim) in zip(counts, sizes, strict=True)
    )

  assert context - plain == formula(*depths[1:])
  # 3.87 G are printed beside 3.86 G.
  assert formula(4, 6, 3) / 1e9 == pytest.approx(0.01, abs=0.005)
  # 4.11 G are printed (recalled): 0.25 G more, where `4 N C C' + 2 N^2 C'` gives 0.45.
  assert non_local_ - plain == 4 * 196 * 1024 * 512 + 2 * 196**2 * 512
  assert (non_local_ - plain) / 1e9 == pytest.approx(0.45, abs=0.005)


@pytest.mark.parametrize(
  'layer',
  [
    global_context.GlobalContext(),
    global_context.GlobalContext(pooling='avg'),
    non_local.SimplifiedNonLocal(),
    non_local.NonLocal(),
    *(non_local.NonLocal(form, norm=False) for form in non_local.FORMS),
  ],
  ids=lambda layer: f'{type(layer).__name__}-{getattr(layer, "form", layer.name)}',
)
def test_a_fresh_block_is_the_identity_and_positions_may_be_permuted(layer):
  x = _map(2, 3, 5, 8)
  variables = jax.jit(functools.partial(layer.init, train=False))(jax.random.key(1), x)
  apply = jax.jit(functools.partial(layer.apply, train=False))
  np.testing.assert_array_equal(apply(variables, x), x)
  variables = {**variables, 'params': _noisy(variables['params'])}
  order = jax.random.permutation(jax.random.key(2), 15)
  y = apply(variables, x).reshape(2, 15, 8)
  assert jnp.abs(y - x.reshape(2, 15, 8)).max() > 1e-2
  shuffled = x.reshape(2, 15, 8)[:, order].reshape(x.shape)
  z = apply(variables, shuffled).reshape(2, 15, 8)
  np.testing.assert_allclose(z, y[:, order], atol=1e-5)


def test_a_fresh_product_halves_and_both_fusions_follow_each_other():
  x = _map(2, 3, 4, 8)
  product = global_context.GlobalContext(fusion='mul')
  fresh = product.init(jax.random.key(1), x)
  np.testing.assert_allclose(product.apply(fresh, x), x / 2, rtol=1e-6)
  both = product.clone(fusion='both')
  variables = _made(both, x)
  params = variables['params']
  scaled = product.apply({'params': {k: params[k] for k in ('key', 'mul')}}, x)
  added = product.clone(fusion='add').apply({'params': {k: params[k] for k in ('key', 'add')}}, x)
  np.testing.assert_allclose(both.apply(variables, x), scaled + added - x, atol=1e-5)


@FEW
@hypothesis.given(SIZES)
def test_a_map_without_scores_is_the_average(size):
  x = _map(2, *size)
  layer = global_context.GlobalContext(ratio=1 / 2)
  variables = _made(layer, x)
  variables['params']['key']['kernel'] *= 0
  y, weights = _run(layer, variables, x)
  del variables['params']['key']
  np.testing.assert_allclose(layer.clone(pooling='avg').apply(variables, x), y, atol=1e-5)
  np.testing.assert_allclose(weights, 1 / (size[0] * size[1]), rtol=1e-5)


@FEW
@hypothesis.given(SIZES)
def test_what_a_context_block_adds_is_the_same_everywhere(size):
  x = _map(2, *size)
  layer = global_context.GlobalContext(ratio=1 / 2)
  y, weights = _run(layer, _made(layer, x), x)
  added = (y - x).reshape(2, -1, size[-1])
  np.testing.assert_allclose(added, added[:, :1].repeat(added.shape[1], 1), atol=1e-5)
  np.testing.assert_allclose(attention_statistics.cosine_distance(added), 0, atol=1e-6)
  assert weights.shape == (2, 1, 1, size[0] * size[1])
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)


def test_a_constant_query_makes_the_simplified_block():
  """`W_z` after a simplified block with `W_v` inside, whose mask is the query times the key."""
  x = _map(2, 3, 4, 8)
  layer = non_local.NonLocal(norm=False)
  variables = _made(layer, x)
  params = variables['params']
  params['query']['kernel'] *= 0
  y, weights = _run(layer, variables, x)
  np.testing.assert_allclose(weights, weights[:, :, :1].repeat(12, 2), atol=1e-6)
  np.testing.assert_allclose(attention_statistics.cosine_distance(weights), 0, atol=1e-6)
  query = params['query']['bias']
  simple = non_local.SimplifiedNonLocal()
  key = {'kernel': params['key']['kernel'] @ query[:, None], 'bias': jnp.zeros(1)}
  joined = params['value']['kernel'] @ params['proj']['kernel']
  z = simple.apply({'params': {'key': key, 'value': {'kernel': joined}}}, x)
  shift = params['value']['bias'] @ params['proj']['kernel'] + params['proj']['bias']
  np.testing.assert_allclose(y, z + shift, atol=1e-5)


@pytest.mark.parametrize(
  ('form', 'sub_sample'),
  [
    *((form, 'none') for form in non_local.FORMS),
    ('gaussian', 'outputs'),
    ('embedded_gaussian', 'inputs'),
    ('embedded_gaussian', 'outputs'),
    ('dot_product', 'inputs'),
  ],
)
def test_forms_follow_their_equations(form, sub_sample):
  x = _map(2, 4, 5, 6)
  layer = non_local.NonLocal(form, norm=False, sub_sample=sub_sample)
  variables = _made(layer, x)
  y, weights = _run(layer, variables, x)
  np.testing.assert_allclose(y, layer.apply(variables, x, train=False), atol=1e-5)
  params = variables['params']

  def linear(name, z):
    return z @ params[name]['kernel'] + params[name]['bias']

  def pooled(z):
    return z[:, :4, :4].reshape(2, 2, 2, 2, 2, -1).max((2, 4))

  def flat(z):
    return z.reshape(2, -1, z.shape[-1])

  before = pooled(x) if sub_sample == 'inputs' else x
  after = pooled if sub_sample == 'outputs' else lambda z: z
  value = flat(after(linear('value', before)))
  if form == 'gaussian':
    query, key = flat(x), flat(after(before))
  else:
    query, key = flat(linear('query', x)), flat(after(linear('key', before)))
  affinity = query @ key.swapaxes(1, 2)
  if form == 'concatenation':
    pairs = (query @ params['query_score']) + (key @ params['key_score']).swapaxes(1, 2)
    affinity = jax.nn.relu(pairs)
  softmax = 'gaussian' in form
  expected = jax.nn.softmax(affinity, -1) if softmax else affinity / key.shape[1]
  assert weights.shape == (2, 1, 20, 20 if sub_sample == 'none' else 4)
  np.testing.assert_allclose(weights[:, 0], expected, atol=1e-5)
  z = flat(x) + linear('proj', expected @ value)
  np.testing.assert_allclose(flat(y), z, atol=1e-5)
  assert bool(jnp.allclose(weights.sum(-1), 1, atol=1e-3)) == softmax


@FEW
@hypothesis.given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(1, 5))
def test_products_may_be_taken_in_either_order(queries, keys, dim, width):
  query, key, value = (_map(2, *s) for s in ((queries, dim), (keys, dim), (keys, width)))
  expected = math_of.mix(math_of.dot_product_weights(query, key), value)
  y = math_of.dot_product_mix(query, key, value)
  np.testing.assert_allclose(y, expected, atol=1e-5)


def test_scales_of_the_logits():
  assert math_of.scale_of('none', 16, 64) == 1
  assert math_of.scale_of('inverse_sqrt', 16, 64) == 1 / 4
  assert math_of.scale_of('sqrt', 16, 64) == 4
  assert math_of.scale_of('inverse_sqrt_input', 16, 64) == 1 / 8


@FEW
@hypothesis.given(st.integers(1, 9), st.integers(1, 9))
def test_the_closed_form_is_the_mean_over_all_pairs(n, dim):
  v = np.array(_map(2, n, dim))
  v[0, 0] = 0
  unit = v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-30)
  slow = np.mean(
    [[(1 - (unit[:, i] * unit[:, j]).sum(-1)) / 2 for i in range(n)] for j in range(n)], (0, 1)
  )
  np.testing.assert_allclose(attention_statistics.cosine_distance(jnp.asarray(v)), slow, atol=1e-6)
  whole = attention_statistics.cosine_distance(jnp.asarray(v), halved=False)
  np.testing.assert_allclose(whole, 2 * slow, atol=1e-6)


def test_divergence_of_distributions():
  p = jnp.asarray([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
  q = jnp.asarray([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.5, 0.3, 0.2]])
  divergence = attention_statistics.jensen_shannon(p, q)
  np.testing.assert_allclose(divergence[:2], [0, np.log(2)], atol=1e-6)
  np.testing.assert_allclose(divergence, attention_statistics.jensen_shannon(q, p), rtol=1e-6)
  # Half of the pairs of two alternating rows are of different ones.
  rows = jnp.tile(jnp.asarray([[1.0, 0.0], [0.0, 1.0]]), (8, 1))
  sampled = attention_statistics.sampled_jensen_shannon(jax.random.key(0), rows, 4096)
  assert sampled == pytest.approx(np.log(2) / 2, rel=0.05)
  weights = jnp.asarray([0.05, 0.6, 0.05, 0.3])
  thresholds = [float(attention_statistics.mass_threshold(weights, m)) for m in (0.5, 0.7, 1.0)]
  np.testing.assert_allclose(thresholds, [0.6, 0.3, 0.05])
  with pytest.raises(ValueError, match='must be above 0'):
    attention_statistics.mass_threshold(weights, 90.0)


def test_the_statistic_tells_dependent_from_independent_maps():
  options = dict(depths=(1, 1, 2), width=4, image_size=32, num_classes=3)
  model, _ = va.create_model('nl_resnet_50', **options)
  images = _map(2, 32, 32, 3)
  variables = jax.jit(model.init)(jax.random.key(1), images)
  variables = {**variables, 'params': _noisy(variables['params'], scale=0.3)}
  measure = jax.jit(functools.partial(query_independence.measure, model))
  [(path, values)] = measure(variables, images).items()
  assert path == 'backbone/stage3/after00'
  assert set(values) == set(query_independence.COLUMNS)
  assert values['att'] > 1e-4
  block = variables['params']['backbone']['stage3']['after00']
  block['query']['kernel'] *= 0
  [constant] = measure(variables, images).values()
  np.testing.assert_allclose([constant[k] for k in ('att', 'att_jsd', 'output')], 0, atol=1e-6)
  np.testing.assert_allclose(constant['input'], values['input'], rtol=1e-5)
  assert constant['input'] > 1e-3


@pytest.mark.parametrize(
  ('options', 'expected'),
  [
    (dict(), {'stage2/block00', 'stage2/block01'} | {f'stage3/block0{j}' for j in range(3)}),
    (dict(stages=(1,)), {'stage1/block00'}),
    (dict(place='one'), {'stage3/after01'}),
    (dict(place='alternate'), {'stage2/after00', 'stage3/after00', 'stage3/after02'}),
  ],
)
def test_blocks_are_placed(options, expected):
  options = dict(stages=(2, 3)) | options if options.get('place', 'branch') == 'branch' else options
  model, info = va.create_model('gc_resnet_50', depths=(1, 2, 3, 1), width=8, **options)
  paths = tree.flatten(convert.abstract_variables(model, info)['params']['backbone'])
  assert {
    path.split('/add/')[0].removesuffix('/module') for path in paths if '/add/' in path
  } == expected


def test_weights_say_how_their_blocks_are_made():
  infer = registry.references_of('gc_resnet_50')['official'].infer
  block = 'backbone.layer{}.0.context_block.'
  state = {
    **{block.format(i) + 'channel_mul_conv.0.weight': np.zeros((64, 512, 1, 1)) for i in (2, 4)},
    block.format(2) + 'channel_add_conv.0.weight': np.zeros((64, 512, 1, 1)),
    'fc.bias': np.zeros(7),
  }
  inferred = infer(state, {})
  assert inferred == {
    'num_classes': 7,
    'stages': (2, 4),
    'ratio': 1 / 8,
    'pooling': 'avg',
    'fusion': 'both',
  }
  assert infer({}, {}) == {'num_classes': 0, 'stages': ()}


def test_impossible_options_are_refused():
  with pytest.raises(ValueError, match="place 'after' is unknown: allowed"):
    va.create_model('gc_resnet_50', place='after')
  with pytest.raises(ValueError, match=r"'snl' has no ratio to set to 0\.5: leave it out"):
    va.create_model('gc_resnet_50', context='snl', ratio=0.5)
  x = jnp.zeros((1, 1, 4, 8))
  with pytest.raises(ValueError, match='halves the map, which is 1x4 already'):
    non_local.NonLocal(sub_sample='inputs').init(jax.random.key(0), x, train=False)
  with pytest.raises(ValueError, match="form 'gauss' is unknown: did you mean 'gaussian'"):
    non_local.NonLocal('gauss').init(jax.random.key(0), x, train=False)
  with pytest.raises(ValueError, match="pooling 'att_' is unknown"):
    global_context.GlobalContext(pooling='att_').init(jax.random.key(0), x)


def test_blocks_are_put_into_a_trained_network_or_trained_with_it():
  tuned = gc_resnet50.get_config('init=runs/resnet50')
  assert (tuned.total, tuned.optimizer.learning_rate) == ('40 epochs', 0.02)
  assert tuned.schedule.warmup == '0 steps'
  assert gc_resnet50.get_config().total == '120 epochs'
  for options in (dict(), dict(context='nl', place='one')):
    model, info = va.create_model('gc_resnet_50', depths=(1, 1, 2), width=8, **options)
    plain, _ = va.create_model('resnet_50', depths=(1, 1, 2), width=8)
    paths = (set(tree.flatten(convert.abstract_variables(m, info))) for m in (model, plain))
    new = next(paths) - next(paths)
    assert new
    assert all(any(re.search(p, path) for p in tuned.init.fresh) for path in new)
