"""How much attention depends on its query (arXiv 1904.11492, section 3.1), and where it looks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def cosine_distance(vectors: Float[Array, '*b n d'], *, halved: bool = True) -> Float[Array, '*b']:
  """Returns the mean of `(1 - cos(v_i, v_j)) / 2` over all pairs of positions, in float32.

  With unit vectors `u`, the mean of all cosines is `|mean u|^2`: no pair is formed. A zero vector
  has the cosine 0 to every other, and to itself.

  Args:
    vectors: one per position.
    halved: whether distances lie in [0, 1] and not in [0, 2].
  """
  wide = vectors.astype(jnp.float32)
  norms = jnp.linalg.norm(wide, axis=-1, keepdims=True)
  unit = wide / jnp.where(norms > 0, norms, 1.0)
  distance = 1.0 - jnp.square(unit.mean(-2)).sum(-1)
  return jnp.maximum(distance, 0.0) / (2.0 if halved else 1.0)


def jensen_shannon(p: Float[Array, '*b k'], q: Float[Array, '*b k']) -> Float[Array, '*b']:
  """Returns the Jensen-Shannon divergence of distributions, in nats: from 0 to log 2."""
  p, q = p.astype(jnp.float32), q.astype(jnp.float32)
  middle = (p + q) / 2

  def relative_entropy(a: Float[Array, '*b k']) -> Float[Array, '*b']:
    ratio = jnp.where(a > 0, a / jnp.where(middle > 0, middle, 1.0), 1.0)
    return (a * jnp.log(ratio)).sum(-1)

  return (relative_entropy(p) + relative_entropy(q)) / 2


def sampled_jensen_shannon(
  key: Key[Array, ''], rows: Float[Array, '*b q k'], num_pairs: int = 1024
) -> Float[Array, '*b']:
  """Returns the mean divergence of `num_pairs` random pairs of rows, drawn with replacement."""
  first, second = jax.random.randint(key, (2, num_pairs), 0, rows.shape[-2])
  return jensen_shannon(rows[..., first, :], rows[..., second, :]).mean(-1)


def mass_threshold(weights: Float[Array, '*b k'], mass: float) -> Float[Array, '*b']:
  """Returns the largest `t` for which the weights of at least `t` add up to `mass` or more.

  The contours that the figures of arXiv 1911.03584 draw around a head, for 90, 50 and 10 %.

  Raises:
    ValueError: if the mass is not within 0 and 1.
  """
  if not 0 < mass <= 1:
    raise ValueError(f'mass {mass} must be above 0 and at most 1')
  falling = jnp.flip(jnp.sort(weights, axis=-1), -1)
  total = jnp.cumsum(falling, axis=-1)
  # The last entry holds everything, whatever rounding says.
  reached = (total >= mass * total[..., -1:]).argmax(-1)
  return jnp.take_along_axis(falling, reached[..., None], -1)[..., 0]
