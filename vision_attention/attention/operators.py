"""Operators and modules by name, so that any of them can be put into any backbone.

An *operator* maps `[b, h, w, c]` to `[b, h, w, dim]` and is called as
`attn(dim=..., num_heads=..., dtype=..., param_dtype=..., name='attn')(x, train=train)`; further
fields have defaults. It takes the place of a 3x3 convolution or of a transformer's attention. A
file of this package lists its operators in `OPERATORS`. Class variables tell what is particular:

  needs_map: it works on `[b, h, w, c]` and not on a list of tokens (default False).
  norm_after, act_after: whether a norm and an activation follow it, as they would follow a
    convolution (default True).
  stages: the stages of a ResNet that it was made for, counted from 1 (default all four).

One with a field `stride` halves the map itself where a backbone asks for it.

A *module* keeps the shape and is added to a backbone: `module(dtype=..., param_dtype=...,
name=...)(x, train=train)`. Its file lists it in `MODULES`, with the class variable

  placement: `branch` (ends every residual branch), `between` (follows every stage but the last),
    `sites` (follows every other block of the third stage of a ResNet), or `top` (follows the
    last block).
"""

import dataclasses
import functools
import importlib
import pkgutil
import types
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn

from vision_attention import attention as package
from vision_attention import errors

ModuleDef = Callable[..., nn.Module]
# A name, a mapping with `name` and fields, or a module class (perhaps with fields bound).
Spec = str | Mapping[str, Any] | ModuleDef
PLACEMENTS = ('branch', 'between', 'sites', 'top')


@functools.cache
def _registered(kind: str) -> Mapping[str, type[nn.Module]]:
  found: dict[str, type[nn.Module]] = {}
  for entry in pkgutil.iter_modules(package.__path__):
    if entry.name == 'operators':
      continue
    module = importlib.import_module(f'{package.__name__}.{entry.name}')
    for name, cls in getattr(module, kind, {}).items():
      if name in found:
        raise ValueError(f'{name!r} is in {kind} of {found[name].__module__} and {entry.name}')
      found[name] = cls
  return types.MappingProxyType(found)


def list_operators() -> list[str]:
  """Returns the names that `attn=` takes in every backbone."""
  return sorted(_registered('OPERATORS'))


def list_modules() -> list[str]:
  """Returns the names of modules that `module=` takes in a ResNet."""
  return sorted(_registered('MODULES'))


def operator(spec: Spec) -> ModuleDef:
  """Returns the operator of a name, of `{'name': ..., field: value}`, or `spec` if it is one.

  Raises:
    ValueError: for an unknown name or field, with the nearest.
  """
  return _resolve(spec, 'operator', _registered('OPERATORS'))


def module(spec: Spec) -> ModuleDef:
  """Returns the module or, among the operators, the operator; see `operator`."""
  both = {**_registered('OPERATORS'), **_registered('MODULES')}
  return _resolve(spec, 'module', both)


def _resolve(spec: Spec, what: str, known: Mapping[str, type[nn.Module]]) -> ModuleDef:
  if isinstance(spec, str):
    errors.check_choice(what, spec, known)
    return known[spec]
  if isinstance(spec, Mapping):
    if 'name' not in spec:
      raise ValueError(f'{what} {dict(spec)} has no name: allowed are {", ".join(sorted(known))}')
    cls = _resolve(spec['name'], what, known)
    fields = {key: value for key, value in spec.items() if key != 'name'}
    for key in fields:
      errors.check_choice(f'field of {what} {spec["name"]}', key, _fields(cls))
    return functools.partial(cls, **fields)
  return spec


def _class(spec: ModuleDef) -> Any:
  while isinstance(spec, functools.partial):
    spec = spec.func
  return spec


def _fields(spec: ModuleDef) -> list[str]:
  cls = _class(spec)
  if not dataclasses.is_dataclass(cls):
    return []
  return [f.name for f in dataclasses.fields(cls) if f.name not in ('parent', 'name')]


def takes(spec: ModuleDef, field: str) -> bool:
  """Whether an operator or module has a field, bound or not: of what kind it is."""
  return field in _fields(spec)


def has_field(spec: ModuleDef, field: str) -> bool:
  """Whether an operator or module has a field that is not bound yet."""
  return takes(spec, field) and field not in getattr(spec, 'keywords', {})


def trait(spec: ModuleDef, name: str, default: Any) -> Any:
  """Returns a class variable of an operator or module."""
  return getattr(_class(spec), name, default)


def bind(spec: ModuleDef, **fields: Any) -> ModuleDef:
  """Binds those of the fields that the operator has and that are not bound yet."""
  mine = {key: value for key, value in fields.items() if has_field(spec, key)}
  return functools.partial(spec, **mine) if mine else spec
