"""What is kept of a run, what is taken for whole, and reading it without the code that made it."""

import json
import pathlib
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from tests import compilation
from vision_attention import checkpoint
from vision_attention.training import state

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ml_collections.ConfigDict({'model': {'name': 'none'}, 'sizes': (1, 2)})
VARIABLES = {
  'params': {'head': {'kernel': jnp.arange(6.0).reshape(2, 3), 'bias': jnp.zeros(3)}},
  'batch_stats': {'norm': {'mean': jnp.array([1.0, 2.0])}},
}


def _state(step: int = 0, averaged: bool = True) -> state.TrainState:
  new = state.create(VARIABLES, optax.adam(1e-3, mu_dtype=jnp.bfloat16), averaged=averaged)
  new = new.replace(step=jnp.asarray(step), params=jax.tree.map(lambda x: x + step, new.params))
  return new


def _save(workdir, scores: dict[int, float | None], *, latest=1, best=1) -> None:
  manager = checkpoint.Manager(workdir, latest, best)
  for step, score in scores.items():
    metrics = None if score is None else {'top1': score}
    manager.save(step, _state(step), state.new_window(), CONFIG, metrics)
  manager.close()


def test_the_latest_and_the_best_are_kept(tmp_path):
  _save(tmp_path, {10: 50.0, 20: 90.0, 30: None, 40: 70.0, 50: None})
  assert checkpoint.steps_of(tmp_path) == [20, 50]
  _save(tmp_path, {60: 80.0, 70: None}, latest=2)
  assert checkpoint.steps_of(tmp_path) == [20, 60, 70], 'the best of before the restart is kept'
  _save(tmp_path, {80: 95.0, 90: None}, latest=1)
  assert checkpoint.steps_of(tmp_path) == [80, 90]


@pytest.mark.fast
def test_a_restored_state_is_the_saved_one(tmp_path):
  _save(tmp_path, {3: None})
  manager = checkpoint.Manager(tmp_path, 1, 1)
  saved, window = _state(3), state.new_window()
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), (saved, window)
  )
  restored = manager.restore(3, *shapes)
  manager.close()
  assert jax.tree.structure(restored) == jax.tree.structure((saved, window))
  for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves((saved, window)), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.fast
def test_saving_a_step_twice_keeps_the_first(tmp_path):
  """An interval and the end of the machine may fall on the same step."""
  _save(tmp_path, {5: None})
  manager = checkpoint.Manager(tmp_path, 1, 1)
  manager.save(5, _state(6), state.new_window(), CONFIG, None)
  manager.close()
  loaded = checkpoint.load_variables(tmp_path, ema=False)
  np.testing.assert_array_equal(loaded['params']['head']['bias'], np.full(3, 5.0))


@pytest.mark.fast
def test_the_state_may_change_while_it_is_being_written(tmp_path):
  """On a CPU the writer would read the memory that donation hands to the next step."""
  step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
  now = {'params': {'w': jnp.arange(1_000_000.0)}, 'batch_stats': {}}
  manager = checkpoint.Manager(tmp_path, 1, 1)
  manager.save(1, now, state.new_window(), CONFIG, None)
  for _ in range(5):
    now = step(now)
  jax.block_until_ready(now)
  manager.close()
  loaded = checkpoint.load_variables(tmp_path)
  np.testing.assert_array_equal(loaded['params']['w'], np.arange(1_000_000.0, dtype=np.float32))


@pytest.mark.fast
def test_half_written_checkpoints_are_not_there(tmp_path):
  _save(tmp_path, {1: None})
  folder = tmp_path / checkpoint.CHECKPOINTS
  # A kill leaves Orbax's temporary folder; a copy broken off leaves a step without its metadata.
  shutil.copytree(folder / '1', folder / '2.orbax-checkpoint-tmp')
  shutil.copytree(folder / '1', folder / '3')
  (folder / '3' / '_CHECKPOINT_METADATA').unlink()
  assert checkpoint.steps_of(tmp_path) == [1]
  np.testing.assert_array_equal(
    checkpoint.load_variables(tmp_path, ema=False)['params']['head']['bias'], np.full(3, 1.0)
  )
  manager = checkpoint.Manager(tmp_path, 1, 1)
  assert manager.latest_step() == 1
  # Nothing of it is thrown away.
  assert (folder / '3.broken' / 'state').is_dir()
  # The steps that a kill spoiled are reached again.
  manager.save(2, _state(2), state.new_window(), CONFIG, None)
  manager.save(3, _state(3), state.new_window(), CONFIG, None)
  manager.close()
  assert checkpoint.steps_of(tmp_path) == [3]
  assert checkpoint.load_variables(tmp_path, ema=False)['params']['head']['bias'][0] == 3.0
  assert not (folder / '2.orbax-checkpoint-tmp').exists()


