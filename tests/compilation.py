"""How tests compile: programs that run once or twice cost most to compile.

XLA's newer emitters of fused loops on CPU, and code generation split into many parts, compile three
times as long. What is computed does not depend on either but for rounding.
"""

import contextlib
import os
from collections.abc import Iterator

import jax
import pytest

FLAGS = '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'


def flags(devices: int) -> str:
  """Returns `XLA_FLAGS` of a process in which the CPU counts as so many devices."""
  return f'{os.environ.get("XLA_FLAGS", FLAGS)} --xla_force_host_platform_device_count={devices}'


@contextlib.contextmanager
def without_flags() -> Iterator[None]:
  """Lets a first program be compiled for TPUs, which ends a process whose flags are for the CPU."""
  jax.devices()  # reads the flags for itself
  with pytest.MonkeyPatch.context() as patch:
    patch.delenv('XLA_FLAGS', raising=False)
    yield
