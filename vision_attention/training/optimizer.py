"""Optimizers from config, with regular expressions for what decays and how fast it learns.

Reads of `config.optimizer`: `name` (`adamw`, `sgd`, `lamb`, `adafactor`, `rmsprop`),
`learning_rate` (peak), `b1`, `b2` (`rmsprop`: of the squares), `epsilon`, `momentum`, `nesterov`,
`momentum_dtype`, `weight_decay`, `weight_decay_mask` (patterns of parameters that decay),
`weight_decay_multipliers` (pairs of pattern and factor of its decay), `weight_decay_times_lr`
(whether decay is multiplied by the peak learning rate too, or by the schedule alone),
`lr_multipliers` (pairs of pattern and factor; 0 freezes), `clip_norm` (global), `clip_adaptive`
(AGC, arXiv 2102.06171). Zero switches off. Factors by layer (`layer_decay`, see `models.depth`) are
given as a tree.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vision_attention import errors

NAMES = ('adamw', 'sgd', 'lamb', 'adafactor', 'rmsprop')


def path_of(key_path: Sequence[Any]) -> str:
  """Returns a parameter's path such as `backbone/stem/conv1/kernel`."""
  return '/'.join(str(getattr(key, 'key', getattr(key, 'name', key))) for key in key_path)


def matches(params: Any, patterns: Sequence[str]) -> Any:
  """Returns a tree of booleans: whether any pattern is found in the parameter's path."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: any(re.search(pattern, path_of(path)) for pattern in patterns), params
  )


def check_patterns(params: Any, patterns: Sequence[str], what: str) -> None:
  """Raises ValueError naming a pattern that is found in no parameter: a silent misspelling."""
  paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  for pattern in patterns:
    if not any(re.search(pattern, path) for path in paths):
      raise ValueError(f'{what} {pattern!r} matches none of {len(paths)} parameters')


def _factor(path: Sequence[Any], multipliers: Sequence[tuple[str, float]]) -> float:
  """Returns the factor of the first pattern that is found in a path, or 1."""
  name = path_of(path)
  return next((factor for pattern, factor in multipliers if re.search(pattern, name)), 1.0)


def _scale_by_patterns(multipliers: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
  """Multiplies updates by the factors of their paths."""

  def update(updates: Any, params: Any) -> Any:
    del params
    return jax.tree_util.tree_map_with_path(
      lambda path, value: value * _factor(path, multipliers), updates
    )

  return optax.stateless(update)


def _decay(config: Any) -> optax.GradientTransformation:
  """Adds decayed weights, of some parameters more than of others."""
  multipliers, rate = config.weight_decay_multipliers, config.weight_decay
  if not multipliers:
    return optax.add_decayed_weights(rate, lambda tree: matches(tree, config.weight_decay_mask))

  def update(updates: Any, params: Any) -> Any:
    def added(path: Sequence[Any], value: jax.Array, param: jax.Array, decays: bool) -> jax.Array:
      return value + rate * _factor(path, multipliers) * param if decays else value

    decays = matches(params, config.weight_decay_mask)
    return jax.tree_util.tree_map_with_path(added, updates, params, decays)

  return optax.stateless(update)


def _capped_decay(step: Any, power: Any) -> jax.Array:
  """Adafactor's decay of the second moment, at most 0.999 (arXiv 2106.04560, section 3.4)."""
  return jnp.minimum(0.999, 1.0 - (jnp.asarray(step, jnp.float32) + 1.0) ** (-power))


def _direction(config: Any, decay: optax.GradientTransformation) -> list[Any]:
  """The optimizer's own part, for a learning rate of one."""
  dtype = jnp.dtype(config.momentum_dtype)
  if config.name in ('adamw', 'lamb'):
    adam = optax.scale_by_adam(config.b1, config.b2, config.epsilon, mu_dtype=dtype)
    lamb = [optax.scale_by_trust_ratio()] if config.name == 'lamb' else []
    return [adam, decay, *lamb]
  if config.name == 'sgd':
    # Coupled L2: the decay goes through the momentum, as a loss term would.
    return [decay, optax.trace(config.momentum, config.nesterov, accumulator_dtype=dtype)]
  if config.name == 'rmsprop':
    # TensorFlow's: epsilon within the root, squares that begin at one. Its momentum is in `make`.
    rms = optax.scale_by_rms(
      config.b2, config.epsilon, initial_scale=1.0, eps_in_sqrt=True, bias_correction=False
    )
    return [decay, rms]
  return [
    optax.scale_by_factored_rms(
      decay_rate=0.8, decay_rate_fn=_capped_decay, min_dim_size_to_factor=32
    ),
    optax.ema(config.b1, debias=False, accumulator_dtype=dtype),
    decay,
  ]


def make(
  config: Any, factor: Callable[[Any], jax.Array], params: Any, factors: Any = None
) -> optax.GradientTransformation:
  """Makes the optimizer.

  Args:
    config: `config.optimizer`.
    factor: step -> factor on the peak learning rate.
    params: parameters or their shapes, against which patterns are checked.
    factors: on the learning rate of every parameter, of the same structure; None for 1.

  Raises:
    ValueError: for an unknown name, or a pattern that matches no parameter.
  """
  errors.check_choice('config.optimizer.name', config.name, NAMES)
  if config.weight_decay:
    check_patterns(params, config.weight_decay_mask, 'config.optimizer.weight_decay_mask')
  for key in ('lr_multipliers', 'weight_decay_multipliers'):
    check_patterns(params, [p for p, _ in config[key]], f'config.optimizer.{key}')
  decay = _decay(config)
  chain = []
  if config.clip_norm:
    chain.append(optax.clip_by_global_norm(config.clip_norm))
  if config.clip_adaptive:
    chain.append(optax.adaptive_grad_clip(config.clip_adaptive))
  if config.weight_decay_times_lr or config.name in ('sgd', 'rmsprop'):
    chain += [*_direction(config, decay), optax.scale(config.learning_rate)]
  elif config.name == 'lamb':
    raise ValueError('lamb needs weight_decay_times_lr=True: its trust ratio contains the decay')
  else:
    chain += [*_direction(config, optax.identity()), optax.scale(config.learning_rate), decay]
  if config.lr_multipliers:
    chain.append(_scale_by_patterns(config.lr_multipliers))
  if factors is not None:
    multiply = lambda updates, _: jax.tree.map(lambda x, f: x * f, updates, factors)
    chain.append(optax.stateless(multiply))
  chain.append(optax.scale_by_schedule(factor))
  if config.name == 'rmsprop':
    # TensorFlow's momentum is of updates, learning rate and all: a change of rate sinks in slowly.
    dtype = jnp.dtype(config.momentum_dtype)
    chain.append(optax.trace(config.momentum, config.nesterov, accumulator_dtype=dtype))
  return optax.chain(*chain, optax.scale(-1.0))
