"""What is particular to CvT: convolutional projections, the class token, sizes, other names."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vision_attention as va
from configs import cvt_13
from tests import abstract
from vision_attention import convert
from vision_attention.attention import convolutional_projection, mhsa
from vision_attention.models import cvt, tree

TINY = dict(depths=(1, 1, 2), dims=(8, 16, 16), num_heads=(1, 2, 2))
Attention = convolutional_projection.ConvolutionalProjectionAttention


def _drawn(shapes, seed=0):
  """Returns variables with something to see: no zeros, no unit scales."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: (
      np.abs(0.3 * rng.standard_normal(leaf.shape)).astype(np.float32)
      * (1 if len(leaf.shape) == 1 else rng.choice([-1, 1], leaf.shape).astype(np.float32))
    ),
    shapes,
  )


@pytest.mark.parametrize(
  ('name', 'size', 'published', 'counted'),
  [
    ('cvt_13', 224, 4.53, 4.566),
    ('cvt_13', 384, 16.3, 16.27),
    ('cvt_w24', 384, 193.2, 194.2),
  ],
)
def test_multiply_adds_are_those_of_the_paper_and_of_its_code(name, size, published, counted):
  model, info = va.create_model(name, image_size=size)
  macs = abstract.macs(model, image_size=size) / 1e9
  assert macs == pytest.approx(published, rel=0.01)
  assert macs == pytest.approx(counted, rel=1e-3)
  assert (name, size) == ('cvt_13', 384) or info.flops == pytest.approx(published * 1e9)


def _attention(x, **fields):
  """Returns attention of drawn variables as a function, and the variables."""
  module = Attention(8, num_heads=2, **fields)
  shapes = jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), x)
  return functools.partial(module.apply, train=False), _drawn(shapes)


def _plain(variables):
  """Sets convolutions to the middle pixel and BatchNorm to the identity."""
  flat = tree.flatten(variables)
  for path, value in flat.items():
    if path.endswith('_conv/kernel'):
      flat[path] = np.zeros_like(value)
      flat[path][1, 1] = 1
    elif '_norm/' in path:
      flat[path] = np.full_like(value, path.endswith(('scale', 'var')))
  return tree.unflatten(flat)


@functools.cache
def _map(height, width, dim=8):
  return jax.random.normal(jax.random.key(1), (2, height, width, dim))


@pytest.mark.parametrize('scale', ['dim', 'head_dim'])
def test_without_convolutions_it_is_plain_attention(scale):
  x = _map(4, 5)
  attend, variables = _attention(x, kv_stride=1, scale=scale, norm_epsilon=0.0)
  variables = _plain(variables)
  got = attend(variables, x)
  dense = {k: dict(variables['params'][k]) for k in ('query', 'key', 'value', 'proj')}
  factor = 0.5**0.5 if scale == 'dim' else 1.0  # two heads: sqrt(4 / 8)
  dense['query'] = {k: v * np.float32(factor) for k, v in dense['query'].items()}
  expected = mhsa.MultiHeadAttention(8, 2).apply({'params': dense}, x, train=False)
  np.testing.assert_allclose(got, expected, atol=1e-5)
  linear, _ = _attention(x, projection='linear', scale=scale)
  np.testing.assert_allclose(linear({'params': variables['params']}, x), got, atol=1e-5)
  # Then it also commutes with any permutation of pixels.
  order = np.random.default_rng(0).permutation(20)
  mix = lambda x: x.reshape(2, 20, 8)[:, order].reshape(x.shape)
  np.testing.assert_allclose(attend(variables, mix(x)), mix(got), atol=1e-5)


