"""Every value of the published recipes, and what the configs refuse."""

import functools
import importlib
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import coatnet0, common, conv_attention_quadratic, resnet50, vit_b16, vit_s16
from tests import compilation, launcher
from vision_attention import planning
from vision_attention.training import optimizer, schedule, state

pytestmark = pytest.mark.usefixtures('unchecked')

IMAGENET = 1_281_167


def _values(config) -> dict:
  """The recipe of a config in the terms of CoAtNet's Table 10."""
  peak = config.optimizer.learning_rate
  final = {'constant': 1.0}.get(config.schedule.kind, config.schedule.final)
  return {
    'drop_path': config.model.options.drop_path,
    'rand_augment': [op for op in config.data.train_ops if op.startswith('rand_augment')],
    'center_crop': config.data.eval_ops[0].startswith('center_crop'),
    'mixup': config.mixing.mixup_alpha,
    'loss': config.loss.kind,
    'smoothing': config.loss.label_smoothing,
    'total': config.total,
    'batch': config.batch_size,
    'peak': peak,
    'min': pytest.approx(peak * final),
    'warmup': config.schedule.warmup,
    'decay': config.schedule.kind,
    'weight_decay': config.optimizer.weight_decay,
    'ema': config.ema.decay,
  }


def _rand_augment(magnitude: int) -> list[str]:
  return [f'rand_augment_tpu(2, {magnitude})']


TRAIN = {
  'rand_augment': _rand_augment(15),
  'center_crop': True,
  'mixup': 0.8,
  'loss': 'softmax',
  'smoothing': 0.1,
  'total': '300 epochs',
  'batch': 4096,
  'peak': 1e-3,
  'min': 1e-5,
  'warmup': '10_000 steps',
  'decay': 'cosine',
  'weight_decay': 0.05,
  'ema': 0.0,
}
TUNE = {
  **TRAIN,
  'center_crop': False,
  'total': '30 epochs',
  'batch': 512,
  'peak': 5e-5,
  'min': 5e-5,
  'warmup': '0 steps',
  'decay': 'constant',
  'weight_decay': 1e-8,
  'ema': 0.9999,
}
PRETRAIN = {
  **TRAIN,
  'rand_augment': [],
  'mixup': 0.0,
  'loss': 'sigmoid',
  'smoothing': 1e-4,
  'total': '90 epochs',
  'warmup': '5 epochs',
  'decay': 'linear',
  'weight_decay': 0.01,
}
TUNE_21K = {**TUNE, 'rand_augment': [], 'mixup': 0.0, 'batch': 1024}
RATES_1K = {'coatnet_0': 0.2, 'coatnet_1': 0.3, 'coatnet_2': 0.5, 'coatnet_3': 0.7}
RATES_21K = {'coatnet_2': 0.3, 'coatnet_3': 0.5, 'coatnet_4': 0.7}
STRONGER = {'rand_augment': _rand_augment(20)}  # CoAtNet-3, in fine-tuning


def _table_10():
  for name, rate in RATES_1K.items():
    yield f'variant={name}', {**TRAIN, 'drop_path': rate}
    tune = {**TUNE, 'drop_path': rate, **(STRONGER if name == 'coatnet_3' else {})}
    yield f'variant={name},size=384,init=run', tune
  for name, rate in RATES_21K.items():
    yield f'variant={name},data=imagenet21k', {**PRETRAIN, 'drop_path': rate}
    tune = {**TUNE_21K, 'drop_path': rate}
    yield f'variant={name},size=512,init=run,pretrained=21k', tune


@pytest.mark.fast
@pytest.mark.parametrize('arg, expected', list(_table_10()), ids=[arg for arg, _ in _table_10()])
def test_coatnet_is_trained_as_in_table_10(arg, expected):
  config = coatnet0.get_config(arg)
  assert _values(config) == expected
  assert config.optimizer.name == 'adamw'
  assert config.optimizer.clip_norm == 1.0
  assert config.mixing.cutmix_alpha == 0.0
  assert config.mixing.prob == 1.0
  size = dict(item.split('=') for item in arg.split(',')).get('size', '224')
  assert config.image_size == int(size)


