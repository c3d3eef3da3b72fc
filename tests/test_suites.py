"""Other test sets: masks, sets of labels, classes by name, probes, and what is written of them."""

import csv
import io
import json
from typing import Any

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from configs import vit_s16
from vision_attention import checkpoint, convert, evaluation, planning, suites
from vision_attention.data import builders, imagenet_classes, pipeline, records, shards, source
from vision_attention.models import registry
from vision_attention.training import evaluate, few_shot

NAMES = imagenet_classes.imagenet2012()
TINY = {'depth': 1, 'dim': 8, 'mlp_dim': 8, 'num_heads': 1}


def _png(value):
  buffer = io.BytesIO()
  Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(buffer, 'PNG')
  return buffer.getvalue()


def _write(folder, name, labels, names=NAMES, splits=('test',)):
  rows = [(_png(i % 256), int(label)) for i, label in enumerate(labels)]
  raw = builders.Raw(dict.fromkeys(splits, rows), names, (16, 16, 3), name)
  builders.write(name, raw, folder)


def _config(folder, **changes):
  config: Any = vit_s16.get_config()
  with config.unlocked():
    config.model.options.update(TINY)
  config.update_from_flattened_dict(
    {
      'model.dtype': 'float32',
      'image_size': 16,
      'batch_size': 8,
      'eval.batch_size': 8,
      'data.name': 'own',
      'data.data_dir': str(folder),
      'data.train_split': 'test',
      'data.eval_split': 'test',
      'data.train_ops': ('resize(16)',),
      'data.eval_ops': ('resize(16)',),
      'data.num_classes': 0,
      'data.num_threads': 1,
      'schedule.warmup': '0 steps',
      'total': '1 steps',
      'eval.every': '1 steps',
      'eval.shots': (1, 2),
      **changes,
    }
  )
  return config


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  _write(folder, 'own', [0, 1, 2, 3])
  _write(folder, 'imagenet_a', np.arange(200) * 4 + 1)
  _write(folder, 'imagenet_r', [3, 4])
  _write(folder, 'pets', [0, 0, 1, 1, 2, 2, 2], ('cat', 'dog', 'eel'), ('train', 'test'))
  return folder


@pytest.fixture(scope='module')
def weights(folder, tmp_path_factory):
  """A file of weights whose logits are those of class 6, then 5, then 4, ... on every image."""
  config = _config(folder, **{'data.num_classes': 1000})
  _, info = registry.create_model('vit_s16', image_size=16)
  rng = np.random.default_rng(0)
  shapes = convert.abstract_variables(checkpoint.create_model(config), info)
  variables = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes)
  order = np.zeros(1000, np.float32)
  order[:7] = np.arange(7) + 100
  variables['params']['head']['classifier'] = {
    'kernel': np.zeros_like(variables['params']['head']['classifier']['kernel']),
    'bias': order,
  }
  path = tmp_path_factory.mktemp('weights') / 'vit.npz'
  checkpoint.save_variables(path, variables)
  return path


@pytest.mark.fast
def test_all_that_is_missing_is_said_at_once(folder):
  names = ('imagenet_sketch', 'own', 'imagenet2012_real')
  config = _config(folder, **{'eval.suites': names, 'eval.kshot': ('digits', 'pets')})
  said = r'imagenet_sketch(.|\n)*imagenet2012_real(.|\n)*prepare_data.py digits'
  with pytest.raises(source.MissingDataError, match=said):
    suites.prepare(config)
  with pytest.raises(ValueError, match='images of 2 classes in place of 200'):
    suites.prepare(_config(folder, **{'eval.suites': ('imagenet_r',)}))
  with pytest.raises(ValueError, match='none of our 3 classes'):
    suites.prepare(_config(folder, **{'eval.suites': ('pets',)}))


def test_only_the_classes_of_a_set_may_be_answered(folder, weights, tmp_path, capsys):
  """Of 0 to 6 the model prefers 6; of the set's classes 1, 5, 9, ... it can only answer 5."""
  config = _config(folder, **{'eval.suites': ('imagenet_a',), 'init.path': str(weights)})
  found = evaluation.evaluate_only(config, tmp_path / 'run')
  assert (found['eval/correct'], found['eval/count']) == (0, 4)
  assert (found['eval/imagenet_a/correct'], found['eval/imagenet_a/count']) == (1, 200)
  assert found['eval/imagenet_a/top5'] == 1.0  # 5 and 1; then all are alike, and none is right
  assert 'eval/imagenet_a: top-1 0.500 %' in capsys.readouterr().out
  written = json.loads((tmp_path / 'run' / suites.JSON).read_text())
  assert written['results'] == found
  assert (written['model'], written['step'], written['data']) == ('vit_s16', 0, 'own')
  assert written['parameters'] > 1000
  rows = list(csv.DictReader((tmp_path / 'run' / suites.CSV).read_text().splitlines()))
  assert [float(row['eval/imagenet_a/top1']) for row in rows] == [0.5]


def test_probes_and_speed_of_weights(folder, weights, tmp_path):
  changes = {'eval.kshot': ('pets',), 'eval.throughput': True, 'init.path': str(weights)}
  found = evaluation.evaluate_only(_config(folder, **changes), tmp_path)
  assert found['images_per_second'] > 0
  config = _config(folder, **{**changes, 'eval.shots': (3,)})
  with pytest.raises(ValueError, match='class 0 has 2 images, fewer than 3 shots'):
    evaluation.evaluate_only(config, tmp_path)


