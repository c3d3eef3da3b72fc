"""Metrics of single classes and their means, from counts and logits of every evaluated example.

A class without a single image in the split has no recall and no AUC: it is left out of the
results and of the means.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# What larger values of mean a better model; each is in the results of an evaluation per class.
MEANS = ('balanced_accuracy', 'macro_f1', 'macro_auc')


def counts(
  logits: jax.Array, labels: jax.Array, correct: jax.Array, counted: jax.Array
) -> dict[str, jax.Array]:
  """Returns integers per class, `[k]`, that add up over batches.

  Args:
    logits: `[b, k]`.
    labels: `[b]`.
    correct: `[b]`, whether the true class stands alone in front (ties and NaN do not).
    counted: `[b]`, false for padding.
  """

  def tally(classes: jax.Array, which: jax.Array) -> jax.Array:
    return jnp.zeros(logits.shape[-1], jnp.int32).at[classes].add(which.astype(jnp.int32))

  return {
    'examples': tally(labels, counted),
    'predicted': tally(logits.argmax(-1), counted),
    'true_positives': tally(labels, counted & correct),
  }


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
  """Returns the area under the ROC curve: the share of (positive, negative) pairs in right order.

  Pairs with equal scores count one half (Mann and Whitney's U); NaN is the lowest score.

  Args:
    scores: `[n]`, higher for positive.
    positive: `[n]` bool; both kinds must occur.
  """
  scores = np.where(np.isnan(scores), -np.inf, scores)
  values, inverse = np.unique(scores, return_inverse=True)
  positives = np.bincount(inverse[positive], minlength=len(values))
  negatives = np.bincount(inverse[~positive], minlength=len(values))
  # In halves of pairs, which are integers: the result does not depend on the order of examples.
  halves = positives * (2 * (np.cumsum(negatives) - negatives) + negatives)
  return int(halves.sum()) / (2 * int(positives.sum()) * int(negatives.sum()))


def log_odds(logits: np.ndarray) -> np.ndarray:
  """Returns `log p / (1 - p)` of every class in float64, which keeps order where `p` rounds to 1.

  Args:
    logits: `[n, k]` of a softmax over at least two classes.
  """
  logits = logits.astype(np.float64)
  rest = np.empty_like(logits)
  for c in range(logits.shape[1]):
    others = np.delete(logits, c, 1)
    top = others.max(1, keepdims=True)
    with np.errstate(invalid='ignore'):  # of infinite logits, which become NaN
      rest[:, c] = (top + np.log(np.exp(others - top).sum(1, keepdims=True)))[:, 0]
  with np.errstate(invalid='ignore'):
    return logits - rest


def summarize(
  sums: dict[str, np.ndarray], logits: np.ndarray, labels: np.ndarray, label_names: Sequence[str]
) -> dict[str, float]:
  """Returns the metrics of every class and their means over classes.

  Args:
    sums: of `counts`, over the whole split.
    logits: `[n, k]` of the whole split, without padding.
    labels: `[n]`.
    label_names: of the classes; their numbers if empty.

  Returns:
    In percent: `recall/<label>`, `precision/<label>` (0 where nothing is predicted),
    `balanced_accuracy` (the mean recall) and `macro_f1`; between 0 and 1: `auc/<label>`, one class
    against the rest, and `macro_auc`.
  """
  examples, predicted = sums['examples'], sums['predicted']
  right = sums['true_positives']
  names = label_names or [str(c) for c in range(len(examples))]
  found: dict[str, float] = {}
  recalls, f1s, areas = [], [], []
  scores = log_odds(logits)
  for c, name in enumerate(names):
    if examples[c]:
      recalls.append(100 * int(right[c]) / int(examples[c]))
      found[f'recall/{name}'] = recalls[-1]
      found[f'precision/{name}'] = 100 * int(right[c]) / max(int(predicted[c]), 1)
    if examples[c] or predicted[c]:
      f1s.append(200 * int(right[c]) / int(examples[c] + predicted[c]))
    if 0 < examples[c] < len(labels):
      areas.append(auc(scores[:, c], labels == c))
      found[f'auc/{name}'] = areas[-1]
  means = zip(MEANS, (recalls, f1s, areas), strict=True)
  return {key: float(np.mean(values)) for key, values in means if values} | found
