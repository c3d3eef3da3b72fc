"""The notebooks run from top to bottom, on a run that is really there."""

import os
import pathlib
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from tests import launcher
from vision_attention.data import builders

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_load_and_predict(tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'data'))
  monkeypatch.setenv('RUN', str(tmp_path / 'run'))
  monkeypatch.setenv('MPLBACKEND', 'agg')
  builders.write('digits', builders.digits(), tmp_path / 'data')
  command = [sys.executable, 'main.py', '--config=configs/coatnet0.py:local']
  command += [f'--workdir={tmp_path / "run"}', '--config.total=4 steps']
  command += ['--config.schedule.warmup=1 steps', '--config.compile_cache=']
  # A process of its own also because libtpu, which other tests load, breaks the profiler.
  command += ['--config.profile.start=2', '--config.profile.steps=2']
  subprocess.run(command, cwd=ROOT, check=True, timeout=launcher.PATIENCE, env=os.environ)
  assert list((tmp_path / 'run' / 'profile').rglob('*.xplane.pb')), 'a trace was written'
  notebook = nbformat.read(ROOT / 'notebooks' / 'load_and_predict.ipynb', as_version=4)
  folder = {'metadata': {'path': str(ROOT / 'notebooks')}}
  done = NotebookClient(notebook, timeout=launcher.PATIENCE, resources=folder).execute()
  outputs = [cell.outputs for cell in done.cells if cell.cell_type == 'code']
  assert 'coatnet_0' in outputs[0][-1]['data']['text/plain']
  assert 0 <= float(outputs[1][-1]['data']['text/plain']) <= 1
  assert 'attn' not in outputs[2][-1]['data']['text/plain']
  assert '(32, ' in outputs[3][-1]['data']['text/plain'], 'the attention maps are there'