def test_features_of_chance_tell_digits_apart(folder, weights):
  """Ten of each are far above chance, and more are better than one."""
  builders.write('digits', builders.digits(), folder)
  changes = {'eval.kshot': ('digits',), 'eval.shots': (1, 10), 'eval.batch_size': 64}
  config = _config(folder, **{**changes, 'batch_size': 64, 'model.options.dim': 64})
  plan = planning.prepare(config)
  probe = evaluation._Probe(plan, 'digits')
  variables = plan.model.init(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))
  found = probe(variables)
  assert found[1] > 20
  assert found[10] > max(55, found[1])


def test_every_label_of_real_is_read(tmp_path):
  """Records with none, one and two labels, as TFDS writes them."""
  features = {
    'image': tfds.features.Image(shape=(None, None, 3)),
    'real_label': tfds.features.Sequence(tfds.features.ClassLabel(names=list('abcd'))),
  }

  def make(rows):
    for labels in rows:
      content = records.example(image=_png(7), real_label=labels)
      yield shards.Written('validation', content)

  spec = shards.Spec('real', '1.0.0', features, labels='real_label')
  shards.build(spec, tmp_path, lambda: [([2], [], [0, 3])], make, source='rows')
  config = _config(tmp_path, **{'data.name': 'real', 'data.eval_split': 'validation'})
  (batch,) = pipeline.eval_batches(config.data, batch_size=8)
  assert batch['label'].tolist()[:3] == [2, -1, 0]
  assert batch['mask'].tolist() == [1] * 3 + [0] * 5
  expected = [[False, False, True, False], [False] * 4, [True, False, False, True]]
  assert batch['labels'][:3].tolist() == expected
  assert not batch['labels'][3:].any()


@pytest.mark.fast
def test_any_of_several_labels_is_right_and_none_is_skipped():
  apply = lambda variables, images, train: images[:, 0, :5, 0]
  step = evaluate.make_eval_step(apply, (0.0,), (1 / 255,))
  logits = np.array([[5, 4, 3, 2, 1]] * 4, np.float32)
  labels = np.zeros((4, 5), bool)
  labels[0, [0, 3]] = labels[1, [1, 2]] = labels[2, [4]] = True
  batch = {
    'image': logits[:, None, :, None],
    'label': np.array([0, 1, 4, -1]),
    'labels': labels,
    'mask': np.ones(4, np.float32),
  }
  found = evaluate.evaluate(step, {}, [batch], 4)
  assert found is not None
  assert (found['correct'], found['count'], found['skipped']) == (1, 3, 1)
  prob = np.exp(logits[0]) / np.exp(logits[0]).sum()
  losses = [-np.log(prob[row].sum()) for row in labels[:3]]
  np.testing.assert_allclose(found['loss'], np.mean(losses), rtol=1e-5)


@pytest.mark.fast
def test_logits_are_picked_by_class():
  apply = lambda variables, images, train: images[:, 0, :5, 0]
  step = evaluate.make_eval_step(apply, (0.0,), (1 / 255,), pick=[3, -1, 0])
  batch = {
    'image': np.array([[9, 8, 7, 6, 5], [1, 8, 7, 6, 5]], np.float32)[:, None, :, None],
    'label': np.array([2, 0]),
    'mask': np.ones(2, np.float32),
  }
  found = evaluate.evaluate(step, {}, [batch], 2)
  assert found is not None
  assert found['correct'] == 2
  batch['label'] = np.array([1, 1])  # not known to the model, so never right
  found = evaluate.evaluate(step, {}, [batch], 2)
  assert found is not None
  assert found['correct'] == 0


@pytest.mark.fast
def test_the_probe_is_ridge_regression():
  rng = np.random.default_rng(0)
  for count, dim in ((12, 5), (6, 20)):
    x, test = rng.standard_normal((count, dim)), rng.standard_normal((50, dim))
    labels = np.arange(count) % 3
    z, zt = ((a - x.mean(0)) / (x.std(0) + 1e-5) for a in (x, test))
    z, zt = (np.hstack([a, np.full((len(a), 1), 100.0)]) for a in (z, zt))
    # Ridge regression as least squares on rows added for the penalty.
    penalty = np.sqrt(8.0) * np.eye(dim + 1)
    targets = np.where(labels[:, None] == np.arange(3), 1.0, -1.0)
    weights = np.linalg.lstsq(
      np.vstack([z, penalty]), np.vstack([targets, np.zeros((dim + 1, 3))]), rcond=None
    )[0]
    answers = (zt @ weights).argmax(1)
    truth = rng.integers(0, 3, 50)
    got = few_shot.accuracy(x, labels + 7, test, truth + 7, l2=8.0)
    assert got == pytest.approx(100 * (answers == truth).mean())


@pytest.mark.fast
def test_shots_are_of_every_class_and_by_the_seed():
  labels = np.array([0, 1, 2] * 10)
  chosen = few_shot.choose(labels, 4, seed=1)
  assert np.bincount(labels[chosen]).tolist() == [4, 4, 4]
  assert chosen.tolist() == few_shot.choose(labels, 4, seed=1).tolist()
  assert chosen.tolist() != few_shot.choose(labels, 4, seed=2).tolist()
