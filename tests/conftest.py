"""Typed shapes are checked while tests run, and compiled programs are kept between runs."""

import gc
import os
import pathlib

# JAX reads these when it is imported, which the next imports do.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR', str(pathlib.Path(__file__).parents[1] / '.cache' / 'jax')
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')

from tests import bucket, compilation, typed

os.environ.setdefault('XLA_FLAGS', compilation.FLAGS)
# Where nothing answers: what a test's bucket leaves running asks no real one.
os.environ['STORAGE_EMULATOR_HOST'] = 'http://127.0.0.1:9'
# Children and workers inherit these. Without the next, glibc gives every large buffer back to the
# kernel and has it cleared again.
os.environ.setdefault(
  'GLIBC_TUNABLES',
  'glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=8589934592'
  ':glibc.malloc.hugetlb=1',
)

typed.install()

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# Traced programs are many small objects that stay: looking through them for garbage as often as
# Python does by default takes a fifth of the time.
gc.set_threshold(200_000, 20, 100)
# Compilation makes single examples slow; the seed is fixed so that a failure repeats.
settings.register_profile('project', deadline=None, max_examples=8, derandomize=True)
settings.load_profile('project')


@pytest.fixture
def store(monkeypatch):
  """A bucket that takes whatever this process writes to gs://."""
  server = bucket.Bucket()
  for name, value in server.environment.items():
    monkeypatch.setenv(name, value)
  pytest.importorskip('gcsfs', reason="buckets need pip install -e '.[gcs]'")
  yield server
  server.close()


@pytest.fixture
def unchecked():
  """See `typed.unchecked`."""
  with typed.unchecked():
    yield


@pytest.fixture(autouse=True)
def _quick_compilation(request):
  """Programs that run once are not worth optimising; the marker `optimized` says which are."""
  optimized = request.node.get_closest_marker('optimized') is not None
  jax.config.update('jax_disable_most_optimizations', not optimized)
