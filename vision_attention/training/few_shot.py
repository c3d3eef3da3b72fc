"""The k-shot linear probe: how well a few images per class are told apart by frozen features.

Ridge regression in closed form on standardised features with a column of 100 for the bias, from
them to targets of -1 and 1; the protocol of big_vision's `fewshot_lsr`, with one strength of
regularisation for all.
"""

from collections.abc import Sequence

import numpy as np

L2 = 2.0**10
_BIAS = 100.0


def choose(labels: Sequence[int] | np.ndarray, shots: int, seed: int) -> np.ndarray:
  """Returns the positions of `shots` examples of every class, by chance.

  Raises:
    ValueError: if a class that occurs has fewer.
  """
  labels = np.asarray(labels)
  order = np.random.default_rng(seed).permutation(len(labels))
  chosen = []
  for label in np.unique(labels):
    mine = order[labels[order] == label]
    if len(mine) < shots:
      raise ValueError(f'class {label} has {len(mine)} images, fewer than {shots} shots')
    chosen.append(mine[:shots])
  return np.sort(np.concatenate(chosen))


def accuracy(
  features: np.ndarray,
  labels: np.ndarray,
  test_features: np.ndarray,
  test_labels: np.ndarray,
  l2: float = L2,
) -> float:
  """Returns the share of test examples that a ridge regression answers rightly, in percent.

  Args:
    features: `[n, d]` of the examples to learn from.
    labels: `[n]`.
    test_features: `[m, d]`.
    test_labels: `[m]`.
    l2: strength of the regularisation, of the bias too.
  """
  features = np.asarray(features, np.float64)
  mean, std = features.mean(0), features.std(0) + 1e-5

  def standardised(x: np.ndarray) -> np.ndarray:
    return np.pad((x - mean) / std, ((0, 0), (0, 1)), constant_values=_BIAS)

  x = standardised(features)
  found, numbers = np.unique(labels, return_inverse=True)
  targets = 2.0 * np.eye(len(found))[numbers] - 1.0
  # Of the two forms of the solution, the one with the smaller system.
  if x.shape[0] < x.shape[1]:
    weights = x.T @ np.linalg.solve(x @ x.T + l2 * np.eye(len(x)), targets)
  else:
    weights = np.linalg.solve(x.T @ x + l2 * np.eye(x.shape[1]), x.T @ targets)
  answers = found[(standardised(np.asarray(test_features, np.float64)) @ weights).argmax(1)]
  return 100.0 * float((answers == test_labels).mean())
