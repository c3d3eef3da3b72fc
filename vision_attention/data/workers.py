"""Processes that read or write for another one."""

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Task = TypeVar('Task')
Result = TypeVar('Result')


def end_with_parent(*_: Any) -> None:
  """Lets this worker end when the process that it works for is gone, killed or not."""
  parent = multiprocessing.parent_process()
  if parent is None:
    return

  def wait() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()


def results(
  function: Callable[[Task], Result], tasks: Iterable[Task], count: int
) -> Iterator[Result]:
  """Yields what a function makes of tasks, in the order in which it is made.

  Args:
    function: a function of a module, or a partial of one.
    tasks: sent to processes, and taken as processes become free: they may be large.
    count: of processes; 0 for this one, in which the order is that of the tasks.

  Raises:
    Exception: the first that the function raises, after what was running has ended.
  """
  if not count:
    yield from map(function, tasks)
    return
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(count, context, initializer=end_with_parent) as pool:
    running: set[concurrent.futures.Future[Result]] = set()
    try:
      for task in tasks:
        if len(running) > count:
          ready, running = concurrent.futures.wait(
            running, return_when=concurrent.futures.FIRST_COMPLETED
          )
          yield from (future.result() for future in ready)
        running.add(pool.submit(function, task))
      yield from (future.result() for future in concurrent.futures.as_completed(running))
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise
