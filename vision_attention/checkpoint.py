"""Runs on disk: saving and resuming a run, and its variables on any machine. Only Orbax user."""

import contextlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from vision_attention import folders, weights
from vision_attention.models import base, registry, tree

logger = logging.getLogger('vision_attention')
CHECKPOINTS = 'checkpoints'
CONFIG = 'config.json'
_METADATA = '_CHECKPOINT_METADATA'  # comes with the folder's rename, which makes a checkpoint whole
_COMMITTED = 'commit_success.txt'  # Orbax writes it last, and a bucket knows no rename


class SaveError(OSError):
  """A checkpoint that could not be written."""


class DamagedError(ValueError):
  """A checkpoint that cannot be read."""


class Manager:
  """Checkpoints of one run: asynchronous, whole or not there, the latest and the best kept.

  Args:
    workdir: folder of the run.
    keep_latest: how many of the latest are kept.
    keep_best: how many of the best are kept besides.
    best_by: the metric, of those given to `save`, that they are best by.
  """

  def __init__(
    self, workdir: folders.Folder, keep_latest: int, keep_best: int, best_by: str = 'top1'
  ):
    self._folder = folder = folders.absolute(workdir) / CHECKPOINTS
    self._begun: int | None = None
    if jax.process_index() == 0 and not folders.is_bucket(folder):
      # A copy of a run that was broken off; Orbax would take the number for a checkpoint.
      for step in sorted(set(_steps(folder)) - set(steps_of(workdir))):
        broken = folder / f'{step}.broken'
        shutil.rmtree(broken, ignore_errors=True)
        (folder / str(step)).rename(broken)
        logger.warning(
          'the checkpoint of step %d has no %s, so it is not whole: it is %s now, and the run goes '
          'on without it',
          step,
          _METADATA,
          broken,
        )
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('broken checkpoints are removed')
    policies: list[Any] = [preservation_policy.LatestN(max(1, keep_latest))]
    if keep_best:
      policies.append(
        preservation_policy.BestN(
          get_metric_fn=lambda metrics: metrics[best_by],
          n=keep_best,
          keep_checkpoints_without_metrics=False,
        )
      )
    options = ocp.CheckpointManagerOptions(
      preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
      # What a killed process left half-written is removed, and never listed as a step.
      cleanup_tmp_directories=True,
    )
    with _reaching(folder):
      folders.reach(folder)
      self._manager = ocp.CheckpointManager(folder, options=options)
      found = sorted(self._manager.all_steps())
      if folders.is_bucket(folder) and found != (whole := steps_of(workdir)):
        # Orbax may take a bucket that does not answer for an empty one, and would begin anew.
        raise OSError(f'it has the whole checkpoints {whole}, of which Orbax sees {found}')

  def latest_step(self) -> int | None:
    """Returns the newest whole checkpoint's step."""
    return self._manager.latest_step()

  def save(
    self,
    step: int,
    state: Any,
    window: Any,
    config: Any,
    metrics: Mapping[str, float] | None,
  ) -> None:
    """Begins to save; returns when the arrays may change again.

    Raises:
      SaveError: if this checkpoint, or the one that was begun before it, cannot be written.
    """
    if step in self._manager.all_steps():
      return
    if jax.default_backend() == 'cpu':
      # Orbax would read a CPU array's own memory, which the next step reuses by donation.
      state, window = jax.tree.map(lambda x: x.copy(), (state, window))
    self.wait()
    self._begun = step
    items: dict[str, Any] = {
      'state': ocp.args.PyTreeSave(state),
      'window': ocp.args.PyTreeSave(window),
      'config': ocp.args.JsonSave(json.loads(config.to_json_best_effort())),
    }
    scores = dict(metrics) if metrics else None
    if scores:
      # Where Orbax looks for them when a run goes on, to know the best checkpoint of before.
      items['metrics'] = ocp.args.JsonSave(scores)
    with self._writing():
      self._manager.save(step, args=ocp.args.Composite(**items), metrics=scores, force=True)

  def score(self, step: int, metrics: Mapping[str, float]) -> None:
    """Gives a checkpoint the scores of an evaluation that ended after it was saved."""
    folder = self._folder / str(step) / 'metrics'
    if jax.process_index() == 0 and not folder.exists():
      folders.make(folder)
      folders.write(folder / 'metrics', json.dumps(dict(metrics)))
    if jax.process_count() > 1:
      # Not only where it is missing: the first may have written it before another looks.
      multihost_utils.sync_global_devices('a checkpoint has its scores')
    self._manager.reload()

  def restore(self, step: int, state: Any, window: Any) -> tuple[Any, Any]:
    """Restores into shapes with shardings (`ShapeDtypeStruct`s), bit for bit.

    Nothing else is tried if that fails: an earlier checkpoint would undo steps without a word.

    Raises:
      DamagedError: if the checkpoint cannot be read; it names what else there is.
    """

    def args(target: Any) -> Any:
      restore_args = ocp.checkpoint_utils.construct_restore_args(target)
      return ocp.args.PyTreeRestore(item=target, restore_args=restore_args)

    wanted = ocp.args.Composite(state=args(state), window=args(window))
    try:
      restored = self._manager.restore(step, args=wanted)
    except Exception as error:  # of many kinds, by what is wrong with which file
      earlier = [number for number in steps_of(self._folder.parent) if number < step]
      rest = f'an earlier one is step {earlier[-1]}' if earlier else 'there is no earlier one'
      raise DamagedError(
        f'the checkpoint of step {step} in {self._folder} cannot be read '
        f'({_first_line(error)}); {rest}: remove the folder {step} to go on from what is left'
      ) from error
    return restored['state'], restored['window']

  def reached_preemption(self, step: int) -> bool:
    """Whether the cluster has announced the end of several processes; the same in all of them."""
    return jax.process_count() > 1 and self._manager.reached_preemption(step)

  def wait(self) -> None:
    """Returns when everything is on disk; raises SaveError if it cannot be."""
    with self._writing():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and releases the folder."""
    self.wait()
    self._manager.close()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Says which checkpoint was not written, of what fails at once or in the background."""
    try:
      yield
    except Exception as error:  # of many kinds, by which library's thread could not write
      whole = steps_of(self._folder.parent)
      rest = f'the last whole checkpoint is step {whole[-1]}' if whole else 'there is no other'
      raise SaveError(
        f'the checkpoint of step {self._begun} could not be written to {self._folder} '
        f'({_first_line(error)}); {rest}: make room or mend the place, then start the run again'
      ) from error


