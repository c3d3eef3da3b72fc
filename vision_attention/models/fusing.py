"""Batch normalisations folded into the linear maps beside them, for inference."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vision_attention.attention import operators
from vision_attention.layers import fusable
from vision_attention.models import base, registry


def fuse_batchnorm(
  model: base.Classifier, variables: Mapping[str, Any]
) -> tuple[base.Classifier, dict[str, Any]]:
  """Returns a model and its variables that compute the same in inference without BatchNorm.

  Every BatchNorm that stands beside a linear map becomes part of it (arXiv 2104.01136, section
  4.2): fewer operations, and no `batch_stats`. The new model is not meant to be trained.

  Args:
    model: of `create_model`.
    variables: trained ones of it.

  Raises:
    ValueError: if nothing of the model can be folded, naming the models of which something can.
  """
  fused = base.Classifier(
    parts=_fused(model.parts),
    source=model.source,
    conventions={source: _fused(parts) for source, parts in model.conventions.items()},
    options=model.options,
  )
  variables = {key: _copied(value) for key, value in variables.items()}
  layers = _layers(model, variables)
  if not layers:
    raise ValueError(
      'no BatchNorm of this model stands beside a linear map that knows how to take it in: models '
      f'that fuse are {", ".join(_families())}'
    )
  for path, fold in layers.items():
    *above, name = path
    params, stats = variables['params'], variables['batch_stats']
    for key in above:
      params, stats = params[key], stats[key]
    params[name] = fold(params[name], stats.pop(name))
  variables['batch_stats'] = _without_empty(variables['batch_stats'])
  return fused, {key: value for key, value in variables.items() if value}


def _copied(tree: Any) -> Any:
  """Copies the dicts, which are changed, and not the arrays."""
  if not isinstance(tree, Mapping):
    return tree
  return {key: _copied(value) for key, value in tree.items()}


def _without_empty(tree: Any) -> Any:
  if not isinstance(tree, Mapping):
    return tree
  kept = {key: _without_empty(value) for key, value in tree.items()}
  return {key: value for key, value in kept.items() if not isinstance(value, Mapping) or value}


def _layers(
  model: base.Classifier, variables: Mapping[str, Any]
) -> dict[tuple[str, ...], Callable[..., dict[str, Any]]]:
  """Returns, by path, what folds the layers that the model calls; computes nothing."""
  found = {}

  def note(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    layer = context.module
    if isinstance(layer, fusable.LAYERS) and not layer.fused:
      found[layer.path] = functools.partial(layer.fold, epsilon=layer.epsilon)
    return call(*args, **kwargs)

  size = getattr(model.parts.backbone, 'keywords', {}).get('image_size', (224, 224))
  images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
  with nn.intercept_methods(note):
    jax.eval_shape(model.apply, variables, images)
  return found


def _fused(spec: Any) -> Any:
  """Returns module definitions with their fields `fused` set."""
  if isinstance(spec, base.Parts):
    return base.Parts(_fused(spec.backbone), _fused(spec.head))
  if isinstance(spec, functools.partial):
    fields = {key: _fused(value) for key, value in spec.keywords.items()}
    if operators.has_field(spec, 'fused'):
      fields['fused'] = True
    return functools.partial(spec.func, *(_fused(value) for value in spec.args), **fields)
  if isinstance(spec, (list, tuple)):
    return type(spec)(_fused(value) for value in spec)
  return spec


def _fusable(spec: Any) -> bool:
  """Whether a module definition has parts with a field `fused`."""
  if isinstance(spec, functools.partial):
    inner = (*spec.args, *spec.keywords.values())
    return operators.has_field(spec, 'fused') or any(map(_fusable, inner))
  return isinstance(spec, (list, tuple)) and any(map(_fusable, spec))


def _families() -> list[str]:
  """Returns the models of which something can be folded."""
  models = {name: registry.create_model(name)[0] for name in registry.list_models()}
  return [name for name, model in models.items() if _fusable(model.parts.backbone)]
