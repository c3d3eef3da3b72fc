"""What is particular to MViTv2: pooling, decomposed positions, expansion, windows, class token."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vision_attention as va
from configs import mvitv2_tiny
from tests import abstract
from vision_attention import convert
from vision_attention.attention import mhsa
from vision_attention.attention import pooling_attention as pooling
from vision_attention.models import mvitv2
from vision_attention.ops import decomposed_position, relative_position

TINY = dict(depths=(1, 2), dim=8, num_heads=1, kv_stride=2)


@pytest.mark.parametrize(
  ('name', 'size', 'counted'),
  [
    ('mvitv2_tiny', 224, 4.70),
    ('mvitv2_base', 384, 36.69),
  ],
)
def test_multiply_adds_are_those_of_the_code(name, size, counted):
  model, _ = va.create_model(name, image_size=size)
  assert abstract.macs(model, image_size=size) / 1e9 == pytest.approx(counted, rel=0.01)


def test_tables_and_strides_are_those_of_the_code():
  backbone = abstract.variables('mvitv2_tiny')['params']['backbone']
  lengths = {
    f'{i}.{j}': backbone[f'stage{i}'][f'block{j:02d}']['attn']['relative_height'].shape[0]
    for i, depth in enumerate((1, 2, 5, 2), 1)
    for j in range(depth)
  }
  first = {'1.0': 111, '2.0': 55, '2.1': 55, '3.0': 55, '3.1': 27, '4.0': 27, '4.1': 13}
  assert first.items() <= lengths.items()


def _attention(shape, seed=0, **fields):
  fields = dict(dim=6, num_heads=2) | fields
  module = pooling.PoolingAttention(**fields)
  if fields.get('size'):
    x = jax.random.normal(jax.random.key(0), (2, 1 + math.prod(fields['size']), 5))
  else:
    x = jax.random.normal(jax.random.key(0), (2, *shape, 5))
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(1), x, train=False))
  return x, abstract.drawn(shapes['params'], seed), functools.partial(module.apply, train=False)


def _plain(params):
  """Sets pooling to the centre, norms to the identity as far as they can be, tables to zero."""
  params = dict(params)
  for name in ('query', 'key', 'value'):
    kernel = np.zeros_like(params[f'pool_{name}']['kernel'])
    kernel[1, 1] = 1
    params[f'pool_{name}'] = {'kernel': kernel}
  for axis in ('height', 'width'):
    params[f'relative_{axis}'] = np.zeros_like(params[f'relative_{axis}'])
  return params


def test_without_pooling_and_tables_it_is_plain_attention(monkeypatch):
  monkeypatch.setattr(
    pooling.norm.LayerNorm, '__call__', lambda self, x, *, train=False: x, raising=True
  )
  x, params, apply = _attention((3, 2), residual_pooling=False)
  params = {k: v for k, v in _plain(params).items() if not k.startswith('norm')}
  plain = {k: params[k] for k in ('query', 'key', 'value', 'proj')}
  expected = mhsa.MultiHeadAttention(6, 2).apply({'params': plain}, x, train=False)
  np.testing.assert_allclose(apply({'params': params}, x), expected, atol=1e-5)


@given(st.integers(1, 9), st.integers(1, 9))
def test_offsets_lie_in_the_table(queries, keys):
  index = decomposed_position.offsets(queries, keys)
  assert index.shape == (queries, keys)
  assert index.min() >= 0
  assert index.max() < decomposed_position.length(queries, keys)
  if queries == keys:
    assert (np.diag(index) == keys - 1).all()
  finer = max(queries, keys)
  if finer % min(queries, keys) == 0:
    down, up = finer // queries, finer // keys
    exact = [[down * i - up * j + (keys - 1) * up for j in range(keys)] for i in range(queries)]
    np.testing.assert_array_equal(index, exact)


def test_two_tables_are_one_of_their_sums():
  """On maps of one size the logits are those of a table of both offsets."""
  rng = np.random.default_rng(0)
  query = jnp.asarray(rng.standard_normal((2, 2, 3, 2, 4)), jnp.float32)
  rows, columns = (jnp.asarray(rng.standard_normal((n, 4)), jnp.float32) for n in (3, 5))
  joint = (rows[:, None] + columns[None]).transpose(2, 0, 1)
  vectors = relative_position.relative_bias(joint, 2, 3)  # d q k
  expected = jnp.einsum('bqnd,dqk->bnqk', query.reshape(2, 6, 2, 4), vectors)
  logits = decomposed_position.decomposed_logits(query, rows, columns, (2, 3))
  np.testing.assert_allclose(logits, expected, atol=1e-5)
  with pytest.raises(ValueError, match='tables of 3 and 5 offsets do not belong to queries on 2x3'):
    decomposed_position.decomposed_logits(query, rows, columns, (4, 3))


def test_the_position_is_not_scaled():
  """What a table says is added to logits as it is: the definition, written out."""
  x, params, apply = _attention((4, 2), stride=2, residual_pooling=False)
  module = pooling.PoolingAttention(6, num_heads=2, stride=2, residual_pooling=False)
  _, state = module.apply({'params': params}, x, train=False, mutable='intermediates')
  [weights] = state['intermediates']['attention']
  zero = {k: np.zeros_like(v) if k.startswith('relative') else v for k, v in params.items()}
  _, state = module.apply({'params': zero}, x, train=False, mutable='intermediates')
  ratio = jnp.log(weights) - jnp.log(state['intermediates']['attention'][0])
  query = x @ params['query']['kernel'] + params['query']['bias']
  query = pooling.HeadPool(2, 3, 2).apply({'params': params['pool_query']}, query)
  query = query.reshape(2, 2, 1, 2, 3)
  query = query - query.mean(-1, keepdims=True)
  query = query / jnp.sqrt(jnp.square(query).mean(-1, keepdims=True) + 1e-6)
  query = query * params['norm_query']['scale'] + params['norm_query']['bias']
  tables = [jnp.asarray(params[f'relative_{axis}']) for axis in ('height', 'width')]
  logits = decomposed_position.decomposed_logits(query, *tables, (4, 2))
  # Up to what shifts all logits of a query alike.
  centred = lambda a: a - a.mean(-1, keepdims=True)
  np.testing.assert_allclose(centred(ratio), centred(logits), atol=1e-4)
  assert apply({'params': params}, x).shape == (2, 2, 1, 6)


def test_residual_pooling_adds_the_queries():
  x, params, apply = _attention((3, 2), stride=2)
  params['norm_value'] = jax.tree.map(np.zeros_like, params['norm_value'])
  _, without, plain = _attention((3, 2), stride=2, residual_pooling=False)
  without |= {'norm_value': params['norm_value']}
  np.testing.assert_allclose(
    plain({'params': without}, x), jnp.broadcast_to(params['proj']['bias'], (2, 2, 1, 6)), atol=1e-6
  )
  assert jnp.abs(apply({'params': params}, x) - params['proj']['bias']).max() > 0.1


def test_heads_share_their_pooling():
  x, params, apply = _attention((3, 4), kv_stride=2)
  swap = np.array([3, 4, 5, 0, 1, 2])
  moved = dict(params)
  for name in ('query', 'key', 'value'):
    moved[name] = {k: v[..., swap] for k, v in params[name].items()}
  moved['proj'] = dict(params['proj'], kernel=params['proj']['kernel'][swap])
  np.testing.assert_allclose(apply({'params': moved}, x), apply({'params': params}, x), atol=1e-5)


def test_a_window_over_the_map_is_global_and_others_keep_apart():
  x, params, apply = _attention((4, 8), kv_stride=2)
  _, _, windowed = _attention((4, 8), kv_stride=2, window=8)
  np.testing.assert_allclose(
    windowed({'params': params}, x), apply({'params': params}, x), atol=1e-5
  )
  # Pooling of one pixel looks across no border.
  fields = dict(kernel_size=1, window=4)
  x, params, apply = _attention((4, 8), **fields)
  left = apply({'params': params}, x)[:, :, :4]
  np.testing.assert_allclose(left, apply({'params': params}, x[:, :, :4]), atol=1e-5)


def test_padding_of_windows_is_masked_or_seen():
  fields = dict(kernel_size=1, window=2)
  x, params, apply = _attention((2, 3), **fields)
  _, _, attend = _attention((2, 3), padding='attend', **fields)
  masked, seen = apply({'params': params}, x), attend({'params': params}, x)
  np.testing.assert_allclose(masked[:, :, :2], seen[:, :, :2], atol=1e-6)
  assert jnp.abs(masked[:, :, 2] - seen[:, :, 2]).max() > 1e-3
  # The last column sees itself alone, so what stands in for the rest does not matter.
  module = pooling.PoolingAttention(6, num_heads=2, **fields)
  _, state = module.apply({'params': params}, x, train=False, mutable='intermediates')
  [weights] = state['intermediates']['attention']
  np.testing.assert_allclose(weights.reshape(2, 2, 2, 4, 2, 2)[:, 1, ..., 1], 0, atol=1e-9)


def test_a_class_token_is_not_pooled_and_sees_no_positions():
  x, params, apply = _attention(None, size=(2, 3), stride=2)
  y = apply({'params': params}, x)
  assert y.shape == (2, 1 + 1 * 2, 6)
  moved = {k: v + 1.0 if k.startswith('relative') else v for k, v in params.items()}
  moved['relative_height'] = params['relative_height'][::-1]
  other = apply({'params': moved}, x)
  np.testing.assert_allclose(other[:, 0], y[:, 0], atol=1e-6)
  assert jnp.abs(other[:, 1:] - y[:, 1:]).max() > 1e-3
  _, _, added = _attention(None, size=(2, 3), stride=2, residual_class=True)
  full = added({'params': params}, x)
  np.testing.assert_allclose(full[:, 1:], y[:, 1:], atol=1e-6)
  assert jnp.abs(full[:, 0] - y[:, 0]).max() > 1e-2


@pytest.mark.parametrize('size', [(32, 32), (36, 70), (225, 97)])
@pytest.mark.parametrize(
  'options',
  [{}, {'class_token': True}, {'windows': (8, 4, 2, 2)}, {'expand': 'mlp'}, {'attn': 'mhsa'}],
  ids=str,
)
def test_any_image_size_is_taken(size, options):
  model, info = va.create_model(
    'mvitv2_tiny', image_size=size, **(dict(depths=(1, 2, 2, 1), dim=8) | options)
  )
  shapes = convert.abstract_variables(model, info)
  images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
  features = jax.eval_shape(functools.partial(model.apply, method='features'), shapes, images)
  maps = [tuple(-(-side // stride) for side in size) for stride in (4, 8, 16, 32)]
  assert [features[f'stage{i}'].shape[1:3] for i in (1, 2, 3, 4)] == maps
  assert ('cls' in features) == ('class_token' in options)


def test_hybrid_windows_are_global_at_the_ends_of_stages():
  parts = mvitv2.build(
    num_classes=1, image_size=(224, 224), dtype=jnp.float32, param_dtype=jnp.float32,
    depths=(1, 2, 5, 2), dim=96, num_heads=1, windows=(56, 28, 14, 7), global_kv_stride=2,
  )  # fmt: skip
  fields = [
    [(f['window'], f['stride'], f['kv_stride']) for f in (b.keywords['attn'].keywords for b in s)]
    for s in parts.backbone.keywords['stages']
  ]
  assert fields == [
    [(56, 1, 4)],
    [(56, 2, 2), (None, 1, 4)],
    [(28, 2, 1), (14, 1, 1), (14, 1, 1), (14, 1, 1), (None, 1, 2)],
    [(14, 2, 1), (None, 1, 1)],
  ]


def test_options_that_cannot_be_are_refused():
  with pytest.raises(ValueError, match="expand 'mpl' is unknown: did you mean 'mlp'"):
    va.create_model('mvitv2_tiny', expand='mpl')
  with pytest.raises(ValueError, match='go without a class token'):
    va.create_model('mvitv2_small_cls', windows=(56, 28, 14, 7))
  with pytest.raises(ValueError, match='takes neither a class token nor windows'):
    va.create_model('mvitv2_small_cls', attn='mhsa')
  with pytest.raises(ValueError, match='num_heads 5 do not divide the width 96'):
    va.create_model('mvitv2_tiny', num_heads=5)
  with pytest.raises(ValueError, match='window 3 must be a multiple of stride 2'):
    pooling.PoolingAttention(4, window=3, stride=2).init(
      jax.random.key(0), jnp.zeros((1, 4, 4, 4)), train=False
    )


def _state(expand, *, class_token=False, official=False, side=16):
  """Returns a state dict of the tiny model."""
  rng = np.random.default_rng(0)
  state = {}

  def add(name, *weight, bias=True):
    state[f'{name}.weight'] = rng.standard_normal(weight).astype(np.float32)
    if bias:
      state[f'{name}.bias'] = rng.standard_normal(weight[0]).astype(np.float32)

  add('patch_embed.proj', 8, 3, 7, 7)
  if class_token:
    state['cls_token'] = rng.standard_normal((1, 1, 8)).astype(np.float32)
  width = 8
  for k, (i, j) in enumerate(((0, 0), (1, 0), (1, 1))):
    block = f'blocks.{k}.' if official else f'stages.{i}.blocks.{j}.'
    dim, finest = 8 * (i + 1), side if k < 2 else side // 2
    add(block + 'norm1', width)
    add(block + 'attn.qkv', 3 * dim, width)
    for part in 'qkv':
      add(block + f'attn.pool_{part}', 8, 1, 3, 3, bias=False)
      add(block + f'attn.norm_{part}', 8)
    for axis in 'hw':
      shape = (2 * finest - 1, 8)
      state[block + f'attn.rel_pos_{axis}'] = rng.standard_normal(shape).astype(np.float32)
    add(block + 'attn.proj', dim, dim)
    add(block + 'norm2', dim)
    out = 16 if expand == 'mlp' else dim
    add(block + 'mlp.fc1', 4 * dim, dim)
    add(block + 'mlp.fc2', out, 4 * dim)
    if width != dim or out != dim:
      place = 'attn' if expand == 'attention' else 'mlp'
      add(block + ('proj' if official else f'shortcut_proj_{place}'), 16, 8)
    width = out
  add('norm', 16)
  add('head.projection' if official else 'head.fc', 3, 16)
  return state


@pytest.mark.parametrize('expand', mvitv2.EXPANSIONS)
@pytest.mark.parametrize('class_token', [False, True])
def test_official_and_timm_names_are_the_same_weights(expand, class_token):
  loaded = []
  for source in ('official', 'timm'):
    state = _state(expand, class_token=class_token, official=source == 'official')
    if source == 'official':
      # As a video model of one frame has them.
      state = {k: v[:, :, None] if v.ndim == 4 else v for k, v in state.items()}
    loaded.append(va.load_reference('mvitv2_tiny', state, source=source, **TINY))
  assert jax.tree.all(jax.tree.map(np.array_equal, *(found['params'] for found in loaded)))
  state = _state(expand, class_token=class_token)
  found = mvitv2.REFERENCES['timm'].infer(state, {})
  assert found == {
    'num_classes': 3,
    'class_token': class_token,
    'expand': expand,
    'image_size': (64, 64),
  }
  attn = loaded[0]['params']['backbone']['stage2']['block01']['attn']
  weight = state['stages.1.blocks.1.attn.qkv.weight']
  np.testing.assert_array_equal(attn['value']['kernel'], weight[32:].T)
  kernel = state['stages.1.blocks.1.attn.pool_k.weight']
  np.testing.assert_array_equal(attn['pool_key']['kernel'][0, 1, 0], kernel[:, 0, 0, 1])


def test_weights_of_another_form_are_refused_by_a_model_that_would_not_use_them():
  """Flax takes variables that no module asks for, and the logits would be others."""
  state = _state('mlp', class_token=True)
  variables = va.load_reference('mvitv2_tiny', state, source='timm', **TINY)
  images = np.zeros((1, 64, 64, 3), np.float32)
  create = functools.partial(
    va.create_model, 'mvitv2_tiny', num_classes=3, image_size=64, source='timm', **TINY
  )
  for options, message in (
    ({}, r"a model with class_token=True, expand='mlp', of which"),
    ({'expand': 'mlp'}, r'a model with class_token=True, of which'),
  ):
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(create(**options)[0].apply, variables, images)
  model, _ = create(expand='mlp', class_token=True)
  assert jax.eval_shape(model.apply, variables, images).shape == (1, 3)


def test_tables_are_resized_linearly():
  table = np.array([[0.0], [1.0], [2.0]], np.float32)
  np.testing.assert_allclose(decomposed_position.resize(table, (3, 1)), table)
  wide = decomposed_position.resize(table, (5, 1))[:, 0]
  np.testing.assert_allclose(wide, [0, 0.4, 1, 1.6, 2], atol=1e-6)
  state = _state('attention')
  small = va.load_reference('mvitv2_tiny', state, source='timm', image_size=96, **TINY)
  tables = small['params']['backbone']['stage1']['block00']['attn']
  assert tables['relative_width'].shape == (47, 8)


def test_recipes_are_those_of_the_code():
  config = mvitv2_tiny.get_config('variant=mvitv2_large')
  assert (config.total, config.batch_size) == ('300 epochs', 2048)
  assert config.optimizer.learning_rate == pytest.approx(2e-3)
  assert (config.optimizer.weight_decay, config.optimizer.clip_norm) == (0.1, 1.0)
  assert (config.schedule.warmup, config.model.options.drop_path) == ('70 epochs', 0.5)
  tuned = mvitv2_tiny.get_config('variant=mvitv2_base,init=run')
  assert (tuned.image_size, tuned.total, tuned.batch_size) == (384, '30 epochs', 512)
  assert tuned.optimizer.learning_rate == pytest.approx(8e-5)
  with pytest.raises(ValueError, match="no recipe for 'mvitv2_giant'"):
    mvitv2_tiny.get_config('variant=mvitv2_giant')
