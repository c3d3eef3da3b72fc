"""Stochastic depth (arXiv 1603.09382): a residual branch is dropped per sample."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


class DropPath(nn.Module):
  """Zeroes whole samples with probability `rate` and divides the kept ones by `1 - rate`.

  Draws from the random stream `dropout`. The identity in inference.

  Attributes:
    rate: a number, or an array of none where one program serves blocks of different rates.
  """

  rate: float | Float[Array, '']

  @nn.compact
  def __call__(self, x: Float[Array, 'b *rest'], *, train: bool) -> Float[Array, 'b *rest']:
    if isinstance(self.rate, float | int):
      _check(self.rate)
      if self.rate == 0.0:
        return x
    if not train:
      return x
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    keep = jax.random.bernoulli(self.make_rng('dropout'), 1.0 - self.rate, shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - self.rate, x.dtype), jnp.zeros_like(x))


def _check(rate: float) -> None:
  if not 0 <= rate < 1:
    raise ValueError(f'drop_path {rate} is not in [0, 1)')


def linear_rates(rate: float, depths: Sequence[int], *, last: bool = True) -> list[list[float]]:
  """Returns a rate per block, growing linearly over all blocks of all stages.

  Args:
    rate: the nominal rate `p`.
    depths: blocks per stage.
    last: whether block `b` of `B` gets `p b / (B - 1)`, so that the last one reaches `p`
      (timm, big_vision), or `p b / B` (Google's CoAtNet and MaxViT code).

  Raises:
    ValueError: for a rate outside of [0, 1).
  """
  _check(rate)
  total = sum(depths)
  steps = max(total - 1, 1) if last else total
  flat = iter(range(total))
  return [[rate * next(flat) / steps for _ in range(depth)] for depth in depths]
