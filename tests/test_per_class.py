"""What rare classes need: weighted losses, metrics by class, and the best checkpoint by them."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference

import train
from configs import resnet50
from tests import compilation, launcher
from vision_attention import checkpoint, planning
from vision_attention.data import builders
from vision_attention.models import transfer
from vision_attention.training import evaluate, losses, per_class, state

pytestmark = pytest.mark.fast
CLASSES = 5
HAM_COUNTS = (327, 514, 1099, 115, 1113, 6705, 142)


def _data(count: int = 40, seed: int = 0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(count, CLASSES)).astype(np.float32) * 2, rng.integers(0, CLASSES, count)


# -- The loss.


@pytest.mark.parametrize('gamma', [0.0, 0.5, 2.0])
@pytest.mark.parametrize('kind', losses.KINDS)
def test_weights_and_focus_follow_their_formula(kind, gamma):
  logits, labels = _data()
  rng = np.random.default_rng(1)
  share = rng.uniform(size=(40, 1))
  targets = share * np.eye(CLASSES)[labels] + (1 - share) * np.eye(CLASSES)[labels[::-1]]
  weights = rng.uniform(0.1, 3, CLASSES)
  got = losses.classification(
    jnp.asarray(logits),
    jnp.asarray(targets, jnp.float32),
    kind,
    class_weights=jnp.asarray(weights, jnp.float32),
    focal_gamma=gamma,
  )
  z = logits.astype(np.float64)
  if kind == 'softmax':
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    expected = -(weights * targets * (1 - p) ** gamma * np.log(p)).sum(1)
  else:
    p = 1 / (1 + np.exp(-z))
    one = targets * (1 - p) ** gamma * np.log(p)
    other = (1 - targets) * p**gamma * np.log(1 - p)
    expected = -(weights * (one + other)).sum(1)
  np.testing.assert_allclose(got, expected, rtol=2e-5)


@given(st.integers(0, 99))
def test_the_weighted_loss_is_linear_in_the_targets(seed):
  """So a mixed image is weighted by its shares of the classes."""
  logits, labels = _data(6, seed)
  weights = jnp.asarray(np.random.default_rng(seed).uniform(0.1, 3, CLASSES), jnp.float32)
  first, second = jax.nn.one_hot(labels, CLASSES), jax.nn.one_hot(labels[::-1], CLASSES)

  def loss(targets):
    return losses.classification(jnp.asarray(logits), targets, 'softmax', class_weights=weights)

  mixed = loss(0.3 * first + 0.7 * second)
  np.testing.assert_allclose(mixed, 0.3 * loss(first) + 0.7 * loss(second), rtol=1e-4)


@pytest.mark.parametrize('kind', losses.KINDS)
def test_equal_weights_change_nothing(kind):
  logits, labels = _data()
  targets = losses.smooth(jnp.asarray(labels), CLASSES, 0.1, kind)
  plain = losses.classification(jnp.asarray(logits), targets, kind)
  ones = losses.classification(jnp.asarray(logits), targets, kind, class_weights=jnp.ones(CLASSES))
  np.testing.assert_allclose(ones, plain, rtol=1e-5)


@pytest.mark.parametrize('kind', losses.KINDS)
@pytest.mark.parametrize('gamma', [0.5, 1.0, 2.0])
@pytest.mark.parametrize('size', [1e4, -1e4])
def test_the_focus_has_a_finite_gradient_at_certainty(kind, gamma, size):
  logits = jnp.array([[size, 0.0, -size]])
  targets = losses.smooth(jnp.array([0]), 3, 0.0, kind)
  grads = jax.grad(lambda z: losses.classification(z, targets, kind, focal_gamma=gamma).sum())(
    logits
  )
  assert np.isfinite(grads).all()


def test_inverse_weights_have_mean_one_and_fall_with_the_count():
  weights = losses.class_weights('inverse', HAM_COUNTS)
  assert weights is not None
  assert weights.mean() == pytest.approx(1)
  np.testing.assert_allclose(weights * HAM_COUNTS, weights[0] * HAM_COUNTS[0], rtol=1e-5)
  assert losses.class_weights('none', HAM_COUNTS) is None
  with pytest.raises(ValueError, match=r'none of class \[1\]'):
    losses.class_weights('inverse', [3, 0, 5])
  with pytest.raises(ValueError, match="did you mean 'inverse'"):
    losses.class_weights('inverses', [3])


# -- The step, and what is refused.


@pytest.fixture
def _fast_compilation():
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  """Digits of which the training split has ever fewer from class to class."""
  raw = builders.digits()
  train = [x for i, x in enumerate(raw.splits['train']) if i % (x[1] + 1) == 0]
  folder = tmp_path_factory.mktemp('data')
  builders.write('digits', builders.Raw({**raw.splits, 'train': train}, *_rest(raw)), folder)
  return str(folder), np.bincount([label for _, label in train])


def _rest(raw):
  return raw.label_names, raw.shape, raw.description


def _config(data_dir='', **changes):
  config = resnet50.get_config('data=digits')
  with config.unlocked():
    config.model.options.update({'depths': (1,), 'width': 8})
  config.update_from_flattened_dict(
    {
      'image_size': 8,
      'batch_size': 16,
      'model.dtype': 'float32',
      'data.data_dir': data_dir,
      'data.train_ops': (),
      'data.eval_ops': (),
      **changes,
    }
  )
  return config


def test_weights_are_counted_in_the_training_split(data_dir):
  folder, counts = data_dir
  plan = planning.prepare(_config(folder, **{'loss.class_weights': 'inverse'}))
  assert counts[0] > 3 * counts[9]
  np.testing.assert_array_equal(plan.class_weights, losses.class_weights('inverse', counts))
  half = _config(folder, **{'loss.class_weights': 'inverse', 'data.train_split': 'train[:50%]'})
  assert (planning.prepare(half).class_weights != plan.class_weights).any()
  assert planning.prepare(_config(folder)).class_weights is None


def _loss(plan, weights):
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.integers(0, 256, (16, 8, 8, 3), np.uint8),
    'label': np.arange(16, dtype=np.int32) % 10,
    'corrupt': np.zeros(16, np.int32),
  }
  step = jax.jit(state.make_train_step(plan.model.apply, plan.optimizer, plan.config, 10, weights))
  now, window = jax.jit(plan.init)()
  return float(step(now, window, batch)[1].loss)


@pytest.mark.usefixtures('_fast_compilation')
def test_the_step_weighs_examples_by_their_class():
  plan = planning.prepare(_config(), with_data=False)
  weights = np.linspace(0, 1, 10, dtype=np.float32)
  some, others = _loss(plan, weights), _loss(plan, 1 - weights)
  assert some + others == pytest.approx(_loss(plan, None), rel=1e-5)
  # Six of the sixteen images are of classes 0 to 5, a second time; these weigh less than the rest.
  assert 0 < some < others


@pytest.fixture
def _own_signals():
  before = signal.getsignal(signal.SIGTERM)
  yield
  signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures('_fast_compilation', '_own_signals')
def test_a_run_that_went_on_has_the_same_metrics_of_every_class(data_dir, tmp_path):
  config = _config(
    data_dir[0],
    **{
      'loss.class_weights': 'inverse',
      'loss.focal_gamma': 2.0,
      'eval.per_class': True,
      'eval.best_by': 'macro_f1',
      'eval.every': '3 steps',
      'checkpoint.every': '2 steps',
      'checkpoint.keep_latest': 3,
      'schedule.warmup': '1 steps',
      'schedule.boundaries': (),
      'total': '6 steps',
      'log_every': '2 steps',
    },
  )
  found = train.train_and_evaluate(config, tmp_path)
  assert {'eval/recall/9', 'eval/auc/0', 'eval/macro_f1', 'eval/balanced_accuracy'} <= found.keys()
  written = (tmp_path / 'metrics.jsonl').read_text()
  for step in (4, 6):
    shutil.rmtree(tmp_path / checkpoint.CHECKPOINTS / str(step))
  assert train.train_and_evaluate(config, tmp_path) == found
  assert (tmp_path / 'metrics.jsonl').read_text() == written


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'loss.class_weights': 'balanced'}, "config.loss.class_weights 'balanced' is unknown"),
    ({'loss.focal_gamma': -1.0}, 'focal_gamma -1.0 is not between 0'),
    ({'eval.best_by': 'macro_f1'}, "best_by 'macro_f1' needs config.eval.per_class=True"),
    ({'eval.best_by': 'top2'}, "config.eval.best_by 'top2' is unknown"),
    (
      {'eval.best_by': 'balanced_acuracy', 'eval.per_class': True},
      "did you mean 'balanced_accuracy'",
    ),
  ],
)
def test_impossible_values_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    planning.prepare(_config(**changes), with_data=False)


def test_the_best_checkpoint_is_best_by_the_chosen_metric(tmp_path):
  manager = checkpoint.Manager(tmp_path, 1, 1, 'macro_f1')
  for step, score in ((1, 3.0), (2, 9.0), (3, 5.0)):
    arrays = {'x': jnp.full(2, step)}
    manager.save(step, arrays, arrays, _config(), {'macro_f1': score})
  manager.close()
  assert checkpoint.steps_of(tmp_path) == [2, 3]


def test_weights_of_a_plain_model_start_one_with_modules():
  init = {
    'params': {
      'backbone': {
        'stage1': {'block00': {'conv1': np.zeros(2), 'module': {'w': np.zeros(1)}}},
      },
      'head': {'bias': np.zeros(3)},
    }
  }
  loaded = {
    'params': {'backbone': {'stage1': {'block00': {'conv1': np.ones(2)}}}, 'head': {}},
  }
  with pytest.raises(ValueError, match=r'block00/module/w \(1,\) is missing'):
    transfer.transfer('resnet_18', loaded, init)
  variables, report = transfer.transfer('resnet_18', loaded, init, fresh_paths=('/module/',))
  block = variables['params']['backbone']['stage1']['block00']
  assert (block['conv1'] == 1).all()
  assert (block['module']['w'] == 0).all()
  assert report.loaded == ('params/backbone/stage1/block00/conv1',)
  assert 'params/backbone/stage1/block00/module/w' in report.reinitialised
  # The other way round, what is left over is dropped.
  with pytest.raises(ValueError, match='block00/module/w is left over'):
    transfer.transfer('resnet_18', init, loaded)
  _, report = transfer.transfer('resnet_18', init, loaded, fresh_paths=('/module/',))
  assert 'params/backbone/stage1/block00/module/w' in report.dropped


# -- Evaluation.


def _apply(variables, images, *, train):
  """Logits are the image's first pixels, so a test writes them into the image."""
  del variables, train
  return images[:, 0, :CLASSES, 0]


