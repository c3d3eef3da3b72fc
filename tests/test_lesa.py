"""LESA: its terms against their definitions, its counts, and the official weights' names."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vision_attention as va
from vision_attention import convert
from vision_attention.attention import lesa
from vision_attention.models import registry, tree

HEADS, DIM, SIZE = 2, 12, (3, 4)
POSITIONS = list(lesa.POSITIONS)


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


@functools.cache
def _layer(position):
  """Returns a layer's variables, none of them at its initial value, an input, and the layer."""
  layer = lesa.LesaAttention(DIM, HEADS, position=position)
  x = _normal(2, *SIZE, 8)
  variables = jax.jit(functools.partial(layer.init, train=False))(jax.random.key(0), x)
  noise = iter(range(1000))
  variables = {
    'params': jax.tree.map(
      lambda p: p + 0.3 * _normal(*p.shape, seed=next(noise)), variables['params']
    ),
    'batch_stats': jax.tree.map(
      lambda s: s + np.abs(0.3 * _normal(*s.shape, seed=next(noise))), variables['batch_stats']
    ),
  }
  apply = functools.partial(layer.apply, mutable=['intermediates', 'batch_stats'])
  return variables, x, jax.jit(apply, static_argnames='train')


def _normed(variables, name, x, train=False):
  params, stats = variables['params'][name], variables['batch_stats'][name]
  axes = tuple(range(x.ndim - 1))
  mean, var = (x.mean(axes), x.var(axes)) if train else (stats['mean'], stats['var'])
  return (x - mean) / np.sqrt(var + 1e-5) * params['scale'] + params['bias']


