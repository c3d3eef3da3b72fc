"""ACmix: attention on a reflected map and convolution of heads, against their definitions."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import vision_attention as va
from vision_attention import convert
from vision_attention.attention import acmix
from vision_attention.models import registry, tree
from vision_attention.ops import reflected_attention, shift_convolution


def _normal(*shape: int, seed: int = 0) -> jax.Array:
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def _neighbours(x, kernel, stride):
  """Returns `kernel^2` copies of a map, `[b, h, w, taps, ...]`: one neighbourhood per query."""
  size = [-(-n // stride) for n in x.shape[1:3]]
  margin = kernel // 2
  x = jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0), (0, 0)), 'reflect')
  rows, columns = (stride * np.arange(n)[:, None] + np.arange(kernel) for n in size)
  x = x[:, rows[:, None, :, None], columns[:, None, :]]
  return x.reshape(len(x), *size, kernel**2, *x.shape[5:])


def _by_definition(query, key, value, kernel, stride, scale):
  logits = jnp.einsum('bpqnd,bpqtnd->bpqnt', query * scale, _neighbours(key, kernel, stride))
  weights = jax.nn.softmax(logits, -1)
  return jnp.einsum('bpqnt,bpqtne->bpqne', weights, _neighbours(value, kernel, stride)), weights


# More queries than a block, fewer than a kernel, sides that blocks do not divide.
@pytest.mark.parametrize(
  ('height', 'width', 'kernel', 'stride'),
  [(11, 9, 7, 1), (9, 16, 7, 2), (3, 2, 7, 1), (1, 5, 3, 2), (10, 7, 5, 3)],
)
def test_blocks_give_the_attention_of_single_neighbourhoods(height, width, kernel, stride):
  query = _normal(2, -(-height // stride), -(-width // stride), 2, 3)
  key, value = _normal(2, height, width, 2, 3, seed=1), _normal(2, height, width, 2, 4, seed=2)
  options = {'kernel': kernel, 'stride': stride, 'scale': 0.6}

  def ours(*arrays):
    return reflected_attention.reflected_attention(*arrays, **options)

  def slow(*arrays):
    return _by_definition(*arrays, kernel, stride, 0.6)[0]

  def both(function):
    def loss(*arrays):
      y = function(*arrays)
      return jnp.sin(3 * y).sum(), y

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(query, key, value)

  for mine, expected in zip(jax.tree.leaves(both(ours)), jax.tree.leaves(both(slow)), strict=True):
    np.testing.assert_allclose(mine, expected, atol=2e-5)
  weights = reflected_attention.reflected_attention_weights(query, key, **options)
  expected = _by_definition(query, key, value, kernel, stride, 0.6)[1]
  np.testing.assert_allclose(weights, expected.transpose(0, 3, 1, 2, 4), atol=1e-6)
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)


@pytest.mark.optimized
def test_keys_and_values_are_not_copied_for_every_tap():
  """Compiled only, at the size of a first stage."""
  jax.config.update('jax_disable_most_optimizations', False)
  maps = [jax.ShapeDtypeStruct((32, 56, 56, 3, 32), jnp.float32)] * 3

  def temporary(attend):
    def loss(*arrays):
      return attend(*arrays).sum()

    compiled = [jax.jit(f).lower(*maps).compile() for f in (attend, jax.grad(loss, (0, 1, 2)))]
    return [program.memory_analysis().temp_size_in_bytes for program in compiled]

  ours = temporary(functools.partial(reflected_attention.reflected_attention, kernel=7))
  gather = temporary(lambda *arrays: _by_definition(*arrays, 7, 1, 1.0)[0])
  for mine, theirs in zip(ours, gather, strict=True):
    print(f'{mine / 2**20:.0f} MiB against {theirs / 2**20:.0f} MiB')
    assert mine < theirs / 4


def _convolved(maps, mixing, kernel, bias, stride):
  """The definition, output by output."""
  maps, mixing, kernel = (np.asarray(a, np.float64) for a in (maps, mixing, kernel))
  mixed = np.einsum('bhwjd,jt->bhwdt', maps, mixing) + (0 if bias is None else np.asarray(bias))
  side, outputs = len(kernel), kernel.shape[-1] // maps.shape[-1]
  margin = side // 2
  padded = np.pad(mixed, ((0, 0), (margin, margin), (margin, margin), (0, 0), (0, 0)))
  height, width = (-(-n // stride) for n in maps.shape[1:3])
  out = np.zeros((len(maps), height, width, kernel.shape[-1]))
  for y, x, o in np.ndindex(height, width, kernel.shape[-1]):
    window = padded[:, stride * y :, stride * x :, o // outputs][:, :side, :side]
    out[:, y, x, o] = np.einsum('byxt,yxt->b', window, kernel[..., o])
  return out


@hypothesis.given(
  st.integers(1, 3),
  st.sampled_from([1, 3, 5, 12]),
  st.sampled_from([(4, 5), (5, 3), (1, 2)]),
  st.integers(1, 2),
  st.booleans(),
)
def test_shift_convolution_is_its_definition(heads, dim, size, stride, biased):
  maps, mixing = _normal(1, *size, 3 * heads, dim), _normal(3 * heads, 9, seed=1)
  kernel = _normal(3, 3, 9, heads * dim, seed=2)
  bias = _normal(9, seed=3) if biased else None
  y = shift_convolution.shift_convolution(maps, mixing, kernel, bias, stride=stride)
  np.testing.assert_allclose(y, _convolved(maps, mixing, kernel, bias, stride), atol=1e-4)


def test_it_can_be_any_convolution_to_one_head():
  """Nine maps are the nine 1x1 convolutions of a 3x3 convolution; shifts put them together."""
  x, weights = _normal(2, 6, 5, 4), _normal(3, 3, 4, 7, seed=1)
  maps = jnp.einsum('bhwc,yxcd->bhwyxd', x, weights).reshape(2, 6, 5, 9, 7)
  kernel = jnp.asarray(shift_convolution.shift_kernel(3, 21))
  y = shift_convolution.shift_convolution(maps, jnp.eye(9), kernel)
  layout = ('NHWC', 'HWIO', 'NHWC')
  expected = jax.lax.conv_general_dilated(x, weights, (1, 1), 'SAME', dimension_numbers=layout)
  np.testing.assert_allclose(y.reshape(2, 6, 5, 7, 3), expected[..., None] * np.ones(3), atol=1e-4)


def test_it_moves_with_the_image():
  maps, mixing, kernel = _normal(1, 9, 8, 6, 5), _normal(6, 9, seed=1), _normal(3, 3, 9, 10, seed=2)
  for stride in (1, 2):
    convolve = functools.partial(shift_convolution.shift_convolution, stride=stride)
    still = convolve(maps, mixing, kernel)
    moved = convolve(jnp.roll(maps, (stride, stride), (1, 2)), mixing, kernel)
    np.testing.assert_allclose(moved[:, 2:-1, 2:-1], still[:, 1:-2, 1:-2], atol=1e-4)


@functools.cache
def _layer(stride=1):
  layer = acmix.AcmixAttention(dim=12, num_heads=3, stride=stride)
  x = _normal(2, 9, 10, 6)
  params = jax.jit(functools.partial(layer.init, train=False))(jax.random.key(0), x)['params']
  noise = iter(range(100))
  params = jax.tree.map(lambda p: p + 0.3 * _normal(*p.shape, seed=next(noise)), params)
  apply = jax.jit(functools.partial(layer.apply, train=False, mutable=['intermediates']))
  return params, x, lambda params: apply({'params': params}, x)


def _projected(params, name, x):
  y = x @ params[name]['kernel'] + params[name]['bias']
  return y.reshape(*y.shape[:3], 3, 4)


@pytest.mark.parametrize('stride', [1, 2])
def test_without_the_convolution_it_is_attention(stride):
  params, x, apply = _layer(stride)
  y, state = apply(params | {'conv_rate': 0.0})
  query, key, value = (_projected(params, name, x) for name in ('query', 'key', 'value'))
  # Queries meet the difference of positions, `p_query - p_key`, added to the key.
  axes = jnp.linspace(-1, 1, 9), jnp.linspace(-1, 1, 10)
  grid = jnp.stack([*jnp.meshgrid(axes[1], axes[0])], -1)
  position = grid @ params['position']['kernel'] + params['position']['bias']
  far = _neighbours(position[None, :, :, None], 7, stride)
  near = position[None, ::stride, ::stride, None, None]
  placed = _neighbours(key, 7, stride) + near - far
  logits = jnp.einsum('bpqnd,bpqtnd->bpqnt', query[:, ::stride, ::stride] * 4**-0.5, placed)
  weights = jax.nn.softmax(logits, -1)
  expected = jnp.einsum('bpqnt,bpqtnd->bpqnd', weights, _neighbours(value, 7, stride))
  expected = params['attention_rate'] * expected.reshape(y.shape)
  np.testing.assert_allclose(y, expected, atol=1e-5)
  [sown] = jax.tree.leaves(state['intermediates'])
  np.testing.assert_allclose(sown, weights.transpose(0, 3, 1, 2, 4), atol=1e-5)


def test_without_attention_shifts_of_one_head_are_a_box_filter():
  params, x, apply = _layer()
  chosen = jnp.zeros((9, 9)).at[7].set(1.0)  # the second head's values, for every tap
  conv = {'mixing': chosen, 'kernel': jnp.asarray(shift_convolution.shift_kernel(3, 12))}
  y, _ = apply(params | {'attention_rate': 0.0, 'conv_rate': 2.0, 'conv': conv})
  head = jnp.pad(_projected(params, 'value', x)[:, :, :, 1], ((0, 0), (1, 1), (1, 1), (0, 0)))
  box = sum(head[:, i : i + 9, j : j + 10] for i in range(3) for j in range(3))
  np.testing.assert_allclose(y.reshape(2, 9, 10, 4, 3), 2 * box[..., None] * np.ones(3), atol=1e-4)


def test_the_bias_of_positions_has_no_effect():
  params, _, apply = _layer()
  other = {**params['position'], 'bias': params['position']['bias'] + 3.0}
  np.testing.assert_allclose(apply(params)[0], apply(params | {'position': other})[0], atol=1e-5)
  other = {**params['position'], 'kernel': params['position']['kernel'] + 3.0}
  assert jnp.abs(apply(params)[0] - apply(params | {'position': other})[0]).max() > 1e-2


def test_branches_begin_as_halves_and_convolutions_as_shifts():
  layer = acmix.AcmixAttention(dim=8, num_heads=2)
  shapes = jax.jit(functools.partial(layer.init, train=False))(
    jax.random.key(0), _normal(1, 4, 4, 8)
  )
  params = shapes['params']
  assert params['attention_rate'] == params['conv_rate'] == 0.5
  assert params['conv']['kernel'].shape == (3, 3, 9, 8)
  for tap in range(9):
    of_tap = np.zeros((3, 3, 8))
    of_tap[tap // 3, tap % 3] = 1
    np.testing.assert_array_equal(params['conv']['kernel'][:, :, tap], of_tap)


def test_impossible_settings_are_refused():
  with pytest.raises(ValueError, match='5 heads do not divide width 12'):
    jax.eval_shape(
      functools.partial(acmix.AcmixAttention(dim=12, num_heads=5).init, train=False),
      jax.random.key(0),
      _normal(1, 4, 4, 3),
    )
  with pytest.raises(ValueError, match='kernel 4 has no centre: pass 5'):
    reflected_attention.reflected_attention(*[_normal(1, 4, 4, 1, 2)] * 3, kernel=4)
  maps = [_normal(1, 5, 4, 1, 2)] * 3
  with pytest.raises(ValueError, match='a map of 5x4 has 3x2 of them at stride 2'):
    reflected_attention.reflected_attention(*maps, kernel=3, stride=2)


# Published millions; those of the released code with 4 heads (exact in the model's table) and 8.
@pytest.mark.parametrize(
  ('name', 'published', 'released', 'with_eight'),
  [
    ('acmix_resnet_26', 10.6, 10_487_816, 10_487_984),
    ('acmix_resnet_38', 14.6, 14_410_896, 14_411_136),
    ('acmix_resnet_50', 18.6, 18_333_976, 18_334_288),
  ],
)
def test_parameters_are_those_of_the_released_code_and_not_the_published(
  name, published, released, with_eight
):
  assert registry.variant_of(name).params == released
  model, info = va.create_model(name, num_heads=8)
  params = convert.abstract_variables(model, info)['params']
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == with_eight
  assert 0.1 < published - released / 1e6 < 0.3


def _official_state(depths, width, heads, classes):
  """A state dict in the official names and layout, written by hand."""
  draw = iter(range(10_000))
  state = {}

  def add(name, *shape):
    state[name] = np.random.default_rng(next(draw)).standard_normal(shape, np.float32)

  def norm(name, dim):
    for leaf in ('weight', 'bias', 'running_mean', 'running_var'):
      add(f'{name}.{leaf}', dim)

  add('conv1.weight', width, 3, 7, 7)
  norm('bn1', width)
  inputs = width
  for i, (depth, n) in enumerate(zip(depths, heads, strict=True)):
    dim = width * 2**i
    for j in range(depth):
      block = f'layer{i + 1}.{j}'
      add(f'{block}.conv1.weight', dim, inputs, 1, 1)
      for part in ('conv1', 'conv2', 'conv3'):
        add(f'{block}.conv2.{part}.weight', dim, dim, 1, 1)
        add(f'{block}.conv2.{part}.bias', dim)
      add(f'{block}.conv2.conv_p.weight', dim // n, 2, 1, 1)
      add(f'{block}.conv2.conv_p.bias', dim // n)
      add(f'{block}.conv2.fc.weight', 9, 3 * n, 1, 1)
      add(f'{block}.conv2.dep_conv.weight', dim, 9, 3, 3)
      add(f'{block}.conv2.rate1', 1)
      add(f'{block}.conv2.rate2', 1)
      add(f'{block}.conv3.weight', 4 * dim, dim, 1, 1)
      for k, channels in ((1, dim), (2, dim), (3, 4 * dim)):
        norm(f'{block}.bn{k}', channels)
      if not j:
        add(f'{block}.downsample.0.weight', 4 * dim, inputs, 1, 1)
        norm(f'{block}.downsample.1', 4 * dim)
      inputs = 4 * dim
  add('fc.weight', classes, inputs)
  add('fc.bias', classes)
  return state


@pytest.mark.parametrize('heads', [(2, 2), (1, 4)])
def test_official_weights_of_any_number_of_heads_are_read(heads):
  state = _official_state((1, 2), 8, heads, 5)
  prefixed = {f'module.{key}': value for key, value in state.items()}
  options = {'depths': (1, 2), 'width': 8}
  variables = va.load_reference('acmix_resnet_26', prefixed, source='official', **options)
  paths = tree.flatten(variables['params']['backbone'])
  assert paths['stage2/block01/attn/conv/mixing'].shape == (3 * heads[1], 9)
  theirs = state['layer2.1.conv2.dep_conv.weight']
  np.testing.assert_array_equal(
    paths['stage2/block01/attn/conv/kernel'], theirs.transpose(2, 3, 1, 0)
  )
  assert paths['stage1/block00/attn/conv_rate'] == state['layer1.0.conv2.rate2'][0]
  assert paths['stage1/block00/attn/attention_rate'] == state['layer1.0.conv2.rate1'][0]
