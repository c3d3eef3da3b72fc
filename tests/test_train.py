"""The training step and the loop: accumulation, meshes, averages, stops, fine-tuning."""

import json
import pathlib
import shutil
import signal

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

import train
from configs import coatnet0, vit_s16
from vision_attention import checkpoint, evaluation, planning
from vision_attention.data import builders
from vision_attention.models import tree
from vision_attention.training import state

ROOT = pathlib.Path(__file__).parents[1]
COATNET = {
  'model.options.depths': (1, 1, 1, 1),
  'model.options.dims': (8, 8, 16, 16),
  'model.options.stem_dim': 8,
  'image_size': 32,
  'batch_size': 16,
  'log_every': '3 steps',
  'schedule.warmup': '2 steps',
  'compile_cache': '',
}


def _coatnet(**changes) -> ml_collections.ConfigDict:
  config = coatnet0.get_config('local')
  config.update_from_flattened_dict({**COATNET, **changes})
  return config


def _vit(**changes) -> ml_collections.ConfigDict:
  """A model without BatchNorm and a recipe without chance."""
  config = vit_s16.get_config()
  with config.unlocked():
    config.model.options.update({'depth': 2, 'dim': 16, 'mlp_dim': 32, 'num_heads': 2})
    config.update_from_flattened_dict(
      {
        'model.dtype': 'float32',
        'image_size': 32,
        'batch_size': 16,
        'data.num_classes': 10,
        'mixing.mixup_alpha': 0.0,
        'schedule.warmup': '0 steps',
        # Adam divides by the gradient's size, and would magnify rounding.
        'optimizer.name': 'sgd',
        'optimizer.learning_rate': 0.1,
        'optimizer.momentum_dtype': 'float32',
        **changes,
      }
    )
  return config


def _batch(size: int = 16, seed: int = 0) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  return {
    'image': rng.integers(0, 256, (size, 32, 32, 3), np.uint8),
    'label': rng.integers(0, 10, size, np.int32),
    'corrupt': (np.arange(size) == 3).astype(np.int32),
  }


def _run(config, steps: int = 3):
  plan = planning.prepare(config, with_data=False)
  now, window = jax.jit(plan.init, out_shardings=plan.places)()
  step = jax.jit(
    state.make_train_step(plan.model.apply, plan.optimizer, plan.config, 10),
    out_shardings=plan.places,
  )
  for i in range(steps):
    now, window = step(now, window, _batch(config.batch_size, i))
  return now, window


def _assert_close(got, expected, **tolerance):
  got, expected = tree.flatten(got), tree.flatten(expected)
  assert got.keys() == expected.keys()
  for path, value in expected.items():
    np.testing.assert_allclose(got[path], value, err_msg=path, **tolerance)


def test_accumulated_gradients_are_those_of_the_whole_batch():
  whole, window = _run(_vit())
  parts, parts_window = _run(_vit(accumulate=4))
  _assert_close(parts.params, whole.params, rtol=1e-4, atol=1e-6)
  assert float(parts_window.loss) == pytest.approx(float(window.loss), rel=1e-5)
  assert float(parts_window.grad_norm) == pytest.approx(float(window.grad_norm), rel=1e-4)
  assert int(window.corrupt) == 3


def test_averages_follow_their_formula():
  decay = 0.9
  states = [_run(_vit(**{'ema.decay': decay}), steps)[0] for steps in range(4)]
  for path, start in tree.flatten(states[0].params).items():
    expected = np.asarray(start, np.float64)
    for now in states[1:]:
      expected = decay * expected + (1 - decay) * np.asarray(tree.flatten(now.params)[path])
      np.testing.assert_allclose(tree.flatten(now.ema_params)[path], expected, rtol=1e-4, atol=1e-7)


def test_young_averages_forget_sooner():
  """TensorFlow's rule: after the first step the decay is (1 + 1) / (10 + 1)."""
  first, _ = _run(_vit(**{'ema.decay': 0.999}), 0)
  now, _ = _run(_vit(**{'ema.decay': 0.999, 'ema.warmup': True}), 1)
  path = 'head/classifier/bias'
  before, after = (tree.flatten(s.params)[path] for s in (first, now))
  expected = before + (1 - 2 / 11) * (after - before)
  np.testing.assert_allclose(tree.flatten(now.ema_params)[path], expected, rtol=1e-5)


def test_a_step_is_a_function_of_seed_and_number():
  options = {'mixing.mixup_alpha': 0.4, 'mixing.cutmix_alpha': 1.0}
  same, _ = _run(_vit(**options), 2)
  again, _ = _run(_vit(**options), 2)
  jax.tree.map(np.testing.assert_array_equal, again.params, same.params)
  other, _ = _run(_vit(seed=1, **options), 2)
  bias = lambda now: np.asarray(now.params['head']['classifier']['kernel'])
  assert (bias(other) != bias(same)).any()


