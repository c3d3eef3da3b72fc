"""Full-size models against what the reference implementations answered."""

import jax
import numpy as np
import pytest

import vision_attention as va
from tests import golden

TOLERANCE = 2e-3
PATHS = sorted(golden.FOLDER.glob('*.npz'))


def _logits(case: golden.Golden, **options) -> np.ndarray:
  meta = case.meta
  model, _ = va.create_model(
    meta['registered'],
    num_classes=case.outputs['logits'].shape[-1],
    image_size=tuple(meta['input'][1:3]),
    **meta['kwargs'],
    **options,
  )
  variables = va.load_reference(
    meta['registered'], case.state(), source=meta['reference'], **meta['kwargs']
  )
  return np.asarray(jax.jit(model.apply)(variables, case.images()))


@pytest.mark.golden
@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
def test_logits_are_those_of_the_reference(path):
  case = golden.load(path)
  error = case.error(_logits(case))
  print(f'{path.stem}: {error:.1e}')
  assert error <= TOLERANCE
