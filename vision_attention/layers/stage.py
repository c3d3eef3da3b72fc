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
    after: per block, a module that follows it, named `after00`, ..., or None; nothing if empty.
  """

  blocks: Sequence[ModuleDef]
  remat: bool = False
  after: Sequence[ModuleDef | None] = ()

  @nn.compact
  def __call__(self, x: Float[Array, 'b ...'], *, train: bool) -> Float[Array, 'b ...']:
    def apply(block: nn.Module, x: Float[Array, 'b ...']) -> Float[Array, 'b ...']:
      return block(x, train=train)

    for j, block in enumerate(self.blocks):
      x = (nn.remat(apply) if self.remat else apply)(block(name=f'block{j:02d}'), x)
      follower = self.after[j] if self.after else None
      if follower is not None:
        x = follower(name=f'after{j:02d}')(x, train=train)
    return x
