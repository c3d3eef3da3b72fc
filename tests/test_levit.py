"""What is particular to LeViT: its bias, its shrinking, two classifiers, and norms that fold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vision_attention as va
from configs import levit_128s
from tests import abstract
from vision_attention import convert
from vision_attention.attention import levit as levit_attention
from vision_attention.attention import mhsa
from vision_attention.models import levit, transfer, tree
from vision_attention.ops import distance_bias

TINY = dict(dims=(16, 24), depths=(1, 1), num_heads=(2, 3), head_dim=4, num_classes=3)


@functools.cache
def _model(**options):
  model, info = va.create_model('levit_128s', **(TINY | dict(image_size=48) | options))
  images = jax.random.normal(jax.random.key(0), (2, *info.image_size, 3))
  return model, abstract.drawn(convert.abstract_variables(model, info)), images


@pytest.mark.parametrize(
  ('name', 'expected'),
  [
    ('levit_128s', 7_391_290),
    ('levit_128', 8_828_168),
    ('levit_192', 10_561_301),
    ('levit_256', 18_379_852),
    ('levit_384', 38_358_300),
  ],
)
def test_parameters_with_one_classifier(name, expected):
  assert abstract.size(abstract.variables(name, distillation=False)['params']) == expected


@pytest.mark.parametrize(
  ('name', 'expected', 'macs'),
  [
    ('levit_128s', 7_756_466, 305.11),
    ('levit_384', 39_074_100, 2352.94),
  ],
)
def test_parameters_without_norms_and_multiply_adds(name, expected, macs):
  model, info = va.create_model(name)
  variables = jax.tree.map(
    lambda leaf: np.broadcast_to(np.float32(1), leaf.shape), convert.abstract_variables(model, info)
  )
  _, fused = va.fuse_batchnorm(model, variables)
  assert abstract.size(fused['params']) == expected
  # The code also counts the softmax.
  assert abstract.macs(model) / 1e6 == pytest.approx(macs, rel=0.005)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 2))
@settings(max_examples=5)
def test_the_bias_is_that_of_absolute_distances(height, width, stride):
  table = np.random.default_rng(0).standard_normal((2, height, width)).astype(np.float32)
  y, x = (a.reshape(-1) for a in np.meshgrid(range(height), range(width), indexing='ij'))
  queries = (y % stride == 0) & (x % stride == 0)
  down, right = (np.abs(a[queries][:, None] - a[None, :]) for a in (y, x))
  bias = distance_bias.distance_bias(jnp.asarray(table), stride)
  np.testing.assert_array_equal(bias, table[:, down, right])


def test_tables_keep_their_size_their_centre_and_constants():
  table = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32)
  np.testing.assert_allclose(distance_bias.resize(table, (2, 5, 4)), table, atol=1e-6)
  large = distance_bias.resize(table, (2, 9, 7))
  assert large.shape == (2, 9, 7)
  np.testing.assert_allclose(large[:, 0, 0], table[:, 0, 0], atol=1e-6)
  np.testing.assert_allclose(distance_bias.resize(np.ones_like(table), (2, 3, 8)), 1, atol=1e-6)


def _attention(size, **fields):
  module = levit_attention.LevitAttention(6, num_heads=2, head_dim=4, **fields)
  x = jax.random.normal(jax.random.key(0), (2, *size, 5))
  variables = abstract.drawn(jax.eval_shape(lambda: module.init(jax.random.key(1), x, train=False)))
  return x, variables, jax.jit(functools.partial(module.apply, variables, train=False))


def test_attention_commutes_with_flips_and_shrinking_does_not():
  x, _, attend = _attention((4, 6))
  for axis in (1, 2):
    np.testing.assert_allclose(
      attend(jnp.flip(x, axis)), jnp.flip(attend(x), axis), rtol=1e-4, atol=1e-5
    )
  _, _, shrink = _attention((4, 6), stride=2)
  assert shrink(x).shape == (2, 2, 3, 6)
  assert jnp.abs(shrink(jnp.flip(x, 1)) - jnp.flip(shrink(x), 1)).max() > 1e-2


def test_without_a_bias_attention_sees_no_order_and_shrinking_takes_its_corners():
  x, variables, _ = _attention((3, 4))
  zero = dict(variables['params'], attention_bias=np.zeros((2, 3, 4), np.float32))
  module = levit_attention.LevitAttention(6, num_heads=2, head_dim=4)
  attend = functools.partial(module.apply, variables | {'params': zero}, train=False)
  order = np.random.default_rng(1).permutation(12)
  mixed = x.reshape(2, 12, 5)[:, order].reshape(x.shape)
  expected = attend(x).reshape(2, 12, 6)[:, order].reshape(2, 3, 4, 6)
  np.testing.assert_allclose(attend(mixed), expected, rtol=1e-4, atol=1e-5)

  # Shrinking is attention of which every other row and column is kept.
  x, variables, attend = _attention((3, 4), stride=2, value_ratio=2)
  params, stats = variables['params'], variables['batch_stats']

  def joined(tables):
    """Query, key and value of each head behind one another."""
    query, kv = (np.asarray(tables[name]) for name in ('query', 'kv'))
    parts = [a.reshape(*a.shape[:-1], 2, -1) for a in (query, kv)]
    both = np.concatenate(parts, -1)
    return both.reshape(*both.shape[:-2], -1)

  def qkv(params):
    pick = lambda path: joined({k: tree.flatten(params[k])[path] for k in ('query', 'kv')})
    return tree.unflatten({path: pick(path) for path in tree.flatten(params['query'])})

  shared = {k: params[k] for k in ('proj', 'attention_bias')}
  whole = {
    'params': shared | {'qkv': qkv(params)},
    'batch_stats': {'proj': stats['proj'], 'qkv': qkv(stats)},
  }
  expected = module.apply(whole, x, train=False)[:, ::2, ::2]
  np.testing.assert_allclose(attend(x), expected, rtol=1e-4, atol=1e-5)


def test_a_fresh_model_is_its_stem_and_its_shrinking():
  model, info = va.create_model('levit_128s', image_size=48, **TINY)
  images = jax.random.normal(jax.random.key(0), (2, *info.image_size, 3))
  variables = jax.jit(model.init)(jax.random.key(1), images)
  features = jax.jit(functools.partial(model.apply, method='features'))
  stage = features(variables, images)['stage2']
  for part in ('stage1', 'stage2'):
    inner = variables['params']['backbone'][part]
    variables['params']['backbone'][part] = jax.tree.map(lambda x: 2 * x, inner)
  np.testing.assert_array_equal(features(variables, images)['stage2'], stage)
  shrink = variables['params']['backbone']['downsample2']['attn']['kv']['linear']
  shrink['kernel'] = -2 * shrink['kernel']
  assert jnp.abs(features(variables, images)['stage2'] - stage).max() > 1e-3


@pytest.mark.parametrize(
  ('size', 'maps'),
  [
    ((224, 224), [(14, 14), (7, 7), (4, 4)]),
    ((256, 256), [(16, 16), (8, 8), (4, 4)]),
    ((100, 18), [(7, 2), (4, 1), (2, 1)]),
    ((1, 1), [(1, 1), (1, 1), (1, 1)]),
  ],
)
def test_any_image_size_is_taken(size, maps):
  model, info = va.create_model('levit_128s', image_size=size)
  shapes = convert.abstract_variables(model, info)
  images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
  features = jax.eval_shape(functools.partial(model.apply, method='features'), shapes, images)
  assert [features[f'stage{i}'].shape[1:3] for i in (1, 2, 3)] == maps


def test_logits_are_the_mean_of_two_classifiers():
  model, variables, images = _model()
  logits = jax.jit(model.apply)(variables, images)
  named = jax.jit(functools.partial(model.apply, method='named_logits'))(variables, images)
  assert set(named) == set(model.outputs) == {'classifier', 'distilled'}
  np.testing.assert_allclose(logits, (named['classifier'] + named['distilled']) / 2, rtol=1e-5)
  assert jnp.abs(named['classifier'] - named['distilled']).max() > 1e-2
  one, _ = va.create_model('levit_128s', image_size=48, distillation=False, **TINY)
  assert one.outputs == ()
  assert va.create_model('levit_128s', num_classes=0)[0].outputs == ()


@pytest.mark.fast
def test_folded_norms_compute_the_same():
  model, variables, images = _model()
  before = jax.tree.map(np.copy, variables)
  fused, folded = va.fuse_batchnorm(model, variables)
  assert jax.tree.all(jax.tree.map(np.array_equal, variables, before))
  assert set(folded) == {'params'}
  assert not [path for path in tree.flatten(folded) if 'norm' in path]
  shapes = jax.eval_shape(fused.init, jax.random.key(0), images)
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, folded)
  expected = jax.jit(model.apply)(variables, images)
  np.testing.assert_allclose(
    jax.jit(fused.apply)(folded, images), expected, atol=1e-4 * jnp.abs(expected).max()
  )


def test_what_does_not_know_a_norm_keeps_it_or_is_refused():
  model, variables, images = _model(attn='mhsa')
  fused, folded = va.fuse_batchnorm(model, variables)
  np.testing.assert_allclose(
    fused.apply(folded, images), model.apply(variables, images), rtol=1e-3, atol=1e-4
  )
  other, info = va.create_model('resnet_18', depths=(1,), width=8, image_size=32)
  with pytest.raises(ValueError, match=r'models that fuse are .*levit_128s'):
    va.fuse_batchnorm(other, abstract.drawn(convert.abstract_variables(other, info)))


def test_options_that_cannot_be_are_refused():
  with pytest.raises(ValueError, match='one entry per stage, and shrink_heads'):
    va.create_model('levit_128s', depths=(1, 1))
  with pytest.raises(ValueError, match='the stem halves the width 12 three times'):
    va.create_model('levit_128s', dims=(12, 24, 48))
  with pytest.raises(ValueError, match='4 heads do not divide width 6'):
    levit_attention.LevitAttention(6, num_heads=4).init(
      jax.random.key(0), jnp.zeros((1, 2, 2, 6)), train=False
    )


def _timm(state):
  """Keys of ours, with statistics, as timm has them."""
  names = {'query': 'q.ln', 'proj': 'proj.ln', 'expand': 'ln1', 'project': 'ln2'}
  leaves = {'kernel': 'weight', 'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}
  found = {}
  for path, value in tree.flatten(state).items():
    _, part, *inner, leaf = path.split('/')
    value = np.asarray(value)
    if part == 'head':
      prefix = ['head' if inner[0] == 'classifier' else 'head_dist']
    elif inner[0] == 'stem':
      prefix = ['stem', inner[1]]
    else:
      stage = int(inner[0][-1]) - 1
      shrinks = inner[0].startswith('downsample')
      block = ['downsample'] if shrinks else ['blocks', str(int(inner[1][-2:]))]
      rest = inner[1 if shrinks else 2 :]
      attn = 'attn_downsample' if shrinks else 'attn'
      prefix = ['stages', str(stage), *block, attn if rest[0] == 'attn' else 'mlp']
      if leaf != 'attention_bias':
        prefix.append(names.get(rest[1], rest[1]))
    if leaf == 'attention_bias':
      found['.'.join([*prefix, 'attention_biases'])] = value.reshape(len(value), -1)
      continue
    if leaf == 'kernel':
      value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    layer = 'bn' if inner[-1] == 'norm' else 'linear'
    found['.'.join([*prefix, layer, leaves.get(leaf, leaf)])] = value
  return found


def _official(state):
  """timm's keys of a model of two stages with one block each, as the authors have them."""
  branches = {
    'stages.0.blocks.0.attn': 'blocks.0.m',
    'stages.0.blocks.0.mlp': 'blocks.1.m',
    'stages.1.downsample.attn_downsample': 'blocks.2',
    'stages.1.downsample.mlp': 'blocks.3.m',
    'stages.1.blocks.0.attn': 'blocks.4.m',
    'stages.1.blocks.0.mlp': 'blocks.5.m',
    **{f'stem.conv{i + 1}': f'patch_embed.{2 * i}' for i in range(4)},
    '.q.ln.': '.q.1.',
    '.proj.ln.': '.proj.1.',
    '.ln1.': '.0.',
    '.ln2.': '.2.',
  }
  found = {}
  for key, value in state.items():
    for theirs, ours in branches.items():
      key = key.replace(theirs, ours)
    found[key.replace('.linear.', '.l.' if key.startswith('head') else '.c.')] = value
  return found


