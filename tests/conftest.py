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

from hypothesis import settings  # noqa: E402

# Compilation makes single examples slow; the seed is fixed so that a failure repeats.
settings.register_profile('project', deadline=None, max_examples=8, derandomize=True)
settings.load_profile('project')
