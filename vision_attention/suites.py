"""Evaluation on other test sets than the run's own: ImageNet-V2, -A, -R, -Sketch, ReaL, and any.

Classes are matched by name, so that a model of ImageNet-21k is evaluated on the 1000 classes of
ImageNet as well. ImageNet-A and -R have images of 200 of those, and only these may be answered
(arXiv 1907.07174, 2006.16241). An image of ReaL has any number of labels, each of them right, and
one without any is left out (arXiv 2006.07159).
"""

import csv
import dataclasses
import io
import json
import logging
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import ml_collections

from vision_attention import folders
from vision_attention.data import classes, pipeline, source

logger = logging.getLogger('vision_attention')
JSON, CSV = 'evaluation.json', 'evaluation.csv'
# Test sets of which only the classes that occur may be answered, and how many these are.
SUBSETS = {'imagenet_a': 200, 'imagenet_r': 200}
_PACKAGES = ('vision_attention', 'jax', 'flax', 'numpy')


@dataclasses.dataclass(frozen=True)
class Suite:
  """A test set, and how its classes are those of the model.

  Attributes:
    name: of the data set.
    batches: of all its images.
    pick: see `evaluate.make_eval_step`; None where the classes are the model's own.
    among: see there.
  """

  name: str
  batches: pipeline.EvalBatches
  pick: Sequence[int] | None
  among: Sequence[bool] | None


def prepare(config: Any, process_index: int = 0, process_count: int = 1) -> list[Suite]:
  """Opens all test sets of `config.eval.suites` before anything is computed.

  That the data of `config.eval.kshot` are there is looked at too, so that one message says it all.

  Args:
    config: of a run, resolved.
    process_index: which process this is.
    process_count: number of processes.

  Raises:
    MissingDataError: naming every set that is not there, and how each is prepared.
    ValueError: for a set that has no class of the model, or not those that it is known for.
  """
  names, missing = tuple(config.eval.suites), []
  for name in dict.fromkeys((*names, *config.eval.kshot)):
    try:
      source.find(name, config.data.data_dir or None)
    except source.MissingDataError as error:
      missing.append(str(error))
  if missing:
    raise source.MissingDataError('\n'.join(missing))
  ours = classes.names(config.data.name, config.data.data_dir or None) if names else ()
  return [_suite(name, config, ours, process_index, process_count) for name in names]


def _suite(name: str, config: Any, ours: Sequence[str], index: int, count: int) -> Suite:
  data_dir = config.data.data_dir or None
  split = source.evaluation_split(name, data_dir)
  data = ml_collections.ConfigDict({**config.data.to_dict(), 'name': name, 'eval_split': split})
  batches = pipeline.eval_batches(
    data, batch_size=config.eval.batch_size, process_index=index, process_count=count
  )
  theirs, pick, among = tuple(batches.label_names), None, None
  if theirs != tuple(ours):
    pick = classes.index_map(ours, theirs)
    if unknown := pick.count(-1):
      logger.info('%s: the model does not know %d of its %d classes', name, unknown, len(pick))
  expected = SUBSETS.get(name.partition('/')[0].partition(':')[0])
  if expected is not None:
    occurring = source.Source(name, split, data_dir).class_counts() > 0
    if occurring.sum() != expected:
      raise ValueError(
        f'{name} has images of {occurring.sum()} classes in place of {expected}: prepare it again'
      )
    among = occurring.tolist()
  return Suite(name, batches, pick, among)


def write(workdir: folders.Folder, facts: Mapping[str, Any], found: Mapping[str, float]) -> None:
  """Writes what was found, with what it was found of, to one JSON file and one CSV file of a row.

  Args:
    workdir: folder of the run.
    facts: of the run and its model.
    found: numbers by name.
  """
  versions = {name: metadata.version(name) for name in _PACKAGES}
  row = io.StringIO()
  table = csv.DictWriter(row, [*facts, *found])
  table.writeheader()
  table.writerow({**facts, **found})
  content = json.dumps({**facts, 'versions': versions, 'results': dict(found)}, indent=2)
  folders.make(workdir)
  folders.write(workdir / JSON, content + '\n')
  folders.write(workdir / CSV, row.getvalue())
