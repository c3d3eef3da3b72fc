"""Every system's recipe is a run, and its `:local` preset learns digits through the same loop."""

import importlib
import pathlib
import signal

import jax
import numpy as np
import pytest

import train
from vision_attention import evaluation, planning
from vision_attention.data import builders
from vision_attention.training import state

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(p.stem for p in (ROOT / 'configs').glob('*.py') if p.stem[0] != '_')
# Presets of the recipes that only ImageNet's data make sense of, and what others build on.
WITHOUT = {'common', 'resnet50', 'vit_b16', 'vit_s16'}
# Those that learn slower: by noise in CoAtNet's, which is the README's main job.
STEPS = {'coatnet0': 500, 'conv_attention_quadratic': 300, 'qna_tiny': 300, 'volo_d1': 300}


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  builders.write('digits', builders.digits(), folder)
  return str(folder)


@pytest.fixture(autouse=True)
def _own_signals():
  before = signal.getsignal(signal.SIGTERM)
  yield
  signal.signal(signal.SIGTERM, before)


# CoAtNet's preset is the README's main job; the others are trained with `-m exhaustive`.
TRAINED = {'coatnet0'}


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=[] if name in TRAINED else [pytest.mark.exhaustive])
    for name in CONFIGS
    if name not in WITHOUT
  ],
)
def test_local_presets_learn(name, data_dir, tmp_path):
  config = importlib.import_module(f'configs.{name}').get_config('local')
  changes = {
    'data.data_dir': data_dir,
    'compile_cache': '',
    # The last evaluation is what counts, and so many steps are enough for it.
    'total': f'{STEPS.get(name, 200)} steps',
    'schedule.warmup': '20 steps',
    'eval.every': '1000 steps',
    'checkpoint.every': '1000 steps',
  }
  config.update_from_flattened_dict(changes)
  found = train.train_and_evaluate(config, tmp_path)
  accuracy = found[f'{evaluation.best_name(found)}/top1']
  print(f'{name}: {accuracy:.1f} %')
  assert found['eval/count'] == 355
  assert accuracy >= 80


@pytest.mark.parametrize('name', [name for name in CONFIGS if name not in WITHOUT | TRAINED])
def test_local_presets_take_a_step(name):
  config = importlib.import_module(f'configs.{name}').get_config('local')
  config.batch_size = 8
  plan = planning.prepare(config, with_data=False)
  size, classes = config.image_size, plan.config.data.num_classes
  now, window = jax.jit(plan.init, out_shardings=plan.places)()
  step = jax.jit(state.make_train_step(plan.model.apply, plan.optimizer, plan.config, classes))
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.integers(0, 256, (8, size, size, 3), np.uint8),
    'label': rng.integers(0, classes, 8, np.int32),
    'corrupt': np.zeros(8, np.int32),
  }
  later = now
  for _ in range(2):  # the first has a learning rate of zero where it warms up
    later, window = step(later, window, batch)
  assert int(window.bad_step) == -1
  changed = jax.tree.map(lambda a, b: bool((a != b).any()), now.params, later.params)
  assert any(jax.tree.leaves(changed))


# Arguments under which other parameters are there to decay, freeze or start afresh.
ARGUMENTS = [
  *((name, '') for name in CONFIGS if name != 'common'),
  ('sasa_resnet50', 'stem=attention'),
  ('sasa_resnet50', 'stem=attention_plain'),
  ('sasa_resnet50', 'stem=attention_convvalue'),
  ('aa_resnet50', 'variant=aa_resnet_34'),
  ('aa_resnet50', 'variant=aa_wide_resnet_28_10,data=cifar100'),
  ('attention_modules', 'module=srm,variant=resnet_18'),
  ('attention_modules', 'module=halo'),
  ('attention_modules', 'variant=srm_resnet_50'),
  ('botnet_t3', 'variant=botnet_50,last_stride=1'),
  ('botnet_t3', 'variant=botnet_t7'),
  ('conv_attention_quadratic', 'variant=conv_attention_learned_content'),
  ('conv_attention_quadratic', 'variant=resnet_18'),
  ('gc_resnet50', 'variant=nl_resnet_50'),
  ('halonet_h0', 'variant=halonet_h4,conv=2'),
  ('lesa_resnet50', 'variant=lesa_wrn_50'),
  ('skin_lesions', 'module=cbam,variant=resnet_50,fold=-1'),
]


@pytest.mark.parametrize(('name', 'arg'), ARGUMENTS)
def test_recipes_are_runs_that_could_start(name, arg):
  """Model, optimizer, schedule and shapes fit each other, at full size; nothing is compiled."""
  config = importlib.import_module(f'configs.{name}').get_config(arg)
  if 'cifar100' in arg:
    config.data.num_classes, config.data.num_train = 100, 50_000
  plan = planning.prepare(config, with_data=False)
  assert plan.total > 1000
  assert plan.factor(plan.total // 2) > 0
  assert plan.config.model.name == plan.info.name
