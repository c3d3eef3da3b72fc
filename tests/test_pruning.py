"""Heads that are taken out: what is left answers alike, has its published size, and trains on."""

import functools
import json

import jax
import numpy as np
import pytest

import train
import vision_attention as va
from configs import conv_attention_quadratic
from tests import abstract
from tools import prune_heads
from vision_attention import checkpoint, convert
from vision_attention.data import builders
from vision_attention.models import pruning, tree

TINY = dict(dim=8, depth=3, mlp_dim=12, image_size=8, num_classes=4)
HEADS = {0: (1,), 2: (3, 0)}
OPERATORS = {
  'quadratic': 'quadratic',
  'general': {'name': 'quadratic', 'isotropic': False},
  'learned': 'learned_position',
  'content': {'name': 'learned_position', 'content': True, 'head_dim': 5},
}
PATH = 'params/backbone/stage1/block{:02d}/attn/{}'


def _model(attn='quadratic', num_heads=4):
  options = {**TINY, 'attn': attn, 'num_heads': num_heads}
  model, info = va.create_model('conv_attention_quadratic', **options)
  return model, abstract.drawn(convert.abstract_variables(model, info))


def _logits(model, variables):
  images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  return np.asarray(jax.jit(functools.partial(model.apply, train=False))(variables, images))


@pytest.mark.parametrize('name', OPERATORS)
def test_heads_that_give_nothing_are_not_missed(name):
  model, variables = _model(OPERATORS[name])
  flat = tree.flatten(variables)
  for layer, heads in HEADS.items():
    rows = flat[PATH.format(layer, 'proj/kernel')].reshape(4, TINY['dim'], TINY['dim'])
    rows[list(heads)] = 0.0
  pruned, left = pruning.prune(variables, HEADS)
  assert left == (3, 4, 2)
  assert pruning.num_heads(pruned) == left
  smaller, fresh = _model(OPERATORS[name], left)
  assert jax.tree.map(np.shape, pruned) == jax.tree.map(np.shape, fresh)
  expected = _logits(model, variables)
  np.testing.assert_allclose(_logits(smaller, pruned), expected, atol=1e-5)
  # Other heads would be.
  other, _ = pruning.prune(variables, {0: (2,), 2: (0, 1)})
  assert np.abs(_logits(smaller, other) - expected).max() > 1e-2


@pytest.mark.fast
def test_degenerate_heads_are_found_by_layer():
  _, variables = _model(OPERATORS['general'])
  flat = tree.flatten(variables)
  for layer in range(3):
    flat[PATH.format(layer, 'spreads')][:] = np.eye(2)
  assert pruning.degenerate(variables) == {}
  flat[PATH.format(1, 'spreads')][2] = [[1.0, 0.0], [0.0, 0.02]]  # a line
  flat[PATH.format(2, 'spreads')][[0, 3]] = 1e-3 * np.eye(2)  # everywhere
  assert pruning.degenerate(variables) == {1: (2,), 2: (0, 3)}
  _, variables = _model('learned_position')
  with pytest.raises(ValueError, match='only heads of the operator quadratic can be degenerate'):
    pruning.degenerate(variables)


@pytest.mark.parametrize(
  ('name', 'gaussian'), [('conv_attention_quadratic', 3), ('conv_attention_quadratic_general', 6)]
)
def test_a_head_has_a_square_of_values_and_a_gaussian(name, gaussian):
  """From the 16 heads of the code to the 9 of table 1, and below."""
  shapes = abstract.variables(name, num_heads=16)
  variables = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
  pruned, left = pruning.prune(variables, dict.fromkeys(range(6), range(9, 16)))
  assert left == (9,) * 6
  published = abstract.count(name)
  assert abstract.size(pruned['params']) == published
  assert abstract.size(variables['params']) == published + 7 * 6 * (400 * 400 + gaussian)
  fewer, left = pruning.prune(pruned, {1: (0, 4), 5: (8,)})
  assert left == (9, 7, 9, 9, 9, 8)
  assert abstract.size(fewer['params']) == published - 3 * (400 * 400 + gaussian)
  assert abstract.count(name, num_heads=left) == abstract.size(fewer['params'])


