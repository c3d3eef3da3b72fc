"""Classification losses per example, in float32."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from vision_attention import errors

KINDS = ('softmax', 'sigmoid')
CLASS_WEIGHTS = ('none', 'inverse')


def classification(
  logits: Float[Array, 'b k'],
  targets: Float[Array, 'b k'],
  kind: str,
  *,
  class_weights: Float[Array, 'k'] | None = None,
  focal_gamma: float = 0.0,
) -> Float[Array, 'b']:
  """Returns the cross-entropy of each example, as it is or weighted by class and difficulty.

  With weights `w` and focus `g` (arXiv 1708.02002, equation 5) the term of class `c` becomes
  `-w_c t_c (1 - p_c)^g log p_c`: a target that mixes classes is weighted by its shares. Nothing is
  divided by the weights of a batch, so that micro-batches add up to the whole one.

  Args:
    logits: of any float type; computed in float32.
    targets: a distribution (`softmax`) or independent labels in [0, 1] (`sigmoid`).
    kind: `softmax`, or `sigmoid`: binary cross-entropy summed over the classes, each class's two
      terms with that class's weight.
    class_weights: of the classes; all 1 if None.
    focal_gamma: how much less an example counts that is classified well; 0 for the cross-entropy.
  """
  errors.check_choice('config.loss.kind', kind, KINDS)
  logits = logits.astype(jnp.float32)
  if class_weights is None and not focal_gamma:
    if kind == 'softmax':
      return optax.softmax_cross_entropy(logits, targets)
    return optax.sigmoid_binary_cross_entropy(logits, targets).sum(-1)
  if kind == 'softmax':
    terms = _focal(jax.nn.log_softmax(logits), targets, focal_gamma)
  else:
    terms = _focal(jax.nn.log_sigmoid(logits), targets, focal_gamma)
    terms += _focal(jax.nn.log_sigmoid(-logits), 1.0 - targets, focal_gamma)
  return (terms if class_weights is None else terms * class_weights).sum(-1)


def _focal(log_prob: Array, targets: Array, gamma: float) -> Array:
  """`-t (1 - p)^g log p` of every class."""
  terms = -targets * log_prob
  if gamma:
    # A power below 1 has no derivative at 0.
    terms *= jnp.maximum(-jnp.expm1(log_prob), 1e-12) ** gamma
  return terms


def entropy(distribution: Float[Array, 'b k']) -> Float[Array, 'b']:
  """Returns `-sum p log p` of each example, with `0 log 0 = 0`."""
  return jax.scipy.special.entr(distribution).sum(-1)


def class_weights(kind: str, counts: Sequence[int] | np.ndarray) -> np.ndarray | None:
  """Returns the weights of the classes for training images counted by class, or None for `none`.

  `inverse`: `w_c = a / n_c`, with `a` such that the mean over the classes is 1.

  Raises:
    ValueError: for an unknown kind, or a class that has no image to be weighted by.
  """
  errors.check_choice('config.loss.class_weights', kind, CLASS_WEIGHTS)
  if kind == 'none':
    return None
  counts = np.asarray(counts, np.float64)
  if not counts.all():
    raise ValueError(
      f'config.loss.class_weights={kind!r} needs an image of every class, and the training split '
      f"has none of class {np.flatnonzero(counts == 0).tolist()}: pass 'none' or another split"
    )
  return (1 / counts / np.mean(1 / counts)).astype(np.float32)


def smooth(labels: jax.Array, num_classes: int, smoothing: float, kind: str) -> jax.Array:
  """Returns labels `[b]` as smoothed one-hot targets `[b, num_classes]`.

  Softmax: `(1 - e) one_hot + e / k`. Sigmoid: every class is moved to `[e, 1 - e]`, which for the
  large class sets of pre-training is what keeps the sum of the targets bounded.
  """
  one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
  if kind == 'softmax':
    return one_hot * (1.0 - smoothing) + smoothing / num_classes
  return one_hot * (1.0 - 2 * smoothing) + smoothing
