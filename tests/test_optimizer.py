"""One step of every optimizer against the formula of its paper, and what masks let through."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import common
from vision_attention.training import optimizer, sharding

pytestmark = pytest.mark.fast

PARAMS = {
  'backbone': {
    'block00': {'kernel': jnp.array([[1.0, -2.0], [3.0, 4.0]]), 'bias': jnp.array([0.5, -0.5])},
    'norm': {'scale': jnp.array([1.0, 1.0])},
  },
  'head': {'classifier': {'kernel': jnp.array([[2.0, 0.0], [-1.0, 1.0]])}},
}
GRADS = jax.tree.map(lambda x: 0.1 * x + 0.01, PARAMS)
LR = 0.5  # a power of two times the schedule's factor below


def _config(**changes) -> ml_collections.ConfigDict:
  config = common.get_config().optimizer
  config.learning_rate = LR
  config.weight_decay_mask = ('/kernel$',)
  config.update(changes)
  return config


def _run(steps: int = 1, factor: float = 0.5, **changes):
  """Returns parameters after `steps` steps with constant gradients."""
  tx = optimizer.make(_config(**changes), lambda step: jnp.asarray(factor), PARAMS)
  params, state = PARAMS, tx.init(PARAMS)
  for _ in range(steps):
    updates, state = tx.update(GRADS, state, params)
    params = jax.tree.map(jnp.add, params, updates)
  return params, state


def _kernel(tree):
  return np.asarray(tree['backbone']['block00']['kernel'], np.float64)


def _bias(tree):
  return np.asarray(tree['backbone']['block00']['bias'], np.float64)


@pytest.mark.parametrize('name', ['adamw', 'sgd', 'adafactor'])
def test_multipliers_are_of_the_decay_alone(name):
  """The head decays a hundredfold in arXiv 2106.04560."""
  multipliers = (('classifier/kernel$', 100.0),)
  same = dict(name=name, momentum=0.0, b1=0.0, weight_decay=0.003)
  got, _ = _run(weight_decay_multipliers=multipliers, **same)
  body, _ = _run(**same)
  head, _ = _run(**{**same, 'weight_decay': 0.3})
  np.testing.assert_array_equal(_kernel(got), _kernel(body))
  np.testing.assert_array_equal(_bias(got), _bias(body))
  classifier = lambda tree: tree['head']['classifier']['kernel']
  np.testing.assert_allclose(classifier(got), classifier(head), rtol=1e-6)
  assert np.abs(classifier(got) - classifier(body)).max() > 0.05


def test_adamw_follows_its_formula_for_three_steps():
  b1, b2, eps, decay, factor = 0.9, 0.999, 1e-8, 0.1, 0.5
  got, _ = _run(steps=3, factor=factor, weight_decay=decay)
  for pick, wd in ((_kernel, decay), (_bias, 0.0)):
    w, g = pick(PARAMS), pick(GRADS)
    m, v = np.zeros_like(g), np.zeros_like(g)
    for t in range(1, 4):
      m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
      update = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
      w = w - factor * LR * (update + wd * w)
    np.testing.assert_allclose(pick(got), w, rtol=1e-4)


def test_independent_decay_follows_the_schedule_but_not_the_peak():
  """The same as PyTorch's AdamW with a decay of `weight_decay / learning_rate`."""
  got, _ = _run(weight_decay=0.05, weight_decay_times_lr=False)
  same, _ = _run(weight_decay=0.05 / LR, weight_decay_times_lr=True)
  np.testing.assert_allclose(_kernel(got), _kernel(same), rtol=1e-6)
  plain, _ = _run()
  np.testing.assert_allclose(_kernel(plain) - _kernel(got), 0.5 * 0.05 * _kernel(PARAMS), rtol=1e-4)


@pytest.mark.parametrize('nesterov', [False, True])
def test_sgd_puts_the_decay_through_the_momentum(nesterov):
  momentum, decay, factor = 0.9, 0.01, 0.5
  got, _ = _run(
    steps=3, factor=factor, name='sgd', momentum=momentum, nesterov=nesterov, weight_decay=decay
  )
  for pick, wd in ((_kernel, decay), (_bias, 0.0)):
    w, velocity = pick(PARAMS), 0.0
    for _ in range(3):
      g = pick(GRADS) + wd * w
      velocity = momentum * velocity + g
      w = w - factor * LR * (momentum * velocity + g if nesterov else velocity)
    np.testing.assert_allclose(pick(got), w, rtol=1e-4)


def test_lamb_scales_by_the_ratio_of_norms():
  decay, factor = 0.1, 0.5
  got, _ = _run(factor=factor, name='lamb', weight_decay=decay)
  w, g = _kernel(PARAMS), _kernel(GRADS)
  update = g / (np.abs(g) + 1e-8) + decay * w
  ratio = np.linalg.norm(w) / np.linalg.norm(update)
  np.testing.assert_allclose(_kernel(got), w - factor * LR * ratio * update, rtol=1e-4)


