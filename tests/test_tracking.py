"""Weights & Biases, with a stand-in for its library that writes down how it is called."""

import json
import sys

import pytest

from configs import common
from vision_attention.training import metrics, tracking

pytestmark = pytest.mark.fast
LIBRARY = """
import json, pathlib
class Run:
  def __init__(self, **options):
    self.path = pathlib.Path(options['dir']) / 'calls'
    self.note('init', options)
  def note(self, *call):
    with self.path.open('a') as file:
      file.write(json.dumps(call) + '\\n')
  def log(self, values, step):
    self.note('log', step, values)
  def finish(self):
    self.note('finish')
init = Run
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
  (tmp_path / 'wandb.py').write_text(LIBRARY)
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.delitem(sys.modules, 'wandb', raising=False)
  yield
  sys.modules.pop('wandb', None)


def _config(**values):
  config = common.get_config()
  config.wandb.update(values)
  return config


def _calls(folder):
  return [json.loads(line) for line in (folder / 'calls').read_text().splitlines()]


def test_a_restart_goes_on_with_the_same_run(library, tmp_path):
  folder, config = tmp_path / 'se', _config(project='attention')
  for step in (0, 10):
    writer = metrics.Writer(folder, step, True, config)
    writer.write(step + 5, {'train/loss': 0.5})
    writer.write(step + 5, {'step_ms': 3.0}, timing=True)
    writer.close()
  calls = _calls(folder)
  assert [call[0] for call in calls] == ['init', 'log', 'log', 'finish'] * 2
  first, second = calls[0][1], calls[4][1]
  assert first == second
  assert first['id'] == (folder / tracking.ID).read_text()
  assert (first['project'], first['name'], first['mode']) == ('attention', 'se', 'offline')
  assert first['resume'] == 'allow'
  assert first['config']['wandb']['project'] == 'attention'
  assert calls[1][1:] == [5, {'train/loss': 0.5}]
  assert calls[6][1:] == [15, {'step_ms': 3.0}]
  metrics.Writer(tmp_path / 'eca', 0, True, config).close()
  assert _calls(tmp_path / 'eca')[0][1]['id'] != first['id']


def test_it_is_off_unless_asked_for_and_in_other_processes(library, tmp_path):
  for active, config in ((True, _config()), (True, None), (False, _config(project='attention'))):
    writer = metrics.Writer(tmp_path / 'run', 0, active, config)
    writer.write(5, {'train/loss': 0.5})
    writer.close()
  assert not (tmp_path / 'run' / 'calls').exists()
  assert not (tmp_path / 'run' / tracking.ID).exists()


def test_what_is_refused(tmp_path, monkeypatch):
  # A folder of earlier runs is not the library.
  (tmp_path / 'wandb').mkdir()
  monkeypatch.setattr(sys, 'path', [str(tmp_path)])
  monkeypatch.delitem(sys.modules, 'wandb', raising=False)
  with pytest.raises(ValueError, match=r'needs wandb, which is not installed: pip install'):
    tracking.check(_config(project='attention').wandb)
  with pytest.raises(ValueError, match=r"config.wandb.mode 'on' is unknown"):
    tracking.check(_config(mode='on').wandb)
  tracking.check(_config().wandb)
