"""Declared costs: multiply-adds that the mathematics has where a program has others."""

import re
from collections.abc import Callable
from typing import Any

import jax

_NAME = re.compile(r'.*__macs_(\d+)')


def declare(function: Callable[..., Any], macs: int) -> Callable[..., Any]:
  """Returns `function` under `jit`, for `count_macs` to take `macs` as what one call costs.

  A program may compute more than it needs because that is quicker, such as products with masked
  keys. Papers count what is needed.
  """

  def call(*args: Any) -> Any:
    return function(*args)

  call.__name__ = f'declared__macs_{macs}'
  return jax.jit(call)


def declared(name: str) -> int | None:
  """Returns the multiply-adds in the name of a compiled function, or None."""
  match = _NAME.fullmatch(name)
  return None if match is None else int(match[1])
