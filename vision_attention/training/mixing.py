"""Mixup and CutMix on the device, with weights of the batch or of each example."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

PER = ('batch', 'weight', 'example')
DRAWS = ('beta', 'power')


def normalize(
  images: Array, mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, 'b h w c']:
  """Returns pixels 0..255 as `(x / 255 - mean) / std`, per channel, in float32."""
  scale = 1.0 / (255.0 * jnp.asarray(std, jnp.float32))
  return images.astype(jnp.float32) * scale - jnp.asarray(mean) / jnp.asarray(std)


def _partner(x: Array) -> Array:
  """The batch turned round: example `i` is mixed with example `b - 1 - i` (timm's pairing)."""
  return x[::-1]


def _share(key: Array, alpha: float, count: int, draw: str) -> Float[Array, ' n']:
  """How much of the partner each of `count` mixtures takes."""
  if draw == 'power':
    return 0.5 * jax.random.uniform(key, (count,)) ** (1.0 / alpha)
  return 1.0 - jax.random.beta(key, alpha, alpha, (count,))


def _blend(x: Array, share: Float[Array, ' n']) -> Array:
  share = share.reshape(-1, *[1] * (x.ndim - 1))
  return (1.0 - share) * x + share * _partner(x)


def mixup(
  key: Array,
  images: Float[Array, 'b h w c'],
  targets: Float[Array, 'b k'],
  alpha: float,
  *,
  count: int = 1,
  draw: str = 'beta',
) -> tuple[Float[Array, 'b h w c'], Float[Array, 'b k']]:
  """Mixes images and targets (arXiv 1710.09412).

  Args:
    key: random key.
    images: the batch.
    targets: of the images.
    alpha: of the distribution of weights.
    count: of weights: 1 for the batch, or one for each example.
    draw: `beta` for weights of `Beta(alpha, alpha)`, `power` for shares `u ** (1 / alpha) / 2`.
  """
  share = _share(key, alpha, count, draw)
  return _blend(images, share), _blend(targets, share)


def cutmix(
  key: Array,
  images: Float[Array, 'b h w c'],
  targets: Float[Array, 'b k'],
  alpha: float,
  *,
  count: int = 1,
  draw: str = 'beta',
) -> tuple[Float[Array, 'b h w c'], Float[Array, 'b k']]:
  """Pastes one rectangle of the partner (arXiv 1905.04899); targets mix by its visible area.

  See `mixup` for the arguments; of CutMix the area is drawn.
  """
  key_weight, key_y, key_x = jax.random.split(key, 3)
  side = jnp.sqrt(_share(key_weight, alpha, count, draw))

  def span(key: Array, size: int) -> Array:
    half = jnp.floor(side * size).astype(jnp.int32)[:, None] // 2
    centre = jax.random.randint(key, (count, 1), 0, size)
    at = jnp.arange(size)
    return (at >= centre - half) & (at < centre + half)

  height, width = images.shape[1:3]
  box = span(key_y, height)[:, :, None] & span(key_x, width)[:, None, :]
  share = box.mean((1, 2), dtype=jnp.float32)
  mixed = jnp.where(box[..., None], _partner(images), images)
  return mixed, _blend(targets, share)


def mix(
  key: Array,
  images: Float[Array, 'b h w c'],
  targets: Float[Array, 'b k'],
  *,
  mixup_alpha: float,
  cutmix_alpha: float,
  prob: float,
  switch_prob: float,
  per: str = 'batch',
  draw: str = 'beta',
) -> tuple[Float[Array, 'b h w c'], Float[Array, 'b k']]:
  """Applies mixup, CutMix, one of them, or nothing.

  Args:
    key: random key of the step.
    images: the batch.
    targets: one-hot or smoothed labels.
    mixup_alpha: of mixup's weight, 0 for no mixup.
    cutmix_alpha: of CutMix's area, 0 for no CutMix.
    prob: probability of being mixed at all.
    switch_prob: probability of CutMix where both are on.
    per: `batch` to draw everything once (timm's default), `weight` for weights and rectangles of
      each example's own, `example` to draw everything for each example (timm's `elem`).
    draw: see `mixup`.
  """
  kinds = [(mixup, mixup_alpha), (cutmix, cutmix_alpha)]
  kinds = [(kind, alpha) for kind, alpha in kinds if alpha > 0]
  if not kinds or prob == 0:
    return images, targets
  weights, choices = (1 if single else len(images) for single in (per == 'batch', per != 'example'))
  key_apply, key_switch, key_mix = jax.random.split(key, 3)
  results = [kind(key_mix, images, targets, a, count=weights, draw=draw) for kind, a in kinds]

  def choose(key: Array, chance: float, a: Any, b: Any) -> Any:
    take = jax.random.bernoulli(key, chance, (choices,))
    return jax.tree.map(lambda x, y: jnp.where(take.reshape(-1, *[1] * (x.ndim - 1)), x, y), a, b)

  mixed = results[0]
  if len(results) == 2:
    mixed = choose(key_switch, switch_prob, results[1], results[0])
  return mixed if prob == 1 else choose(key_apply, prob, mixed, (images, targets))
