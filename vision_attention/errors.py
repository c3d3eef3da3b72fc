"""Help for error messages that name the nearest thing that would have worked."""

import difflib
from collections.abc import Iterable


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