def test_official_and_timm_names_are_the_same_weights():
  model, variables, images = _model(image_size=(40, 64))
  timm = _timm(variables)
  loaded = {
    'timm': timm,
    'official': _official(timm) | {'blocks.0.m.attention_bias_idxs': np.zeros((9, 9), np.int64)},
    'conv': {
      key: value[..., None, None] if value.ndim == 2 and 'linear' in key else value
      for key, value in timm.items()
    },
  }
  options = {key: value for key, value in TINY.items() if key != 'num_classes'}
  for name, state in loaded.items():
    source = 'official' if name == 'official' else 'timm'
    found = va.load_reference('levit_128s', state, source=source, **options)
    for part in ('params', 'batch_stats'):
      assert jax.tree.all(jax.tree.map(np.array_equal, found[part], variables[part])), name
  one = {key: value for key, value in timm.items() if not key.startswith('head_dist')}
  assert levit.REFERENCES['timm'].infer(one, {}) == {
    'num_classes': 3,
    'distillation': False,
    'image_size': (48, 64),
  }
  small = va.load_reference('levit_128s', timm, source='timm', image_size=96, **options)
  table = small['params']['backbone']['stage1']['block00']['attn']['attention_bias']
  own = variables['params']['backbone']['stage1']['block00']['attn']['attention_bias']
  np.testing.assert_array_equal(table, distance_bias.resize(own, (2, 6, 6)))
  _, report = transfer.transfer(
    'levit_128s', variables, abstract.variables('levit_128s', image_size=96, **TINY)
  )
  assert len(report.resized) == 3
  assert images.shape[1:3] == (40, 64)
  assert model.outputs


