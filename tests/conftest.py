"""Typed shapes are checked while tests run, and compiled programs are kept between runs."""

import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Children that the tests start inherit the cache.
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR', str(pathlib.Path(__file__).parents[1] / '.cache' / 'jax')
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')

import jaxtyping

jaxtyping.install_import_hook(
  ['vision_attention.ops', 'vision_attention.layers', 'vision_attention.attention'],
  'beartype.beartype',
)

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# Compilation makes single examples slow; the seed is fixed so that a failure repeats.
settings.register_profile('project', deadline=None, max_examples=8, derandomize=True)
settings.load_profile('project')


@pytest.fixture(autouse=True)
def _quick_compilation(request):
  """Programs that run once are not worth optimising; the marker `optimized` says which are."""
  optimized = request.node.get_closest_marker('optimized') is not None
  jax.config.update('jax_disable_most_optimizations', not optimized)
