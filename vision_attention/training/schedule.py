"""Durations and learning-rate schedules, resolved when a run starts."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vision_attention import errors

UNITS = ('epochs', 'steps', 'examples')
KINDS = ('constant', 'cosine', 'linear', 'rsqrt', 'step')


def steps(duration: str, *, num_examples: int, batch_size: int) -> int:
  """Returns a duration such as `300 epochs`, `10_000 steps` or `1e6 examples` in steps.

  Raises:
    ValueError: if it does not read so, or is negative.
  """
  number, _, unit = duration.strip().partition(' ')
  try:
    value = float(number)
  except ValueError:
    value = math.nan
  unit = unit.strip()
  unit = unit if unit.endswith('s') else unit + 's'
  if unit not in UNITS or not 0 <= value < math.inf:
    raise ValueError(
      f"duration {duration!r} does not read like '300 epochs', '10_000 steps' or '1e6 examples'"
    )
  if unit == 'steps':
    return round(value)
  examples = value * num_examples if unit == 'epochs' else value
  return round(examples / batch_size)


def relative(config: Any, *, total: int, to_steps: Callable[[str], int]) -> Callable:
  """Returns step -> factor on the peak learning rate.

  Reads of `config.schedule`: `kind`; `warmup`, a duration of linear growth from `warmup_init`;
  `warmup_prefix`, whether the decay begins after it or runs beneath it from the first step (timm's
  default); `final`, the factor at the end (`cosine`, `linear`); `hold`, a duration at the end that
  stays there (timm's cooldown); `boundaries`, durations, with `factor` (`step`); `timescale` in
  steps and `cooldown`, a duration of linear decay to 0 (`rsqrt`, arXiv 2106.04560); `every`, a
  duration through which the factor stays what it was at its start (`1 epochs` for schedules that
  move by epochs; of no length: by steps).

  Args:
    config: `config.schedule`.
    total: steps of the run.
    to_steps: duration to steps.

  Raises:
    ValueError: for an unknown kind, or a warm-up that leaves no steps.
  """
  errors.check_choice('config.schedule.kind', config.kind, KINDS)
  warmup = to_steps(config.warmup)
  if warmup >= total:
    raise ValueError(f'the warm-up of {warmup} steps leaves none of the {total} steps of the run')
  hold, every = to_steps(config.hold), to_steps(config.every)
  begin = warmup if config.warmup_prefix else 0
  if begin + hold >= total:
    raise ValueError(
      f'the warm-up of {begin} and the hold of {hold} steps leave none of the {total} steps between'
    )
  boundaries: Sequence[int] = [to_steps(duration) for duration in config.boundaries]
  cooldown = to_steps(config.cooldown)

  def factor(step: Any) -> jax.Array:
    step = jnp.asarray(step, jnp.float32)
    step = step // every * every if every else step
    done = jnp.clip((step - begin) / (total - hold - begin), 0.0, 1.0)
    if config.kind == 'constant':
      value = jnp.ones(())
    elif config.kind == 'cosine':
      value = config.final + (1 - config.final) * 0.5 * (1 + jnp.cos(jnp.pi * done))
    elif config.kind == 'linear':
      value = config.final + (1 - config.final) * (1 - done)
    elif config.kind == 'step':
      value = jnp.ones(())
      for boundary in boundaries:
        value = jnp.where(step >= boundary, value * config.factor, value)
    else:
      value = jnp.sqrt(config.timescale / jnp.maximum(step + config.timescale - warmup, 1.0))
      value = jnp.minimum(value, 1.0)
      if cooldown:
        value = value * jnp.clip((total - step) / cooldown, 0.0, 1.0)
    if not warmup:
      return value
    grown = config.warmup_init + (1 - config.warmup_init) * step / warmup
    if config.warmup_prefix:
      return value * jnp.minimum(1.0, grown)
    return jnp.where(step < warmup, grown, value)

  return factor
