"""A stage: blocks one after the other, named `block00`, `block01`, ... ."""

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

ModuleDef = Callable[..., nn.Module]
# What a scanned block's own name is, within the group.
INNER = 'block'


class Stage(nn.Module):
  """Applies blocks in order.

  Scanned, blocks that differ in nothing but their rate of stochastic depth are compiled once, and
  their variables are stacked along a first axis: `block01` to `block11` as `block01_11/block`. The
  first block, which may change the map, stands alone. `models.stacking` converts between the two.

  Attributes:
    blocks: block definitions, each called with its name and then as `block(x, train=train)`.
    remat: whether a block's activations are computed again in the backward pass.
    after: per block, a module that follows it, named `after00`, ..., or None; nothing if empty.
    scan: whether equal blocks are scanned; there must be nothing after blocks.
  """

  blocks: Sequence[ModuleDef]
  remat: bool = False
  after: Sequence[ModuleDef | None] = ()
  scan: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, 'b ...'], *, train: bool) -> Float[Array, 'b ...']:
    def apply(block: nn.Module, x: Float[Array, 'b ...']) -> Float[Array, 'b ...']:
      return block(x, train=train)

    if self.scan and any(self.after):
      raise ValueError('blocks are followed by modules, one by one: create the model without scan')
    for first, last in _groups(self.blocks) if self.scan else _alone(self.blocks):
      block = self.blocks[first]
      if last > first:
        x = self._scanned(first, last, x, train)
        continue
      x = (nn.remat(apply) if self.remat else apply)(block(name=f'block{first:02d}'), x)
      follower = self.after[first] if self.after else None
      if follower is not None:
        x = follower(name=f'after{first:02d}')(x, train=train)
    return x

  def _scanned(
    self, first: int, last: int, x: Float[Array, 'b ...'], train: bool
  ) -> Float[Array, 'b ...']:
    rates = [_rate(block) for block in self.blocks[first : last + 1]]
    # A rate of zero is left as it is: nothing is drawn.
    xs = jnp.asarray(rates) if any(rates) else None
    axes: Any = nn.broadcast if xs is None else 0
    body = nn.remat(_Repeated, prevent_cse=False) if self.remat else _Repeated
    scanned = nn.scan(
      body,
      variable_axes={'params': 0, 'batch_stats': 0, 'intermediates': 0},
      split_rngs={'params': True, 'dropout': True},
      in_axes=axes,
      length=last - first + 1,
    )
    return scanned(self.blocks[first], train, name=f'block{first:02d}_{last:02d}')(x, xs)[0]


class _Repeated(nn.Module):
  """One turn of a scan: the block with this turn's rate."""

  block: ModuleDef
  train: bool

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b ...'], rate: Float[Array, ''] | None
  ) -> tuple[Float[Array, 'b ...'], None]:
    options = {} if rate is None else {'drop_path': rate}
    return self.block(**options, name=INNER)(x, train=self.train), None


def _alone(blocks: Sequence[ModuleDef]) -> Iterator[tuple[int, int]]:
  return ((i, i) for i in range(len(blocks)))


def _groups(blocks: Sequence[ModuleDef]) -> Iterator[tuple[int, int]]:
  """First and last number of every run of equal blocks."""
  kinds = [_kind(block) for block in blocks]
  first = 0
  for i in range(1, len(blocks) + 1):
    if first == 0 or i == len(blocks) or kinds[i] != kinds[first]:
      yield first, i - 1
      first = i


def _rate(block: ModuleDef) -> float:
  return block.keywords.get('drop_path', 0.0) if isinstance(block, functools.partial) else 0.0


def _kind(block: Any, *, outermost: bool = True) -> Hashable:
  """What makes two definitions equal: partial functions compare by what they hold."""
  if isinstance(block, functools.partial):
    held = {k: v for k, v in block.keywords.items() if not (outermost and k == 'drop_path')}
    inner = functools.partial(_kind, outermost=False)
    return (
      block.func,
      tuple(map(inner, block.args)),
      tuple((key, inner(value)) for key, value in sorted(held.items())),
    )
  if isinstance(block, list | tuple):
    return tuple(_kind(item, outermost=False) for item in block)
  return block if isinstance(block, Hashable) else repr(block)
