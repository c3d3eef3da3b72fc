"""Evaluation with a model whose logits are known: padding, ties, NaN, and the asserted count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vision_attention.training import evaluate

pytestmark = pytest.mark.fast
CLASSES = 10


def _apply(variables, images, *, train):
  """Logits are the image's first pixels, so a test writes them into the image."""
  assert not train
  return images[:, 0, :CLASSES, 0] * variables['scale']


STEP = jax.jit(evaluate.make_eval_step(_apply, (0.0,), (1 / 255,)))


def _batches(logits: np.ndarray, labels: np.ndarray, batch_size: int, garbage: float = 200.0):
  """The examples in batches; the last is filled with examples that would count as right."""
  for begin in range(0, len(labels), batch_size):
    count = min(batch_size, len(labels) - begin)
    image = np.full((batch_size, 1, CLASSES, 1), 0.0, np.float32)
    image[:, 0, 0] = garbage
    label, mask = np.zeros(batch_size, np.int32), np.zeros(batch_size, np.float32)
    image[:count, 0, :, 0] = logits[begin : begin + count]
    label[:count], mask[:count] = labels[begin : begin + count], 1
    yield {'image': image, 'label': label, 'mask': mask}


def _evaluate(logits, labels, batch_size, num_examples=None):
  batches = _batches(logits, labels, batch_size)
  return evaluate.evaluate(STEP, {'scale': 1.0}, batches, num_examples or len(labels))


@given(st.integers(1, 23), st.integers(1, 8), st.integers(0, 99))
def test_any_batch_size_counts_every_example_once(count, batch_size, seed):
  rng = np.random.default_rng(seed)
  logits = rng.permuted(np.tile(np.arange(CLASSES, dtype=np.float32), (count, 1)), axis=1)
  labels = rng.integers(0, CLASSES, count)
  got = _evaluate(logits, labels, batch_size)
  rank = CLASSES - 1 - logits[np.arange(count), labels]
  nll = np.log(np.exp(logits).sum(1)) - logits[np.arange(count), labels]
  assert got['count'] == count
  assert got['correct'] == (rank == 0).sum()
  assert got['top1'] == pytest.approx(100 * (rank == 0).mean())
  assert got['top5'] == pytest.approx(100 * (rank < 5).mean())
  assert got['loss'] == pytest.approx(nll.mean(), rel=1e-5)


@pytest.mark.parametrize('value', [0.0, np.nan, np.inf, -np.inf])
def test_a_model_without_an_opinion_is_never_right(value):
  got = _evaluate(np.full((6, CLASSES), value, np.float32), np.arange(6), 4)
  assert (got['correct'], got['top5'], got['count']) == (0, 0.0, 6)


@pytest.mark.parametrize('claimed', [5, 8])
def test_the_count_is_asserted(claimed):
  logits = np.zeros((7, CLASSES), np.float32)
  with pytest.raises(RuntimeError, match=f'evaluated 7 examples of {claimed}'):
    _evaluate(logits, np.zeros(7, int), 4, claimed)


def test_it_gives_up_when_interrupted():
  asked = iter([False, True])
  batches = _batches(np.zeros((9, CLASSES), np.float32), np.zeros(9, int), 4)
  got = evaluate.evaluate(STEP, {'scale': 1.0}, batches, 9, lambda: next(asked))
  assert got is None


def test_sums_are_exact_in_16_bit_models():
  """Counts are integers: a bfloat16 sum would stop growing at 256."""
  logits = np.zeros((1000, CLASSES), np.float32)
  logits[:, 3] = 1
  half = jax.jit(
    evaluate.make_eval_step(
      lambda v, x, train: _apply(v, x, train=train).astype(jnp.bfloat16), (0.0,), (1 / 255,)
    )
  )
  got = evaluate.evaluate(half, {'scale': 1.0}, _batches(logits, np.full(1000, 3), 300), 1000)
  assert got is not None
  assert got['correct'] == 1000
