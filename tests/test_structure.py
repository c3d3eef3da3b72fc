"""House rules that a machine can check: imports, lengths of files, names of submodules."""

import ast
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from tests import typed
from vision_attention.ops import attention

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = 'vision_attention'
MAX_LINES = 450

# Every layer of the house with the layers that it may import; what is not listed is refused.
_BELOW_MODELS = {'ops', 'layers', 'attention'}
ALLOWED = {
  'errors': set(),
  'folders': set(),
  'ops': {'errors'},
  'layers': {'errors', 'ops'},
  'attention': {'errors', 'ops', 'layers'},
  'models': {'errors'} | _BELOW_MODELS,
  'data': {'errors', 'folders'},
  'training': {'errors', 'folders', 'ops'},
  'weights': {'errors', 'torch_file'},
  'macs': {'errors', 'models', 'ops'},
  'convert': {'errors', 'weights', 'models'} | _BELOW_MODELS,
  'checkpoint': {'errors', 'folders', 'weights', 'models', 'training'},
  'planning': {
    'checkpoint',
    'convert',
    'data',
    'errors',
    'folders',
    'macs',
    'models',
    'runs',
    'training',
  },
  'suites': {'data', 'folders'},
  'evaluation': {
    'checkpoint',
    'convert',
    'data',
    'folders',
    'macs',
    'models',
    'planning',
    'suites',
    'training',
  },
  'aot': {'errors', 'macs', 'planning', 'training'},
  'torch_file': set(),
  'runs': {'folders', 'training'},
  'comparison': {'errors', 'runs'},
}


def _sources() -> list[pathlib.Path]:
  folders = (PACKAGE, 'configs', 'tools', 'tests')
  return sorted([*ROOT.glob('*.py'), *(p for f in folders for p in (ROOT / f).rglob('*.py'))])


def _imports(path: pathlib.Path) -> set[str]:
  """Returns the modules of the package that a file imports, without the package's name."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      found |= {f'{node.module}.{alias.name}' for alias in node.names}
  return {name.removeprefix(f'{PACKAGE}.') for name in found if name.startswith(f'{PACKAGE}.')}


def _modules() -> list[pathlib.Path]:
  return sorted(p for p in (ROOT / PACKAGE).rglob('*.py') if p != ROOT / PACKAGE / '__init__.py')


@pytest.mark.fast
@pytest.mark.parametrize('path', _modules(), ids=lambda p: str(p.relative_to(ROOT / PACKAGE)))
def test_imports_flow_one_way(path):
  layer = path.relative_to(ROOT / PACKAGE).parts[0].removesuffix('.py')
  assert layer in ALLOWED, f'{path} is in no known layer: add it to ALLOWED'
  for module in _imports(path):
    if module.split('.')[0] != layer:
      assert any(module == a or module.startswith(f'{a}.') for a in ALLOWED[layer]), (
        f'{path.name} ({layer}) imports {module}; {layer} may import {sorted(ALLOWED[layer])}'
      )


@pytest.mark.fast
def test_configs_import_no_model_code():
  for path in (ROOT / 'configs').glob('*.py'):
    assert not _imports(path), f'{path} imports the package'


@pytest.mark.fast
def test_only_checkpoint_imports_orbax():
  users = [p for p in _sources() if re.search(r'^\s*(import|from) orbax', p.read_text(), re.M)]
  assert [p.relative_to(ROOT).as_posix() for p in users if p.parts[-2] != 'tests'] == [
    f'{PACKAGE}/checkpoint.py'
  ]


@pytest.mark.fast
def test_neither_torch_nor_tensorflow_is_imported():
  for path in _sources():
    names = re.findall(r'^\s*(?:import|from) (torch|tensorflow|timm)\b', path.read_text(), re.M)
    assert not names, f'{path} imports {names}'


@pytest.mark.fast
def test_what_tests_compile_is_kept_and_runs_on_the_cpu():
  # JAX takes these from the environment when it is imported, however early that is.
  assert jax.config.jax_platforms == os.environ['JAX_PLATFORMS']
  assert jax.config.jax_compilation_cache_dir == os.environ['JAX_COMPILATION_CACHE_DIR']


@pytest.mark.fast
def test_typed_shapes_are_checked_unless_asked_not_to():
  query, key = jnp.zeros((2, 3, 1, 4)), jnp.zeros((2, 5, 1, 8))
  with pytest.raises(jaxtyping.TypeCheckError, match='attention_logits'):
    attention.attention_logits(query, key)
  with typed.unchecked(), pytest.raises(ValueError, match='does not match'):
    attention.attention_logits(query, key)


@pytest.mark.fast
def test_files_are_short():
  long = {
    str(p.relative_to(ROOT)): n
    for p in _sources()
    if (n := len(p.read_text().splitlines())) > MAX_LINES
  }
  assert not long, f'over {MAX_LINES} lines, so probably two things: {long}'
  assert len((ROOT / 'main.py').read_text().splitlines()) <= 80
  assert len((ROOT / 'train.py').read_text().splitlines()) <= 320
