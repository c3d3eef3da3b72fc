"""Classification losses per example, in float32."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from vision_attention import errors

KINDS = ('softmax', 'sigmoid')


def classification(
  logits: Float[Array, 'b k'], targets: Float[Array, 'b k'], kind: str
) -> Float[Array, 'b']:
  """Returns the cross-entropy of each example.

  Args:
    logits: of any float type; computed in float32.
    targets: a distribution (`softmax`) or independent labels in [0, 1] (`sigmoid`).
    kind: `softmax`, or `sigmoid`: binary cross-entropy summed over the classes.
  """
  errors.check_choice('config.loss.kind', kind, KINDS)
  logits = logits.astype(jnp.float32)
  if kind == 'softmax':
    return optax.softmax_cross_entropy(logits, targets)
  return optax.sigmoid_binary_cross_entropy(logits, targets).sum(-1)


def smooth(labels: jax.Array, num_classes: int, smoothing: float, kind: str) -> jax.Array:
  """Returns labels `[b]` as smoothed one-hot targets `[b, num_classes]`.

  Softmax: `(1 - e) one_hot + e / k`. Sigmoid: every class is moved to `[e, 1 - e]`, which for the
  large class sets of pre-training is what keeps the sum of the targets bounded.
  """
  one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
  if kind == 'softmax':
    return one_hot * (1.0 - smoothing) + smoothing / num_classes
  return one_hot * (1.0 - 2 * smoothing) + smoothing
