"""Nested variables as flat dicts with paths such as `params/backbone/stem/conv/kernel`."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns path -> leaf."""
  return traverse_util.flatten_dict(dict(variables), sep='/')


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `flatten`."""
  return traverse_util.unflatten_dict(dict(flat), sep='/')
