"""A stage: blocks one after the other, named `block00`, `block01`, ... ."""

from collections.abc import Callable, Sequence

from flax import linen as nn
from jaxtyping import Array, Float

ModuleDef = Callable[..., nn.Module]


class Stage(nn.Module):
  """Applies blocks in order.

  Attributes:
    blocks: block definitions, each called with its name and then as `block(x, train=train)`.
    remat: whether a block's activations are computed again in the backward pass.
  """

  blocks: Sequence[ModuleDef]
  remat: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, 'b ...'], *, train: bool) -> Float[Array, 'b ...']:
    def apply(block: nn.Module, x: Float[Array, 'b ...']) -> Float[Array, 'b ...']:
      return block(x, train=train)

    for j, block in enumerate(self.blocks):
      x = (nn.remat(apply) if self.remat else apply)(block(name=f'block{j:02d}'), x)
    return x
