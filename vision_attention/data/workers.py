"""Processes that read or write for another one."""

import multiprocessing
import os
import threading
from typing import Any


def end_with_parent(*_: Any) -> None:
  """Lets this worker end when the process that it works for is gone, killed or not."""
  parent = multiprocessing.parent_process()
  if parent is None:
    return

  def wait() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()
