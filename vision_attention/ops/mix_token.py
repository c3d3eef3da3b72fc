"""MixToken (arXiv 2104.10858, section 3.3): a rectangle of one image's tokens goes into another.

The batch is turned round: image `i` gets tokens of image `b - 1 - i`. Patches are mixed after they
have been embedded, so that no patch holds pixels of two images, and every token keeps its label.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def box(key: jax.Array, size: tuple[int, int], alpha: float) -> Bool[Array, 'h w']:
  """Returns which cells of a grid are exchanged: a rectangle of the grid's proportions.

  Its sides are `sqrt(1 - l)` of the grid's, with `l` of `Beta(alpha, alpha)`, and its centre is any
  cell; what reaches beyond the grid is cut off.
  """
  key_weight, key_y, key_x = jax.random.split(key, 3)
  side = jnp.sqrt(1.0 - jax.random.beta(key_weight, alpha, alpha))

  def span(key: jax.Array, length: int) -> jax.Array:
    half = jnp.floor(side * length).astype(jnp.int32) // 2
    centre = jax.random.randint(key, (), 0, length)
    at = jnp.arange(length)
    return (at >= centre - half) & (at < centre + half)

  return span(key_y, size[0])[:, None] & span(key_x, size[1])


def exchange(x: Float[Array, 'b h w c'], cells: Bool[Array, 'p q']) -> Float[Array, 'b h w c']:
  """Exchanges cells of every image with those of its partner; twice, and nothing has changed.

  Args:
    x: a map, whose pixels may be finer than the cells; those that no cell covers stay.
    cells: which are exchanged.
  """
  rows, columns = (side // cell for side, cell in zip(x.shape[1:3], cells.shape, strict=True))
  mask = cells.repeat(rows, 0).repeat(columns, 1)
  outside = [(0, side - covered) for side, covered in zip(x.shape[1:3], mask.shape, strict=True)]
  return jnp.where(jnp.pad(mask, outside)[:, :, None], x[::-1], x)