STEP = jax.jit(evaluate.make_eval_step(_apply, (0.0,), (1 / 255,), by_class=True))


def _batches(logits, labels, batch_size):
  for begin in range(0, len(labels), batch_size):
    count = min(batch_size, len(labels) - begin)
    # Padding that would be right, and certain.
    image = np.full((batch_size, 1, CLASSES, 1), 0, np.float32)
    image[:, 0, 0] = 200
    label, mask = np.zeros(batch_size, np.int32), np.zeros(batch_size, np.float32)
    image[:count, 0, :, 0] = logits[begin : begin + count]
    label[:count], mask[:count] = labels[begin : begin + count], 1
    yield {'image': image, 'label': label, 'mask': mask}


def _evaluate(logits, labels, batch_size, names=()):
  batches = _batches(logits, labels, batch_size)
  found = evaluate.evaluate(STEP, {}, batches, len(labels), label_names=names)
  assert found is not None
  return found


@given(st.integers(8, 40), st.integers(1, 9), st.integers(0, 99))
def test_metrics_are_those_of_scikit_learn_for_any_batch_size(count, batch_size, seed):
  logits, labels = _data(count, seed)
  labels[:CLASSES] = np.arange(CLASSES)
  names = [f'c{c}' for c in range(CLASSES)]
  got = _evaluate(logits, labels, batch_size, names)
  predicted = logits.argmax(1)
  z = logits.astype(np.float64)
  p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
  assert got['top1'] == pytest.approx(100 * reference.accuracy_score(labels, predicted))
  assert got['balanced_accuracy'] == pytest.approx(
    100 * reference.balanced_accuracy_score(labels, predicted)
  )
  assert got['macro_f1'] == pytest.approx(
    100 * reference.f1_score(labels, predicted, average='macro')
  )
  assert got['macro_auc'] == pytest.approx(reference.roc_auc_score(labels, p, multi_class='ovr'))
  recall = reference.recall_score(labels, predicted, average=None)
  precision = reference.precision_score(labels, predicted, average=None, zero_division=0)
  for c, name in enumerate(names):
    assert got[f'recall/{name}'] == pytest.approx(100 * recall[c])
    assert got[f'precision/{name}'] == pytest.approx(100 * precision[c])
    assert got[f'auc/{name}'] == pytest.approx(reference.roc_auc_score(labels == c, p[:, c]))


