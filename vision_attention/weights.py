"""Weight files as flat dicts of arrays: .safetensors, .npz and PyTorch's, without PyTorch."""

import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from vision_attention import torch_file

State = dict[str, np.ndarray]
# Under which training codes keep their weights; where they keep averages of them too, with `_ema`.
_NESTED = ('model', 'state_dict', 'model_state_dict', 'model_state', 'net')


def read(path: str | os.PathLike, *, averaged: bool | None = None) -> State:
  """Reads a weight file.

  Args:
    path: a .safetensors, .npz, .pth, .pyth, .pt or .bin file. In PyTorch's formats the state dict
      may lie under `model`, `state_dict`, `net`, ..., and its keys may begin with `module.`.
    averaged: which to take of a checkpoint that holds weights and, under a name that ends in
      `_ema`, averages of them.

  Returns:
    Arrays by name; 16-bit floats as float32, all other types as they are.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if the file is of another kind, damaged, or holds anything but arrays.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'there is no weight file {path}')
  try:
    if path.suffix == '.safetensors':
      state = safetensors.numpy.load_file(path)
    elif path.suffix == '.npz':
      with np.load(path, allow_pickle=False) as file:
        state = {key: file[key] for key in file.files}
    elif path.suffix in ('.pth', '.pt', '.bin', '.tar', '.pyth'):
      state = _state_dict(torch_file.load(path), averaged)
    else:
      raise ValueError('its ending is not .safetensors, .npz, .pth, .pyth, .pt, .bin or .tar')
  except (ValueError, EOFError, KeyError, SafetensorError, zipfile.BadZipFile) as error:
    raise ValueError(f'cannot read weights from {path}: {error}') from error
  return {key: _widened(value) for key, value in state.items()}


def write(path: str | os.PathLike, state: Mapping[str, np.ndarray]) -> None:
  """Writes arrays by name to a .safetensors or .npz file, whole or not at all."""
  path = pathlib.Path(path)
  state = {key: np.array(value, order='C') for key, value in state.items()}
  partial = path.with_name(path.name + '.partial')
  if path.suffix == '.safetensors':
    safetensors.numpy.save_file(state, partial)
  elif path.suffix == '.npz':
    with partial.open('wb') as file:
      np.savez(file, **state)  # pyright: ignore[reportArgumentType]
  else:
    raise ValueError(f'cannot write {path}: its ending is not .safetensors or .npz')
  partial.replace(path)


def _widened(value: np.ndarray) -> np.ndarray:
  half = value.dtype in (np.float16, ml_dtypes.bfloat16)
  return value.astype(np.float32) if half else value


def _state_dict(content: Any, averaged: bool | None) -> State:
  """Finds the one state dict of a checkpoint."""
  if not isinstance(content, Mapping):
    raise ValueError(f'it holds a {type(content).__name__}, not a state dict')
  names = [f'{name}{end}' for name in _NESTED for end in ('', '_ema')]
  found = [key for key in names if isinstance(content.get(key), Mapping)]
  if averaged is not None and any(key.endswith('_ema') for key in found):
    found = [key for key in found if key.endswith('_ema') == averaged]
  elif averaged:
    raise ValueError(f'it holds no averages, of which the name ends in _ema, only {found}')
  if len(found) > 1:
    raise ValueError(
      f'it holds several state dicts, {found}: pass averaged=True or False, or save the one meant'
    )
  if found:
    content = content[found[0]]
  other = [key for key, value in content.items() if not isinstance(value, np.ndarray)]
  if other or not content:
    raise ValueError(f'entries {other[:5]} of its state dict are not tensors')
  state = {str(key): value for key, value in content.items()}
  if all(key.startswith('module.') for key in state):
    state = {key.removeprefix('module.'): value for key, value in state.items()}
  return state
