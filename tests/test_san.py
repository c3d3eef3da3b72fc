"""SAN: vector attention against its definition, pixel by pixel, and the official weights' names."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vision_attention as va
from tests import abstract
from vision_attention.attention import san
from vision_attention.models import san as models
from vision_attention.models import tree
from vision_attention.ops import vector_attention

LAYERS = {'pairwise': san.PairwiseAttention, 'patchwise': san.PatchwiseAttention}


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _mirrored(i, size):
  i = abs(i)
  return i if i < size else 2 * (size - 1) - i


def _gather(x, kernel):
  """Returns the neighbours of every pixel of a map, one by one."""
  height, width = x.shape[1:3]
  out = np.zeros((*x.shape[:3], kernel**2, *x.shape[3:]))
  for y, z, t in np.ndindex(height, width, kernel**2):
    i, j = y + t // kernel - kernel // 2, z + t % kernel - kernel // 2
    out[:, y, z, t] = x[:, _mirrored(i, height), _mirrored(j, width)]
  return out


@pytest.mark.parametrize(('height', 'width', 'kernel'), [(5, 4, 3), (4, 6, 7), (3, 3, 1)])
def test_aggregation_is_its_definition(height, width, kernel):
  value = _normal(2, height, width, 6)
  weights = _normal(2, height, width, kernel**2, 3, seed=1)
  np.testing.assert_array_equal(
    vector_attention.neighbours(jnp.asarray(value), kernel), _gather(value, kernel).astype('f')
  )
  # Channels 0 and 3, 1 and 4, 2 and 5 share a weight.
  tiled = np.tile(weights, 2)
  expected = (_gather(value, kernel) * tiled).sum(3)
  y = vector_attention.aggregate(jnp.asarray(value), jnp.asarray(weights))
  np.testing.assert_allclose(y, expected, atol=1e-5)
  # It is linear in either: gradients are contractions with the same neighbours.
  g = _normal(*value.shape, seed=2)
  _, pull = jax.vjp(vector_attention.aggregate, jnp.asarray(value), jnp.asarray(weights))
  dvalue, dweights = pull(jnp.asarray(g))
  full = g[:, :, :, None] * _gather(value, kernel)
  np.testing.assert_allclose(dweights, full[..., :3] + full[..., 3:], atol=1e-5)
  assert np.vdot(dvalue, value) == pytest.approx(np.vdot(g, y), rel=1e-4)


@functools.cache
def _layer(form, conv=False):
  layer = LAYERS[form](dim=16, kernel=3, conv=conv)
  x = _normal(2, 4, 5, 6)
  variables = jax.jit(functools.partial(layer.init, train=False))(jax.random.key(0), x)
  noise = iter(range(1000))
  params, stats = (
    jax.tree.map(lambda p: p + np.abs(0.3 * _normal(*p.shape, seed=next(noise))), variables[key])
    for key in ('params', 'batch_stats')
  )
  apply = jax.jit(functools.partial(layer.apply, train=False, mutable=['intermediates']))
  return params, stats, x, apply


def _dense(params, name, x):
  return x @ params[name]['kernel'] + params[name].get('bias', 0)


def _activated(params, stats, name, x):
  mean, var = stats[name]['mean'], stats[name]['var']
  y = (x - mean) / np.sqrt(var + 1e-5) * params[name]['scale'] + params[name]['bias']
  return np.maximum(y, 0)


@pytest.mark.parametrize('form', LAYERS)
def test_weights_are_their_definition(form):
  params, stats, x, apply = _layer(form)
  y, state = apply({'params': params, 'batch_stats': stats}, x)
  query, key, value = (np.asarray(_dense(params, name, x)) for name in ('query', 'key', 'value'))
  patch = _gather(key, 3)
  if form == 'pairwise':
    rows, columns = np.linspace(-1, 1, 4), np.linspace(-1, 1, 5)
    grid = np.stack(np.meshgrid(columns, rows), -1)[None]
    place = np.asarray(_dense(params, 'position', grid))
    apart = place[:, :, :, None] - _gather(place, 3)
    pairs = query[:, :, :, None] - patch
    seen = np.concatenate([pairs, np.broadcast_to(apart, (2, *apart.shape[1:]))], -1)
  else:
    seen = np.concatenate([query, patch.reshape(2, 4, 5, -1)], -1)
  hidden = _dense(params, 'hidden', _activated(params, stats, 'norm1', seen))
  weights = _dense(params, 'weights', _activated(params, stats, 'norm2', hidden))
  weights = np.asarray(weights).reshape(2, 4, 5, 9, 2)
  if form == 'pairwise':
    weights = np.asarray(jax.nn.softmax(weights, 3))
  expected = (_gather(value, 3) * np.tile(weights, 8)).sum(3)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
  [sown] = jax.tree.leaves(state['intermediates'])
  np.testing.assert_allclose(sown, weights.transpose(0, 4, 1, 2, 3), rtol=1e-4, atol=1e-5)
  if form == 'pairwise':
    np.testing.assert_allclose(sown.sum(-1), 1, rtol=1e-5)


def test_of_positions_only_differences_count():
  params, stats, x, apply = _layer('pairwise')
  other = {**params['position'], 'bias': params['position']['bias'] + 2.0}
  outputs = [
    apply({'params': changed, 'batch_stats': stats}, x)[0]
    for changed in (params, params | {'position': other})
  ]
  np.testing.assert_allclose(*outputs, atol=1e-4)


@pytest.mark.parametrize('form', LAYERS)
def test_without_the_convolution_branch_it_is_attention_alone(form):
  params, stats, x, apply = _layer(form, conv=True)
  _, _, _, plain = _layer(form)
  own = {k: v for k, v in params.items() if k not in ('conv', 'attention_rate', 'conv_rate')}
  rates = {'attention_rate': 0.7, 'conv_rate': 0.0}
  y, _ = apply({'params': params | rates, 'batch_stats': stats}, x)
  expected, _ = plain({'params': own, 'batch_stats': stats}, x)
  np.testing.assert_allclose(y, 0.7 * expected, rtol=1e-4, atol=1e-5)


def test_impossible_settings_are_refused():
  for options, message in (
    (dict(dim=12), 'width 12 must be a multiple of 4 and of share=8'),
    (dict(dim=16, kernel=4), 'kernel 4 has no centre: pass 5'),
  ):
    init = functools.partial(san.PairwiseAttention(**options).init, train=False)
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 4, 4, 6)))
  with pytest.raises(ValueError, match='is halved 5 times: pass at least 32'):
    va.create_model('san10_pairwise', image_size=16)


# Published millions, which the own reading does not reach, and the parameters of this reading.
@pytest.mark.parametrize(
  ('size', 'published', 'plain', 'ours'),
  [
    (10, 12.1, 11_841_124, 11_994_612),
    (15, 16.6, 16_181_310, 16_414_134),
    (19, 21.2, 20_518_470, 20_829_278),
  ],
)
def test_parameters_of_acmix_san(size, published, plain, ours):
  params = abstract.variables(f'acmix_san{size}')['params']
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == ours
  # Mixing, the grouped convolution and two scalars per block.
  dims, depths = (64, 256, 512, 1024, 2048), models._DEPTHS[size]
  added = sum(n * (6 * 9 + 81 * c // 4 + 2) for n, c in zip(depths, dims, strict=True))
  assert ours == plain + added
  assert 0 < published - ours / 1e6 < 0.4


def test_taps_are_put_first():
  array = np.arange(2 + 6)
  np.testing.assert_array_equal(models._swap(array, 2, 2), [0, 1, 2, 5, 3, 6, 4, 7])
  np.testing.assert_array_equal(models._swap(array[None], 2, 2, axis=1)[0, 2:], [2, 5, 3, 6, 4, 7])


@pytest.mark.parametrize('form', LAYERS)
def test_official_names_are_all_known(form):
  options = dict(depths=(1, 2), dims=(32, 64), kernels=(3, 5), num_classes=3, image_size=32)
  expected = abstract.variables(f'san10_{form}', **options)
  renames = {'kernel': 'weight', 'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}
  modules = {
    'backbone/stem_norm': 'bn_in',
    'backbone/stem': 'conv_in',
    'head/classifier': 'fc',
    'attn/query': 'sam/conv1',
    'attn/key': 'sam/conv2',
    'attn/value': 'sam/conv3',
    'attn/position': 'sam/conv_p',
    'attn/norm1': 'sam/conv_w/0',
    'attn/hidden': 'sam/conv_w/2',
    'attn/norm2': 'sam/conv_w/3',
    'attn/weights': 'sam/conv_w/5',
    'norm1': 'bn1',
    'norm2': 'bn2',
    'proj': 'conv',
  }
  for i in (1, 2):
    modules[f'backbone/stage{i}_transition/conv'] = f'conv{i - 1}'
    modules[f'backbone/stage{i}_norm'] = f'bn{i - 1}'
    modules |= {f'backbone/stage{i}/block0{j}': f'layer{i - 1}/{j}' for j in (0, 1)}
  state = {}
  for path, leaf in tree.flatten(expected).items():
    name = path.split('/', 1)[1]
    for ours, theirs in modules.items():
      name = name.replace(ours, theirs)
    *parts, last = name.split('/')
    shape = leaf.shape
    if last == 'kernel':
      shape = (*leaf.shape[::-1][:2], 1, 1) if leaf.ndim == 2 else (*leaf.shape[:1:-1], 1, 1)
      shape = shape[:2] if parts == ['fc'] else shape
    state['.'.join(['module', *parts, renames.get(last, last)])] = _normal(*shape)
  variables = va.load_reference(
    f'san10_{form}',
    state,
    source='official',
    **{k: v for k, v in options.items() if k != 'num_classes'},
  )
  found = {k: v.shape for k, v in tree.flatten(variables).items() if 'convention' not in k}
  assert found == {path: leaf.shape for path, leaf in tree.flatten(expected).items()}
