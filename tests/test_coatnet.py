"""What is particular to CoAtNet in its default form: equations 3 to 5, tables, sizes, layouts."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import vision_attention as va
from tests import abstract
from vision_attention import convert
from vision_attention.attention import relative
from vision_attention.layers import mbconv
from vision_attention.models import coatnet, registry, transfer, tree
from vision_attention.ops import relative_position

pytestmark = pytest.mark.fast
TINY = dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), stem_dim=8, head_dim=4)
WIDTH, DIM, HEAD_DIM = 4, 6, 3
SIDES = st.integers(1, 7)


def _map(*shape):
  return np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)


def _block(stage, size, stride=2, **options):
  """Returns the first block of a stage as a function, drawn variables of it, and a map.

  It is that of the default options but for the given ones, from `WIDTH` to `DIM` channels.
  """
  parts = coatnet.build(
    num_classes=1, image_size=(32, 32), dtype=jnp.float32, param_dtype=jnp.float32, stem_dim=8,
    depths=(1,) * 4, dims=(DIM,) * 4, head_dim=HEAD_DIM, strides=(stride,) * 4, **options,
  )  # fmt: skip
  block = parts.backbone.keywords['stages'][stage][0]()
  x = _map(*size, WIDTH)
  shapes = jax.eval_shape(functools.partial(block.init, train=False), jax.random.key(1), x)
  apply = jax.jit(functools.partial(block.apply, train=False))
  return lambda variables, x: np.asarray(apply(variables, x)), abstract.drawn(shapes), x


def _without(variables, *modules):
  """Returns variables in which the parameters of some modules are zero."""
  params = {k: jax.tree.map(np.zeros_like, v) if k in modules else v
            for k, v in variables['params'].items()}  # fmt: skip
  return {**variables, 'params': params}


def _dense(params, x):
  kernel = params['kernel']
  return x @ kernel.reshape(kernel.shape[-2:]) + params.get('bias', 0.0)


def _batch_norm(variables, name, x):
  params, stats = variables['params'][name], variables['batch_stats'][name]
  return (x - stats['mean']) / np.sqrt(stats['var'] + 1e-3) * params['scale'] + params['bias']


def _layer_norm(params, x):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5)
  return x * params['scale'] + params['bias']


def _gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


def _depthwise(x, kernel, padding):
  """Convolves every channel with its own `[height, width, 1, channels]`."""
  height, width = x.shape[1:3]
  padded = np.pad(x, ((0, 0), *padding, (0, 0)))
  found = np.zeros_like(x)
  for i in range(kernel.shape[0]):
    for j in range(kernel.shape[1]):
      found += padded[:, i : i + height, j : j + width] * kernel[i, j, 0]
  return found


def _pooled(x, reduce=np.max):
  """Reduces every 2x2 pixels, of which those at an odd end are fewer."""
  rows, columns = (range(0, side, 2) for side in x.shape[1:3])
  return np.stack(
    [np.stack([reduce(x[:, i : i + 2, j : j + 2], (1, 2)) for j in columns], 1) for i in rows], 1
  )


def _close(got, expected):
  np.testing.assert_allclose(got, expected, atol=1e-5 * (1 + np.abs(expected).max()))


@pytest.mark.parametrize('size', [(6, 8), (5, 7), (1, 3)])
def test_the_stride_of_a_convolutional_block_sits_in_its_expansion(size):
  """Equation 5: `Proj(Pool(x)) + Conv(DepthConv(Conv(Norm(x), stride=2)))`."""
  apply, variables, x = _block(0, size)
  params = variables['params']
  y = _batch_norm(variables, 'pre_norm', x)[:, ::2, ::2]  # and no activation
  assert params['expand']['kernel'].shape == (1, 1, WIDTH, 4 * DIM)
  y = _gelu(_batch_norm(variables, 'norm1', _dense(params['expand'], y)))
  y = _depthwise(y, params['depthwise']['kernel'], ((1, 1), (1, 1)))
  y = _gelu(_batch_norm(variables, 'norm2', y))
  hidden = _dense(params['se']['squeeze'], y.mean((1, 2), keepdims=True))
  assert hidden.shape[-1] == int(0.25 * DIM)
  y = y * _sigmoid(_dense(params['se']['excite'], hidden * _sigmoid(hidden)))
  expected = _dense(params['shortcut']['proj'], _pooled(x)) + _dense(params['project'], y)
  _close(apply(variables, x), expected)
  biased = {path.rsplit('/', 1)[0] for path in tree.flatten(params) if path.endswith('/bias')}
  norms = {'pre_norm', 'norm1', 'norm2'}
  assert biased == norms | {'se/squeeze', 'se/excite', 'project', 'shortcut/proj'}


@pytest.mark.parametrize('size', [(6, 8), (5, 7)])
@pytest.mark.parametrize('stride_in', mbconv.STRIDES)
def test_only_the_shortcut_sees_odd_pixels(stride_in, size):
  apply, variables, x = _block(0, size, stride_in=stride_in)
  rows, columns = np.indices(size)
  odd = ((rows % 2 == 1) | (columns % 2 == 1))[..., None]
  # Above all that a window holds, so that the pool must give them.
  other = np.where(odd, 10.0 + np.abs(x), x)
  branch, shortcut = _without(variables, 'shortcut'), _without(variables, 'project')
  if stride_in == 'expand':
    np.testing.assert_array_equal(apply(branch, other), apply(branch, x))
  else:
    assert np.abs(apply(branch, other) - apply(branch, x)).max() > 0.1
  pooled = _dense(variables['params']['shortcut']['proj'], _pooled(other))
  _close(apply(shortcut, other), pooled)
  # Each of them is seen by one place. Where both ends are odd, the last window is an even pixel.
  seen = np.abs(apply(shortcut, other) - apply(shortcut, x)).max((0, 3)) > 0.1
  places = [slice(0, side // 2) if side % 2 else slice(None) for side in size]
  assert seen[places[0]].all()
  assert seen[:, places[1]].all()
  assert seen[-1, -1] == (size == (6, 8))
  one = x.copy()
  one[:, 3, 2] += 100.0
  seen = np.abs(apply(shortcut, one) - apply(shortcut, x)).max((0, 3)) > 0.1
  assert np.argwhere(seen).tolist() == [[1, 1]]


def _attention(params, x):
  """Equation 3 with the table `[heads, query - key]`, entry by entry."""
  batch, height, width, _ = x.shape
  tokens = x.reshape(batch, height * width, -1)
  heads = [
    _dense(params[name], tokens).reshape(batch, height * width, -1, HEAD_DIM)
    for name in ('query', 'key', 'value')
  ]
  assert params['query']['kernel'].shape == (WIDTH, DIM)
  assert params['relative_position'].shape == (DIM // HEAD_DIM, 2 * height - 1, 2 * width - 1)
  places = [(i, j) for i in range(height) for j in range(width)]
  bias = np.stack(
    [
      [params['relative_position'][:, i - k + height - 1, j - m + width - 1] for k, m in places]
      for i, j in places
    ]
  )
  logits = np.einsum('bqnd,bknd->bnqk', *heads[:2]) * HEAD_DIM**-0.5 + bias.transpose(2, 0, 1)
  weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  mixed = np.einsum('bnqk,bknd->bqnd', weights, heads[2])
  return _dense(params['proj'], mixed.reshape(batch, height, width, DIM))


@pytest.mark.parametrize('size', [(4, 6), (5, 3)])
def test_a_strided_transformer_block_pools_both_branches(size):
  """Equation 4: `Proj(Pool(x)) + Attention(Pool(Norm(x)))`, then the FFN."""
  apply, variables, x = _block(2, size)
  params = variables['params']
  y = _pooled(_layer_norm(params['norm1'], x))
  # What pooling and norm do not share: the other order is another block.
  assert np.abs(y - _layer_norm(params['norm1'], _pooled(x))).max() > 0.1
  x = _dense(params['shortcut']['proj'], _pooled(x)) + _attention(params['attn'], y)
  y = _dense(params['mlp']['expand'], _layer_norm(params['norm2'], x))
  assert y.shape[-1] == 4 * DIM
  expected = x + _dense(params['mlp']['project'], _gelu(y))
  _close(apply(variables, _block(2, size)[2]), expected)


def test_a_wider_transformer_block_without_stride_projects_alone():
  """As the transformer part of the third resolution of CoAtNet-6 begins."""
  apply, variables, x = _block(3, (3, 4), stride=1)
  params = variables['params']
  y = _dense(params['shortcut']['proj'], x)
  y = y + _attention(params['attn'], _layer_norm(params['norm1'], x))
  _close(apply(_without(variables, 'mlp'), x), y)


@hypothesis.given(SIDES, SIDES)
def test_the_bias_depends_on_the_offset_alone(height, width):
  rng = np.random.default_rng(0)
  table = rng.standard_normal((2, 2 * height - 1, 2 * width - 1)).astype(np.float32)
  bias = jax.jit(relative_position.relative_bias, static_argnums=(1, 2))(table, height, width)
  bias = np.asarray(bias).reshape(2, height, width, height, width)
  for down in range(height):
    for right in range(width):
      # Query and key moved alike, as far as both stay within the map.
      rows, columns = height - down, width - right
      np.testing.assert_array_equal(
        bias[:, down:, right:, down:, right:], bias[:, :rows, :columns, :rows, :columns]
      )
      # Query below and to the right of the key.
      np.testing.assert_array_equal(
        bias[:, down, right, 0, 0], table[:, height - 1 + down, width - 1 + right]
      )
      np.testing.assert_array_equal(
        bias[:, 0, right, down, 0], table[:, height - 1 - down, width - 1 + right]
      )


def test_a_table_of_another_map_is_refused():
  with pytest.raises(ValueError, match='5x7 offsets belongs to a map of 3x4, not 4x4: resize it'):
    relative_position.relative_bias(jnp.zeros((2, 5, 7)), 4, 4)
  with pytest.raises(ValueError, match='relative positions need a map'):
    relative.RelativeAttention(6, 2).init(jax.random.key(0), jnp.zeros((1, 5, 6)), train=False)


def _relative(size):
  module = relative.RelativeAttention(6, 2)
  x = _map(*size, 6)
  shapes = jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(1), x)
  params = abstract.drawn(shapes)['params']
  apply = jax.jit(functools.partial(module.apply, train=False))
  return lambda params, x: np.asarray(apply({'params': params}, x)), params, x


def test_a_constant_in_the_table_changes_nothing():
  attend, params, x = _relative((3, 4))
  table, y = params['relative_position'], attend(params, x)
  _close(attend({**params, 'relative_position': table + np.float32([[[3.0]], [[-2.0]]])}, x), y)
  assert np.abs(attend({**params, 'relative_position': 2 * table}, x) - y).max() > 1e-2


def test_without_queries_attention_is_a_convolution_that_the_table_gives():
  attend, params, x = _relative((3, 4))
  zero = jax.tree.map(np.zeros_like, params['query'])
  eye = {'kernel': np.eye(6, dtype=np.float32), 'bias': np.zeros(6, np.float32)}
  params = {**params, 'query': zero, 'value': eye, 'proj': eye}
  # Two heads of three channels, and a sum over all keys of `exp(P[query - key])`.
  kernel = np.exp(params['relative_position']).repeat(3, 0).transpose(1, 2, 0)[::-1, ::-1, None]
  convolve = lambda x: _depthwise(x, kernel, ((2, 2), (3, 3)))
  _close(attend(params, x), convolve(x) / convolve(np.ones_like(x)))
  flat = {**params, 'relative_position': np.zeros_like(params['relative_position'])}
  _close(attend(flat, x), np.broadcast_to(x.mean((1, 2), keepdims=True), x.shape))


def _resized(table, rows, columns):
  """Bilinear with half-pixel centres, and what lies beyond the ends repeated."""

  def weights(new, old):
    matrix = np.zeros((new, old))
    for i in range(new):
      place = (i + 0.5) * old / new - 0.5
      low = int(np.floor(place))
      for k, share in ((low, low + 1 - place), (low + 1, place - low)):
        matrix[i, min(max(k, 0), old - 1)] += share
    return matrix

  y, x = weights(rows, table.shape[1]), weights(columns, table.shape[2])
  return np.einsum('ry,nyx,cx->nrc', y, table, x)


@hypothesis.given(SIDES, SIDES, SIDES, SIDES)
def test_tables_are_resized_bilinearly(height, width, other_height, other_width):
  shape = (2, 2 * height - 1, 2 * width - 1)
  table = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
  other = (2, 2 * other_height - 1, 2 * other_width - 1)
  got = relative_position.resize_table(table, other)
  np.testing.assert_allclose(got, _resized(table, *other[1:]), atol=1e-5)
  np.testing.assert_allclose(relative_position.resize_table(table, shape), table, atol=1e-6)


def test_a_model_takes_tables_to_another_resolution():
  small, large = (
    abstract.variables('coatnet_0', image_size=size, num_classes=3, **TINY)
    for size in ((64, 96), (128, 64))
  )
  loaded = abstract.drawn(small)
  variables, report = transfer.transfer('coatnet_0', loaded, large, reinit=())
  path = 'params/backbone/stage{}/block00/attn/relative_position'
  assert report.resized == (path.format(3), path.format(4))
  for stage, before, after in ((3, (7, 11), (15, 7)), (4, (3, 5), (7, 3))):
    old, new = (tree.flatten(v)[path.format(stage)] for v in (loaded, variables))
    assert (old.shape[1:], new.shape[1:]) == (before, after)
    np.testing.assert_allclose(new, _resized(old, *after), atol=1e-5)


@hypothesis.given(SIDES, SIDES)
def test_pooling_rounds_up_and_pads_with_nothing(height, width):
  x = -1.0 - np.abs(_map(height, width, 2))
  for kind, reduce in (('max', np.max), ('avg', np.mean)):
    got = jax.jit(mbconv.halve, static_argnums=1)(x, kind)
    assert got.shape == (2, -(-height // 2), -(-width // 2), 2)
    np.testing.assert_allclose(got, _pooled(x, reduce), rtol=1e-6)


@pytest.mark.parametrize('size', [(64, 96), (75, 50), (33, 31), (1, 17)])
@pytest.mark.parametrize('stride_in', mbconv.STRIDES)
def test_maps_are_halved_and_rounded_up(size, stride_in):
  features = abstract.features('coatnet_0', size, stride_in=stride_in, **TINY)
  shapes = abstract.variables('coatnet_0', image_size=size, stride_in=stride_in, **TINY)
  for i in range(1, 5):
    sides = tuple(-(-side // 2 ** (i + 1)) for side in size)
    assert features[f'stage{i}'].shape == (2, *sides, TINY['dims'][i - 1])
    if i > 2:
      table = tree.flatten(shapes)[f'params/backbone/stage{i}/block00/attn/relative_position']
      assert table.shape[1:] == tuple(2 * side - 1 for side in sides)


def _kinds(**options):
  """Returns the letter of every block by what it holds, and the paths of all arrays."""
  paths = tree.flatten(abstract.variables('coatnet_0', **options)['params']['backbone'])
  blocks = {}
  for path in paths:
    if path.startswith('stage'):
      stage, block, module, *_ = path.split('/')
      blocks.setdefault((stage, block), set()).add(module)
  letters = {'depthwise': 'C', 'attn': 'T'}
  return [
    ''.join(letters[module] for module in modules if module in letters)
    for _, modules in sorted(blocks.items())
  ], paths


@pytest.mark.parametrize('layout', ['CCTT', 'CCCT', 'CCCC', 'CTTT', 'TTTT'])
def test_layouts_choose_the_blocks_they_name(layout):
  depths = (2, 1, 2, 1)
  kinds, paths = _kinds(image_size=64, **{**TINY, 'depths': depths}, layout=layout)
  expected = ''.join(kind * depth for kind, depth in zip(layout, depths, strict=True))
  assert ''.join(kinds) == expected
  # Of blocks whose width does not change, a shortcut has no parameters.
  assert 'stage1/block00/shortcut/proj/kernel' not in paths
  assert 'stage3/block00/shortcut/proj/kernel' in paths
  assert not [path for path in paths if 'block01/shortcut' in path]


def test_the_default_is_two_stages_of_either_and_both_parts_of_six_share_a_resolution():
  assert ''.join(_kinds(image_size=64, **TINY)[0]) == 'CCTT'
  options = {**registry.variant_of('coatnet_6').options, 'dims': (8, 8, 8, 16, 16), 'stem_dim': 8}
  options |= {'depths': (1,) * 5, 'head_dim': 4}
  kinds, paths = _kinds(image_size=64, **options)
  assert ''.join(kinds) == 'CCCTT'
  tables = {path: leaf.shape for path, leaf in paths.items() if 'relative_position' in path}
  assert tables == {
    'stage4/block00/attn/relative_position': (4, 7, 7),
    'stage5/block00/attn/relative_position': (4, 3, 3),
  }
  assert 'stage4/block00/shortcut/proj/kernel' in paths


def test_heads_are_32_wide_and_blocks_are_dropped_by_their_number():
  options = {'drop_path': 0.2, **registry.variant_of('coatnet_0').options}
  parts = coatnet.build(
    num_classes=1, image_size=(224, 224), dtype=jnp.float32, param_dtype=jnp.float32, **options
  )
  blocks = [block for blocks in parts.backbone.keywords['stages'] for block in blocks]
  rates = [block.keywords['drop_path'] for block in blocks]
  np.testing.assert_allclose(rates, [0.2 * b / 12 for b in range(12)])
  assert [block.keywords['stride'] for block in blocks] == [2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 2, 1]
  table = abstract.variables('coatnet_0')['params']['backbone']['stage3']['block01']['attn']
  assert table['relative_position'].shape == (384 // 32, 27, 27)


def test_impossible_layouts_are_refused():
  create = functools.partial(va.create_model, 'coatnet_0')
  with pytest.raises(ValueError, match="stage in layout 'V' is unknown: allowed: C, T"):
    create(layout='CCTV')
  with pytest.raises(ValueError, match=r"layout 'CCT', depths .* must have one entry per stage"):
    create(layout='CCT')
  model, info = create(stride_in='expnad', **TINY)
  with pytest.raises(ValueError, match="stride_in 'expnad' is unknown: did you mean 'expand'"):
    convert.abstract_variables(model, info)
