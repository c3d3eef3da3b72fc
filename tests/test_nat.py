"""Neighbourhood attention against the per-pixel definition, and what is particular to NAT."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import vision_attention as va
from configs import nat_tiny
from tests import abstract
from vision_attention import convert
from vision_attention.attention import neighborhood as layer
from vision_attention.attention import relative
from vision_attention.models import nat, transfer, tree
from vision_attention.ops import neighborhood

TINY = dict(depths=(2, 1), dim=16, num_heads=(2, 4), kernel=3, dilations=((1, 2), (1,)))


def _window(i, size, kernel, dilation):
  """The `kernel` pixels nearest to `i` of those with its remainder."""
  same = [j for j in range(size) if (j - i) % dilation == 0]
  place = same.index(i)
  first = min(max(place - kernel // 2, 0), len(same) - kernel)
  return same[first : first + kernel]


def _seen(size, kernel, dilation):
  """Returns, per pair of pixels of a map, whether the first sees the second, and table rows."""
  pixels = [(i, j) for i in range(size[0]) for j in range(size[1])]
  seen = np.zeros((len(pixels), len(pixels)), bool)
  rows = np.zeros((len(pixels), len(pixels), 2), int)
  for a, (i, j) in enumerate(pixels):
    for y in _window(i, size[0], kernel, dilation):
      for x in _window(j, size[1], kernel, dilation):
        b = y * size[1] + x
        seen[a, b] = True
        rows[a, b] = (i - y) // dilation + kernel - 1, (j - x) // dilation + kernel - 1
  return seen, rows


def _reference(query, key, value, table, kernel, dilation):
  seen, rows = _seen(query.shape[1:3], kernel, dilation)
  flat = [x.reshape(len(x), -1, *x.shape[3:]) for x in (query, key, value)]
  logits = jnp.einsum('bqnd,bknd->bnqk', flat[0], flat[1]) * query.shape[-1] ** -0.5
  if table is not None:
    logits += table[:, rows[..., 0], rows[..., 1]]
  weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), -1)
  return jnp.einsum('bnqk,bknd->bqnd', weights, flat[2]).reshape(value.shape), weights


def _arrays(size, kernel, batch=2, heads=2, dim=3, value_dim=2):
  rng = np.random.default_rng(0)
  rows = 2 * kernel - 1
  shapes = [(batch, *size, heads, d) for d in (dim, dim, value_dim)] + [(heads, rows, rows)]
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@hypothesis.settings(max_examples=6)
@hypothesis.given(
  kernel=st.sampled_from((3, 5, 7)),
  dilation=st.integers(1, 3),
  more=st.tuples(st.integers(0, 6), st.integers(0, 6)),
  block=st.integers(1, 8),
  batch=st.integers(1, 3),
)
def test_every_pixel_sees_its_nearest(kernel, dilation, more, block, batch):
  """At all borders and dilations, in values and all gradients."""
  if kernel == 7:
    dilation = min(dilation, 2)
  size = tuple(kernel * dilation + extra for extra in more)
  arrays = _arrays(size, kernel, batch)
  ours = functools.partial(
    neighborhood.neighborhood_attention, kernel=kernel, dilation=dilation, block=block
  )
  theirs = lambda *arrays: _reference(*arrays, kernel, dilation)[0]

  def value_and_gradients(function):
    def loss(*arrays):
      y = function(*arrays)
      return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

    return jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(*arrays)

  (grads, y), (expected_grads, expected) = map(value_and_gradients, (ours, theirs))
  np.testing.assert_allclose(y, expected, atol=2e-5)
  for grad, right in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(grad, right, atol=2e-4)


def test_every_query_has_as_many_keys_and_corners_share_them():
  seen, _ = _seen((11, 9), 5, 1)
  assert (seen.sum(-1) == 25).all()
  index, rows = neighborhood.neighbours(11, 5)
  for i in range(3):
    np.testing.assert_array_equal(index[i], np.arange(5))
  for size, dilation in ((11, 2), (17, 3), (15, 3)):
    index, rows = neighborhood.neighbours(size, 5, dilation)
    expected = [_window(i, size, 5, dilation) for i in range(size)]
    np.testing.assert_array_equal(index, expected)
    np.testing.assert_array_equal(rows, (np.arange(size)[:, None] - index) // dilation + 4)


def test_attention_maps_are_those_of_the_definition():
  query, key, _, table = _arrays((7, 8), 3)
  maps = neighborhood.neighborhood_weights(query, key, table, kernel=3, dilation=2)
  _, weights = _reference(query, key, query, table, 3, 2)
  theirs = np.sort(weights.reshape(2, 2, 7, 8, -1))[..., -9:]
  np.testing.assert_allclose(np.sort(maps), theirs, atol=1e-5)
  np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)


def test_a_neighbourhood_that_covers_the_map_is_global_attention():
  """With the very parameters of attention with relative positions."""
  x = jax.random.normal(jax.random.key(0), (2, 5, 5, 8))
  ours = layer.NeighborhoodAttention(8, 2, kernel=5)
  theirs = relative.RelativeAttention(8, 2)
  params = theirs.init(jax.random.key(1), x, train=False)
  np.testing.assert_allclose(
    ours.apply(params, x, train=False), theirs.apply(params, x, train=False), atol=1e-5
  )


def test_dilation_is_attention_within_remainders():
  arrays = _arrays((10, 12), 5)
  y = neighborhood.neighborhood_attention(*arrays, kernel=5, dilation=2)
  *maps, table = arrays
  for r in range(2):
    for s in range(2):
      mine = neighborhood.neighborhood_attention(*(x[:, r::2, s::2] for x in maps), table, kernel=5)
      np.testing.assert_allclose(y[:, r::2, s::2], mine, atol=1e-5)


def test_the_outer_half_of_the_table_is_for_borders():
  query, key, value, table = _arrays((9, 9), 5)

  def loss(table):
    y = neighborhood.neighborhood_attention(query, key, value, table, kernel=5)
    return jnp.square(y[:, 2:-2, 2:-2]).sum()

  grad = np.array(jax.grad(loss)(table))
  assert (np.abs(grad[:, 2:7, 2:7]) > 0).all()
  grad[:, 2:7, 2:7] = 0
  np.testing.assert_array_equal(grad, 0)


def test_interior_outputs_move_with_the_input():
  query, key, value, table = _arrays((12, 12), 3)
  attend = functools.partial(neighborhood.neighborhood_attention, table=table, kernel=3, block=4)
  y = attend(query, key, value)
  moved = attend(*(jnp.roll(x, (1, 2), (1, 2)) for x in (query, key, value)))
  moved = jnp.roll(moved, (-1, -2), (1, 2))
  np.testing.assert_allclose(moved[:, 2:9, 2:9], y[:, 2:9, 2:9], atol=1e-5)


def test_small_maps_are_padded_with_pixels_that_count():
  """Zeros before the projection: their keys and values are its biases."""
  x = jax.random.normal(jax.random.key(0), (1, 2, 4, 4))
  attend = layer.NeighborhoodAttention(4, 2, kernel=3)
  params = attend.init(jax.random.key(1), x, train=False)
  y = attend.apply(params, x, train=False)
  assert y.shape == x.shape
  padded = jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0)))
  np.testing.assert_allclose(y, attend.apply(params, padded, train=False)[:, :2], atol=1e-6)
  params['params']['value']['bias'] += 1.0
  assert jnp.abs(attend.apply(params, x, train=False) - y).max() > 1e-3


def test_impossible_neighbourhoods_are_refused():
  x = jnp.zeros((1, 9, 8, 1, 2))
  attend = functools.partial(neighborhood.neighborhood_attention, x, x, x)
  with pytest.raises(ValueError, match='kernel 4 has no centre and neighbours: pass 5'):
    attend(kernel=4)
  with pytest.raises(ValueError, match=r'needs a map of 9 pixels a side, not 9x8: .* at most 2'):
    attend(kernel=3, dilation=3)
  with pytest.raises(ValueError, match='dilation 0 must be positive'):
    attend(kernel=3, dilation=0)


def test_bfloat16_is_close():
  arrays = _arrays((8, 9), 3, dim=16)
  y = neighborhood.neighborhood_attention(*arrays, kernel=3)
  half = neighborhood.neighborhood_attention(*(x.astype(jnp.bfloat16) for x in arrays), kernel=3)
  assert half.dtype == jnp.bfloat16
  np.testing.assert_allclose(half.astype(jnp.float32), y, atol=0.1)


def _gather(query, key, value, table):
  """One copy of keys and values per query: the form whose memory is to be avoided."""
  (down, y), (right, x) = (neighborhood.neighbours(n, 7) for n in query.shape[1:3])
  keys, values = (a[:, down[:, None, :, None], right[None, :, None]] for a in (key, value))
  logits = jnp.einsum('bhwnd,bhwyxnd->bhwnyx', query * query.shape[-1] ** -0.5, keys)
  bias = table[:, y[:, None, :, None], x[None, :, None]]
  weights = jax.nn.softmax(logits + bias.transpose(1, 2, 0, 3, 4), (-2, -1))
  return jnp.einsum('bhwnyx,bhwyxnd->bhwnd', weights, values)


@pytest.mark.optimized
def test_memory_is_a_fifth_of_that_of_a_gather():
  """At 56x56, 3 heads of 32, 7x7 neighbours and batch 32, forward and backward; nothing runs."""

  def memory(function):
    shapes = [(32, 56, 56, 3, 32)] * 3 + [(3, 13, 13)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    loss = lambda *arrays: jnp.square(function(*arrays)).sum()
    program = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3))).lower(*arrays)
    return program.compile().memory_analysis().temp_size_in_bytes

  ours = memory(functools.partial(neighborhood.neighborhood_attention, kernel=7))
  gather = memory(_gather)
  print(f'MB: gather {gather / 1e6:.0f}, tiles {ours / 1e6:.0f}')
  assert gather > 5 * ours


def test_masked_products_are_not_counted():
  arrays = _arrays((14, 14), 7, dim=8, value_dim=4)
  attend = functools.partial(neighborhood.neighborhood_attention, kernel=7)
  assert va.count_macs(attend, *arrays) == 2 * 2 * 14 * 14 * 49 * (8 + 4)


# One of every architecture: tracing takes seconds.
@pytest.mark.parametrize('name', ['nat_mini', 'dinat_s_tiny', 'nat_isotropic_small'])
def test_multiply_adds(name):
  model, info = va.create_model(name)
  assert abstract.macs(model, image_size=info.image_size) == pytest.approx(info.flops, rel=0.02)


@pytest.mark.parametrize(
  ('name', 'options', 'expected'),
  [
    ('dinat_large', dict(num_classes=21_841), 232_976_131),
    ('dinat_small', dict(layer_scale=1e-5), 50_719_681 + 23_616),
    # The ViT with relative positions that the isotropic models are compared with.
    ('nat_isotropic_small', dict(attn='relative'), 22_080_376),
    ('nat_isotropic_base', dict(attn='relative'), 86_627_080),
  ],
)
def test_parameters_with_options(name, options, expected):
  params = convert.abstract_variables(*va.create_model(name, **options))['params']
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == expected


def _dilations(**options):
  parts = va.create_model('dinat_large', **options)[0].parts
  return [
    [b.keywords['attn'].keywords['dilation'] for b in s] for s in parts.backbone.keywords['stages']
  ]


def test_dilations_alternate_and_grow_with_the_image_where_asked():
  ninefold = lambda d: [1, d] * 9
  assert _dilations() == [[1, 8, 1], [1, 4, 1, 4], ninefold(2), [1] * 5]
  assert _dilations(image_size=384) == _dilations()
  scaled = _dilations(image_size=384, dilation_policy='scale')
  assert scaled == [[1, 13, 1], [1, 6, 1, 6], ninefold(3), [1] * 5]
  assert _dilations(dilation_policy='scale') == _dilations()


@pytest.mark.parametrize('stem', nat.STEMS)
@pytest.mark.parametrize('size', [(32, 32), (45, 70), (9, 5)])
def test_any_image_size_is_taken(stem, size):
  model, info = va.create_model('dinat_mini', image_size=size, stem=stem, **TINY)
  shapes = convert.abstract_variables(model, info)
  images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
  features = jax.eval_shape(functools.partial(model.apply, method='features'), shapes, images)
  first, last = ([-(-side // stride) for side in size] for stride in (4, 8))
  assert features['stage1'].shape == (2, *first, 16)
  assert features['stage2'].shape == (2, *last, 32)


def test_tables_of_another_kernel_are_resized_per_head():
  old, new = (
    convert.abstract_variables(
      *va.create_model('dinat_mini', image_size=32, **(TINY | {'kernel': k}))
    )
    for k in (3, 5)
  )
  loaded = jax.tree.map(lambda x: np.ones(x.shape, np.float32), old)
  variables, report = transfer.transfer('dinat_mini', loaded, new)
  assert len(report.resized) == 3
  table = variables['params']['backbone']['stage1']['block00']['attn']['relative_position']
  np.testing.assert_allclose(table, np.ones((2, 9, 9)), rtol=1e-5)


@pytest.mark.parametrize('stem', nat.STEMS)
def test_official_names_load_with_scales_and_other_kernels(stem):
  """Tables are key minus query there, query minus key here."""
  rng = np.random.default_rng(0)
  state = {}

  def add(name, *weight, bias=True):
    state[f'{name}.weight'] = rng.standard_normal(weight)
    if bias:
      state[f'{name}.bias'] = rng.standard_normal(weight[0])

  convs = stem == 'conv'
  if convs:
    add('patch_embed.proj.0', 8, 3, 3, 3)
    add('patch_embed.proj.1', 16, 8, 3, 3)
  else:
    add('patch_embed.proj', 16, 3, 4, 4)
  add('patch_embed.norm', 16)
  stages = 'levels' if convs else 'layers'
  for i, j, dim in ((0, 0, 16), (0, 1, 16), (1, 0, 32)):
    block = f'{stages}.{i}.blocks.{j}.'
    for part, shape in {
      'norm1': (dim,),
      'norm2': (dim,),
      'attn.qkv': (3 * dim, dim),
      'attn.proj': (dim, dim),
      'mlp.fc1': (3 * dim, dim),
      'mlp.fc2': (dim, 3 * dim),
    }.items():
      add(block + part, *shape)
    state[block + 'attn.rpb'] = rng.standard_normal((dim // 8, 9, 9))
    for k in (1, 2):
      state[block + f'gamma{k}'] = rng.standard_normal(dim)
  shape = (32, 16, 3, 3) if convs else (32, 64)
  add(f'{stages}.0.downsample.reduction', *shape, bias=False)
  add(f'{stages}.0.downsample.norm', 32 if convs else 64)
  add('norm', 32)
  add('head', 5, 32)
  options = {key: value for key, value in TINY.items() if key != 'kernel'} | {'stem': stem}
  params = va.load_reference('nat_mini', state, source='official', **options)['params']
  block = params['backbone']['stage1']['block01']
  theirs = state[f'{stages}.0.blocks.1.attn.rpb'].astype(np.float32)
  np.testing.assert_array_equal(block['attn']['relative_position'], theirs[:, ::-1, ::-1])
  gamma = state[f'{stages}.0.blocks.1.gamma2'].astype(np.float32)
  np.testing.assert_array_equal(block['layer_scale2']['scale'], gamma)
  assert not [path for path in tree.flatten(params) if 'qkv' in path]


def test_options_that_cannot_be_are_refused():
  with pytest.raises(ValueError, match='one entry per stage'):
    va.create_model('nat_mini', depths=(1, 1))
  with pytest.raises(ValueError, match='do not divide the widths'):
    va.create_model('nat_mini', num_heads=(3, 3, 3, 3))
  with pytest.raises(ValueError, match="stem 'convs' is unknown: did you mean 'conv'"):
    va.create_model('nat_mini', stem='convs')


def test_drop_path_grows_over_all_blocks():
  rates = nat.drop_path_rates(0.2, (3, 4, 18, 5))
  np.testing.assert_allclose([rate for stage in rates for rate in stage], np.linspace(0, 0.2, 30))


def test_recipes_are_those_of_the_code():
  config = nat_tiny.get_config('variant=dinat_base')
  assert (config.total, config.batch_size, config.optimizer.learning_rate) == (
    '310 epochs',
    1024,
    1e-3,
  )
  assert (config.optimizer.weight_decay, config.optimizer.clip_norm) == (0.05, 5.0)
  assert (config.schedule.warmup, config.schedule.hold) == ('20 epochs', '10 epochs')
  assert config.schedule.warmup_init * config.optimizer.learning_rate == pytest.approx(1e-6)
  assert config.schedule.final * config.optimizer.learning_rate == pytest.approx(5e-6)
  assert config.model.options.drop_path == 0.5
  tuned = nat_tiny.get_config('variant=dinat_large_384,init=run')
  assert (tuned.image_size, tuned.total, tuned.batch_size) == (384, '30 epochs', 512)
  assert (tuned.optimizer.learning_rate, tuned.optimizer.weight_decay) == (5e-5, 1e-10)
  assert tuned.mixing.mixup_alpha == 0
  assert tuned.data.eval_ops == ('center_crop({size}, ratio=1.0)',)
  with pytest.raises(ValueError, match="no recipe of training from scratch for 'dinat_large'"):
    nat_tiny.get_config('variant=dinat_large')
