"""Labels of tokens from the map of a whole image (arXiv 2104.10858): the map aligned to a view."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _weights(
  view: Float[Array, 'b 2 3'],
  bounds: Float[Array, 'b 2 2'],
  cells: tuple[int, int],
  grid: tuple[int, int],
) -> Float[Array, 'b r c h w']:
  """The share of every cell of the map in every bin of the view."""
  size = jnp.array(cells, jnp.float32)

  def samples(axis: int) -> tuple[jax.Array, jax.Array]:
    """Places along an axis of the view, `[b, bins, samples]`, and their shares, `[b, samples]`."""
    bins = grid[axis]
    span = jnp.linalg.norm(view[:, :, axis] * size, axis=-1) / bins
    # The view may be longer than the map, which covers a square of the image: not twice, if it is
    # a crop of the usual proportions.
    most = -(-2 * max(cells) // bins)
    # Of a span that is a whole number but for rounding, as many samples as that number.
    count = jnp.clip(jnp.ceil(span - 1e-4), 1, most)[:, None]
    at = jnp.arange(most)
    places = (jnp.arange(bins)[None, :, None] + ((at + 0.5) / count)[:, None]) / bins
    return places, jnp.where(at < count, 1 / count, 0)

  (rows, row_shares), (columns, column_shares) = samples(0), samples(1)
  # [b, 2, rows, samples, columns, samples]
  vector = view[..., None, None, None, None]
  places = vector[:, :, 0] * rows[:, None, :, :, None, None]
  places += vector[:, :, 1] * columns[:, None, None, None] + vector[:, :, 2]
  low, high = (bounds[:, :, i, None, None, None, None] for i in range(2))
  seen = ((places >= low) & (places <= high)).all(1)
  shares = jnp.einsum('bn,bm->bnm', row_shares, column_shares)[:, None, :, None]
  last = (size - 1)[:, None, None, None, None]
  index = jnp.clip(places * (last + 1) - 0.5, 0, last)
  near = [jax.nn.relu(1 - jnp.abs(index[:, i, ..., None] - jnp.arange(cells[i]))) for i in range(2)]
  return jnp.einsum('brncm,brncmh,brncmw->brchw', seen * shares, *near, precision='highest')


def align(
  maps: Float[Array, 'b 2 k h w'],
  view: Float[Array, 'b 2 3'],
  bounds: Float[Array, 'b 2 2'],
  grid: tuple[int, int],
  num_classes: int,
) -> Float[Array, 'b r c n']:
  """Returns a map's logits in the bins of a view, as RoIAlign does (arXiv 1703.06870, section 3).

  A bin is the mean of samples that divide it evenly, as many along each axis of the view as it is
  cells of the map long; a sample is interpolated between the four cells about it, or beyond the
  map's border that of the nearest, and 0 where no image is.

  Args:
    maps: logits and numbers of the likeliest classes of every cell; others have logit 0.
    view: rows y and x: what a step to the view's bottom, a step to its right, and its top left
      corner are in heights and widths of the map.
    bounds: rows y and x: where the image begins and ends, in the same units.
    grid: bins of the view.
    num_classes: of the result.
  """
  weights = _weights(view, bounds, (maps.shape[3], maps.shape[4]), grid)
  values, classes = maps[:, 0].astype(jnp.float32), maps[:, 1].astype(jnp.int32)
  dense = (values[..., None] * jax.nn.one_hot(classes, num_classes)).sum(1)
  return jnp.einsum('brchw,bhwn->brcn', weights, dense, precision='highest')