@pytest.mark.fast
@pytest.mark.parametrize('epochs, steps', [(90, 112_603), (150, 187_671), (300, 375_342)])
def test_vit_s16_is_trained_as_better_plain_vit(epochs, steps):
  """arXiv 2205.01580, section 3, and the config of its code."""
  config = vit_s16.get_config(f'epochs={epochs}')
  plan = planning.prepare(config, with_data=False)
  assert plan.total == steps
  assert config.batch_size == 1024
  assert config.model.options.to_dict() == {
    'pool': 'gap',
    'position': 'sincos2d',
    'pre_logits': True,
  }
  adam = config.optimizer
  assert (adam.name, adam.learning_rate, adam.b1, adam.b2) == ('adamw', 1e-3, 0.9, 0.999)
  assert (adam.momentum_dtype, adam.clip_norm) == ('bfloat16', 1.0)
  assert (adam.weight_decay, adam.weight_decay_times_lr) == (1e-4, False)
  assert (config.schedule.kind, config.schedule.warmup) == ('cosine', '10_000 steps')
  assert (config.schedule.final, config.ema.decay) == (0.0, 0.0)
  assert config.mixing.mixup_alpha == 0.2
  assert (config.loss.kind, config.loss.label_smoothing) == ('softmax', 0.0)
  assert config.data.mean == config.data.std == (0.5, 0.5, 0.5)
  assert config.data.train_split == 'train[:99%]'
  assert config.data.train_ops[0].startswith('random_resized_crop({size}, area=(0.05, 1.0)')
  assert config.data.train_ops[2].startswith('rand_augment_tpu(2, 10')
  decays = optimizer.matches(plan.shapes[0].params, adam.weight_decay_mask)
  flat = {optimizer.path_of(p): v for p, v in jax.tree_util.tree_leaves_with_path(decays)}
  assert {path.rsplit('/', 1)[1] for path, decayed in flat.items() if decayed} == {'kernel'}
  assert all(decayed == path.endswith('/kernel') for path, decayed in flat.items())


@pytest.mark.fast
@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_resnet_50_is_trained_as_on_tpus(smoothing):
  """github.com/tensorflow/tpu, models/official/resnet: lr 0.1 per 256 images, 90 epochs."""
  config = resnet50.get_config(f'smoothing={smoothing}')
  plan = planning.prepare(config, with_data=False)
  per_epoch = IMAGENET / 1024
  assert plan.total == round(90 * per_epoch)
  sgd = config.optimizer
  assert (sgd.name, sgd.learning_rate, sgd.momentum, sgd.nesterov) == ('sgd', 0.4, 0.9, True)
  assert sgd.weight_decay == 1e-4
  assert config.loss.label_smoothing == smoothing
  factors = {0: 0.0, 2.5: 0.5, 5: 1.0, 29.9: 1.0, 30.1: 0.1, 60.1: 0.01, 80.1: 1e-3, 89.9: 1e-3}
  for epoch, factor in factors.items():
    assert float(plan.factor(round(epoch * per_epoch))) == pytest.approx(factor, abs=1e-3)
  decays = optimizer.matches(plan.shapes[0].params, sgd.weight_decay_mask)
  for path, decayed in jax.tree_util.tree_leaves_with_path(decays):
    name = optimizer.path_of(path)
    assert decayed == ('norm' not in name), f'{name}: all but BatchNorm decays'


@pytest.mark.fast
def test_the_learning_rate_moves_with_the_batch_size_of_the_argument():
  assert resnet50.get_config('batch=4096').optimizer.learning_rate == pytest.approx(1.6)