def test_a_zero_bias_and_no_norm_is_plain_attention():
  """Folded, with the activation left out and values as wide as keys."""
  x, variables, _ = _attention((2, 3), fused=True, activation='identity', value_ratio=1)
  params = dict(variables['params'], attention_bias=np.zeros((2, 2, 3), np.float32))
  module = levit_attention.LevitAttention(
    6, num_heads=2, head_dim=4, fused=True, activation='identity', value_ratio=1
  )
  qkv, proj = params['qkv']['linear'], params['proj']['linear']
  split = lambda a: np.moveaxis(a.reshape(*a.shape[:-1], 2, 3, 4), -2, 0)
  kernels, biases = split(qkv['kernel']), split(qkv['bias'])
  plain = {
    name: {'kernel': kernels[i].reshape(5, 8), 'bias': biases[i].reshape(8)}
    for i, name in enumerate(('query', 'key', 'value'))
  }
  expected = mhsa.MultiHeadAttention(6, 2, head_dim=4).apply(
    {'params': plain | {'proj': proj}}, x, train=False
  )
  ours = module.apply({'params': params}, x, train=False)
  np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_recipes_are_those_of_the_code():
  config = levit_128s.get_config()
  assert (config.total, config.batch_size, config.optimizer.learning_rate) == (
    '1000 epochs',
    2048,
    2e-3,
  )
  assert (config.optimizer.weight_decay, config.optimizer.clip_adaptive) == (0.025, 0.01)
  assert config.schedule.warmup == '5 epochs'
  assert not config.model.options.drop_path
  assert not config.model.options.distillation
  taught = levit_128s.get_config('teacher=run')
  assert (taught.teacher.path, taught.distill.kind, taught.distill.weight) == ('run', 'hard', 0.5)
  assert taught.model.options.distillation
  assert levit_128s.get_config('variant=levit_384').model.options.drop_path == 0.1
