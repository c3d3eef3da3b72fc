"""Exact evaluation: padded examples count nothing, and the number of counted ones is asserted."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from vision_attention.training import mixing

Sums = dict[str, jax.Array]


def make_eval_step(apply: Callable[..., Any], mean: Any, std: Any) -> Callable[..., Sums]:
  """Makes `(variables, batch) -> sums` over the examples whose mask is 1."""

  def eval_step(variables: Any, batch: Any) -> Sums:
    images = mixing.normalize(batch['image'], mean, std)
    logits = apply(variables, images, train=False).astype(jnp.float32)
    counted = batch['mask'] > 0
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), batch['label'][:, None], 1)[:, 0]
    true = jnp.take_along_axis(logits, batch['label'][:, None], 1)
    # Ties and NaN rank behind: a model that answers the same everywhere is right nowhere.
    rank = (~(logits < true)).sum(-1) - 1
    return {
      'count': counted.sum(dtype=jnp.int32),
      'correct1': (counted & (rank < 1)).sum(dtype=jnp.int32),
      'correct5': (counted & (rank < 5)).sum(dtype=jnp.int32),
      'loss': jnp.where(counted, -log_prob, 0.0).sum(),
    }

  return eval_step


def evaluate(
  eval_step: Callable[..., Sums],
  variables: Any,
  batches: Iterable[Any],
  num_examples: int,
  interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
  """Evaluates on every example once.

  Args:
    eval_step: compiled step, from variables and a batch on the devices to sums.
    variables: of the model.
    batches: on the devices.
    num_examples: what the counts must add up to.
    interrupted: asked between batches; whether to give up.

  Returns:
    `top1` and `top5` in percent, `loss`, `correct` and `count`; None if interrupted.

  Raises:
    RuntimeError: if any example was left out or counted twice.
  """
  totals: Sums | None = None
  for batch in batches:
    if interrupted():
      return None
    sums = eval_step(variables, batch)
    totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
  sums = {key: value.item() for key, value in jax.device_get(totals or {}).items()}
  if sums.get('count') != num_examples:
    raise RuntimeError(f'evaluated {sums.get("count", 0)} examples of {num_examples}')
  return {
    'top1': 100 * sums['correct1'] / num_examples,
    'top5': 100 * sums['correct5'] / num_examples,
    'loss': sums['loss'] / num_examples,
    'correct': sums['correct1'],
    'count': num_examples,
  }
