"""Exact vision attention models in JAX, and the loop that trains them.

The names here are the notebook's: models by name, variables from a run or from somebody else's
weights, the multiply-adds of a model. They are imported when first used, so that a process that
only reads data does not load the model code.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from vision_attention.checkpoint import load, load_variables
  from vision_attention.convert import load_reference
  from vision_attention.macs import count_macs
  from vision_attention.models.fusing import fuse_batchnorm
  from vision_attention.models.registry import create_model, list_models

__all__ = [
  'count_macs',
  'create_model',
  'fuse_batchnorm',
  'list_models',
  'load',
  'load_reference',
  'load_variables',
]

_HOMES = {
  'count_macs': 'macs',
  'create_model': 'models.registry',
  'fuse_batchnorm': 'models.fusing',
  'list_models': 'models.registry',
  'load': 'checkpoint',
  'load_reference': 'convert',
  'load_variables': 'checkpoint',
}


def __getattr__(name: str) -> Any:
  if name not in _HOMES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(f'{__name__}.{_HOMES[name]}'), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