def _binary(variables, x, position, train=False):
  """The binary term and the attention map, entry by entry, in the words of the paper's code."""
  params = variables['params']
  batch, (height, width) = len(x), SIZE
  n, value_dim = height * width, DIM // HEADS
  key_dim = value_dim // 2
  qkv = _normed(variables, 'qkv_norm', x @ params['qkv']['kernel'], train).reshape(
    batch, n, HEADS, 2 * key_dim + value_dim
  )
  query, key, value = np.split(np.asarray(qkv, np.float64), (key_dim, 2 * key_dim), -1)
  kinds = 3 if position == 'flat' else 2
  logits = np.zeros((batch, n, n, kinds, HEADS))
  for i, j in np.ndindex(n, n):
    logits[:, i, j, 0] = np.einsum('bhd,bhd->bh', query[:, i], key[:, j])
    if position == 'flat':
      table = params['relative']
      logits[:, i, j, 1] = query[:, i] @ table[:key_dim, i - j + n - 1]
      logits[:, i, j, 2] = key[:, j] @ table[key_dim : 2 * key_dim, j - i + n - 1]
    else:
      row = params['relative_height'][j // width - i // width + height - 1]
      column = params['relative_width'][j % width - i % width + width - 1]
      logits[:, i, j, 1] = query[:, i] @ (row + column)
  logits = logits.reshape(batch, n, n, -1)
  logits = _normed(variables, 'logits_norm', logits, train).reshape(batch, n, n, kinds, HEADS)
  weights = np.asarray(jax.nn.softmax(logits.sum(3), 2))
  mixed = np.einsum('bijh,bjhd->bihd', weights, value)
  if position == 'flat':
    offset = np.arange(n)[:, None] - np.arange(n) + n - 1
    vectors = params['relative'][2 * key_dim :][:, offset]
    mixed = np.stack([mixed, np.einsum('bijh,dij->bihd', weights, vectors)], -1)
  mixed = _normed(variables, 'binary_norm', mixed.reshape(batch, n, -1), train)
  return mixed.reshape(batch, height, width, DIM, -1).sum(-1), weights.transpose(0, 3, 1, 2)


def _unary(variables, x, train=False):
  params = variables['params']
  layout = ('NHWC', 'HWIO', 'NHWC')
  y = jax.lax.conv_general_dilated(
    x,
    params['local']['kernel'],
    (1, 1),
    'SAME',
    dimension_numbers=layout,
    feature_group_count=HEADS,
  )
  return _normed(variables, 'local_norm', y @ params['local_proj']['kernel'][0, 0], train)


def _expected(variables, x, position, train=False):
  params = variables['params']
  unary = np.asarray(_unary(variables, x, train))
  binary, weights = _binary(variables, x, position, train)
  fused = np.maximum(np.concatenate([unary, binary], -1), 0) @ params['fusion1']['kernel'][0, 0]
  fused = np.maximum(_normed(variables, 'fusion_norm1', fused, train), 0)
  fused = _normed(variables, 'fusion_norm2', fused @ params['fusion2']['kernel'][0, 0], train)
  gate = jax.nn.sigmoid(fused)
  assert gate.min() > 0
  assert gate.max() < 1
  return unary + gate * binary, weights


@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('position', POSITIONS)
def test_it_is_its_definition(position, train):
  variables, x, apply = _layer(position)
  y, state = apply(variables, x, train=train)
  expected, weights = _expected(variables, x, position, train)
  np.testing.assert_allclose(y, expected, atol=2e-4)
  [sown] = jax.tree.leaves(state['intermediates'])
  np.testing.assert_allclose(sown, weights, atol=1e-5)
  np.testing.assert_allclose(sown.sum(-1), 1, atol=1e-5)


def test_statistics_of_logits_follow_the_batch():
  variables, x, apply = _layer('flat')
  before = variables['batch_stats']
  _, state = apply(variables, x, train=True)
  after = state['batch_stats']['logits_norm']
  query, key, _ = np.split(
    np.asarray(
      _normed(variables, 'qkv_norm', x @ variables['params']['qkv']['kernel'], True)
    ).reshape(2, 12, HEADS, -1),
    (3, 6),
    -1,
  )
  logits = np.einsum('bihd,bjhd->bhij', query, key)
  for leaf, value in (('mean', logits.mean((0, 2, 3))), ('var', logits.var((0, 2, 3)))):
    expected = 0.9 * before['logits_norm'][leaf][:HEADS] + 0.1 * value
    np.testing.assert_allclose(after[leaf][:HEADS], expected, rtol=1e-4)


@pytest.mark.parametrize('position', POSITIONS)
def test_a_closed_gate_leaves_the_convolution(position):
  variables, x, apply = _layer(position)
  closed = {'scale': np.zeros(DIM), 'bias': np.full(DIM, -100.0)}
  params = variables['params'] | {'fusion_norm2': closed}
  y, _ = apply({**variables, 'params': params}, x, train=False)
  np.testing.assert_allclose(y, _unary(variables, x), atol=1e-5)


def test_logits_without_scale_attend_to_all_alike():
  variables, x, apply = _layer('flat')
  flat = jax.tree.map(np.zeros_like, variables['params']['logits_norm'])
  params = variables['params'] | {'logits_norm': flat}
  _, state = apply({**variables, 'params': params}, x, train=False)
  [weights] = jax.tree.leaves(state['intermediates'])
  np.testing.assert_allclose(weights, 1 / 12, rtol=1e-5)


def _without_tables(position):
  variables, x, apply = _layer(position)
  names = {name for name in variables['params'] if name.startswith('relative')}
  tables = {name: np.zeros_like(variables['params'][name]) for name in names}
  return {**variables, 'params': variables['params'] | tables}, x, apply


def test_without_positions_the_order_of_pixels_is_not_seen():
  for position in POSITIONS:
    variables, x, apply = _without_tables(position)
    order = np.random.default_rng(0).permutation(12)
    shuffled = x.reshape(2, 12, -1)[:, order].reshape(x.shape)
    maps = []
    for images in (x, shuffled):
      _, state = apply(variables, images, train=False)
      maps.append(jax.tree.leaves(state['intermediates'])[0])
    np.testing.assert_allclose(maps[1], maps[0][:, :, order][..., order], atol=1e-6)


def test_without_positions_both_forms_are_one():
  flat, x, apply = _without_tables('flat')
  axes, _, other = _without_tables('axes')
  shared = {k: v for k, v in flat['params'].items() if not k.startswith('relative')}
  params = axes['params'] | shared
  stats = {**axes['batch_stats'], **flat['batch_stats']}
  # The flat form has a third kind of logits, and a norm for mixed positions between the contents'.
  params['logits_norm'] = {k: v[: 2 * HEADS] for k, v in shared['logits_norm'].items()}
  stats['logits_norm'] = {k: v[: 2 * HEADS] for k, v in stats['logits_norm'].items()}
  params['binary_norm'] = {k: v[::2] for k, v in shared['binary_norm'].items()}
  stats['binary_norm'] = {k: v[::2] for k, v in stats['binary_norm'].items()}
  norm, running = flat['params']['binary_norm'], flat['batch_stats']['binary_norm']
  silent = running['mean'] * norm['scale'] / np.sqrt(running['var'] + 1e-5)
  norm = {**norm, 'bias': norm['bias'].at[1::2].set(silent[1::2])}
  flat = {**flat, 'params': flat['params'] | {'binary_norm': norm}}
  y, _ = apply(flat, x, train=False)
  z, _ = other({'params': params, 'batch_stats': stats}, x, train=False)
  np.testing.assert_allclose(y, z, atol=1e-5)


@pytest.mark.parametrize(('dim', 'side'), [(256, 14), (512, 14), (128, 9)])
def test_parameters_of_a_layer_follow_the_formula(dim, side):
  layer = lesa.LesaAttention(dim, 8)
  x = jax.ShapeDtypeStruct((1, side, side, dim), jnp.float32)
  shapes = jax.eval_shape(functools.partial(layer.init, train=False), jax.random.key(0), x)
  count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes['params']))
  assert count == 57 * dim**2 // 8 + 14 * dim + dim // 4 * (2 * side**2 - 1) + 48
  known = {(256, 14): 495_600, (512, 14): 1_925_040}
  assert count == known.get((dim, side), count)