def test_keys_are_strided_convolutions():
  x = _map(7, 5)
  module = Attention(8, num_heads=2)
  variables = _drawn(
    jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), x)
  )
  y, aux = module.apply(variables, x, train=False, mutable='intermediates')
  [weights] = aux['intermediates']['attention']
  assert weights.shape == (2, 2, 35, 4 * 3)
  params, stats = variables['params'], variables['batch_stats']

  def projected(name, stride):
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = params[f'{name}_conv']['kernel'][:, :, 0]
    taps = [padded[:, i : i + 7, j : j + 5] * kernel[i, j] for i in range(3) for j in range(3)]
    z = np.sum(taps, 0)[:, ::stride, ::stride]
    mean, var = (stats[f'{name}_norm'][k] for k in ('mean', 'var'))
    z = (z - mean) / np.sqrt(var + 1e-5) * params[f'{name}_norm']['scale']
    z = (z + params[f'{name}_norm']['bias']) @ params[name]['kernel'] + params[name]['bias']
    return z.reshape(2, -1, 2, 4)

  query, key, value = projected('query', 1), projected('key', 2), projected('value', 2)
  expected = jax.nn.softmax(np.einsum('bqnd,bknd->bnqk', query, key) * 8**-0.5)
  np.testing.assert_allclose(weights, expected, atol=1e-5)
  mixed = np.einsum('bnqk,bknd->bqnd', expected, value).reshape(2, 7, 5, 8)
  np.testing.assert_allclose(
    y, mixed @ params['proj']['kernel'] + params['proj']['bias'], atol=1e-4
  )


def test_the_class_token_takes_part_in_no_convolution():
  x = _map(4, 6)
  tokens = jnp.concatenate([_map(1, 1).reshape(2, 1, 8) + 1, x.reshape(2, -1, 8)], 1)
  attend, variables = _attention(tokens, map_size=(4, 6))
  # A norm that gives zero leaves the map's queries and keys their biases; the token keeps its own.
  norms = {k: 0 * v if '_norm' in k else v for k, v in tree.flatten(variables['params']).items()}
  params = tree.unflatten(norms)
  _, aux = attend({**variables, 'params': params}, tokens, mutable='intermediates')
  [weights] = aux['intermediates']['attention']
  project = lambda name, x: x @ params[name]['kernel'] + params[name]['bias']
  rows = lambda count: jnp.concatenate([tokens[:, :1], jnp.zeros((2, count, 8))], 1)
  query = project('query', rows(24)).reshape(2, 25, 2, 4)
  key = project('key', rows(2 * 3)).reshape(2, 7, 2, 4)
  expected = jax.nn.softmax(jnp.einsum('bqnd,bknd->bnqk', query, key) * 8**-0.5)
  np.testing.assert_allclose(weights, expected, atol=1e-6)


def test_inputs_of_a_wrong_form_are_refused():
  x = _map(4, 6)
  run = lambda x, **fields: jax.eval_shape(
    functools.partial(Attention(8, **fields).init, train=False), jax.random.key(0), x
  )
  with pytest.raises(ValueError, match=r'need a map .* pass map_size for tokens'):
    run(x.reshape(2, 24, 8))
  with pytest.raises(ValueError, match=r'map_size 4x6 needs 25 tokens'):
    run(x.reshape(2, 24, 8), map_size=(4, 6))
  with pytest.raises(ValueError, match='a linear projection has no stride'):
    run(x, projection='linear', stride=2)
  with pytest.raises(ValueError, match='3 heads do not divide width 8'):
    run(x, num_heads=3)


def _features(size, **options):
  model, info = va.create_model('cvt_13', image_size=size, **TINY, **options)
  shapes = convert.abstract_variables(model, info)
  images = jax.ShapeDtypeStruct((2, *info.image_size, 3), jnp.float32)
  return jax.eval_shape(functools.partial(model.apply, method='features'), shapes, images)


@pytest.mark.parametrize(
  ('size', 'grids'),
  [
    (224, ((56, 56), (28, 28), (14, 14))),
    (384, ((96, 96), (48, 48), (24, 24))),
    ((61, 30), ((15, 7), (8, 4), (4, 2))),
    ((3, 5), ((1, 1), (1, 1), (1, 1))),
  ],
)
def test_any_image_size_is_taken(size, grids):
  features = _features(size)
  assert tuple(features[f'stage{i}'].shape[1:3] for i in (1, 2, 3)) == grids
  assert features['cls'].shape == (2, 16)


def test_images_without_a_token_and_of_another_size_are_refused():
  with pytest.raises(ValueError, match=r'no token remains of an image of 2x8: .* at least 3x3'):
    va.create_model('cvt_13', image_size=(2, 8))
  model, info = va.create_model('cvt_13', image_size=32, **TINY)
  shapes = convert.abstract_variables(model, info)
  with pytest.raises(ValueError, match=r'images are 64x64 but .* 32x32: pass image_size=\(64, 64'):
    jax.eval_shape(model.apply, shapes, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))


