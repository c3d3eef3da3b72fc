"""Local attention in blocks against attention to every pixel, with each pair decided by hand."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import vision_attention as va
from vision_attention.ops import attention, convolution, local_attention, relative_logits


def _pairs(size, near):
  """Returns queries, keys of the padded map, and per pair whether it counts and its table rows."""
  height, width = size
  (bh, bw), h, s = near.block, near.halo, near.stride
  queries = [(i, j) for i in range(0, height, s) for j in range(0, width, s)]
  keys = [(y, x) for y in range(-h, height + h) for x in range(-h, width + h)]
  counts = np.zeros((len(queries), len(keys)), bool)
  offsets = np.zeros((len(queries), len(keys), 2), int)
  for a, (i, j) in enumerate(queries):
    # The first row and column of the query's window.
    top, left = i // bh * bh - h, j // bw * bw - h
    for b, (y, x) in enumerate(keys):
      inside = 0 <= y < height and 0 <= x < width
      window = top <= y < top + bh + 2 * h and left <= x < left + bw + 2 * h
      near_enough = not near.kernel or max(abs(y - i), abs(x - j)) <= near.kernel // 2
      counts[a, b] = window and near_enough and (inside or not near.mask_padding)
      offsets[a, b] = y - i, x - j
      if near.index == 'subsampled':
        offsets[a, b] = (y - top) - i % bh // s, (x - left) - j % bw // s
  return queries, keys, counts, offsets


def _reference(query, key, value, tables, near, scale=1.0, position_scale=1.0):
  """Attends from every query to every pixel, and gives all others no weight."""
  size, h = value.shape[1:3], near.halo
  _, keys, counts, offsets = _pairs(size, near)
  pad = ((0, 0), (h, h), (h, h), (0, 0), (0, 0))
  key, value = (jnp.pad(x, pad).reshape(len(x), len(keys), *x.shape[3:]) for x in (key, value))
  flat = query.reshape(len(query), -1, *query.shape[3:])
  logits = scale * jnp.einsum('bqnd,bknd->bnqk', flat, key)
  if tables:
    rows = [
      np.clip(offsets[..., a] + t.shape[-2] // 2, 0, t.shape[-2] - 1)
      for a, t in (enumerate(tables))
    ]
    vectors = [t[r] if t.ndim == 2 else t[:, r] for t, r in zip(tables, rows, strict=True)]
    full = tables[0].shape[-1] == query.shape[-1]
    vector = vectors[0] + vectors[1] if full else jnp.concatenate(vectors, -1)
    spec = 'bqnd,qkd->bnqk' if vector.ndim == 3 else 'bqnd,nqkd->bnqk'
    logits += position_scale * jnp.einsum(spec, flat, vector)
  weights = jax.nn.softmax(jnp.where(counts, logits, -jnp.inf), -1)
  mixed = jnp.einsum('bnqk,bknd->bqnd', weights, value)
  return mixed.reshape(*query.shape[:-1], -1), weights


def _arrays(size, near, *, heads=2, dim=4, value_dim=3, half=False, per_head=False, seed=0):
  """Returns query, key, value and the tables."""
  rng = np.random.default_rng(seed)
  grid = [-(-n // near.stride) for n in size]
  rows = (local_attention.table_size(near), dim // 2 if half else dim)
  rows = (heads, *rows) if per_head else rows
  if near.block[0] != near.block[1]:
    assert near.kernel
  shapes = [(2, *grid, heads, dim), (2, *size, heads, dim), (2, *size, heads, value_dim)]
  return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in (*shapes, rows, rows)]


def _check(size, near, scale=1.0, position_scale=1.0, **options):
  """Compares values and all gradients with the reference."""
  arrays = _arrays(size, near, **options)
  scales = dict(scale=scale, position_scale=position_scale)
  ours = functools.partial(local_attention.local_attention, near=near, **scales)
  theirs = lambda q, k, v, *tables: _reference(q, k, v, tables, near, **scales)[0]

  def value_and_gradients(function):
    def loss(*arrays):
      y = function(*arrays)
      return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

    return jax.jit(jax.grad(loss, tuple(range(5)), has_aux=True))(*arrays)

  (grads, y), (expected_grads, expected) = map(value_and_gradients, (ours, theirs))
  np.testing.assert_allclose(y, expected, atol=2e-5)
  for grad, right in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(grad, right, atol=2e-4)


SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@hypothesis.settings(max_examples=5)
@hypothesis.given(
  size=SIZES,
  block=st.integers(1, 5),
  halo=st.integers(0, 6),
  stride=st.sampled_from((1, 2)),
  mask_padding=st.booleans(),
  index=st.sampled_from(local_attention.INDICES),
  per_head=st.booleans(),
)
def test_halos_are_exact_at_any_size(size, block, halo, stride, mask_padding, index, per_head):
  near = local_attention.halo(
    block * stride, halo, stride=stride, mask_padding=mask_padding, index=index
  )
  _check(size, near, scale=0.5, per_head=per_head)


@hypothesis.settings(max_examples=5)
@hypothesis.given(
  size=SIZES,
  kernel=st.sampled_from((1, 3, 5, 7)),
  block=st.integers(1, 4),
  mask_padding=st.booleans(),
)
def test_centred_neighbourhoods_are_exact_at_any_size(size, kernel, block, mask_padding):
  near = local_attention.centred(kernel, size, block=block, mask_padding=mask_padding)
  _check(size, near, position_scale=0.5, half=True)


def test_halo_zero_is_attention_within_windows():
  near = local_attention.halo(3, 0)
  query, key, value, *_ = _arrays((6, 9), near)
  y = local_attention.local_attention(query, key, value, near=near)

  def windows(x):
    return x.reshape(2, 2, 3, 3, 3, *x.shape[3:]).swapaxes(2, 3).reshape(12, 9, *x.shape[3:])

  expected = attention.dot_product_attention(*map(windows, (query, key, value)), scale=1.0)
  np.testing.assert_allclose(windows(y), expected, atol=1e-5)


@pytest.mark.parametrize('kind', ['block', 'halo', 'kernel'])
def test_a_window_that_covers_the_image_is_global_attention(kind):
  near = {
    'block': local_attention.halo(5, 0),
    'halo': local_attention.halo(2, 4),
    'kernel': local_attention.centred(9, (5, 5), block=3),
  }[kind]
  query, key, value, *tables = _arrays((5, 5), near)
  y = local_attention.local_attention(query, key, value, *tables, near=near)
  extra = len(tables[0]) // 2 - 4
  tables = [table[extra : len(table) - extra] for table in tables]
  flat = [x.reshape(2, 25, *x.shape[3:]) for x in (query, key, value)]
  bias = relative_logits.relative_logits_2d(query, *tables)
  expected = attention.dot_product_attention(*flat, bias, scale=1.0)
  np.testing.assert_allclose(y.reshape(expected.shape), expected, atol=1e-5)


@pytest.mark.parametrize('mask_padding', [True, False])
def test_blocks_of_one_pixel_are_centred(mask_padding):
  halo = local_attention.halo(1, 2, mask_padding=mask_padding)
  arrays = _arrays((6, 7), halo)
  centred = local_attention.centred(5, (6, 7), block=4, mask_padding=mask_padding)
  ys = [local_attention.local_attention(*arrays, near=near) for near in (halo, centred)]
  np.testing.assert_allclose(*ys, atol=1e-5)


def test_the_block_is_no_part_of_a_centred_neighbourhood():
  nears = [local_attention.centred(5, (11, 8), block=block) for block in (1, 3, 4, 16)]
  arrays = _arrays((11, 8), nears[0], half=True)
  ys = [local_attention.local_attention(*arrays, near=near) for near in nears]
  for y in ys[1:]:
    np.testing.assert_allclose(y, ys[0], atol=1e-5)


@pytest.mark.parametrize(
  ('kind', 'shift', 'same'), [('halo', 4, 1), ('halo', 1, 0), ('kernel', 1, 1)]
)
def test_outputs_move_with_the_input(kind, shift, same):
  """By any pixel where the query is in the centre, by whole blocks where it is not."""
  size = (16, 16)
  near = local_attention.halo(4, 2) if kind == 'halo' else local_attention.centred(5, size, block=4)
  *arrays, height, width = _arrays(size, near)
  attend = functools.partial(
    local_attention.local_attention, height_table=height, width_table=width, near=near
  )
  y = attend(*arrays)
  moved = attend(*(jnp.roll(x, (shift, shift), (1, 2)) for x in arrays))
  moved = jnp.roll(moved, (-shift, -shift), (1, 2))
  interior = (slice(None), slice(4, 8), slice(4, 8))
  difference = jnp.abs(y - moved)[interior].max()
  assert (difference < 1e-5) == bool(same), difference


def test_two_tables_are_one_table_of_concatenated_vectors():
  near = local_attention.centred(3, (5, 5), block=5)
  query, key, value, rows, columns = _arrays((5, 5), near, half=True)
  full = jnp.concatenate(
    [jnp.broadcast_to(rows[:, None], (3, 3, 2)), jnp.broadcast_to(columns[None], (3, 3, 2))], -1
  )
  taps = np.arange(5)[:, None] + np.arange(3)
  padded = [jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0))) for x in (key, value)]
  keys, values = (x[:, taps[:, None, :, None], taps[:, None]] for x in padded)
  logits = jnp.einsum('bijnd,bijyxnd->bnijyx', query, keys)
  logits += jnp.einsum('bijnd,yxd->bnijyx', query, full)
  outside = (taps < 1) | (taps > 5)
  logits = jnp.where(outside[:, None, :, None] | outside[:, None], -jnp.inf, logits)
  weights = jax.nn.softmax(logits, (-2, -1))
  expected = jnp.einsum('bnijyx,bijyxne->bijne', weights, values)
  y = local_attention.local_attention(query, key, value, rows, columns, near=near)
  np.testing.assert_allclose(y, expected, atol=1e-5)
  mine = local_attention.local_attention_weights(query, key, rows, columns, size=(5, 5), near=near)
  np.testing.assert_allclose(mine, weights.reshape(*weights.shape[:4], 9), atol=1e-5)


def test_queries_of_zero_average():
  near = local_attention.centred(3, (7, 6))
  query, key, value, *tables = _arrays((7, 6), near)
  y = local_attention.local_attention(0 * query, key, value, *tables, near=near)
  flat = value.reshape(*value.shape[:3], -1)
  expected = convolution.avg_pool(flat, window=3, stride=1, padding='same', count_include_pad=False)
  np.testing.assert_allclose(y.reshape(expected.shape), expected, atol=1e-5)


def test_a_neighbourhood_of_one_pixel_is_the_identity():
  near = local_attention.centred(1, (4, 5))
  query, key, value, *tables = _arrays((4, 5), near)
  y = local_attention.local_attention(query, key, value, *tables, near=near)
  np.testing.assert_allclose(y, value, rtol=1e-6)


def test_strided_queries_are_every_other_query():
  """With true offsets; subsampled ones are others."""
  full = local_attention.halo(4, 3)
  query, key, value, *tables = _arrays((9, 8), full)
  y = local_attention.local_attention(query, key, value, *tables, near=full)[:, ::2, ::2]
  strided = local_attention.halo(4, 3, stride=2)
  attend = functools.partial(local_attention.local_attention, query[:, ::2, ::2], key, value)
  np.testing.assert_allclose(attend(*tables, near=strided), y, atol=1e-5)
  other = local_attention.halo(4, 3, stride=2, index='subsampled')
  rows = local_attention.table_size(other) - len(tables[0])
  tables = [jnp.pad(table, ((rows // 2, rows // 2), (0, 0))) for table in tables]
  assert jnp.abs(attend(*tables, near=other) - y).max() > 1e-2


def test_subsampled_tables_have_rows_that_no_pair_uses():
  near = local_attention.halo(4, 1, index='subsampled')
  assert local_attention.table_size(near) == 11
  used = np.unique(local_attention.table_rows(11, 4, near))
  np.testing.assert_array_equal(used, np.arange(2, 11))


@pytest.mark.parametrize('kind', ['halo', 'zeros', 'kernel'])
def test_attention_maps_are_those_of_the_reference(kind):
  size = (7, 6)
  near = {
    'halo': local_attention.halo(4, 1, stride=2),
    'zeros': local_attention.halo(4, 1, mask_padding=False),
    'kernel': local_attention.centred(3, size, block=4),
  }[kind]
  query, key, value, *tables = _arrays(size, near)
  maps = local_attention.local_attention_weights(query, key, *tables, size=size, near=near)
  taps = near.kernel**2 or near.window[0] * near.window[1]
  assert maps.shape == (2, 2, *query.shape[1:3], taps)
  np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)
  _, weights = _reference(query, key, value, tables, near)
  # The same numbers, whatever order the taps have; the reference has all pixels.
  mine = np.sort(maps.reshape(2, 2, -1, taps))
  theirs = np.sort(np.pad(weights, [(0, 0)] * 3 + [(taps, 0)]))[..., -taps:]
  np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_bfloat16_is_close_and_softmax_is_not_rounded():
  near = local_attention.halo(4, 2)
  arrays = _arrays((8, 8), near, dim=16)
  y = local_attention.local_attention(*arrays, near=near, scale=0.25, position_scale=0.25)
  half = [x.astype(jnp.bfloat16) for x in arrays]
  rough = local_attention.local_attention(*half, near=near, scale=0.25, position_scale=0.25)
  assert rough.dtype == jnp.bfloat16
  np.testing.assert_allclose(rough.astype(jnp.float32), y, atol=0.1)
  maps = local_attention.local_attention_weights(half[0], half[1], size=(8, 8), near=near)
  np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)


def test_masked_products_are_not_counted():
  near = local_attention.centred(7, (14, 14))
  arrays = _arrays((14, 14), near, dim=8, value_dim=8, half=True)
  macs = va.count_macs(functools.partial(local_attention.local_attention, near=near), *arrays)
  assert macs == 2 * 2 * 14 * 14 * (49 * 16 + 7 * 8)
  near = local_attention.halo(7, 3)
  arrays = _arrays((14, 14), near, dim=8, value_dim=8)
  macs = va.count_macs(functools.partial(local_attention.local_attention, near=near), *arrays)
  assert macs >= 2 * 2 * 14 * 14 * 169 * 16


def test_impossible_neighbourhoods_are_refused():
  with pytest.raises(ValueError, match='kernel 4 has no centre: pass 5'):
    local_attention.centred(4, (8, 8))
  with pytest.raises(ValueError, match='stride 2 does not divide block 5'):
    local_attention.halo(5, 1, stride=2)
  with pytest.raises(ValueError, match='block 0 must be positive'):
    local_attention.halo(0, 1)
  with pytest.raises(ValueError, match="index 'timm' is unknown"):
    local_attention.halo(4, 1, index='timm')
  near = local_attention.halo(4, 1, stride=2)
  x = jnp.zeros((1, 8, 8, 1, 2))
  with pytest.raises(ValueError, match='a map of 8x8 has 4x4 of them at stride 2'):
    local_attention.local_attention(x, x, x, near=near)


def _gather(query, key, value, rows, columns):
  """One copy of keys and values per tap: the form whose memory is to be avoided."""
  height, width = query.shape[1:3]
  taps = [np.arange(n)[:, None] + np.arange(7) for n in (height, width)]
  pad = ((0, 0), (3, 3), (3, 3), (0, 0), (0, 0))
  keys, values = (
    jnp.pad(x, pad)[:, taps[0][:, None, :, None], taps[1][None, :, None]] for x in (key, value)
  )
  logits = jnp.einsum('bhwnd,bhwyxnd->bhwnyx', query, keys)
  logits += jnp.einsum('bhwnd,yd->bhwny', query, rows)[..., None]
  logits += jnp.einsum('bhwnd,xd->bhwnx', query, columns)[..., None, :]
  return jnp.einsum('bhwnyx,bhwyxnd->bhwnd', jax.nn.softmax(logits, (-2, -1)), values)


def _memory(function, offsets):
  """Returns the bytes that value and gradients need beside arguments and results."""
  shapes = [(32, 56, 56, 3, 32)] * 3 + [(offsets, 32)] * 2
  arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  loss = lambda *arrays: jnp.square(function(*arrays)).sum()
  program = jax.jit(jax.value_and_grad(loss, tuple(range(5)))).lower(*arrays)
  return program.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.optimized
def test_memory_is_a_fraction_of_that_of_a_gather():
  """At 56x56, 96 channels, 7x7 neighbours and batch 32, forward and backward; nothing is run."""
  attend = local_attention.local_attention
  nears = [local_attention.halo(8, 3), local_attention.centred(7, (56, 56))]
  halo, centred = (
    _memory(functools.partial(attend, near=near), local_attention.table_size(near))
    for near in nears
  )
  gather = _memory(_gather, 7)
  print(f'MB: gather {gather / 1e6:.0f}, halo {halo / 1e6:.0f}, centred {centred / 1e6:.0f}')
  assert gather > 4 * halo
  assert gather > 4 * centred
