"""Variables of scanned blocks to those of blocks one by one, and back.

`Stage(scan=True)` holds the variables of blocks 1 to 11 stacked, as `block01_11/block`; without,
each has its own, `block01` to `block11`.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vision_attention.layers import stage
from vision_attention.models import tree

_GROUP = re.compile(rf'(^|/)block(\d\d+)_(\d\d+)/{stage.INNER}(?=/)')


def _members(match: re.Match[str]) -> list[str]:
  first, last = int(match[2]), int(match[3])
  return [f'{match[1]}block{number:02d}' for number in range(first, last + 1)]


def unstack(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns variables with a place of its own for every block."""
  found = {}
  for path, value in tree.flatten(variables).items():
    match = _GROUP.search(path)
    if match is None:
      found[path] = value
      continue
    for i, name in enumerate(_members(match)):
      found[path[: match.start()] + name + path[match.end() :]] = value[i]
  return tree.unflatten(found)


def stack(variables: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
  """Returns variables with the groups that a scanned model has.

  Args:
    variables: of a model without groups, or with other ones.
    like: variables, or their shapes, of the scanned model. What it does not have stays as it is.

  Raises:
    ValueError: if a group has some of its blocks and not others.
  """
  found = tree.flatten(unstack(variables))
  for path in tree.flatten(like):
    match = _GROUP.search(path)
    if match is None:
      continue
    members = [path[: match.start()] + name + path[match.end() :] for name in _members(match)]
    missing = [name for name in members if name not in found]
    if missing and len(missing) < len(members):
      raise ValueError(f'{path} is made of {len(members)} arrays, and {missing} are missing')
    if not missing:
      found[path] = np.stack([np.asarray(found.pop(name)) for name in members])
  return tree.unflatten(found)