def test_parameters_of_the_models_are_those_of_resnets_with_layers_exchanged():
  layers = {256: 495_600, 512: 1_925_040, 1024: 57 * 2**17 + 14 * 2**10 + 2**8 * 391 + 48}
  for name, plain, dims, blocks in (
    ('lesa_resnet_50', 25_557_032, (256, 512), (5, 3)),
    ('lesa_resnet_101', 44_549_160, (256, 512), (22, 3)),
    ('lesa_wrn_50', 68_883_240, (512, 1024), (5, 3)),
    ('lesa_wrn_101', 126_886_696, (512, 1024), (22, 3)),
  ):
    exchanged = sum(
      n * (layers[dim] - 9 * dim**2 - 2 * dim) for dim, n in zip(dims, blocks, strict=True)
    )
    assert registry.variant_of(name).params == plain + exchanged


def _shapes(**options):
  model, info = va.create_model('lesa_resnet_50', **options)
  return model, convert.abstract_variables(model, info)


def test_the_last_stage_keeps_the_resolution():
  model, shapes = _shapes()
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  features = jax.eval_shape(functools.partial(model.apply, method='features'), shapes, images)
  assert [features[f'stage{i}'].shape[1] for i in (1, 2, 3, 4)] == [56, 28, 14, 14]
  blocks = {path.split('/attn/')[0] for path in tree.flatten(shapes['params']) if '/attn/' in path}
  assert len(blocks) == 8
  assert 'backbone/stage3/block00' not in blocks
  assert 'norm2' not in shapes['params']['backbone']['stage4']['block00']


def test_detection_s_form_attends_before_it_halves():
  _, shapes = _shapes(position='axes', strides=(1, 2, 2, 2), image_size=256)
  stage = shapes['params']['backbone']['stage4']
  assert stage['block00']['attn']['relative_height'].shape == (31, 32)
  assert stage['block01']['attn']['relative_width'].shape == (15, 32)
  assert stage['block01']['attn']['logits_norm']['scale'].shape == (16,)


def test_maps_of_another_size_and_impossible_widths_are_refused():
  model, shapes = _shapes()
  images = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
  with pytest.raises(ValueError, match=r'relative has shape \(64, 391\), but a map of 16x16 needs'):
    jax.eval_shape(model.apply, shapes, images)
  with pytest.raises(ValueError, match=r'3 heads, .* do not divide width 16: pass a divisor of 8'):
    _shapes(width=4, num_heads=3)
  with pytest.raises(ValueError, match="position 'axis' is unknown: did you mean 'axes'"):
    _shapes(position='axis')


@pytest.mark.parametrize(
  'options',
  [
    dict(num_heads=4),
    dict(num_heads=2, position='axes', strides=(1, 2, 2, 2), image_size=64),
    dict(num_heads=2, image_size=96, stages=(3,)),
  ],
)
def test_official_weights_show_heads_positions_strides_and_size(options):
  built = {'depths': (1, 1, 2, 2), 'width': 4}
  _, expected = _shapes(**built, **{'image_size': 64, **options})
  state, theirs = {}, _official_names(options.get('position', 'flat'))
  for path, leaf in tree.flatten(expected).items():
    module = path.split('/', 1)[1]
    for ours, name in theirs.items():
      module = module.replace(ours, name)
    parts = module.split('/')
    shape = leaf.shape
    if parts[-1] == 'kernel':
      shape = leaf.shape[::-1] if leaf.ndim == 2 else tuple(leaf.shape[i] for i in (3, 2, 0, 1))
    rename = {'kernel': 'weight', 'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}
    parts[-1] = rename.get(parts[-1], parts[-1])
    state['module.' + '.'.join(parts)] = np.zeros(shape, np.float32)
  state['module.layer3.1.conv2.flatten_index'] = np.zeros(4)
  variables = va.load_reference('lesa_resnet_50', state, source='official', **built)
  found = {k: v.shape for k, v in tree.flatten(variables).items() if 'convention' not in k}
  assert found == {path: leaf.shape for path, leaf in tree.flatten(expected).items()}


def _official_names(position):
  names = {
    'head/classifier': 'fc',
    'shortcut/conv': 'downsample/0',
    'shortcut/norm': 'downsample/1',
    'backbone/stem/conv1': 'conv1',
    'backbone/stem/norm1': 'bn1',
    'attn/qkv_norm': 'conv2/bn_qkv',
    'attn/qkv': 'conv2/qkv_transform',
    'attn/logits_norm': 'conv2/bn_similarity',
    'attn/binary_norm': 'conv2/bn_output',
    'attn/local_norm': 'conv2/bn_x',
    'attn/local_proj': 'conv2/x_transform/1',
    'attn/local': 'conv2/x_transform/0',
    'attn/fusion_norm1': 'conv2/reasoning/2',
    'attn/fusion_norm2': 'conv2/projection/1',
    'attn/fusion1': 'conv2/reasoning/1',
    'attn/fusion2': 'conv2/projection/0',
    'attn/relative_height': 'conv2/rel_height',
    'attn/relative_width': 'conv2/rel_width',
    'attn/': 'conv2/',
    '/norm': '/bn',
  }
  if position == 'flat':
    names |= {'attn/relative': 'conv2/relative'}
  stages = {f'backbone/stage{i}/block0{j}': f'layer{i}/{j}' for i in range(1, 5) for j in range(2)}
  return stages | names
