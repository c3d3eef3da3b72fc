"""Self-attention with a learned scalar per head and offset on the logits."""

from typing import ClassVar

import jax
import jax.numpy as jnp
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
    return relative_position.relative_bias(jnp.asarray(table), height, width)[None]


class LogPositionAttention(mhsa.MultiHeadAttention):
  """Global self-attention with a bias that a small network makes of the offset.

  The offset's signed logarithm `sign(o) log(1 + |o|)` per axis goes through `Dense - ReLU - Dense`
  to a scalar per head: the idea of Swin v2 (arXiv 2111.09883, section 3.3) in timm's form. No array
  depends on the resolution.

  Attributes:
    hidden_dim: width of the network.
  """

  needs_map: ClassVar[bool] = True
  hidden_dim: int = 512

  def logit_bias(self, positions: tuple[int, ...]) -> Float[Array, 'b n q k'] | None:
    if len(positions) != 2:
      raise ValueError(f'relative positions need a map [b, h, w, c], not positions {positions}')
    height, width = positions
    offsets = jnp.stack(
      jnp.meshgrid(jnp.arange(1 - height, height), jnp.arange(1 - width, width), indexing='ij'), -1
    )
    coordinates = jnp.sign(offsets) * jnp.log1p(jnp.abs(offsets).astype(jnp.float32))
    hidden = nn.Dense(self.hidden_dim, param_dtype=self.param_dtype, name='position_expand')
    project = nn.Dense(self.num_heads, param_dtype=self.param_dtype, name='position_project')
    table = project(jax.nn.relu(hidden(coordinates)))
    return relative_position.relative_bias(table.transpose(2, 0, 1), height, width)[None]


OPERATORS = {'relative': RelativeAttention, 'log_position': LogPositionAttention}