def test_features_move_with_the_image_away_from_its_border():
  options = {**TINY, 'depths': (1, 0, 0)}
  options['attn'] = [[{'name': 'convolutional_projection', 'projection': 'linear'}], [], []]
  model, info = va.create_model('cvt_13', num_classes=2, image_size=64, pool='gap', **options)
  variables = _drawn(convert.abstract_variables(model, info))
  images = jnp.zeros((1, 64, 64, 3)).at[:, 20:28, 20:28].set(_map(8, 8, 3)[:1])
  features = jax.jit(functools.partial(model.apply, method='features'))
  here, there = (
    features(variables, x)['stage3'] for x in (images, jnp.roll(images, (16, 16), (1, 2)))
  )
  np.testing.assert_allclose(there[:, 2:, 2:], here[:, 1:-1, 1:-1], atol=1e-5)
  assert float(jnp.abs(there - here).max()) > 1e-2


def test_operators_and_the_class_token():
  shapes = tree.flatten(abstract.variables('cvt_13', image_size=32, attn='mhsa', **TINY))
  assert not [path for path in shapes if '_conv/' in path]
  with pytest.raises(ValueError, match="no place in one: pass pool='gap'"):
    va.create_model('cvt_13', attn='halo', **TINY)
  pooled = tree.flatten(
    abstract.variables('cvt_13', image_size=64, attn='relative', pool='gap', **TINY)
  )
  assert len([path for path in pooled if path.endswith('relative_position')]) == 4
  assert 'params/backbone/cls' not in pooled
  assert set(_features(32, pool='gap')) == {'stage1', 'stage2', 'stage3'}
  with pytest.raises(ValueError, match=r'must have one entry per stage'):
    va.create_model('cvt_13', depths=(1, 2))


def test_drop_path_grows_within_a_stage():
  assert cvt.drop_path_rates(0.3, (1, 2, 4)) == [[0], [0, 0], pytest.approx([0, 0.1, 0.2, 0.3])]
  assert cvt.drop_path_rates((0, 0.2, 0.3), (1, 2, 1)) == [[0], [0, 0.2], [0]]
  with pytest.raises(ValueError, match='one entry per stage'):
    cvt.drop_path_rates((0.1, 0.2), (1, 2, 4))


# The authors' names in terms of Hugging Face's.
HF = {
  r'stage(\d)\.patch_embed\.proj': r'stages.\1.embedding.convolution_embeddings.projection',
  r'stage(\d)\.patch_embed\.norm': r'stages.\1.embedding.convolution_embeddings.normalization',
  r'stage(\d)\.cls_token': r'stages.\1.cls_token',
  r'stage(\d)\.blocks\.(\d)\.norm1': r'stages.\1.layers.\2.layernorm_before',
  r'stage(\d)\.blocks\.(\d)\.norm2': r'stages.\1.layers.\2.layernorm_after',
  r'stage(\d)\.blocks\.(\d)\.attn\.proj': r'stages.\1.layers.\2.attention.output.dense',
  r'stage(\d)\.blocks\.(\d)\.mlp\.fc1': r'stages.\1.layers.\2.intermediate.dense',
  r'stage(\d)\.blocks\.(\d)\.mlp\.fc2': r'stages.\1.layers.\2.output.dense',
  **{
    rf'stage(\d)\.blocks\.(\d)\.attn\.{theirs}': r'stages.\1.layers.\2.attention.attention.' + ours
    for short, name in (('q', 'query'), ('k', 'key'), ('v', 'value'))
    for theirs, ours in (
      (f'proj_{short}', f'projection_{name}'),
      *(
        (
          rf'conv_proj_{short}\.{a}',
          f'convolution_projection_{name}.convolution_projection.{b}',
        )
        for a, b in (('conv', 'convolution'), ('bn', 'normalization'))
      ),
    )
  },
}


