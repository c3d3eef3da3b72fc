"""Weights of Hugging Face's transformers: files and models in memory name layers differently."""

import re

import jax
import numpy as np
import pytest

import vision_attention as va
from tests import golden

pytestmark = pytest.mark.fast

# From the names of release 5 in memory to those that all releases write to files.
FILES = {
  'vit_ti16__hf_vit_ti16': (
    (r'^vit\.layers\.', 'vit.encoder.layer.'),
    (r'attention\.q_proj', 'attention.attention.query'),
    (r'attention\.k_proj', 'attention.attention.key'),
    (r'attention\.v_proj', 'attention.attention.value'),
    (r'attention\.o_proj', 'attention.output.dense'),
    (r'mlp\.fc1', 'intermediate.dense'),
    (r'mlp\.fc2', 'output.dense'),
  ),
  'swin_tiny__hf_swin_tiny': (
    (r'attention\.q_proj', 'attention.self.query'),
    (r'attention\.k_proj', 'attention.self.key'),
    (r'attention\.v_proj', 'attention.self.value'),
    (r'attention\.relative_position_bias\.', 'attention.self.'),
    (r'attention\.o_proj', 'attention.output.dense'),
    (r'mlp\.fc1', 'intermediate.dense'),
    (r'mlp\.fc2', 'output.dense'),
  ),
}


@pytest.mark.parametrize('name', FILES)
def test_files_and_memory_are_the_same_weights(name):
  case = golden.load(golden.FOLDER / f'{name}.npz')
  model, state = case.meta['registered'], case.state()
  renamed = {}
  for key, value in state.items():
    for pattern, replacement in FILES[name]:
      key = re.sub(pattern, replacement, key)
    renamed[key] = value
  assert renamed.keys() != state.keys()
  first, second = (va.load_reference(model, s, source='hf') for s in (state, renamed))
  assert jax.tree.all(jax.tree.map(np.array_equal, first, second))


def test_a_model_without_a_classifier_has_none():
  case = golden.load(golden.FOLDER / 'convnext_tiny__hf_convnext_tiny.npz')
  state = {key: value for key, value in case.state().items() if not key.startswith('classifier')}
  params = va.load_reference('convnext_tiny', state, source='hf')['params']
  assert 'classifier' not in params['head']
  assert 'norm' in params['head']
