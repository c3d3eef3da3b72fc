"""Other people's weights in our models: `load_reference`."""

import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vision_attention import errors, weights
from vision_attention.models import base, reference, registry, transfer, tree


class ConversionError(ValueError):
  """Keys of a reference and of our model that do not find each other, all in one message."""


def load_reference(
  name: str,
  source_weights: str | os.PathLike | Mapping[str, np.ndarray],
  *,
  source: str,
  image_size: int | tuple[int, int] | None = None,
  averaged: bool | None = None,
  **options: Any,
) -> dict[str, Any]:
  """Converts the weights of another implementation, without needing that implementation.

  The number of classes, the resolution and the form (with a class token, with a second head, ...)
  are read off the weights. The variables say where they come from, so that a model of
  `create_model(name, ...)` computes what the reference computes, to the form of its GELU; and which
  options it must be created with, where it would otherwise leave some of them unused.

  Args:
    name: a registered name.
    source_weights: a .safetensors, .npz, .pth or .pt file, or a state dict of arrays.
    source: the implementation, a key of the model file's `REFERENCES` (`timm`, `official`, ...).
    image_size: resolution to convert to; tables that depend on it are resized. That of the weights
      unless given.
    averaged: which to take of a checkpoint that holds weights and averages of them.
    **options: build options, as of `create_model`.

  Returns:
    Variables for `model.apply`, as numpy arrays.

  Raises:
    ConversionError: listing every key of either side that is unmatched or misshapen.
    ValueError: for an unknown name, source or option.
  """
  references = registry.references_of(name)
  errors.check_choice(f'source of {name}', source, references)
  rules = references[source]
  state = (
    dict(source_weights)
    if isinstance(source_weights, Mapping)
    else weights.read(source_weights, averaged=averaged)
  )
  state = {key: np.asarray(value) for key, value in state.items()}
  state = rules.prepare(
    {k: v for k, v in state.items() if not any(re.fullmatch(p, k) for p in rules.ignore)}
  )
  found = rules.infer(state, registry.variant_of(name).options)
  inferred = {**found, **options}
  model, info = registry.create_model(name, source=source, **inferred)
  built = {**info.options, **rules.options_of(registry.variant_of(name).options), **inferred}
  target = abstract_variables(model, info)
  variables = _convert(name, state, rules.rules_of(built), target)
  form = _form(name, source, found, options, target)
  if image_size is not None:
    other, info = registry.create_model(
      name, source=source, **{**inferred, 'image_size': image_size}
    )
    variables, _ = transfer.transfer(name, variables, abstract_variables(other, info), reinit=())
  return {**variables, base.CONVENTION: dict.fromkeys((source, *form), np.zeros((), np.float32))}


def _form(
  name: str,
  source: str,
  found: Mapping[str, Any],
  options: Mapping[str, Any],
  target: Mapping[str, Any],
) -> tuple[str, ...]:
  """Returns the options that a model of these weights needs, as `base.form` has them.

  Args:
    name: of the model.
    source: of the weights.
    found: what is read off them.
    options: what the caller says of them.
    target: variables of the model that fits them; if those of the model by default are no others,
      nothing is needed.
  """
  sizes = {key: found[key] for key in ('num_classes', 'image_size') if key in found}
  others = {key: value for key, value in options.items() if key not in found}
  shown = {key: options.get(key, found[key]) for key in found if key not in sizes}
  defaults = base.form(registry.defaults_of(name, source))
  needed = tuple(text for text in base.form(shown) if text not in defaults)
  if not needed:
    return ()
  plain = abstract_variables(*registry.create_model(name, source=source, **{**sizes, **others}))
  shapes = [{path: leaf.shape for path, leaf in tree.flatten(t).items()} for t in (target, plain)]
  return () if shapes[0] == shapes[1] else needed


def abstract_variables(model: base.Classifier, info: base.ModelInfo) -> dict[str, Any]:
  """Returns the shapes and types of a model's variables; computes nothing."""
  images = jax.ShapeDtypeStruct((1, *info.image_size, 3), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), images)


def _convert(
  name: str, state: reference.State, rules: Any, target: Mapping[str, Any]
) -> dict[str, Any]:
  """Applies the rules and refuses whatever does not come out even."""
  shapes = {path: leaf.shape for path, leaf in tree.flatten(target).items()}
  values: dict[str, np.ndarray] = {}
  origin: dict[str, str] = {}
  problems = []
  for key, array in state.items():
    goals = next((goals for rule in rules if (goals := rule.targets(key)) is not None), None)
    if goals is None:
      problems.append(f'{key} {array.shape} of the reference is not known here')
      continue
    for path, change in goals:
      if path not in shapes:
        problems.append(f'{key} {array.shape} belongs to {path}, which the model does not have')
        continue
      if path in origin:
        problems.append(f'{key} and {origin[path]} both belong to {path}')
        continue
      origin[path] = key
      value = change(array, shapes[path])
      if value.shape != shapes[path]:
        problems.append(f'{key} {array.shape} does not give {path} {shapes[path]}')
      values[path] = np.array(value, np.float32, order='C')
  problems += [
    f'{path} {shape} of the model is not in the reference'
    for path, shape in shapes.items()
    if path not in origin
  ]
  if problems:
    raise ConversionError(
      f'{len(problems)} arrays do not fit {name}:\n  ' + '\n  '.join(sorted(problems))
    )
  return tree.unflatten(values)
