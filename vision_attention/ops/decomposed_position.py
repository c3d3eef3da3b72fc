"""Position logits of pooled attention, from a table of vectors per axis (arXiv 2112.01526, eq. 4).

Queries and keys lie on maps of different sizes over the same image. Offsets are query minus key in
pixels of the finer of the two.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vision_attention.ops import relative_logits

# Half-pixel centres and linear, as all the authors' code that resizes.
resize = relative_logits.resize_offsets


def length(queries: int, keys: int) -> int:
  """Returns the number of offsets along an axis of `queries` and `keys` pixels."""
  return 2 * max(queries, keys) - 1


def offsets(queries: int, keys: int) -> Int[np.ndarray, 'q k']:
  """Returns which of the `length` entries belongs to a query and a key.

  Where one size does not divide the other, offsets are cut to integers, in float32 as the authors'
  code has it.
  """
  down = np.float32(max(keys / queries, 1.0))
  up = np.float32(max(queries / keys, 1.0))
  q, k = np.arange(queries, dtype=np.float32), np.arange(keys, dtype=np.float32)
  index = q[:, None] * down - k[None, :] * up
  return (index + np.float32((keys - 1) * max(queries / keys, 1.0))).astype(np.int32)


def decomposed_logits(
  query: Float[Array, 'b h w n d'],
  height_table: Float[Array, 'y d'],
  width_table: Float[Array, 'x d'],
  keys: tuple[int, int],
) -> Float[Array, 'b n q k']:
  """Returns `query . (R_h[dy] + R_w[dx])` of every query and key, in float32.

  No vector per query and key is made: an axis's logits are the product of queries with a vector per
  offset of that axis.

  Args:
    query: `n` heads of `d` channels on a map.
    height_table: a vector per vertical offset, `[length(h, keys[0]), d]`, shared by the heads.
    width_table: a vector per horizontal offset.
    keys: height and width of the keys' map.

  Raises:
    ValueError: if the tables are not made for maps of these sizes.
  """
  batch, height, width, heads, _ = query.shape
  needed = length(height, keys[0]), length(width, keys[1])
  if (len(height_table), len(width_table)) != needed:
    raise ValueError(
      f'tables of {len(height_table)} and {len(width_table)} offsets do not belong to queries on '
      f'{height}x{width} and keys on {keys[0]}x{keys[1]}, which have {needed}: resize them'
    )
  rows = height_table[offsets(height, keys[0])].astype(query.dtype)
  columns = width_table[offsets(width, keys[1])].astype(query.dtype)
  down = jnp.einsum('bhwnd,hkd->bnhwk', query, rows, preferred_element_type=jnp.float32)
  right = jnp.einsum('bhwnd,wkd->bnhwk', query, columns, preferred_element_type=jnp.float32)
  total = down[..., :, None] + right[..., None, :]
  return total.reshape(batch, heads, height * width, keys[0] * keys[1])