@pytest.mark.fast
@pytest.mark.parametrize('arg, epochs', [('literal', 300), ('literal,init=run', 100)])
def test_the_literal_schedule_has_the_authors_rate_at_every_step(arg, epochs):
  """github.com/epfml/attention-cnn: train.py calls utils/learning_rate.py once an epoch."""
  config = conv_attention_quadratic.get_config(arg)
  to_steps = functools.partial(schedule.steps, num_examples=50_000, batch_size=100)
  factor = schedule.relative(config.schedule, total=to_steps(config.total), to_steps=to_steps)
  horizon = epochs * (50_000 // 100 + 1)
  warm = int(0.05 * horizon)
  for epoch in {0, 1, 14, 15, 16, epochs // 2, epochs - 1}:
    t = epoch * 500
    cosine = 0.5 * (1 + math.cos(math.pi * (t - warm) / (horizon - warm)))
    expected = t / warm if t < warm else cosine
    for step in (t, t + 499):
      assert float(factor(step)) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.fast
def test_durations_follow_overrides():
  """A schedule computed when the file is read would not see `--config.batch_size`."""
  config = coatnet0.get_config()
  with config.unlocked():
    config.batch_size = 1024
  assert planning.prepare(config, with_data=False).total == round(300 * IMAGENET / 1024)


TINY = {
  'coatnet0': {'depths': (1, 1, 1, 1), 'dims': (8, 8, 16, 16), 'stem_dim': 8, 'head_dim': 8},
  'vit_s16': {'depth': 1, 'dim': 16, 'mlp_dim': 32, 'num_heads': 2},
  'resnet50': {'depths': (1, 1, 1, 1), 'width': 8},
}


@pytest.mark.parametrize(
  'name, arg',
  [
    ('coatnet0', 'variant=coatnet_2,data=imagenet21k'),
    ('coatnet0', 'local'),
    ('vit_s16', ''),
    ('resnet50', 'smoothing=0.1'),
  ],
)
def test_every_recipe_takes_a_step(name, arg):
  config = importlib.import_module(f'configs.{name}').get_config(arg)
  with config.unlocked():
    config.model.options.update(TINY[name])
    config.image_size, config.batch_size, config.data.num_classes = 32, 8, 10
  plan = planning.prepare(config, with_data=False)
  now, window = jax.jit(plan.init, out_shardings=plan.places)()
  step = jax.jit(state.make_train_step(plan.model.apply, plan.optimizer, plan.config, 10))
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.integers(0, 256, (8, 32, 32, 3), np.uint8),
    'label': rng.integers(0, 10, 8, np.int32),
    'corrupt': np.zeros(8, np.int32),
  }
  later = now
  for _ in range(2):
    later, window = step(later, window, batch)
  assert int(window.bad_step) == -1
  assert (int(later.step), int(window.steps)) == (2, 2)
  changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), now.params, later.params)
  assert any(jax.tree.leaves(changed))
  assert (later.ema_params is None) == (config.ema.decay == 0)


@pytest.mark.fast
@pytest.mark.parametrize(
  'arg, message',
  [
    ('varaint=coatnet_1', "'varaint' is unknown: did you mean 'variant'"),
    ('size=large', "size='large' is not a int"),
    ('variant', "'variant' needs a value"),
    ('local=maybe', "local='maybe' is not a bool"),
    ('variant=coatnet_7', "Table 10 has no training on ImageNet-1k for 'coatnet_7'"),
    ('size=384,pretrained=jtf', "pretrained='jtf' must be 1k or 21k or jft"),
    ('augment', 'augment goes with coatnet_4'),
    ('local,size=64', 'local is a model and recipe of its own'),
    ('variant=swin_tiny', r"'swin_tiny' is not of this recipe.*coatnet_.*--config.model.name="),
    ('size=384,pretrained=21k', "pretrained='21k' goes with init"),
    (
      'data=imagenet21k/winter21',
      'say data=imagenet21k, and --config.data.name=',
    ),
  ],
)
def test_arguments_that_are_refused(arg, message):
  with pytest.raises(ValueError, match=message):
    coatnet0.get_config(arg)


