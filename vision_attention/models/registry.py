"""Models by name. A file in this folder that has `build` is registered by being there."""

import fnmatch
import functools
import importlib
import inspect
import pkgutil
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from vision_attention import errors
from vision_attention import models as package
from vision_attention.models import base

_COMMON = ('num_classes', 'image_size', 'dtype', 'param_dtype')


@functools.cache
def modules() -> Mapping[str, types.ModuleType]:
  """Returns the model file of every registered name; a name in two files raises ValueError."""
  found = {}
  for entry in pkgutil.iter_modules(package.__path__):
    module = importlib.import_module(f'{package.__name__}.{entry.name}')
    # A file without `build` holds tables or parts of others.
    for name in module.VARIANTS if hasattr(module, 'build') else ():
      if name in found:
        raise ValueError(f'{name!r} is a variant of {found[name].__name__} and {module.__name__}')
      found[name] = module
  return types.MappingProxyType(found)


def list_models(pattern: str = '*') -> list[str]:
  """Returns the names that match a shell pattern, such as `coatnet_*`, in order."""
  return sorted(fnmatch.filter(modules(), pattern))


def module_of(name: str) -> types.ModuleType:
  """Returns the model file of `name`; ValueError names the nearest registered one."""
  if name not in modules():
    raise ValueError(f'model {name!r} is unknown: {errors.nearest(name, modules())}')
  return modules()[name]


def variant_of(name: str) -> base.Variant:
  """Returns the table row of `name`."""
  return module_of(name).VARIANTS[name]


def references_of(name: str) -> dict[str, Any]:
  """Returns, by source, the `models.reference.Reference`s whose weights fit `name`."""
  every = getattr(module_of(name), 'REFERENCES', {})
  return {source: reference for source, reference in every.items() if reference.fits(name)}


def defaults_of(name: str, source: str | None = None) -> dict[str, Any]:
  """Returns the build options of a model, in the convention of a source where one is given."""
  module, variant = module_of(name), variant_of(name)
  parameters = inspect.signature(module.build).parameters.items()
  plain = {key: value.default for key, value in parameters if key not in _COMMON}
  convention = {} if source is None else references_of(name)[source].options_of(variant.options)
  return {**plain, **variant.options, **convention}


def _whole(value: Any) -> bool:
  return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _pair(image_size: Any) -> tuple[int, int]:
  """Returns height and width.

  Raises:
    ValueError: for anything but one or two positive whole numbers.
  """
  size = (image_size,) * 2 if _whole(image_size) else image_size
  if (
    not isinstance(size, Sequence)
    or isinstance(size, str)
    or len(size) != 2
    or not all(_whole(side) and side > 0 for side in size)
  ):
    raise ValueError(
      f'image_size {image_size!r} must be a positive whole number of pixels, or height and width: '
      'such as 224 or (224, 320)'
    )
  return int(size[0]), int(size[1])


def create_model(
  name: str,
  *,
  num_classes: int | None = None,
  image_size: int | tuple[int, int] | None = None,
  dtype: DTypeLike = jnp.float32,
  param_dtype: DTypeLike = jnp.float32,
  source: str | None = None,
  **options: Any,
) -> tuple[base.Classifier, base.ModelInfo]:
  """Creates the model called `name`.

  Args:
    name: a name of `list_models`.
    num_classes: outputs of the head; the published number unless given. 0 leaves the last layer
      out.
    image_size: resolution in pixels, one number or (height, width); the published one unless given.
    dtype: type of activations and matrix products.
    param_dtype: type of parameters.
    source: follow the conventions of this reference implementation (`timm`, `official`, ...)
      in what carries no parameters. Needed only to train in its manner: variables from
      `load_reference` say themselves where they come from.
    **options: override the variant's options and are handed to the model file's `build`.

  Returns:
    The model and what is published about it.

  Raises:
    ValueError: for an unknown name, option or source, or a value that the model cannot take.
  """
  module, variant = module_of(name), variant_of(name)
  allowed = [key for key in inspect.signature(module.build).parameters if key not in _COMMON]
  for key in options:
    errors.check_choice(f'option of {name}', key, allowed)
  references = references_of(name)
  if source is not None:
    errors.check_choice(f'source of {name}', source, references)
  num_classes = variant.num_classes if num_classes is None else num_classes
  image_size = variant.image_size if image_size is None else image_size
  size = _pair(image_size)
  if not _whole(num_classes) or num_classes < 0:
    raise ValueError(f'num_classes {num_classes!r} must be a whole number, 0 for no last layer')

  def build(convention: Mapping[str, Any]) -> base.Parts:
    chosen = {**variant.options, **convention, **options}
    return module.build(
      num_classes=num_classes, image_size=size, dtype=dtype, param_dtype=param_dtype, **chosen
    )

  conventions = {
    key: build(reference.options_of(variant.options)) for key, reference in references.items()
  }
  parts = build({}) if source is None else conventions[source]
  model = base.Classifier(
    parts=parts, source=source, conventions=conventions, options=base.form(options)
  )
  return model, base.ModelInfo(
    name=name,
    image_size=size,
    num_classes=num_classes,
    options={**variant.options, **options},
    params=variant.params,
    flops=variant.flops,
    top1=variant.top1,
    source=variant.source,
  )
