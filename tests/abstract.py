"""Variables of models without computing them: shapes, counts, and numbers drawn in their place."""

import functools
import math
from typing import Any

import jax
import numpy as np

import vision_attention as va
from tests import typed
from vision_attention import convert
from vision_attention.models import tree


def variables(name: str, **options: Any) -> dict[str, Any]:
  """Returns the shapes and types of a model's variables."""
  with typed.unchecked():
    return convert.abstract_variables(*va.create_model(name, **options))


def features(name: str, image_size: int | tuple[int, int], **options: Any) -> dict[str, Any]:
  """Returns the shapes and types of a model's features, of two images."""
  model, info = va.create_model(name, image_size=image_size, **options)
  images = jax.ShapeDtypeStruct((2, *info.image_size, 3), np.float32)
  apply = functools.partial(model.apply, method='features')
  return jax.eval_shape(apply, convert.abstract_variables(model, info), images)


def size(tree_of_shapes: Any) -> int:
  """Returns the number of numbers in a tree of shapes or arrays."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree_of_shapes))


def count(name: str, **options: Any) -> int:
  """Returns the number of a model's parameters."""
  return size(variables(name, **options)['params'])


def macs(model: Any, image_size: int | tuple[int, int] = 224) -> int:
  """Returns the number of a model's multiply-adds for one image."""
  with typed.unchecked():
    return va.count_macs(model, image_size=image_size)


def drawn(shapes: Any, seed: int = 0) -> Any:
  """Returns variables with nothing at zero and no statistic at its beginning."""
  rng = np.random.default_rng(seed)

  def draw(path: str, leaf: Any) -> np.ndarray:
    z = rng.standard_normal(leaf.shape).astype(np.float32)
    if path.endswith('var'):
      return np.exp(0.5 * z)
    return (path.endswith('scale') + 0.3 * z).astype(np.float32)

  return tree.unflatten({path: draw(path, leaf) for path, leaf in tree.flatten(shapes).items()})