def test_adafactor_factors_large_matrices_and_caps_its_decay():
  key = jax.random.key(0)
  params = {'kernel': jax.random.normal(key, (48, 32)), 'bias': jnp.ones(32)}
  grads = {'kernel': jax.random.normal(jax.random.key(1), (48, 32)), 'bias': jnp.full(32, 2.0)}
  config = _config(name='adafactor', momentum_dtype='bfloat16', weight_decay_mask=('kernel$',))
  tx = optimizer.make(config, lambda step: jnp.ones(()), params)
  state = tx.init(params)
  held = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.float32)
  assert held < 48 * 32, 'the second moment of a matrix is a row and a column'
  assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.shape == (48, 32)} == {
    jnp.dtype(jnp.bfloat16)
  }
  updates, _ = tx.update(grads, state, params)
  g2 = np.asarray(grads['kernel'], np.float64) ** 2
  row, column = g2.mean(1, keepdims=True), g2.mean(0, keepdims=True)
  direction = np.asarray(grads['kernel']) / np.sqrt(row * column / row.mean())
  # The first step has no history: all of the new moment, and a tenth of the new direction.
  np.testing.assert_allclose(updates['kernel'], -LR * 0.1 * direction, rtol=2e-2)
  np.testing.assert_allclose(updates['bias'], -LR * 0.1 * np.ones(32), rtol=2e-2)
  assert float(optimizer._capped_decay(jnp.asarray(10_000_000), 0.8)) == pytest.approx(0.999)


def test_momentum_is_held_in_the_type_asked_for():
  _, state = _run(momentum_dtype='bfloat16')
  types = {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.shape == (2, 2)}
  assert types == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}


def test_global_clipping_keeps_the_direction():
  """With plain SGD the step's length over all parameters is the bound."""
  bound = 0.01
  got, _ = _run(factor=1.0, name='sgd', momentum=0.0, clip_norm=bound)
  step = jax.tree.map(jnp.subtract, PARAMS, got)
  norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(step)))
  assert norm == pytest.approx(LR * bound, rel=1e-3)
  assert np.corrcoef(_kernel(step).ravel(), _kernel(GRADS).ravel())[0, 1] == pytest.approx(1.0)


def test_adaptive_clipping_bounds_each_unit_by_its_weights():
  """arXiv 2102.06171, equation 3: `||g|| / max(||w||, 1e-3) <= clipping`, per output unit."""
  clipping = 0.05
  got, _ = _run(factor=1.0, name='sgd', momentum=0.0, clip_adaptive=clipping)
  step = (_kernel(PARAMS) - _kernel(got)) / LR
  ratio = np.linalg.norm(step, axis=0) / np.linalg.norm(_kernel(PARAMS), axis=0)
  np.testing.assert_allclose(ratio, clipping, rtol=1e-3)


def test_multipliers_take_the_first_pattern_that_is_found():
  multipliers = (('block00/bias', 0.0), ('backbone/', 0.25), ('/kernel$', 7.0))
  plain, _ = _run(factor=1.0)
  got, _ = _run(factor=1.0, lr_multipliers=multipliers)
  moved = lambda tree: jax.tree.map(jnp.subtract, tree, PARAMS)
  ratio = jax.tree.map(lambda a, b: float((a / b).mean()), moved(got), moved(plain))
  assert ratio['backbone']['block00']['bias'] == 0.0, 'zero freezes'
  assert ratio['backbone']['block00']['kernel'] == pytest.approx(0.25, rel=1e-5)
  assert ratio['backbone']['norm']['scale'] == pytest.approx(0.25, rel=1e-5)
  assert ratio['head']['classifier']['kernel'] == pytest.approx(7.0, rel=1e-5)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'name': 'adam'}, "did you mean 'adamw'"),
    ({'weight_decay': 0.1, 'weight_decay_mask': ('/kernal$',)}, "'/kernal\\$' matches none of 4"),
    ({'lr_multipliers': (('stem', 0.1),)}, "'stem' matches none"),
    ({'weight_decay_multipliers': (('stem', 2.0),)}, "decay_multipliers 'stem' matches none"),
    ({'name': 'lamb', 'weight_decay_times_lr': False}, 'trust ratio'),
  ],
)
def test_refusals(changes, message):
  with pytest.raises(ValueError, match=message):
    optimizer.make(_config(**changes), lambda step: 1.0, PARAMS)


def test_rmsprop_is_tensorflows_for_steps_of_changing_rate():
  """Squares from one, epsilon in the root, the rate inside the momentum, decay in the gradient."""
  rho, momentum, eps, decay, rates = 0.9, 0.8, 1e-3, 0.1, (1.0, 0.5, 0.125)
  config = _config(name='rmsprop', b2=rho, momentum=momentum, epsilon=eps, weight_decay=decay)
  tx = optimizer.make(config, lambda step: jnp.asarray(rates)[step], PARAMS)
  params, state = PARAMS, tx.init(PARAMS)
  for _ in rates:
    updates, state = tx.update(GRADS, state, params)
    params = jax.tree.map(jnp.add, params, updates)
  for pick, wd in ((_kernel, decay), (_bias, 0.0)):
    w = pick(PARAMS)
    squares, moved = np.ones_like(w), np.zeros_like(w)
    for rate in rates:
      g = pick(GRADS) + wd * w
      squares = rho * squares + (1 - rho) * g * g
      moved = momentum * moved + LR * rate * g / np.sqrt(squares + eps)
      w = w - moved
    np.testing.assert_allclose(pick(params), w, rtol=1e-5)


@pytest.mark.fast
def test_a_sharding_rule_that_finds_nothing_is_refused():
  tree = {'params': {'head': {'kernel': jnp.zeros((4, 2))}}}
  sharding.check_rules(tree, (('head/kernel', (None, 'fsdp')),))
  with pytest.raises(
    ValueError, match=r"'classifer/kernel' matches none of 1 arrays, such as .*head"
  ):
    sharding.check_rules(tree, (('classifer/kernel', (None, 'fsdp')),))
