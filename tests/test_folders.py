"""Runs in a bucket: what is written when, what counts as whole, and that a kill loses nothing."""

import json
import pathlib
import re

import jax
import ml_collections
import numpy as np
import pytest

from vision_attention import checkpoint, folders, suites
from vision_attention.training import metrics, state, tracking

pytestmark = pytest.mark.fast
RUN = 'gs://bucket/runs/one'
INSIDE = RUN.removeprefix('gs://')


def _text(store, name):
  return store.objects[f'{INSIDE}/{name}'][0].decode()


def test_runs_of_other_arguments_have_other_folders():
  assert folders.of_config('configs/coatnet0.py') == 'runs/coatnet0'
  assert folders.of_config('configs/a.py:variant=b,size=384') == 'runs/a-variant=b,size=384'
  assert folders.of_config('a.py:init=gs://b/c d') == 'runs/a-init=gs_b_c_d'
  # No documented command starts from the folder that it would train in.
  root = pathlib.Path(__file__).parents[1]
  texts = [path.read_text() for path in (root / 'README.md', *(root / 'configs').glob('*.py'))]
  commands = [c for text in texts for c in re.findall(r'main\.py --config=(\S+)(.*)', text)]
  assert len(commands) > 40
  for config, rest in commands:
    start = re.search(r'init=([^,\s]+)', config)
    if start and '--workdir' not in rest:
      assert folders.of_config(config) != start[1], config


def test_a_folder_is_a_path_or_in_a_bucket(store):
  assert folders.folder('runs/a') == pathlib.Path('runs/a')
  assert folders.is_bucket(folders.folder(RUN))
  assert str(folders.absolute(folders.folder(RUN)) / 'x') == f'{RUN}/x'
  for wrong in ('s3://b/run', 'gs://bucket', 'gs://bucket/', 'gs://b/run', pathlib.Path(RUN)):
    with pytest.raises(ValueError, match='neither a folder nor in a bucket: pass a path'):
      folders.folder(wrong)


def test_a_bucket_without_its_library_is_said(monkeypatch):
  monkeypatch.setattr(folders.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r"pip install 'vision_attention\[gcs\]', or mount"):
    folders.folder(RUN)


def test_lines_come_together_and_before_what_follows_them(store, monkeypatch):
  """Not one write a line, which a bucket would refuse; but all of them when asked."""
  where = folders.folder(RUN)
  writer = metrics.Writer(where, 0, True)
  for step in (1, 2, 3):
    writer.write(step, {'train/loss': step / 2})
  assert not store.names()
  assert writer.row(3, 'train/loss')
  writer.flush()
  assert store.written.count(f'{INSIDE}/metrics.jsonl') == 1
  rows = [json.loads(line) for line in _text(store, 'metrics.jsonl').splitlines()]
  assert [row['step'] for row in rows] == [1, 2, 3]
  assert any('/tensorboard/events' in name for name in store.names())
  # Another process has read it anew, and drops what came after the step that it restored.
  again = metrics.Writer(where, 2, True)
  assert again.row(2, 'train/loss')
  assert not again.row(3, 'train/loss')
  assert len(_text(store, 'metrics.jsonl').splitlines()) == 2
  monkeypatch.setattr(folders, '_SECONDS', 0.0)
  again.write(3, {'train/loss': 7.0})
  assert json.loads(_text(store, 'metrics.jsonl').splitlines()[-1])['train/loss'] == 7.0
  again.close()
  writer.close()


def test_what_is_beside_the_checkpoints(store, tmp_path):
  where = folders.folder(RUN)
  suites.write(where, {'model': 'm'}, {'eval/top1': 50.0})
  assert json.loads(_text(store, 'evaluation.json'))['results'] == {'eval/top1': 50.0}
  assert _text(store, 'evaluation.csv').split() == ['model,eval/top1', 'm,50.0']
  staged = folders.Staging(where / 'profile')
  (staged.path / 'plugins').mkdir()
  (staged.path / 'plugins/trace').write_text('abc')
  staged.upload()
  assert _text(store, 'profile/plugins/trace') == 'abc'
  assert folders.Staging(tmp_path).path == tmp_path
  options = ml_collections.ConfigDict({'project': 'p', 'mode': 'offline'})
  with pytest.raises(ValueError, match="which gs://bucket/runs/one cannot be: set it to 'online'"):
    tracking.check(options, where)


def _save(where, *steps):
  now = state.TrainState(np.zeros(()), {'head': {'bias': np.arange(3.0)}}, {}, (), None, None)
  manager = checkpoint.Manager(where, 3, 0)
  for step in steps:
    saved = jax.tree.map(lambda x, step=step: jax.numpy.asarray(x + step), now)
    manager.save(step, saved, state.new_window(), ml_collections.ConfigDict({'a': 1}), None)
  return manager


def test_a_checkpoint_without_its_marker_is_not_there(store):
  where = folders.folder(RUN)
  _save(where, 1, 2).close()
  assert checkpoint.steps_of(where) == [1, 2]
  folder = f'{INSIDE}/{checkpoint.CHECKPOINTS}/2/'
  assert store.written[-1] == f'{folder}commit_success.txt'
  content = store.objects.pop(f'{folder}commit_success.txt')
  assert f'{folder}_CHECKPOINT_METADATA' in store.objects
  assert checkpoint.steps_of(where) == [1]
  bias = lambda **more: checkpoint.load_variables(RUN, **more)['params']['head']['bias']
  np.testing.assert_array_equal(bias(), [1.0, 2.0, 3.0])
  with pytest.raises(FileNotFoundError, match=r'no checkpoint of step 2: it has \[1\]'):
    bias(step=2)
  store.objects[f'{folder}commit_success.txt'] = content
  assert bias()[0] == 2
  del store.objects[f'{folder}commit_success.txt']
  # What was left of it is gone before its step is reached again.
  before = set(store.names(folder))
  manager = _save(where)
  assert manager.latest_step() == 1
  manager.close()
  _save(where, 2).close()
  assert checkpoint.steps_of(where) == [1, 2]
  assert not {name for name in before & set(store.names(folder)) if '/d/' in name}
  assert bias()[0] == 2


def test_a_bucket_that_does_not_answer_is_not_an_empty_one(store, monkeypatch):
  """Else the run would begin anew, over what it has."""
  where = folders.folder(RUN)
  _save(where, 1).close()
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.ocp.CheckpointManager, 'all_steps', lambda self: [])
    with pytest.raises(OSError, match=r'whole checkpoints \[1\], of which Orbax sees \[\]'):
      checkpoint.Manager(where, 3, 0)
  store.refused = 403
  assert not where.is_dir()
  with pytest.raises(OSError, match='Forbidden'):
    checkpoint.steps_of(where)
  with pytest.raises(OSError, match=r'Forbidden.*needs the roles storage\.objectAdmin'):
    checkpoint.Manager(where, 3, 0)
  with pytest.raises(OSError, match=f'{RUN}/a.json cannot be written .*Forbidden'):
    folders.write(where / 'a.json', '{}')
