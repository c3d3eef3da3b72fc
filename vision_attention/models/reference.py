"""How the weights of another implementation become ours: renames and layouts, as tables.

A `Rule` maps a module of the reference to one of ours; its `Kind` maps the leaves. Paths of ours
are relative to the variables' collections, for example `backbone/stage1/block00/conv1`.
"""

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

State = dict[str, np.ndarray]
# (array of the reference, our shape) -> our array
Transform = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Leaf:
  """Where one array goes: collection, path below the rule's target, and how it changes layout."""

  collection: str
  path: str
  transform: Transform


# By the reference's leaf name, the arrays of ours that it becomes. An empty tuple: not needed.
Kind = Mapping[str, tuple[Leaf, ...]]


def _reshaped(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Adds or drops axes of length one; anything else is left for the caller to refuse."""
  squeezed = tuple(n for n in array.shape if n != 1) == tuple(n for n in shape if n != 1)
  return array.reshape(shape) if squeezed else array


def kernel(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """PyTorch's `[out, in]` or `[out, in, h, w]` to ours, `[in, out]` or `[h, w, in, out]`.

  A 3-D convolution of depth one, `[out, in, h, w, 1]`, is a 2-D one of ours.
  """
  if array.ndim == 5 and array.shape[-1] == 1:
    array = array[..., 0]
  moved = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
  return _reshaped(moved, shape)


def same(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """The array as it is, but for axes of length one."""
  return _reshaped(array, shape)


def offsets(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """A table `[y, x, heads]` over key minus query to ours, `[heads, y, x]` over query minus key."""
  del shape
  return array.transpose(2, 0, 1)[:, ::-1, ::-1] if array.ndim == 3 else array


def heads_joined(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Flax's `[dim, heads, head_dim]`, `[heads, head_dim, dim]` or `[heads, head_dim]` to ours."""
  return array.reshape(shape) if array.size == np.prod(shape) else array


def _leaf(path: str, transform: Transform = same, collection: str = 'params') -> tuple[Leaf, ...]:
  return (Leaf(collection, path, transform),)


CONV: Kind = {'weight': _leaf('kernel', kernel), 'bias': _leaf('bias')}
DENSE = CONV
NORM: Kind = {
  'weight': _leaf('scale'),
  'bias': _leaf('bias'),
  'running_mean': _leaf('mean', collection='batch_stats'),
  'running_var': _leaf('var', collection='batch_stats'),
  'num_batches_tracked': (),
}
# A Flax module under another name.
FLAX: Kind = {name: _leaf(name, heads_joined) for name in ('kernel', 'bias', 'scale')}


def param(path: str, transform: Transform = same) -> Kind:
  """A rule that matches a whole key, not a module: the array becomes the parameter `path`."""
  return {'': _leaf(path, transform)}


def fused(*names: str, heads: int | None = None) -> Kind:
  """One PyTorch projection that holds several of ours along its outputs, such as `qkv`.

  Args:
    *names: ours, in the reference's order.
    heads: if given, the outputs are ordered head first, `[heads, len(names), head_dim]`; otherwise
      `[len(names), heads, head_dim]`.
  """

  def part(index: int) -> Transform:
    def take(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
      if array.shape[0] % (len(names) * (heads or 1)):
        return array
      rest = array.shape[1:]
      if heads is None:
        mine = array.reshape(len(names), -1, *rest)[index]
      else:
        mine = array.reshape(heads, len(names), -1, *rest)[:, index].reshape(-1, *rest)
      return kernel(mine, shape) if mine.ndim > 1 else _reshaped(mine, shape)

    return take

  return {
    leaf: tuple(Leaf('params', f'{name}/{ours}', part(i)) for i, name in enumerate(names))
    for leaf, ours in (('weight', 'kernel'), ('bias', 'bias'))
  }


def renaming(*pairs: tuple[str, str]) -> Callable[[State], State]:
  """Returns a `prepare` that replaces patterns in every key, one after the other."""

  def prepare(state: State) -> State:
    renamed = {}
    for key, value in state.items():
      for pattern, replacement in pairs:
        key = re.sub(pattern, replacement, key)
      renamed[key] = value
    return renamed

  return prepare


class _Index(int):
  """A captured number; the format `+1` or `+1:02d` adds before it prints."""

  def __format__(self, spec: str) -> str:
    match = re.fullmatch(r'([+-]\d+)?:?(\d*d)?', spec)
    if match is None:
      raise ValueError(f'format {spec!r} of a rule is not [+-n][:][0n d]')
    return format(int(self) + int(match[1] or 0), match[2] or 'd')


@dataclasses.dataclass(frozen=True)
class Rule:
  """`pattern` (a full match of a module's path in the reference) becomes `target`.

  The target is a format string over the pattern's groups: `{0}`, `{1:02d}`, `{0:+1}`.
  """

  pattern: str
  target: str
  kind: Kind

  def targets(self, key: str) -> list[tuple[str, Transform]] | None:
    """Returns our paths and their transforms for a key, or None if this rule is not its."""
    for leaf, ours in self.kind.items():
      module = key if not leaf else re.sub(rf'[./]{re.escape(leaf)}$', '', key)
      if leaf and module == key and key != leaf:
        continue
      match = re.fullmatch(self.pattern, module)
      if match is None:
        continue
      groups = [_Index(g) if g is not None and g.isdigit() else g for g in match.groups()]
      base = self.target.format(*groups)
      return [('/'.join(p for p in (o.collection, base, o.path) if p), o.transform) for o in ours]
    return None


@dataclasses.dataclass(frozen=True)
class Reference:
  """Another implementation of a model file's variants.

  Attributes:
    origin: its repository and class.
    rules: the renames; a function of the build options where they depend on them. The first rule
      that matches a key decides.
    options: build options in which it differs from ours (the form of GELU, an epsilon); a function
      of the variant's own options where it depends on them.
    prepare: changes keys or splits arrays before the rules see them.
    infer: build options that prepared weights show (`num_classes`, `image_size`, ...), given those
      of the variant.
    ignore: patterns of keys that hold nothing to load.
    variants: shell patterns of the registered names that it has.
  """

  origin: str
  rules: Sequence[Rule] | Callable[[Mapping[str, Any]], Sequence[Rule]]
  options: Mapping[str, Any] | Callable[[Mapping[str, Any]], Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )
  prepare: Callable[[State], State] = lambda state: state
  infer: Callable[[State, Mapping[str, Any]], Mapping[str, Any]] = lambda state, options: {}
  ignore: Sequence[str] = ()
  variants: Sequence[str] = ('*',)

  def fits(self, name: str) -> bool:
    """Whether this implementation has the variant `name`."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in self.variants)

  def options_of(self, variant_options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the build options in which it differs, for a variant."""
    return self.options(variant_options) if callable(self.options) else self.options

  def rules_of(self, options: Mapping[str, Any]) -> Sequence[Rule]:
    """Returns the renames for a model built with `options`."""
    return self.rules(options) if callable(self.rules) else self.rules