@pytest.mark.parametrize('spoilt', ['params', 'batch_stats'])
def test_whatever_is_not_finite_is_named_at_its_step(spoilt):
  config = _coatnet()
  plan = planning.prepare(config, with_data=False)
  now, window = jax.jit(plan.init)()
  step = jax.jit(state.make_train_step(plan.model.apply, plan.optimizer, plan.config, 10))
  now, window = step(now, window, _batch())
  assert int(window.bad_step) == -1
  flat = tree.flatten(getattr(now, spoilt))
  # A running statistic does not enter the loss of a training step.
  path = next(path for path in flat if path.endswith(('mean', 'classifier/bias')))
  flat[path] = flat[path].at[0].set(np.inf)
  now = now.replace(**{spoilt: tree.unflatten(flat)})
  for _ in range(2):
    now, window = step(now, window, _batch())
  assert int(window.bad_step) == 2


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  builders.write('digits', builders.digits(), folder)
  return str(folder)


@pytest.fixture
def _own_signals():
  before = signal.getsignal(signal.SIGTERM)
  yield
  signal.signal(signal.SIGTERM, before)


def _loop(data_dir: str, **changes) -> ml_collections.ConfigDict:
  return _coatnet(
    **{
      'data.data_dir': data_dir,
      'data.eval_split': 'test[:50]',
      'eval.every': '100 steps',
      'checkpoint.every': '5 steps',
      'total': '12 steps',
      **changes,
    }
  )


@pytest.mark.slow
@pytest.mark.usefixtures('_own_signals')
def test_a_run_that_explodes_stops_and_keeps_its_last_good_checkpoint(data_dir, tmp_path):
  """The learning rate of step 7 is infinite, which the log line of step 9 finds."""
  config = _loop(
    data_dir,
    **{'schedule.kind': 'step', 'schedule.boundaries': ('6 steps',), 'schedule.factor': np.inf},
  )
  with pytest.raises(FloatingPointError, match=r'step 7 are not finite; .* checkpoint is step 5'):
    train.train_and_evaluate(config, tmp_path)
  assert checkpoint.steps_of(tmp_path) == [5]
  for value in checkpoint.load_state(tmp_path).values():
    assert np.isfinite(value.astype(np.float32)).all()


@pytest.mark.slow
@pytest.mark.usefixtures('_own_signals')
def test_no_checkpoint_of_a_step_that_is_not_finite(data_dir, tmp_path):
  """Also where no log line comes between the fault and the checkpoint."""
  config = _loop(
    data_dir,
    **{
      'schedule.kind': 'step',
      'schedule.boundaries': ('9 steps',),
      'schedule.factor': np.inf,
      'log_every': '100 steps',
    },
  )
  with pytest.raises(FloatingPointError, match='step 10 are not finite'):
    train.train_and_evaluate(config, tmp_path)
  assert checkpoint.steps_of(tmp_path) == [5]


@pytest.mark.slow
@pytest.mark.usefixtures('_own_signals')
def test_fine_tuning_takes_over_all_but_what_changes(data_dir, tmp_path, caplog):
  """At a higher resolution, from the averages of a run, with fresh moments and averages."""
  first = train.train_and_evaluate(_loop(data_dir), tmp_path / 'first')
  assert first['eval_ema/count'] == 50
  rows = [json.loads(line) for line in (tmp_path / 'first/metrics.jsonl').read_text().splitlines()]
  assert [row['step'] for row in rows] == [3, 6, 9, 12, 12]
  assert rows[-1]['eval_ema/top1'] == first['eval_ema/top1']
  again = evaluation.evaluate_only(_loop(data_dir), tmp_path / 'first')
  assert again['eval_ema/loss'] == pytest.approx(first['eval_ema/loss'], abs=1e-5)
  for key, value in (('data.mean', (0.9, 0.9, 0.9)), ('model.source', 'timm')):
    with pytest.raises(ValueError, match=rf'was trained otherwise \({key}: .* -> '):
      evaluation.evaluate_only(_loop(data_dir, **{key: value}), tmp_path / 'first')
  config = _loop(data_dir, **{'image_size': 64, 'init.path': str(tmp_path / 'first')})
  plan = planning.prepare(config)
  with caplog.at_level('INFO', 'vision_attention'):
    now, window = train._start(plan, tmp_path)
  assert 'resized (params/backbone/stage' in caplog.text
  report = json.loads((tmp_path / 'init.json').read_text())
  assert report['path'] == str(tmp_path / 'first')
  assert all(path.endswith('relative_position') for path in report['resized'])
  assert (len(report['resized']) > 0, report['reinitialised'], report['dropped']) == (True, [], [])
  assert (int(now.step), int(window.steps)) == (0, 0)
  loaded = tree.flatten(checkpoint.load_variables(tmp_path / 'first', ema=True)['params'])
  mine = tree.flatten(now.params)
  resized = {path for path in mine if mine[path].shape != loaded[path].shape}
  assert resized == {path for path in mine if path.endswith('relative_position')}
  for path in mine.keys() - resized:
    np.testing.assert_array_equal(mine[path], loaded[path])
  jax.tree.map(np.testing.assert_array_equal, now.ema_params, now.params)
  moments = [x for x in jax.tree.leaves(now.opt_state) if jnp.issubdtype(x.dtype, jnp.floating)]
  assert all((np.asarray(x) == 0).all() for x in moments)


