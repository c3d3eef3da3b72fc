"""Renames of other people's weights, and that nothing slips through unmatched."""

import numpy as np
import pytest

from vision_attention import convert
from vision_attention.models import reference

pytestmark = pytest.mark.fast


def test_rule_renames_with_offsets_and_padding():
  rule = reference.Rule(
    r'layer(\d+)\.(\d+)\.conv(\d)', 'stage{0:+1}/block{1:02d}/conv{2}', reference.CONV
  )
  [(path, change)] = rule.targets('layer1.3.conv2.weight')
  assert path == 'params/stage2/block03/conv2/kernel'
  assert change(np.zeros((8, 4, 3, 5)), (3, 5, 4, 8)).shape == (3, 5, 4, 8)
  assert rule.targets('layer1.3.conv2.weights') is None
  assert rule.targets('xlayer1.3.conv2.weight') is None


def test_norm_statistics_go_to_batch_stats():
  rule = reference.Rule('bn', 'backbone/bn', reference.NORM)
  assert rule.targets('bn.running_var')[0][0] == 'batch_stats/backbone/bn/var'
  assert rule.targets('bn.num_batches_tracked') == []


@pytest.mark.parametrize('heads', [None, 2])
def test_fused_projections_split_by_part_or_by_head(heads):
  rule = reference.Rule('attn.qkv', 'attn', reference.fused('query', 'key', 'value', heads=heads))
  weight = np.arange(12 * 3, dtype=np.float32).reshape(12, 3)
  parts = {path: change(weight, (3, 4)) for path, change in rule.targets('attn.qkv.weight')}
  rows = {None: [4, 5, 6, 7], 2: [2, 3, 8, 9]}[heads]
  np.testing.assert_array_equal(parts['params/attn/key/kernel'], weight[rows].T)


def test_whole_key_becomes_a_parameter():
  rule = reference.Rule('pos_embed', 'backbone/position', reference.param(''))
  assert rule.targets('pos_embed')[0][0] == 'params/backbone/position'
  assert rule.targets('pos_embed.weight') is None


def test_conversion_lists_every_problem_at_once():
  rules = [
    reference.Rule('fc', 'head', reference.DENSE),
    reference.Rule('old_fc', 'head', reference.DENSE),
    reference.Rule('stem', 'stem', reference.CONV),
  ]
  target = {
    'params': {'head': {'kernel': np.zeros((4, 2)), 'bias': np.zeros(2)}, 'top': np.zeros(3)}
  }
  state = {
    'fc.weight': np.zeros((3, 4)),
    'fc.bias': np.zeros(2),
    'old_fc.bias': np.zeros(2),
    'stem.weight': np.zeros((1, 1, 1, 1)),
    'what.is.this': np.zeros(7),
  }
  with pytest.raises(convert.ConversionError) as caught:
    convert._convert('net', state, rules, target)
  message = str(caught.value)
  for part in (
    '5 arrays do not fit net',
    'what.is.this (7,) of the reference is not known here',
    'fc.weight (3, 4) does not give params/head/kernel (4, 2)',
    'stem.weight (1, 1, 1, 1) belongs to params/stem/kernel, which the model does not have',
    'old_fc.bias and fc.bias both belong to params/head/bias',
    'params/top (3,) of the model is not in the reference',
  ):
    assert part in message
