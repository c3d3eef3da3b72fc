"""Mixup and CutMix on the device, for a whole batch at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def normalize(
  images: Array, mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, 'b h w c']:
  """Returns pixels 0..255 as `(x / 255 - mean) / std`, per channel, in float32."""
  scale = 1.0 / (255.0 * jnp.asarray(std, jnp.float32))
  return images.astype(jnp.float32) * scale - jnp.asarray(mean) / jnp.asarray(std)


def _partner(x: Array) -> Array:
  """The batch turned round: example `i` is mixed with example `b - 1 - i` (timm's pairing)."""
  return x[::-1]


def mixup(
  key: Array, images: Float[Array, 'b h w c'], targets: Float[Array, 'b k'], alpha: float
) -> tuple[Float[Array, 'b h w c'], Float[Array, 'b k']]:
  """Mixes images and targets by one `Beta(alpha, alpha)` weight per batch (arXiv 1710.09412)."""
  weight = jax.random.beta(key, alpha, alpha)

  def mix(x: Array) -> Array:
    return weight * x + (1.0 - weight) * _partner(x)

  return mix(images), mix(targets)


def cutmix(
  key: Array, images: Float[Array, 'b h w c'], targets: Float[Array, 'b k'], alpha: float
) -> tuple[Float[Array, 'b h w c'], Float[Array, 'b k']]:
  """Pastes one rectangle of the partner (arXiv 1905.04899); targets mix by its visible area."""
  height, width = images.shape[1:3]
  key_weight, key_y, key_x = jax.random.split(key, 3)
  side = jnp.sqrt(1.0 - jax.random.beta(key_weight, alpha, alpha))

  def span(key: Array, size: int) -> Array:
    half = jnp.floor(side * size).astype(jnp.int32) // 2
    centre = jax.random.randint(key, (), 0, size)
    at = jnp.arange(size)
    return (at >= centre - half) & (at < centre + half)

  box = span(key_y, height)[:, None] & span(key_x, width)[None, :]
  share = box.mean(dtype=jnp.float32)
  mixed = jnp.where(box[None, ..., None], _partner(images), images)
  return mixed, (1.0 - share) * targets + share * _partner(targets)


def mix(
  key: Array,
  images: Float[Array, 'b h w c'],
  targets: Float[Array, 'b k'],
  *,
  mixup_alpha: float,
  cutmix_alpha: float,
  prob: float,
  switch_prob: float,
) -> tuple[Float[Array, 'b h w c'], Float[Array, 'b k']]:
  """Applies mixup, CutMix, one of them, or nothing to a batch.

  Args:
    key: random key of the step.
    images: the batch.
    targets: one-hot or smoothed labels.
    mixup_alpha: of mixup's weight, 0 for no mixup.
    cutmix_alpha: of CutMix's area, 0 for no CutMix.
    prob: probability that the batch is mixed at all.
    switch_prob: probability of CutMix where both are on.
  """
  kinds = [(mixup, mixup_alpha), (cutmix, cutmix_alpha)]
  kinds = [(kind, alpha) for kind, alpha in kinds if alpha > 0]
  if not kinds or prob == 0:
    return images, targets
  key_apply, key_switch, key_mix = jax.random.split(key, 3)
  results = [kind(key_mix, images, targets, alpha) for kind, alpha in kinds]
  mixed = results[0]
  if len(results) == 2:
    use_cutmix = jax.random.bernoulli(key_switch, switch_prob)
    mixed = jax.tree.map(lambda a, b: jnp.where(use_cutmix, b, a), *results)
  if prob == 1:
    return mixed
  apply = jax.random.bernoulli(key_apply, prob)
  return jax.tree.map(lambda a, b: jnp.where(apply, a, b), mixed, (images, targets))
