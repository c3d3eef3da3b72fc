"""Every system's `:local` preset learns digits on a laptop, through the loop of a full run."""

import importlib
import pathlib
import signal

import pytest

import train
from vision_attention.data import builders

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(p.stem for p in (ROOT / 'configs').glob('*.py') if p.stem[0] != '_')
# Presets of the recipes that only ImageNet's data make sense of, and what others build on.
WITHOUT = {'common', 'resnet50', 'vit_s16'}
# CoAtNet's is the README's main job, with noise that wants more steps.
STEPS = {'coatnet0': 500, 'conv_attention_quadratic': 300}


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


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize('name', [name for name in CONFIGS if name not in WITHOUT])
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
  accuracy = found[f'{train.best_name(found)}/top1']
  print(f'{name}: {accuracy:.1f} %')
  assert found['eval/count'] == 355
  assert accuracy >= 80