def test_a_model_follows_the_conventions_of_the_weights_that_it_starts_from(data_dir, tmp_path):
  """Otherwise it would begin as another function than the one that was trained."""
  item = tmp_path / 'run' / checkpoint.CHECKPOINTS / '5'
  (item / 'config').mkdir(parents=True)
  (item / '_CHECKPOINT_METADATA').touch()
  (item / 'config' / 'metadata').write_text(json.dumps({'model': {'source': 'timm'}}))
  for init in (
    {'init.path': str(tmp_path / 'run')},
    {'init.path': 'weights.safetensors', 'init.source': 'timm'},
  ):
    plan = planning.prepare(_loop(data_dir, **init))
    assert (plan.config.model.source, plan.model.source) == ('timm', 'timm')
  assert planning.prepare(_loop(data_dir)).config.model.source == ''
  # Of a file of ours nothing is known.
  plan = planning.prepare(_loop(data_dir, **{'init.path': 'w.npz', 'model.source': 'timm'}))
  assert plan.config.model.source == 'timm'
  (item / 'config' / 'metadata').write_text(json.dumps({'model': {'source': ''}}))
  with pytest.raises(ValueError, match=r"model.source is 'timm', but the weights of .*package"):
    planning.prepare(
      _loop(data_dir, **{'init.path': str(tmp_path / 'run'), 'model.source': 'timm'})
    )


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('optimizer.clip_norm', -1.0),
    ('optimizer.b1', 1.5),
    ('mixing.mixup_alpha', -1.0),
    ('mixing.switch_prob', 7.0),
    ('data.std', (0.2, 0.0, 0.2)),
    ('profile.steps', 0),
  ],
)
def test_values_that_would_train_something_else_are_refused(data_dir, key, value):
  with pytest.raises(ValueError, match=f'config.{key} .* is not between'):
    planning.prepare(_loop(data_dir, **{key: value}))


@pytest.mark.slow
@pytest.mark.usefixtures('_own_signals')
def test_sizes_grow_through_a_run(data_dir, tmp_path):
  """The last phase is at `image_size`, at which every evaluation is."""
  changes = {'progressive': (('5 steps', 16),), 'model.options.layout': 'CCCC'}
  changes |= {'checkpoint.keep_latest': 3}
  config = _loop(data_dir, **changes)
  plan = planning.prepare(config)
  assert [phase.first for phase in plan.phases] == [0, 5]
  assert 'resize(16,' in plan.phases[0].train_ops[0]
  assert plan.phases[1].train_ops == plan.config.data.train_ops
  found = train.train_and_evaluate(config, tmp_path / 'grown')
  assert found['eval/count'] == 50
  # Begun again at step 5 it goes on at the larger size and ends alike.
  shutil.copytree(tmp_path / 'grown', tmp_path / 'again')
  for step in (10, 12):
    shutil.rmtree(tmp_path / f'again/checkpoints/{step}')
  assert checkpoint.steps_of(tmp_path / 'again') == [5]
  train.train_and_evaluate(config, tmp_path / 'again')
  states = [checkpoint.load_state(tmp_path / name) for name in ('grown', 'again')]
  jax.tree.map(np.testing.assert_array_equal, *states)


def test_progressive_sizes_are_checked(data_dir):
  with pytest.raises(ValueError, match=r'for which coatnet_0 has [0-9]+ other arrays than for 32'):
    planning.prepare(_loop(data_dir, progressive=(('5 steps', 16),)))
  options = {'model.options.layout': 'CCCC'}
  with pytest.raises(ValueError, match='takes 12 of 12 steps'):
    planning.prepare(_loop(data_dir, progressive=(('12 steps', 16),), **options))
