"""Errors that name the nearest thing that would have worked, and how a program ends with one."""

import difflib
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

REFUSED = 2
FAILED = 74  # EX_IOERR of sysexits.h
_LASTING = (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)


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


def check_odd(what: str, side: int) -> None:
  """Raises ValueError for a window that has no centre, with the nearest that have one."""
  if side < 1 or side % 2 == 0:
    less = f' or {side - 1}' if side > 1 else ''
    raise ValueError(f'{what} {side} has no centre: pass {max(side + 1, 1)}{less}')


def refuse(message: str, code: int = REFUSED) -> NoReturn:
  """Ends the process with a message and an exit code."""
  # In one piece, and on a line of its own where a library's thread has begun one.
  sys.stderr.write(f'\nerror: {message}\n')
  sys.exit(code)


def run(job: Callable[[], Any]) -> None:
  """Does a job; what its user can put right is said in one message.

  The exit code is REFUSED for what would be refused again, and FAILED for what reading and writing
  met, which may be over when the same command is tried again.
  """
  try:
    job()
  except (ValueError, OSError, FloatingPointError) as error:
    # A traceback is for our own mistakes.
    logging.getLogger('vision_attention').debug('refused', exc_info=True)
    lasting = not isinstance(error, OSError) or isinstance(error, _LASTING)
    refuse(str(error), REFUSED if lasting else FAILED)
