"""How deep parameters lie, for learning rates that fall towards the stem.

Layer-wise decay (ELECTRA, arXiv 2003.10555, section 3.4; BEiT, arXiv 2106.08254) multiplies the
learning rate of layer `l` of `L` by `decay ** (L - l)`. Layer 0 is what the first block reads, and
layer `L` the head with the norm before it. Every block between is a layer of its own, with whatever
brings its stage's input to size, unless the model file groups them by `DECAY_LAYERS`: a table of
patterns of paths and their layers, the last of which comes before the head.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vision_attention.models import registry, stacking, tree

_BLOCK = re.compile(r'backbone/((?:class_)?stage|group)(\d*)/block(\d+)/')
# What leads into a numbered stage: `downsample2/`, `stage2_embed/`, `embed2/`, a block's sibling.
_ENTRY = re.compile(r'backbone/(?:[a-z_]*?)(\d+)[a-z_]*/')
_LAST = re.compile(r'head/|backbone/(final_norm|final|norm)/')


def _by_block(paths: list[str]) -> dict[str, int]:
  """Every block a layer, in the order of computation."""

  def place(match: re.Match[str]) -> tuple[bool, int, int]:
    return match[1] == 'class_stage', int(match[2] or 0), int(match[3])

  blocks = {path: place(match) for path in paths if (match := _BLOCK.match(path))}
  order = {block: i for i, block in enumerate(sorted(set(blocks.values())), 1)}
  first = {}
  for (is_class, stage, _), layer in order.items():
    if not is_class:
      first[stage] = min(layer, first.get(stage, layer))

  def layer_of(path: str) -> int:
    if path in blocks:
      return order[blocks[path]]
    if _LAST.match(path):
      return len(order) + 1
    entry = _ENTRY.match(path)
    # The first stage's input is the stem's business.
    return first.get(int(entry[1]), 0) if entry and int(entry[1]) > 1 else 0

  return {path: layer_of(path) for path in paths}


def _by_table(paths: list[str], table: Mapping[str, int]) -> dict[str, int]:
  """By the model file's groups; what no pattern begins is the head's layer."""
  last = max(table.values()) + 1
  return {
    path: next((layer for pattern, layer in table.items() if re.match(pattern, path)), last)
    for path in paths
  }


def layers(name: str, params: Any) -> dict[str, int]:
  """Returns the layer of every parameter, from 0 at the stem to that of the head.

  Args:
    name: registered name of the model.
    params: its parameters, or their shapes; blocks that are scanned count one by one.
  """
  paths = list(tree.flatten(params))
  table = getattr(registry.module_of(name), 'DECAY_LAYERS', None)
  return _by_block(paths) if table is None else _by_table(paths, table)


def factors(name: str, params: Any, decay: float) -> Any:
  """Returns the factors on the learning rate, of the parameters' structure.

  A factor is a number, and for stacked parameters of scanned blocks an array that multiplies along
  their first axis.

  Args:
    name: registered name of the model.
    params: its parameters, or their shapes.
    decay: factor between one layer and the next, from 0 (excluded) to 1.
  """
  # As many zeros as there are blocks in a stack, to see where each goes.
  probes = jax.tree.map(lambda leaf: np.zeros(leaf.shape[:1]), params)
  single = stacking.unstack(probes)
  layer = layers(name, single)
  last = max(layer.values())
  scale = {path: np.float32(decay ** (last - number)) for path, number in layer.items()}
  stacked = tree.flatten(stacking.stack(tree.unflatten(scale), params))

  def shaped(leaf: Any, factor: Any) -> Any:
    return factor if np.ndim(factor) == 0 else factor.reshape(-1, *[1] * (len(leaf.shape) - 1))

  flat = tree.flatten(params)
  return tree.unflatten({path: shaped(leaf, stacked[path]) for path, leaf in flat.items()})