@pytest.mark.fast
def test_impossible_heads_are_refused():
  _, variables = _model()
  with pytest.raises(ValueError, match='no layer 3 to prune: they are 0 to 2'):
    pruning.prune(variables, {3: (0,)})
  with pytest.raises(ValueError, match='layer 1 has no head 4: they are 0 to 3'):
    pruning.prune(variables, {1: (0, 4)})
  with pytest.raises(ValueError, match='layer 1 would keep none of its 4 heads'):
    pruning.prune(variables, {1: range(4)})
  _, variables = _model('mhsa')
  with pytest.raises(ValueError, match='only those of conv_attention_'):
    pruning.num_heads(variables)
  with pytest.raises(ValueError, match=r'heads=.9/a. is not a number per layer'):
    conv_attention_quadratic.get_config('init=runs/pruned,heads=9/a')
  with pytest.raises(ValueError, match="'0:a' is not layer:head,head"):
    prune_heads.parse_heads(['1:2', '0:a'])
  with pytest.raises(ValueError, match='names layer 1 twice'):
    prune_heads.parse_heads(['1:2', '1:3'])
  assert prune_heads.parse_heads(['1:2', '0:0,3']) == {1: (2,), 0: (0, 3)}


def _config(data_dir):
  config = conv_attention_quadratic.get_config('local')
  config.data.data_dir = str(data_dir)
  config.data.num_threads = 0
  config.data.eval_split = 'test[:20]'
  config.batch_size = 8
  config.total = '2 steps'
  config.schedule.warmup = '1 steps'
  config.eval.every = '2 steps'
  config.checkpoint.every = '2 steps'
  config.model.options.update(dim=8, depth=2, mlp_dim=8, num_heads=3)
  return config


@pytest.mark.slow
def test_a_pruned_run_is_trained_on(tmp_path, capsys):
  builders.write('digits', builders.digits(), tmp_path / 'data')
  run, out = tmp_path / 'run', tmp_path / 'pruned'
  train.train_and_evaluate(_config(tmp_path / 'data'), run)

  # None of its heads is degenerate yet.
  with pytest.raises(SystemExit):
    prune_heads.main([str(run), str(out)])
  assert 'is degenerate: name those to remove by --heads' in capsys.readouterr().err
  prune_heads.main([str(run), str(out), '--heads', '1:0,2'])
  printed = capsys.readouterr().out
  assert 'layer 1: 1 of 3 heads are left, removed: 0, 2' in printed
  arguments = printed.splitlines()[-1]
  assert arguments == f'variant=conv_attention_quadratic,init={out},heads=3/1'
  assert conv_attention_quadratic.get_config(arguments).model.options.num_heads == (3, 1)

  model, variables, config = va.load(out)
  assert (config.model.options.num_heads, config.init.path) == ([3, 1], str(run))
  expected, _ = pruning.prune(va.load_variables(run), {1: (0, 2)})
  assert jax.tree.all(jax.tree.map(np.array_equal, variables, expected))
  shape = (1, config.image_size, config.image_size, 3)
  assert np.isfinite(model.apply(variables, np.zeros(shape, np.float32))).all()

  tuned = _config(tmp_path / 'data')
  tuned.init.path = str(out)
  with pytest.raises(ValueError, match=r'block01/attn/centers has shape \(1, 2\), needed \(3, 2\)'):
    train.train_and_evaluate(tuned, tmp_path / 'refused')
  tuned.model.options = {**tuned.model.options.to_dict(), 'num_heads': (3, 1)}
  found = train.train_and_evaluate(tuned, tmp_path / 'tuned')
  assert found['eval/count'] == 20
  report = json.loads((tmp_path / 'tuned/init.json').read_text())
  assert not report['reinitialised']
  assert PATH.format(1, 'spreads') in report['loaded']
  assert checkpoint.steps_of(tmp_path / 'tuned') == [2]

  with pytest.raises(SystemExit):
    prune_heads.main([str(run), str(out), '--heads', '0:0'])
  assert f'{out} holds a run already' in capsys.readouterr().err