def _first_line(error: BaseException) -> str:
  return f'{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ""}'[:300]


@contextlib.contextmanager
def _reaching(folder: folders.Folder) -> Iterator[None]:
  """Says what a bucket may lack, of what fails there."""
  try:
    yield
  except Exception as error:  # of many kinds, by which library could not reach it
    if not folders.is_bucket(folder):
      raise
    raise OSError(
      f'{folder} cannot be used ({_first_line(error)}): the account needs the roles '
      'storage.objectAdmin and storage.legacyBucketReader on the bucket'
    ) from error


def steps_of(workdir: folders.Folder) -> list[int]:
  """Returns the steps of a run's whole checkpoints, in order."""
  folder = workdir / CHECKPOINTS
  return [step for step in _steps(folder) if _is_whole(folder / str(step))]


def _is_whole(folder: folders.Folder) -> bool:
  return (folder / (_COMMITTED if folders.is_bucket(folder) else _METADATA)).exists()


def _steps(folder: folders.Folder) -> list[int]:
  # Of a bucket that does not answer, `exists` raises and `is_dir` would say no.
  names = [path.name for path in folder.iterdir()] if folder.exists() else []
  return sorted(int(name) for name in names if name.isdigit())


def _step_folder(path: str | os.PathLike, step: int | None) -> folders.Folder:
  """Returns the folder of one checkpoint, from that of a run or itself."""
  path = folders.absolute(folders.folder(path).expanduser())
  if _is_whole(path):
    return path
  steps = steps_of(path)
  if not steps:
    raise FileNotFoundError(f'{path} is neither a run with a whole checkpoint nor a checkpoint')
  if step is not None and step not in steps:
    raise FileNotFoundError(f'{path} has no checkpoint of step {step}: it has {steps}')
  return path / CHECKPOINTS / str(steps[-1] if step is None else step)


