"""Self-attention with a learned scalar per head and offset on the logits."""

from typing import ClassVar

from flax import linen as nn
from jaxtyping import Array, Float

from vision_attention.attention import mhsa
from vision_attention.ops import relative_position


class RelativeAttention(mhsa.MultiHeadAttention):
  """Global self-attention on a map with translation-equivariant bias (arXiv 2106.04803, eq. 3).

  `softmax(q k / sqrt(d) + P[offset]) v`, where the table `P` is `[heads, 2 h - 1, 2 w - 1]`.
  """

  needs_map: ClassVar[bool] = True
  table_init: nn.initializers.Initializer = nn.initializers.normal(0.02)

  def logit_bias(self, positions: tuple[int, ...]) -> Float[Array, 'b n q k'] | None:
    if len(positions) != 2:
      raise ValueError(f'relative positions need a map [b, h, w, c], not positions {positions}')
    height, width = positions
    shape = (self.num_heads, 2 * height - 1, 2 * width - 1)
    table = self.param('relative_position', self.table_init, shape, self.param_dtype)
    return relative_position.relative_bias(table, height, width)[None]