@pytest.mark.fast
def test_variables_by_run_by_step_and_by_file(tmp_path):
  _save(tmp_path, {1: None, 2: 10.0, 4: None}, latest=3)
  bias = lambda *args, **kw: checkpoint.load_variables(*args, **kw)['params']['head']['bias'][0]
  assert bias(tmp_path, ema=False) == 4
  assert bias(tmp_path, ema=False, step=2) == 2
  assert bias(tmp_path / checkpoint.CHECKPOINTS / '1', ema=False) == 1
  assert bias(tmp_path) == bias(tmp_path, ema=True) == 0, 'averages, where the run has them'
  loaded = checkpoint.load_variables(tmp_path)
  for name in ('weights.safetensors', 'weights.npz'):
    checkpoint.save_variables(tmp_path / name, loaded)
    again = checkpoint.load_variables(tmp_path / name)
    jax.tree.map(np.testing.assert_array_equal, again, loaded)
  with pytest.raises(FileNotFoundError, match=r'no checkpoint of step 3: it has \[1, 2, 4\]'):
    checkpoint.load_variables(tmp_path, step=3)
  with pytest.raises(FileNotFoundError, match='neither a run'):
    checkpoint.load_variables(tmp_path / 'elsewhere')


@pytest.mark.fast
def test_averages_that_are_not_there_are_refused(tmp_path):
  manager = checkpoint.Manager(tmp_path, 1, 1)
  manager.save(1, _state(averaged=False), state.new_window(), CONFIG, None)
  manager.close()
  assert checkpoint.load_variables(tmp_path)['batch_stats']['norm']['mean'][1] == 2.0
  with pytest.raises(ValueError, match='no averaged weights: pass ema=False'):
    checkpoint.load_variables(tmp_path, ema=True)


@pytest.mark.fast
def test_the_config_is_in_the_checkpoint(tmp_path):
  _save(tmp_path, {1: None})
  saved = tmp_path / checkpoint.CHECKPOINTS / '1' / 'config' / 'metadata'
  assert json.loads(saved.read_text()) == {'model': {'name': 'none'}, 'sizes': [1, 2]}


@pytest.mark.slow
def test_a_state_split_over_four_devices_is_read_by_one(tmp_path):
  """With no shapes, no shardings and no model given."""
  script = f"""
    import jax, jax.numpy as jnp, pathlib, ml_collections, optax
    from vision_attention import checkpoint
    from vision_attention.training import sharding, state
    mesh = sharding.make_mesh(1, 4)
    variables = {{'params': {{'w': jnp.arange(64.0 * 512).reshape(64, 512)}}}}
    now = state.create(variables, optax.adam(1e-3), averaged=True)
    now = jax.device_put(now, sharding.shardings(now, mesh))
    assert len(now.params['w'].addressable_shards) == 4
    assert now.params['w'].addressable_shards[0].data.shape == (64, 128)
    manager = checkpoint.Manager(pathlib.Path({str(tmp_path)!r}), 1, 1)
    manager.save(7, now, state.new_window(), ml_collections.ConfigDict(), None)
    manager.close()
  """
  subprocess.run(
    [sys.executable, '-c', textwrap.dedent(script)],
    cwd=ROOT,
    check=True,
    env={
      'PATH': '',
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': compilation.flags(4),
    },
  )
  loaded = checkpoint.load_variables(tmp_path)
  assert type(loaded['params']['w']) is np.ndarray
  np.testing.assert_array_equal(loaded['params']['w'], np.arange(64.0 * 512).reshape(64, 512))