def load_variables(
  path: str | os.PathLike, *, ema: bool | None = None, step: int | None = None
) -> dict[str, Any]:
  """Loads variables as NumPy arrays, wherever and on however many devices they were trained.

  Args:
    path: a run's folder or a checkpoint's, also `gs://...`, or a .safetensors or .npz file of
      `save_variables`.
    ema: whether to take the averaged ones; by default where the run has them.
    step: of a run; the latest by default.

  Returns:
    `{'params': ..., 'batch_stats': ...}`, the latter only of models with BatchNorm.

  Raises:
    FileNotFoundError: if there is no such run, checkpoint or file.
    ValueError: if averages are asked for and the run has none.
  """
  path = folders.folder(path).expanduser()
  if path.suffix in ('.safetensors', '.npz'):
    return tree.unflatten(weights.read(path))
  folder = _step_folder(path, step)
  saved = _metadata(folder)
  has_ema = bool(saved.get('ema_params'))
  if ema and not has_ema:
    raise ValueError(f'{path} has no averaged weights: pass ema=False')
  prefix = 'ema_' if (has_ema if ema is None else ema) else ''
  keys = [key for key in ('params', 'batch_stats') if saved.get(prefix + key)]
  restored = _restore_numpy(folder, {prefix + key: saved[prefix + key] for key in keys})
  return {key: restored[prefix + key] for key in keys}


def load_state(path: str | os.PathLike, *, step: int | None = None) -> dict[str, np.ndarray]:
  """Loads everything a checkpoint holds of a run's state as numpy arrays by path."""
  folder = _step_folder(path, step)
  restored = _restore_numpy(folder, _metadata(folder))
  leaves = jax.tree_util.tree_leaves_with_path(restored)
  return {jax.tree_util.keystr(key, simple=True, separator='/'): leaf for key, leaf in leaves}


def _metadata(folder: folders.Folder) -> Any:
  handler = ocp.PyTreeCheckpointHandler()
  try:
    return handler.metadata(epath.Path(folder / 'state')).tree
  finally:
    handler.close()


def _restore_numpy(folder: folders.Folder, item: Any) -> Any:
  """Restores part of a state without the devices that it was saved on."""
  restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
  args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    return checkpointer.restore(folder / 'state', args=args)


def source_of(path: str | os.PathLike) -> str | None:
  """Returns whose conventions a run's model follows, `''` for ours; None of what is no run."""
  try:
    text = (_step_folder(path, None) / 'config' / 'metadata').read_text()
  except (FileNotFoundError, NotADirectoryError):
    return None
  return json.loads(text)['model'].get('source') or ''


def save_variables(path: str | pathlib.Path, variables: Mapping[str, Any]) -> None:
  """Writes variables to one .safetensors or .npz file, for `load_variables`."""
  weights.write(path, {key: np.asarray(value) for key, value in tree.flatten(variables).items()})


def load(
  path: str | os.PathLike, *, ema: bool | None = None, step: int | None = None
) -> tuple[base.Classifier, dict[str, Any], Any]:
  """Loads a run: its model, variables and config. See `load_variables`."""
  folder = _step_folder(path, step)
  config = ml_collections.ConfigDict(json.loads((folder / 'config' / 'metadata').read_text()))
  model = create_model(config)
  return model, load_variables(folder, ema=ema), config


def create_model(config: Any) -> base.Classifier:
  """Creates the model of a run's config."""
  options = {key: _tuples(value) for key, value in config.model.options.to_dict().items()}
  model, _ = registry.create_model(
    config.model.name,
    num_classes=config.data.num_classes,
    image_size=config.image_size,
    dtype=config.model.dtype,
    source=config.model.source or None,
    **options,
  )
  return model


def _tuples(value: Any) -> Any:
  """JSON knows lists only."""
  return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
