"""Exact evaluation: padded examples count nothing, and the number of counted ones is asserted."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from vision_attention.training import mixing, per_class

Sums = dict[str, jax.Array]
# What a step returns of single examples besides sums.
_EXAMPLES = ('logits', 'label', 'mask')


def make_eval_step(
  apply: Callable[..., Any],
  mean: Any,
  std: Any,
  *,
  by_class: bool = False,
  pick: Sequence[int] | None = None,
  among: Sequence[bool] | None = None,
) -> Callable[..., Sums]:
  """Makes `(variables, batch) -> sums` over the examples whose mask is 1.

  An example may have several labels, `labels` of the batch being boolean `[b, k]`: each of them is
  right, and the loss is that of their probability together. One that has none, with `label` -1, is
  counted as skipped and nothing else.

  Args:
    apply: `model.apply`.
    mean: of the pixels, per channel.
    std: of the pixels, per channel.
    by_class: whether it also counts by class, and returns `logits`, `label` and `mask`.
    pick: for each class of the data its number among the model's, -1 for one that the model does
      not know and so never answers.
    among: for each class of the data whether it may be answered; all may if None.
  """

  def eval_step(variables: Any, batch: Any) -> Sums:
    images = mixing.normalize(batch['image'], mean, std)
    logits = apply(variables, images, train=False).astype(jnp.float32)
    if pick is not None:
      known = np.asarray(pick) >= 0
      logits = jnp.where(known, logits[:, np.asarray(pick)], -jnp.inf)
    if among is not None:
      logits = jnp.where(np.asarray(among), logits, -jnp.inf)
    there = batch['mask'] > 0
    counted = there & (batch['label'] >= 0)
    right = batch.get('labels', jax.nn.one_hot(batch['label'], logits.shape[1], dtype=bool))
    of_right = jnp.where(right, logits, -jnp.inf)
    log_prob = jax.nn.logsumexp(of_right, axis=1) - jax.nn.logsumexp(logits, axis=1)
    # Ties and NaN rank behind: a model that answers the same everywhere is right nowhere.
    rank = (~(logits < of_right.max(1, keepdims=True)) & ~right).sum(-1)
    sums = {
      'skipped': (there & ~counted).sum(dtype=jnp.int32),
      'count': counted.sum(dtype=jnp.int32),
      'correct1': (counted & (rank < 1)).sum(dtype=jnp.int32),
      'correct5': (counted & (rank < 5)).sum(dtype=jnp.int32),
      'loss': jnp.where(counted, -log_prob, 0.0).sum(),
    }
    if by_class:
      sums |= per_class.counts(logits, batch['label'], rank < 1, counted)
      sums |= {'logits': logits, 'label': batch['label'], 'mask': batch['mask']}
    return sums

  return eval_step


def evaluate(
  eval_step: Callable[..., Sums],
  variables: Any,
  batches: Iterable[Any],
  num_examples: int,
  interrupted: Callable[[], bool] = lambda: False,
  label_names: Sequence[str] = (),
) -> dict[str, float] | None:
  """Evaluates on every example once.

  Args:
    eval_step: compiled step, from variables and a batch on the devices to sums.
    variables: of the model.
    batches: on the devices.
    num_examples: what the counts must add up to.
    interrupted: asked between batches; whether to give up.
    label_names: of the classes, for a step that counts by class; their numbers if empty.

  Returns:
    `top1` and `top5` in percent, `loss`, `correct` and `count`, `skipped` if any had no label, and
    of a step that counts by class what `per_class.summarize` returns; None if interrupted.

  Raises:
    RuntimeError: if any example was left out or counted twice.
  """
  totals: Sums | None = None
  examples: list[Sums] = []
  for batch in batches:
    if interrupted():
      return None
    sums = eval_step(variables, batch)
    if 'logits' in sums:
      examples.append({key: sums[key] for key in _EXAMPLES})
      sums = {key: value for key, value in sums.items() if key not in _EXAMPLES}
    totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
  sums = jax.device_get(totals or {})
  count, skipped = (sums[key].item() if sums else 0 for key in ('count', 'skipped'))
  if not count or count + skipped != num_examples:
    without = f' and skipped {skipped} without labels' if skipped else ''
    raise RuntimeError(f'evaluated {count} examples of {num_examples}{without}')
  found = {
    'top1': 100 * sums['correct1'].item() / count,
    'top5': 100 * sums['correct5'].item() / count,
    'loss': sums['loss'].item() / count,
    'correct': sums['correct1'].item(),
    'count': count,
  }
  if skipped:
    found['skipped'] = skipped
  if not examples:
    return found
  # Every process gets the examples of all.
  gathered = multihost_utils.process_allgather(examples, tiled=True)
  logits, labels, mask = (np.concatenate([x[key] for x in gathered]) for key in _EXAMPLES)
  real = mask > 0
  return found | per_class.summarize(sums, logits[real], labels[real], label_names)