def _official():
  """Returns a state dict of the tiny model in the authors' names and layouts."""
  rng, state = np.random.default_rng(0), {}

  def add(name, *weight, bias=True, stats=False):
    state[f'{name}.weight'] = 0.3 * rng.standard_normal(weight)
    if bias:
      state[f'{name}.bias'] = 0.3 * rng.standard_normal(weight[0])
    if stats:
      state[f'{name}.running_mean'] = rng.standard_normal(weight[0])
      state[f'{name}.running_var'] = rng.uniform(0.5, 2, weight[0])
      state[f'{name}.num_batches_tracked'] = np.zeros(())

  inputs = 3
  for i, (depth, dim) in enumerate(zip(TINY['depths'], TINY['dims'], strict=True)):
    side = 3 if i else 7
    add(f'stage{i}.patch_embed.proj', dim, inputs, side, side)
    add(f'stage{i}.patch_embed.norm', dim)
    for j in range(depth):
      block = f'stage{i}.blocks.{j}.'
      for short in 'qkv':
        add(f'{block}attn.conv_proj_{short}.conv', dim, 1, 3, 3, bias=False)
        add(f'{block}attn.conv_proj_{short}.bn', dim, stats=True)
        add(f'{block}attn.proj_{short}', dim, dim)
      for name, shape in {
        'norm1': (dim,), 'norm2': (dim,), 'attn.proj': (dim, dim),
        'mlp.fc1': (4 * dim, dim), 'mlp.fc2': (dim, 4 * dim),
      }.items():  # fmt: skip
        add(block + name, *shape)
    inputs = dim
  state['stage2.cls_token'] = rng.standard_normal((1, 1, inputs))
  add('norm', inputs)
  add('head', 5, inputs)
  return state


def _renamed(key):
  module, _, leaf = key.rpartition('.')
  for pattern, target in HF.items():
    for part, rest in ((module, f'.{leaf}'), (key, '')):
      match = re.fullmatch(pattern, part)
      if match:
        return 'cvt.encoder.' + match.expand(target) + rest
  return key.replace('norm.', 'layernorm.').replace('head.', 'classifier.')


def test_official_and_hugging_face_names_are_the_same_weights_of_other_functions():
  state = _official()
  official = va.load_reference('cvt_13', state, source='official', **TINY)
  theirs = {_renamed(key): value for key, value in state.items()}
  hf = va.load_reference('cvt_13', theirs, source='hf', **TINY)
  for collection in ('params', 'batch_stats'):
    same = jax.tree.map(np.array_equal, official[collection], hf[collection])
    assert jax.tree.all(same)
  attn = official['params']['backbone']['stage3']['block01']['attn']
  weight = state['stage2.blocks.1.attn.conv_proj_k.conv.weight'].astype(np.float32)
  np.testing.assert_array_equal(attn['key_conv']['kernel'], weight.transpose(2, 3, 1, 0))
  # Their GELU differs; a batch of one image works as any other.
  model, _ = va.create_model('cvt_13', num_classes=5, image_size=32, **TINY)
  images = 2 * _map(32, 32, 3)
  apply = jax.jit(model.apply)
  logits = apply(official, images)
  np.testing.assert_allclose(apply(official, images[:1]), logits[:1], atol=1e-4)
  gap = jnp.abs(apply(hf, images) - logits).max() / jnp.abs(logits).max()
  assert 1e-4 < gap < 0.2


def test_states_without_a_class_token_or_classifier_are_known_as_such():
  state = _official()
  del state['stage2.cls_token'], state['head.weight'], state['head.bias']
  params = va.load_reference('cvt_13', state, source='official', **TINY)['params']
  assert 'cls' not in params['backbone']
  assert not params.get('head')


def test_recipes_are_those_of_the_code():
  config = cvt_13.get_config('variant=cvt_21')
  found = (config.batch_size, config.optimizer.learning_rate, config.optimizer.weight_decay)
  assert found == (2048, 2e-3, 0.1)
  assert config.model.options.to_dict() == {'drop_path': 0.1}
  assert config.schedule.warmup_init * 2e-3 == pytest.approx(1e-6)
  assert config.schedule.final * 2e-3 == pytest.approx(1e-5)
  assert (config.mixing.cutmix_alpha, config.erasing.prob) == (1.0, 0.25)
  tuned = cvt_13.get_config('data=cifar100,init=runs/cvt_13')
  assert (tuned.image_size, tuned.total, tuned.optimizer.name) == (384, '10000 steps', 'sgd')
  assert tuned.data.eval_ops == ('resize({size})',)
  with pytest.raises(ValueError, match="no fine-tuning on 'digits' is published"):
    cvt_13.get_config('data=digits,init=runs/cvt_13')