def test_the_order_of_examples_and_batches_changes_nothing():
  logits, labels = _data(37)
  order = np.random.default_rng(3).permutation(37)
  first, second = _evaluate(logits, labels, 8), _evaluate(logits[order], labels[order], 5)
  assert {k: v for k, v in first.items() if k != 'loss'} == {
    k: v for k, v in second.items() if k != 'loss'
  }


def test_always_the_commonest_class_is_no_balanced_accuracy():
  """The counts of HAM10000: 66.95 % right, and one class of seven recalled."""
  labels = np.repeat(np.arange(7), HAM_COUNTS)
  logits = np.zeros((len(labels), 7), np.float32)
  logits[:, 5] = 1
  sums = {
    k: np.asarray(v)
    for k, v in per_class.counts(
      jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(labels == 5), jnp.ones(len(labels)) > 0
    ).items()
  }
  got = per_class.summarize(sums, logits, labels, ())
  assert sums['true_positives'].sum() / len(labels) == pytest.approx(0.6695, abs=1e-4)
  assert got['balanced_accuracy'] == pytest.approx(100 / 7)
  assert (got['recall/5'], got['recall/4'], got['precision/4'], got['auc/4']) == (100, 0, 0, 0.5)


def test_a_class_without_images_is_left_out():
  logits, labels = _data(30)
  labels[labels == 2] = 3
  got = _evaluate(logits, labels, 7)
  assert not [key for key in got if key.endswith('/2') and not key.startswith('precision')]
  recalls = [value for key, value in got.items() if key.startswith('recall/')]
  assert len(recalls) == 4
  assert got['balanced_accuracy'] == pytest.approx(np.mean(recalls))