@pytest.mark.fast
def test_an_argument_without_effect_is_refused():
  with pytest.raises(ValueError, match=r'rate=0\.01, steps=500 changes nothing'):
    vit_b16.get_config('steps=500,rate=0.01')
  # The default, even when it is given, asks for nothing.
  assert vit_b16.get_config('rate=0.03').total == vit_b16.get_config().total


@pytest.mark.fast
def test_a_misspelt_key_is_refused():
  with pytest.raises(AttributeError, match='learning_rate'):
    common.get_config().optimizer.learning_rat = 1.0


@pytest.mark.fast
@pytest.mark.parametrize(
  'changes, message',
  [
    ({'batch_size': 0}, 'batch_size 0 is not a multiple'),
    ({'batch_size': 30, 'accumulate': 4}, 'the nearest are 28 and 32'),
    ({'accumulate': 0}, 'accumulate 0 is not between 1'),
    ({'total': '0 steps'}, "total '0 steps' is no step"),
    ({'total': '3 decades'}, 'does not read like'),
    ({'image_size': 225}, 'nearest sizes are 224 and 240'),
    ({'mesh.fsdp': 3}, 'does not give 1 devices'),
    ({'eval.every': '0 steps'}, 'writes eval every 0 steps'),
    ({'loss.kind': 'hinge'}, "config.loss.kind 'hinge' is unknown"),
    ({'model.dtype': 'float8'}, "config.model.dtype 'float8' is unknown"),
    ({'model.name': 'vit_s61'}, "did you mean 'vit_s16'"),
    ({'optimizer.name': 'adam'}, "did you mean 'adamw'"),
    ({'optimizer.learning_rate': float('nan')}, 'learning_rate nan is not between'),
    ({'schedule.warmup': '400 epochs'}, 'leaves none of'),
    ({'data.num_classes': 0}, 'num_classes and num_train must be given'),
  ],
)
def test_impossible_values_are_refused_in_one_sentence(changes, message):
  config = vit_s16.get_config()
  config.update_from_flattened_dict(changes)
  if config.image_size == 224:
    # No test needs the whole model.
    with config.unlocked():
      config.model.options.update(TINY['vit_s16'])
  with pytest.raises(ValueError, match=message) as caught:
    planning.prepare(config, with_data=False)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--config=configs/vit_s16.py:epoch=3'], "'epoch' is unknown: did you mean 'epochs'?"),
    (['--config=configs/vit_s16.py', '--config.batch_siz=3'], '"batch_size" instead of'),
    (['--config=configs/vit_s61.py'], "did you mean 'configs/vit_s16.py'"),
    (['--config=configs/vit_s16.py', '--config.data.data_dir=/nowhere'], '/nowhere'),
  ],
)
def test_the_command_line_says_it_in_one_line(arguments, message, tmp_path):
  done = subprocess.run(
    [sys.executable, 'main.py', *arguments, f'--workdir={tmp_path}'],
    capture_output=True,
    text=True,
    timeout=launcher.PATIENCE,
  )
  assert done.returncode == 2
  lines = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
  assert len(lines) == 1
  assert message in lines[0]
  assert 'Traceback' not in done.stderr


def test_a_dry_run_needs_no_data(tmp_path):
  done = subprocess.run(
    [
      sys.executable,
      'main.py',
      '--config=configs/coatnet0.py',
      '--mode=dry_run',
      '--config.mesh.data=1',
      '--config.mesh.fsdp=4',
      '--config.data.data_dir=/nowhere',
    ],
    capture_output=True,
    text=True,
    timeout=launcher.PATIENCE,
    env={
      'PATH': '',
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': compilation.flags(4),
    },
  )
  assert done.returncode == 0, done.stderr
  # 25,036,948 parameters and two moments of them in float32, most of it split over four devices.
  assert '25,036,948' in done.stdout
  assert "{'data': 1, 'fsdp': 4, 'tensor': 1} of 4 cpu devices" in done.stdout
  assert '1024 per device' in done.stdout
  mebibytes = float(done.stdout.split('state')[1].split()[0])
  assert 286.5 / 4 < mebibytes < 286.5 / 4 * 1.05
