"""Errors that name the nearest thing that would have worked, and how a program ends with one."""

import difflib
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn


def nearest(value: str, allowed: Iterable[str]) -> str:
  """Returns `did you mean 'x'?` or, when nothing is near, the whole list of allowed values."""
  allowed = sorted(allowed)
  close = difflib.get_close_matches(str(value), allowed, n=3, cutoff=0.6)
  if close:
    return 'did you mean ' + ' or '.join(repr(name) for name in close) + '?'
  return 'allowed: ' + ', '.join(allowed)


def check_choice(what: str, value: str, allowed: Iterable[str]) -> None:
  """Raises ValueError naming `what`, the value and the nearest allowed one."""
  allowed = tuple(allowed)
  if value not in allowed:
    raise ValueError(f'{what} {value!r} is unknown: {nearest(value, allowed)}')


def refuse(message: str) -> NoReturn:
  """Ends the process with a message and exit code 2."""
  # In one piece, and on a line of its own where a library's thread has begun one.
  sys.stderr.write(f'\nerror: {message}\n')
  sys.exit(2)


def run(job: Callable[[], Any]) -> None:
  """Does a job; what its user can put right is said in one message, and ends with exit code 2."""
  try:
    job()
  except (ValueError, OSError, FloatingPointError) as error:
    # A traceback is for our own mistakes.
    logging.getLogger('vision_attention').debug('refused', exc_info=True)
    refuse(str(error))
