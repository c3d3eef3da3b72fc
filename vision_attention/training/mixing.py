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


def shares(key: Array, alpha: float, count: int, draw: str) -> Float[Array, ' n']:
  """Returns how much of the partner each of `count` mixtures takes.

  Args:
    key: random key.
    alpha: of the distribution.
    count: 1 for a whole batch, or one for each example.
    draw: `beta` for weights of `Beta(alpha, alpha)`, `power` for shares `u ** (1 / alpha) / 2`.
  """
  if draw == 'power':
    return 0.5 * jax.random.uniform(key, (count,)) ** (1.0 / alpha)
  return 1.0 - jax.random.beta(key, alpha, alpha, (count,))


def mixup(x: Float[Array, 'b ...'], share: Float[Array, ' n']) -> Float[Array, 'b ...']:
  """Mixes images or targets with their partners (arXiv 1710.09412), by one share or their own."""
  share = share.reshape(-1, *[1] * (x.ndim - 1))
  return (1.0 - share) * x + share * _partner(x)


def cutmix(
  key: Array, images: Float[Array, 'b h w c'], share: Float[Array, ' n']
) -> tuple[Float[Array, 'b h w c'], Float[Array, ' n']]:
  """Pastes rectangles of the partner (arXiv 1905.04899).

  Args:
    key: random key of the places.
    images: the batch.
    share: area of the rectangle, one for all or each its own.

  Returns:
    The images, and the share that is visible: a rectangle is cut off at the border.
  """
  key_y, key_x = jax.random.split(key)
  count, side = len(share), jnp.sqrt(share)

  def span(key: Array, size: int) -> Array:
    half = jnp.floor(side * size).astype(jnp.int32)[:, None] // 2
    centre = jax.random.randint(key, (count, 1), 0, size)
    at = jnp.arange(size)
    return (at >= centre - half) & (at < centre + half)

  height, width = images.shape[1:3]
  box = span(key_y, height)[:, :, None] & span(key_x, width)[:, None, :]
  visible = box.mean((1, 2), dtype=jnp.float32)
  return jnp.where(box[..., None], _partner(images), images), visible


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
    draw: see `shares`.
  """
  if prob == 0 or not (mixup_alpha or cutmix_alpha):
    return images, targets
  weights, choices = (1 if single else len(images) for single in (per == 'batch', per != 'example'))
  key_apply, key_switch, key_share, key_place = jax.random.split(key, 4)
  results = []
  if mixup_alpha:
    share = shares(key_share, mixup_alpha, weights, draw)
    results.append((mixup(images, share), mixup(targets, share)))
  if cutmix_alpha:
    share = shares(key_share, cutmix_alpha, weights, draw)
    pasted, share = cutmix(key_place, images, share)
    results.append((pasted, mixup(targets, share)))

  def choose(key: Array, chance: float, a: Any, b: Any) -> Any:
    take = jax.random.bernoulli(key, chance, (choices,))
    return jax.tree.map(lambda x, y: jnp.where(take.reshape(-1, *[1] * (x.ndim - 1)), x, y), a, b)

  mixed = results[0]
  if len(results) == 2:
    mixed = choose(key_switch, switch_prob, results[1], results[0])
  return mixed if prob == 1 else choose(key_apply, prob, mixed, (images, targets))
