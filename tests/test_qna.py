"""Query and attend against its window formula, and what is particular to QnA-ViT."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import vision_attention as va
from configs import qna_tiny
from tests import abstract
from tools import benchmark
from vision_attention import convert
from vision_attention.attention import qna as layer
from vision_attention.models import qna as models
from vision_attention.models import transfer
from vision_attention.ops import qna


def _reference(score, value, bias, scale, stride=1):
  """Window by window, `[b, p, q, queries, n, d]`."""
  height, width = score.shape[1:3]
  kernel = len(bias)
  rows = []
  for y in range(0, height, stride):
    for x in range(0, width, stride):
      above, below = 0.0, 0.0
      for u in range(kernel):
        for v in range(kernel):
          i, j = y + u - kernel // 2, x + v - kernel // 2
          if 0 <= i < height and 0 <= j < width:
            weight = jnp.exp(score[:, i, j] + bias[u, v])[..., None]
            above += weight * scale[u, v][..., None] * value[:, i, j, None]
            below += weight
      rows.append(above / below)
  size = (-(-height // stride), -(-width // stride))
  return jnp.stack(rows, 1).reshape(len(score), *size, *rows[0].shape[1:])


def _arrays(size, kernel, queries=2, heads=2, dim=3):
  rng = np.random.default_rng(0)
  window = (kernel, kernel, queries, heads)
  shapes = [(2, *size, queries, heads), (2, *size, heads, dim), window, window]
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@hypothesis.settings(max_examples=5)
@hypothesis.given(
  size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
  kernel=st.sampled_from((1, 3)),
  stride=st.sampled_from((1, 2)),
)
def test_it_is_the_window_formula(size, kernel, stride):
  """In values and all gradients, at borders, with windows larger than the map."""
  arrays = _arrays(size, kernel)

  def gradients(function):
    def loss(*arrays):
      y = function(*arrays)
      return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

    return jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(*arrays)

  ours, y = gradients(lambda *arrays: qna.query_and_attend(*arrays, stride=stride)[:, :, :, 0])
  theirs, expected = gradients(lambda *arrays: _reference(*arrays, stride).sum(3))
  np.testing.assert_allclose(y, expected, atol=2e-5)
  for mine, right in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(mine, right, atol=2e-4)


def test_strided_windows_are_every_other_window():
  arrays = _arrays((7, 6), 3)
  y = qna.query_and_attend(*arrays)
  np.testing.assert_allclose(qna.query_and_attend(*arrays, stride=2), y[:, ::2, ::2], atol=1e-5)


def test_constants_and_the_order_of_queries_do_not_matter():
  score, value, bias, scale = _arrays((5, 5), 3)
  y = qna.query_and_attend(score, value, bias, scale)
  more = score + jnp.asarray([[100.0, -30.0], [2.0, 0.0]])
  np.testing.assert_allclose(qna.query_and_attend(more, value, bias, scale), y, atol=2e-4)
  other = (score[:, :, :, ::-1], value, bias[:, :, ::-1], scale[:, :, ::-1])
  np.testing.assert_allclose(qna.query_and_attend(*other), y, atol=1e-5)


def test_equal_scores_average_and_a_bias_chooses():
  score, value, bias, _ = _arrays((4, 4), 3)
  y = qna.query_and_attend(0 * score, value, 0 * bias)[:, :, :, 0]
  np.testing.assert_allclose(y[:, 1, 2], 2 * value[:, :3, 1:4].mean((1, 2)), atol=1e-5)
  np.testing.assert_allclose(y[:, 0, 0], 2 * value[:, :2, :2].mean((1, 2)), atol=1e-5)
  centre = jnp.full_like(bias, -1e4).at[1, 1].set(0.0)
  y = qna.query_and_attend(score, value, centre)[:, :, :, 0]
  np.testing.assert_allclose(y, 2 * value, atol=1e-5)


def test_a_window_that_covers_the_map_pools_it():
  score, value, bias, _ = _arrays((3, 3), 5)
  y = qna.query_and_attend(score, value, 0 * bias)
  np.testing.assert_allclose(y, jnp.broadcast_to(y[:, 1:2, 1:2], y.shape), atol=1e-5)


def test_scores_far_apart_stay_finite():
  score, value, bias, scale = _arrays((6, 6), 3)
  score = score.at[:, 0, 0].add(1e4)
  y, grads = jax.value_and_grad(lambda *a: qna.query_and_attend(*a).sum(), (0, 1, 2, 3))(
    score, value, bias, scale
  )
  assert all(jnp.isfinite(x).all() for x in (y, *grads))


def test_attention_maps_are_the_softmax_of_windows():
  score, value, bias, scale = _arrays((5, 4), 3)
  maps = qna.attention_weights(score, bias, stride=2)
  assert maps.shape == (2, 4, 3, 2, 9)
  np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)
  # Every query's weights applied to values by hand, at a window within the map.
  window = value[:, 1:4, 1:4].reshape(2, 9, 2, 3)
  weights = maps.reshape(2, 2, 2, 3, 2, 9)[:, :, :, 1, 1] * scale.reshape(9, 2, 2).transpose(
    1, 2, 0
  )
  expected = jnp.einsum('bint,btnd->bnd', weights, window)
  y = qna.query_and_attend(score, value, bias, scale, stride=2)[:, 1, 1, 0]
  np.testing.assert_allclose(y, expected, atol=1e-5)


def test_upsampling_writes_a_square_per_window():
  """Every group of queries is a layer of its own."""
  x = jax.random.normal(jax.random.key(0), (1, 3, 4, 6))
  double = layer.QueryAndAttend(8, 2, upsample=2)
  params = double.init(jax.random.key(1), x, train=False)
  y = double.apply(params, x, train=False)
  assert y.shape == (1, 6, 8, 8)
  p = dict(params['params'])
  single = layer.QueryAndAttend(8, 2)
  for g in range(4):
    part = slice(2 * g, 2 * g + 2)
    mine = p | {'query': p['query'][part]}
    mine |= {name: p[name][:, :, part] for name in ('position', 'position_scale')}
    expected = single.apply({'params': mine}, x, train=False)
    np.testing.assert_allclose(y[:, g // 2 :: 2, g % 2 :: 2], expected, atol=1e-5)
  with pytest.raises(ValueError, match='undo each other'):
    layer.QueryAndAttend(8, 2, upsample=2, stride=2).init(jax.random.key(0), x, train=False)
  with pytest.raises(ValueError, match='kernel 2 has no centre: pass 3'):
    layer.QueryAndAttend(8, 2, kernel=2).init(jax.random.key(0), x, train=False)


@pytest.mark.optimized
def test_memory_does_not_grow_with_the_window():
  """Of a layer, forward and backward; that of attention maps grows. Nothing runs."""
  ours, theirs = (
    [benchmark.peak_bytes(name, kernel) for kernel in (3, 11)] for name in ('qna', 'sasa')
  )
  print('MB of qna and sasa:', [round(size / 1e6, 1) for size in (*ours, *theirs)])
  assert ours[1] < 1.1 * ours[0]
  assert theirs[1] > 1.7 * theirs[0]


@pytest.mark.parametrize('name', ['qna_tiny', 'qna_base'])
def test_multiply_adds(name):
  model, info = va.create_model(name)
  assert abstract.macs(model) == pytest.approx(info.flops, rel=0.02)


TINY = dict(
  dim=8,
  depths=(1, 0),
  window_depths=(0, 1),
  num_heads=(2, 4),
  window_heads=(1, 2),
  window=(4, 4),
)


@pytest.mark.parametrize('size', [(32, 32), (45, 70), (9, 5)])
@pytest.mark.parametrize('policy', ['fixed', 'scale'])
def test_any_image_size_is_taken(size, policy):
  model, info = va.create_model('qna_tiny', image_size=size, window_policy=policy, **TINY)
  shapes = convert.abstract_variables(model, info)
  images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
  features = jax.eval_shape(functools.partial(model.apply, method='features'), shapes, images)
  first, last = ([-(-side // stride) for side in size] for stride in (4, 8))
  assert features['stage1'].shape == (2, *first, 8)
  assert features['stage2'].shape == (2, *last, 16)


def test_windows_and_their_tables_grow_with_the_image_where_asked():
  small, large = (
    convert.abstract_variables(*va.create_model('qna_tiny', image_size=size, window_policy='scale'))
    for size in (224, 384)
  )
  loaded = jax.tree.map(lambda x: np.ones(x.shape, np.float32), small)
  variables, report = transfer.transfer('qna_tiny', loaded, large)
  assert len(report.resized) == 6
  stages = variables['params']['backbone']
  for stage, side in (('stage3', 24), ('stage4', 12)):
    table = stages[stage]['block00']['attn']['relative_position']
    assert table.shape[1:] == (2 * side - 1,) * 2


def test_windows_and_kernels_are_read_off_weights():
  state = {
    'ClassificationHead_0/head_logits/bias': np.zeros(7),
    'QnAStage_0/QnA_Block_1/FusedKQnA_0/rpe_bias': np.zeros((25, 16)),
    'LSAStage_2/MSA_Block_1/MultiHeadSelfAttention_0/RelativePositionalEmbedding_0/rpe_bias': (
      np.zeros((47**2, 8))
    ),
    'LSAStage_3/MSA_Block_1/MultiHeadSelfAttention_0/RelativePositionalEmbedding_0/rpe_bias': (
      np.zeros((23**2, 16))
    ),
  }
  found = models.REFERENCES['official'].infer(state, models.VARIANTS['qna_tiny'].options)
  assert found == {
    'num_classes': 7,
    'kernel': (5, 5, 5, 5),
    'window': (7, 7, 24, 12),
    'image_size': 384,
  }


def test_operators_take_the_place_of_qna_but_where_it_halves_maps():
  model, info = va.create_model('qna_tiny', image_size=32, attn='relative', **TINY)
  backbone = convert.abstract_variables(model, info)['params']['backbone']
  assert 'relative_position' in backbone['stage1']['block00']['attn']
  assert 'position_scale' in backbone['downsample2']['attn']


def test_options_that_cannot_be_are_refused():
  with pytest.raises(ValueError, match='must have one entry per stage'):
    va.create_model('qna_tiny', kernel=(3, 3))
  with pytest.raises(ValueError, match='5 heads do not divide the width 8'):
    va.create_model('qna_tiny', image_size=32, **(TINY | {'num_heads': (5, 5)}))


def test_drop_path_counts_blocks_of_stride_two():
  rates = models.drop_path_rates(0.5, (2, 3, 6, 0), (0, 0, 12, 2))
  assert [len(stage) for stage in rates] == [3, 4, 19, 2]
  np.testing.assert_allclose([r for stage in rates for r in stage], np.linspace(0, 0.5, 28))


def test_recipes_are_those_of_the_code():
  config = qna_tiny.get_config('variant=qna_base')
  assert (config.total, config.batch_size, config.schedule.warmup) == (
    '300 epochs',
    1024,
    '20 epochs',
  )
  assert config.optimizer.learning_rate == pytest.approx(2e-3)
  assert (config.optimizer.weight_decay, config.model.options.drop_path) == (0.05, 0.5)
  tuned = qna_tiny.get_config('variant=qna_base,size=384,init=run')
  assert (tuned.total, tuned.schedule.kind) == ('30 epochs', 'constant')
  assert tuned.optimizer.learning_rate == pytest.approx(4e-5)
  assert math.isclose(tuned.optimizer.weight_decay, 1e-8)