@pytest.mark.parametrize('value', [0.0, np.nan, np.inf])
def test_a_model_without_an_opinion_recalls_nothing(value):
  labels = np.arange(10) % CLASSES
  got = _evaluate(np.full((10, CLASSES), value, np.float32), labels, 4)
  assert (got['balanced_accuracy'], got['macro_f1'], got['macro_auc']) == (0, 0, 0.5)


def test_certain_logits_keep_their_order():
  """In float32 both probabilities are 1, and the two examples would tie."""
  logits = np.array([[30, 0], [40, 0], [50, 0], [20, 0]], np.float32)
  assert per_class.auc(per_class.log_odds(logits)[:, 0], np.array([0, 1, 1, 0], bool)) == 1


_PROCESS = """
  import json, sys
  sys.path.insert(0, 'tests')
  import jax, numpy as np
  from vision_attention.training import sharding
  sharding.join_processes()
  import test_per_class as t
  from vision_attention.training import evaluate
  mesh = sharding.make_mesh(-1, 1)
  place, index = sharding.batch_sharding(mesh), jax.process_index()
  logits, labels = t._data(37)
  def batches():
    # Each has a block of every batch, as the pipeline does.
    for batch in t._batches(logits, labels, 8):
      mine = {key: np.split(x, 2)[index] for key, x in batch.items()}
      yield {k: jax.make_array_from_process_local_data(place, x) for k, x in mine.items()}
  print(json.dumps(evaluate.evaluate(t.STEP, {}, batches(), 37)))
"""


@pytest.mark.slow
def test_two_processes_find_what_one_does():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  variables = {'JAX_COORDINATOR_ADDRESS': address, 'JAX_NUM_PROCESSES': '2'}
  variables |= {'XLA_FLAGS': compilation.flags(2)}
  pair = [
    subprocess.Popen(
      [sys.executable, '-c', textwrap.dedent(_PROCESS)],
      env=os.environ | variables | {'JAX_PROCESS_ID': str(i)},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  outputs = [process.communicate(timeout=launcher.PATIENCE) for process in pair]
  expected = _evaluate(*_data(37), 8)
  for output, error in outputs:
    assert output, error[-2000:]
    got = json.loads(output.splitlines()[-1])
    assert got.pop('loss') == pytest.approx(expected['loss'], rel=1e-6)
    assert got == {key: value for key, value in expected.items() if key != 'loss'}
