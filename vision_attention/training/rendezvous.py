"""Processes meet before JAX joins them, which ends a process that waits in vain with a core dump.

The first process listens at the coordinator's address, hears from every other one how many there
are and which it is, and answers all of them with what is wrong, or nothing.
"""

import contextlib
import json
import socket
import time

_GRACE = 5.0  # seconds in which the first process's verdict arrives


def meet(address: str, count: int, index: int, seconds: float) -> None:
  """Returns when all processes are there and agree.

  Args:
    address: host and port of the first process.
    count: how many processes there are.
    index: which this is.
    seconds: how long it waits: for the first process, and for the others from when that answers.

  Raises:
    TimeoutError: naming who did not come.
    ValueError: if counts or numbers contradict each other, or the port is taken.
  """
  host, _, port = address.rpartition(':')
  end = time.monotonic() + seconds
  if index == 0:
    _host(int(port), count, end, seconds)
  else:
    _join(host.strip('[]'), int(port), count, index, end, seconds)


def _host(port: int, count: int, end: float, seconds: float) -> None:
  there: dict[int, socket.socket] = {}
  wrong = ''
  with contextlib.ExitStack() as stack:
    try:
      server = stack.enter_context(socket.create_server(('', port), backlog=max(count, 16)))
    except OSError as error:
      raise ValueError(
        f'process 0 cannot listen at port {port} ({error}): name a free one in '
        'JAX_COORDINATOR_ADDRESS, or under Slurm in JAX_COORDINATOR_PORT'
      ) from error
    while len(there) < count - 1 and not wrong:
      server.settimeout(max(end - time.monotonic(), 0.01))
      try:
        guest = stack.enter_context(server.accept()[0])
        guest.settimeout(_GRACE)
        theirs = json.loads(guest.makefile().readline())
        number, total = int(theirs['index']), int(theirs['count'])
      except (ValueError, KeyError, TypeError, ConnectionError):
        continue  # something else that looks for open ports
      except TimeoutError:
        if time.monotonic() < end:
          continue
        missing = [i for i in range(1, count) if i not in there]
        wrong = (
          f'processes {missing} of {count} did not come within {seconds:g} s: start all of them, '
          'let them reach the coordinator, or raise config.mesh.join_seconds'
        )
        _answer(there, wrong)
        raise TimeoutError(wrong) from None
      if total != count:
        wrong = (
          f'process {number} knows of {total} processes and process 0 of {count}: give all the '
          'same JAX_NUM_PROCESSES, or two runs two ports'
        )
      elif number in (0, *there):
        wrong = (
          f'two processes have number {number}: give each its own JAX_PROCESS_ID, or two runs two '
          'ports'
        )
      # Of two with one number both are told.
      there[number if number not in there else -1] = guest
    _answer(there, wrong)
  if wrong:
    raise ValueError(wrong)


def _answer(there: dict[int, socket.socket], text: str) -> None:
  for guest in there.values():
    with contextlib.suppress(OSError):  # who has left needs no answer
      guest.sendall(json.dumps({'wrong': text}).encode() + b'\n')


def _join(host: str, port: int, count: int, index: int, end: float, seconds: float) -> None:
  while (left := end - time.monotonic()) > 0:
    try:
      with socket.create_connection((host, port), timeout=left) as own:
        # The first process, which knows who is missing, may have begun to wait later than this one.
        own.settimeout(seconds + _GRACE)
        own.sendall(json.dumps({'index': index, 'count': count}).encode() + b'\n')
        answer = own.makefile().readline()
    except TimeoutError:
      break
    except OSError:
      answer = ''
    if answer:
      wrong = json.loads(answer)['wrong']
      if wrong:
        raise ValueError(wrong)
      return
    time.sleep(min(0.1, max(end - time.monotonic(), 0)))  # the first process is not there yet
  raise TimeoutError(
    f'process {index} of {count} did not reach process 0 at {host}:{port}, or not all others did, '
    f'within {seconds:g} s: check that address (JAX_COORDINATOR_ADDRESS, or the first node of a '
    'Slurm step) and the firewall, or raise config.mesh.join_seconds'
  )
