"""Typed shapes are checked while tests run, where a test is about what a model computes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import beartype
import jaxtyping

MODULES = ['vision_attention.ops', 'vision_attention.layers', 'vision_attention.attention']


def check(function: Callable[..., Any]) -> Callable[..., Any]:
  """Checks the types of a function; those of one within another would be read at every call."""
  return function if '<locals>' in function.__qualname__ else beartype.beartype(function)


def install() -> None:
  """Lets what is imported from now on be checked."""
  jaxtyping.install_import_hook(MODULES, f'{__name__}.{check.__name__}')


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
  """For full-size models that are only counted, whose layers other tests run: a fifth quicker."""
  before = jaxtyping.config.jaxtyping_disable
  jaxtyping.config.update('jaxtyping_disable', True)
  try:
    yield
  finally:
    jaxtyping.config.update('jaxtyping_disable', before)
