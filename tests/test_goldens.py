"""Full-size models against what the reference implementations answered."""

import functools

import jax
import numpy as np
import pytest

import vision_attention as va
from tests import golden

TOLERANCE = 2e-3
PATHS = sorted(golden.FOLDER.glob('*.npz'))


def _answer(case: golden.Golden) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Returns logits and features of our model."""
  meta = case.meta
  options = {'image_size': tuple(meta['input'][1:3]), **meta['kwargs']}
  classes = case.outputs['logits'].shape[-1]
  model, _ = va.create_model(meta['registered'], num_classes=classes, **options)
  variables = va.load_reference(
    meta['registered'], case.state(), source=meta['reference'], **options
  )

  def both(module, images):
    features = module.features(images)
    return module.head(features, train=False), features

  apply = jax.jit(functools.partial(model.apply, method=both))
  return jax.tree.map(np.asarray, apply(variables, case.images()))


@pytest.mark.golden
@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
def test_logits_and_features_are_those_of_the_reference(path):
  case = golden.load(path)
  logits, features = _answer(case)
  error = case.error(logits)
  print(f'{path.stem}: {error:.1e}')
  assert error <= TOLERANCE
  if 'features' in case.outputs:
    error = case.error_of_features(features)
    print(f'{path.stem}, features: {error:.1e}')
    assert error <= TOLERANCE
