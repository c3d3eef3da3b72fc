"""Weight files of every kind, and that a pickle is never executed."""

import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest

from vision_attention import torch_file, weights

pytestmark = pytest.mark.fast
DATA = pathlib.Path(__file__).parent / 'data'


@pytest.mark.parametrize('name', ['new', 'nested', 'legacy'])
def test_files_that_pytorch_wrote(name):
  """Slices, transposes, shared storages, parameters, half types, scalars; old and new format."""
  state = weights.read(DATA / f'{name}.pth')
  with np.load(DATA / 'expected.npz') as expected:
    assert set(state) == set(expected.files)
    for key, value in state.items():
      np.testing.assert_array_equal(np.asarray(value, np.float32), expected[key])
  assert state['c'].dtype == np.float32, 'bfloat16 is widened'


@pytest.mark.parametrize('suffix', ['.npz', '.safetensors'])
def test_written_files_read_back(tmp_path, suffix):
  state = {'params/a/kernel': np.arange(6.0, dtype=np.float32).reshape(2, 3), 'b': np.zeros(())}
  weights.write(tmp_path / f'w{suffix}', state)
  read = weights.read(tmp_path / f'w{suffix}')
  for key, value in state.items():
    np.testing.assert_array_equal(read[key], value, strict=True)
  assert [p.name for p in tmp_path.iterdir()] == [f'w{suffix}']


class _Call:
  """Pickles as a call of a function."""

  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


def _zip(path, content):
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('archive/data.pkl', pickle.dumps(content, protocol=2))


@pytest.mark.parametrize('function', [os.system, eval, exec, __import__, os.remove])
def test_pickled_code_is_refused_and_not_run(tmp_path, function):
  victim = tmp_path / 'victim'
  victim.write_text('')
  argument = {
    os.system: f'rm {victim}',
    os.remove: str(victim),
    __import__: 'antigravity',
  }.get(function, f'__import__("os").remove("{victim}")')
  for path in (tmp_path / 'new.pth', tmp_path / 'old.pth'):
    content = {'model': {'w': _Call(function, argument)}}
    _zip(path, content) if path.stem == 'new' else path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r'wants to call|is not a file of torch'):
      weights.read(path)
  assert victim.exists()


def test_other_objects_are_inert_and_no_weights(tmp_path):
  calls = []
  path = tmp_path / 'x.pth'
  _zip(path, {'model': {'w': _Call(pathlib.Path, 'x')}, 'args': calls})
  with pytest.raises(ValueError, match=r"entries \['w'\] of its state dict are not tensors"):
    weights.read(path)


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('x.pth', b'nonsense', 'cannot read weights from .*x.pth'),
    ('x.npz', b'PK\x03\x04', 'cannot read weights from .*x.npz'),
    ('x.safetensors', b'\xff' * 9, 'cannot read weights from .*x.safetensors'),
    ('x.h5', b'', 'its ending is not'),
  ],
)
def test_damaged_and_unknown_files_are_named(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    weights.read(tmp_path / name)


def test_truncated_torch_files_are_refused(tmp_path):
  whole = (DATA / 'legacy.pth').read_bytes()
  for length in (len(whole) - 5, len(whole) // 2, 40):
    (tmp_path / 'cut.pth').write_bytes(whole[:length])
    with pytest.raises(ValueError, match='cannot read weights'):
      weights.read(tmp_path / 'cut.pth')


def test_several_state_dicts_are_ambiguous(tmp_path):
  _zip(tmp_path / 'x.pth', {'model': {}, 'state_dict': {}})
  with pytest.raises(ValueError, match='holds several state dicts'):
    weights.read(tmp_path / 'x.pth')
  with pytest.raises(FileNotFoundError, match='there is no weight file'):
    weights.read(tmp_path / 'missing.pth')


def test_weights_or_their_averages_are_taken_as_asked(tmp_path, monkeypatch):
  raw, mean = ({'module.w': np.full((2,), value, np.float32)} for value in (1, 2))
  (tmp_path / 'x.pth').write_bytes(b'')

  def read(content, **options):
    monkeypatch.setattr(torch_file, 'load', lambda path: content)
    return weights.read(tmp_path / 'x.pth', **options)['w'][0]

  # As LESA's code writes them, and others that know of nothing else.
  assert read({'net': raw, 'acc': 78.1, 'epoch': 3}) == 1
  assert read({'state_dict_ema': mean}) == 2
  both = {'model': raw, 'model_ema': mean, 'epoch': 3}
  assert read(both, averaged=False) == 1
  assert read(both, averaged=True) == 2
  with pytest.raises(ValueError, match=r"\['model', 'model_ema'\]: pass averaged=True or False"):
    read(both)
  with pytest.raises(ValueError, match=r"holds no averages.* only \['net'\]"):
    read({'net': raw}, averaged=True)
