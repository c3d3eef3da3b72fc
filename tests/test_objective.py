"""Losses from teachers and for tokens; erasing on the device; the teacher within a run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import train
import vision_attention as va
from configs import coatnet0, common, vit_s16
from vision_attention import planning
from vision_attention.data import builders
from vision_attention.training import erasing, objective, state

TINY_VIT = {'depth': 1, 'dim': 16, 'mlp_dim': 32, 'num_heads': 2}


def _config(**changes):
  config = common.get_config()
  config.update_from_flattened_dict(changes)
  return config


def _loss(config, found, targets, outputs=()):
  """The loss of given logits: the model is a constant."""
  apply = lambda variables, images, **options: (variables['params'], {})
  loss = objective.make(apply, config, outputs)
  return float(loss(found, {}, None, targets, jax.random.key(0))[0])


def _cross_entropy(logits, targets):
  return float(-(np.asarray(targets) * jax.nn.log_softmax(logits)).sum(-1).mean())


@pytest.fixture
def drawn():
  keys = jax.random.split(jax.random.key(0), 4)
  logits, distilled = (2 * jax.random.normal(key, (6, 5)) for key in keys[:2])
  labels, teacher = (jax.nn.softmax(jax.random.normal(key, (6, 5))) for key in keys[2:])
  return logits, distilled, labels, teacher


@pytest.mark.fast
def test_hard_distillation_is_the_mean_of_two_cross_entropies(drawn):
  """arXiv 2012.12877, equation 3; the second classifier sees the teacher alone."""
  logits, distilled, labels, _ = drawn
  decision = jax.nn.one_hot(jnp.arange(6) % 5, 5)
  targets = {'labels': labels, 'teacher': decision}
  config = _config(**{'distill.kind': 'hard', 'distill.weight': 0.3})
  one = 0.7 * _cross_entropy(logits, labels) + 0.3 * _cross_entropy(logits, decision)
  assert _loss(config, logits, targets) == pytest.approx(one, rel=1e-5)
  two = 0.7 * _cross_entropy(logits, labels) + 0.3 * _cross_entropy(distilled, decision)
  found = {'classifier': logits, 'distilled': distilled}
  assert _loss(config, found, targets, ('classifier', 'distilled')) == pytest.approx(two, rel=1e-5)


@pytest.mark.fast
def test_soft_distillation_is_a_divergence_at_its_temperature(drawn):
  """arXiv 2012.12877, equation 2."""
  logits, _, labels, teacher = drawn
  config = _config(**{'distill.kind': 'soft', 'distill.weight': 1.0, 'distill.temperature': 3.0})
  student = np.asarray(jax.nn.log_softmax(logits / 3))
  expected = 9 * (teacher * (np.log(teacher) - student)).sum(-1).mean()
  found = _loss(config, logits, {'labels': labels, 'teacher': teacher})
  assert found == pytest.approx(float(expected), rel=1e-4)
  same = _loss(config, 3 * jnp.log(teacher), {'labels': labels, 'teacher': teacher})
  assert same == pytest.approx(0, abs=1e-4)


@pytest.mark.fast
def test_tokens_add_their_mean_and_mixed_tokens_mix_the_label(drawn):
  logits, _, labels, _ = drawn
  tokens = jax.random.normal(jax.random.key(9), (6, 2, 3, 5))
  wanted = jax.nn.softmax(jax.random.normal(jax.random.key(8), tokens.shape))
  share = jnp.linspace(0.2, 0.9, 6)
  found = {'classifier': logits, 'tokens': tokens, 'share': share}
  mixed = share[:, None] * labels + (1 - share[:, None]) * labels[::-1]
  config = _config(**{'tokens.weight': 0.5})
  outputs = ('classifier', 'tokens')
  expected = _cross_entropy(logits, mixed) + 0.5 * _cross_entropy(tokens, wanted)
  targets = {'labels': labels, 'tokens': wanted}
  assert _loss(config, found, targets, outputs) == pytest.approx(expected, rel=1e-5)
  # Without labels of their own, all tokens have the image's.
  expected = _cross_entropy(logits, mixed) + 0.5 * _cross_entropy(tokens, labels[:, None, None])
  assert _loss(config, found, {'labels': labels}, outputs) == pytest.approx(expected, rel=1e-5)


@pytest.mark.fast
@pytest.mark.parametrize(
  ('changes', 'outputs', 'message'),
  [
    ({'distill.kind': 'hrad'}, (), "did you mean 'hard'"),
    ({'distill.kind': 'hard'}, (), 'give config.teacher.name and .path'),
    ({'teacher.name': 'resnet_50'}, (), 'nothing learns from it'),
    ({'tokens.weight': 0.5}, (), 'classifies no tokens'),
    ({}, ('classifier', 'distilled'), 'has a classifier for a teacher and the config has none'),
  ],
)
def test_a_teacher_needs_a_use_and_a_use_a_teacher(changes, outputs, message):
  with pytest.raises(ValueError, match=message):
    objective.check(_config(**changes), outputs)


def test_dense_logits_average_to_those_of_a_linear_head():
  model, _ = va.create_model('resnet_18', num_classes=3, image_size=64, depths=(1, 1), width=8)
  images = jax.random.normal(jax.random.key(1), (2, 64, 64, 3))
  variables = model.init(jax.random.key(0), images)
  dense = model.apply(variables, images, method='dense_logits')
  assert dense.shape[0] == 2
  assert dense.shape[1] == dense.shape[2] > 1
  np.testing.assert_allclose(dense.mean((1, 2)), model.apply(variables, images), atol=1e-4)
  token, _ = va.create_model('vit_ti16', num_classes=3, image_size=32, **TINY_VIT)
  with pytest.raises(ValueError, match='mean over a map'):
    token.apply(
      token.init(jax.random.key(0), images[:, :32, :32]), images[:, :32, :32], method='dense_logits'
    )


@pytest.mark.fast
@given(seed=st.integers(0, 1000), height=st.integers(8, 24), width=st.integers(8, 24))
def test_erasing_takes_rectangles_of_the_stated_area(seed, height, width):
  images = jnp.ones((8, height, width, 3))
  gone = np.asarray(erasing.erase(jax.random.key(seed), images, prob=1.0, mode='zero'))[..., 0] == 0
  for mask in gone:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not mask.any():
      continue  # no rectangle of ten lay within the image
    assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    assert mask.sum() == len(rows) * len(columns)
    # Sides are rounded to pixels.
    side = mask.sum() ** 0.5
    assert 0.02 * height * width <= (side + 1.5) ** 2
    assert mask.mean() <= 1 / 3 + 0.75 * (len(rows) + len(columns)) / (height * width)


@pytest.mark.fast
def test_erasing_has_its_probability_and_its_noise():
  images = jnp.full((2000, 8, 8, 1), 9.0)
  found = erasing.erase(jax.random.key(0), images, prob=0.25)
  hit = np.asarray((found != 9.0).any((1, 2, 3)))
  assert 0.2 < hit.mean() < 0.3
  noise = np.asarray(found)[np.asarray(found) != 9.0]
  assert abs(noise.mean()) < 0.05
  assert abs(noise.std() - 1) < 0.05
  flat = np.asarray(erasing.erase(jax.random.key(0), images, prob=1.0, mode='color'))
  assert all(len(np.unique(x[x != 9.0])) <= 1 for x in flat[:50])
  np.testing.assert_array_equal(erasing.erase(jax.random.key(0), images, prob=0.0), images)


def _student(**changes):
  config = vit_s16.get_config()
  with config.unlocked():
    config.model.options.update(TINY_VIT)
    config.image_size, config.batch_size, config.data.num_classes = 32, 8, 10
    config.model.dtype = 'float32'
    config.update_from_flattened_dict(changes)
  return config


def test_a_step_learns_from_its_teacher(tmp_path):
  """Of a teacher that is sure, a student with nothing else to learn takes the decision."""
  config = _student(
    **{
      'teacher.name': 'resnet_18',
      'teacher.path': str(tmp_path),
      'teacher.options': {'depths': (1,), 'width': 8},
      'distill.kind': 'hard',
      'distill.weight': 1.0,
      'mixing.mixup_alpha': 0.0,
      'schedule.warmup': '0 steps',
      'optimizer.learning_rate': 0.01,
      'accumulate': 2,
    }
  )
  plan = planning.prepare(config, with_data=False)
  images = jnp.zeros((1, 32, 32, 3))
  variables = plan.teacher.init(jax.random.key(0), images)
  bias = variables['params']['head']['classifier']['bias']
  variables['params']['head']['classifier']['bias'] = bias.at[7].set(50.0)
  step = jax.jit(
    state.make_train_step(
      plan.model.apply, plan.optimizer, plan.config, 10, teacher=plan.teacher.apply
    )
  )
  now, window = jax.jit(plan.init)()
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.integers(0, 256, (8, 32, 32, 3), np.uint8),
    'label': np.zeros(8, np.int32),
    'corrupt': np.zeros(8, np.int32),
  }
  for _ in range(20):
    now, window = step(now, window, batch, variables)
  logits = plan.model.apply({'params': now.params}, batch['image'] / 255.0)
  assert (logits.argmax(-1) == 7).all()


@pytest.mark.slow
def test_a_run_distils_from_another(tmp_path):
  builders.write('digits', builders.digits(), tmp_path / 'data')
  small = {
    'data.data_dir': str(tmp_path / 'data'),
    'compile_cache': '',
    'total': '3 steps',
    'schedule.warmup': '0 steps',
    'eval.every': '3 steps',
  }
  options = {'depths': (1, 1), 'dims': (8, 16), 'stem_dim': 8, 'layout': 'CT', 'strides': (2, 2)}
  teacher = coatnet0.get_config('local')
  with teacher.unlocked():
    teacher.update_from_flattened_dict(small)
    teacher.model.options.update(options)
  train.train_and_evaluate(teacher, tmp_path / 'teacher')
  config = _student(
    **small,
    **{
      'data.name': 'digits',
      'data.num_classes': 0,
      'data.eval_split': 'test',
      'teacher.name': 'coatnet_0',
      'teacher.path': str(tmp_path / 'teacher'),
      'teacher.options': teacher.model.options.to_dict(),
      'distill.kind': 'soft',
      'batch_size': 64,
      'data.repeats': 3,
      'erasing.prob': 0.25,
    },
  )
  train.train_and_evaluate(config, tmp_path / 'student')
  lines = (tmp_path / 'student' / 'metrics.jsonl').read_text().splitlines()
  assert any('train/loss' in json.loads(line) for line in lines)
  config.teacher.path = str(tmp_path / 'nothing')
  with pytest.raises(FileNotFoundError, match=r'config\.teacher\.path'):
    planning.prepare(config)
