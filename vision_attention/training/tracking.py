"""Weights & Biases, for those who want it: `config.wandb.project` names a project, else it is off.

Runs are kept in the run's folder (`wandb sync` sends them) unless `config.wandb.mode` is `online`,
which it must be for a folder in a bucket.
"""

import importlib
import importlib.util
import json
import tempfile
import uuid
from collections.abc import Mapping
from typing import Any

from vision_attention import errors, folders

MODES = ('offline', 'online')
ID = 'wandb_id.txt'


def check(options: Any, workdir: folders.Folder | None = None) -> None:
  """Refuses what `Tracker` could not do, in a run's folder if that is given.

  Raises:
    ValueError: for an unknown mode, if the library is asked for and not installed, or if it should
      keep a run in a bucket.
  """
  errors.check_choice('config.wandb.mode', options.mode, MODES)
  if not options.project:
    return
  if workdir is not None and folders.is_bucket(workdir) and options.mode == 'offline':
    raise ValueError(
      f"config.wandb.mode 'offline' keeps its files in the run's folder, which {workdir} cannot "
      "be: set it to 'online', or leave config.wandb.project empty"
    )
  spec = importlib.util.find_spec('wandb')
  # A folder `wandb` of earlier runs passes for a package, but one without a file.
  if spec is None or spec.origin is None:
    raise ValueError(
      f'config.wandb.project {options.project!r} needs wandb, which is not installed: '
      "pip install 'vision_attention[wandb]', or leave the project empty"
    )


class Tracker:
  """One run at Weights & Biases, which a restart of ours goes on with.

  Its id is kept in the run's folder. Steps that are done again after a restart are the same ones,
  and the library keeps the first.

  Args:
    options: `config.wandb`.
    workdir: folder of the run.
    config: of the run.
  """

  def __init__(self, options: Any, workdir: folders.Folder, config: Any):
    check(options, workdir)
    path = workdir / ID
    if not path.exists():
      folders.write(path, uuid.uuid4().hex[:12])
    self._run = importlib.import_module('wandb').init(
      project=options.project,
      name=workdir.name,
      id=path.read_text().strip(),
      resume='allow',
      dir=tempfile.mkdtemp() if folders.is_bucket(workdir) else str(workdir),
      mode=options.mode,
      config=json.loads(config.to_json_best_effort()),
    )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Adds values to those of a step."""
    self._run.log(dict(values), step=step)

  def close(self) -> None:
    """Writes what is left."""
    self._run.finish()
