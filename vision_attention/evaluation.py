"""Weights evaluated: on the run's own test split as it trains, and on all that a user asks for."""

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from vision_attention import checkpoint, convert, folders, macs, planning, suites
from vision_attention.data import pipeline, preprocessing, source
from vision_attention.models import base, transfer
from vision_attention.training import evaluate, few_shot, mixing, sharding, state

logger = logging.getLogger('vision_attention')
_TIMED = 10
_SEEDS = 3


class Evaluator:
  """Evaluates weights on a whole split.

  Args:
    plan: of the run.
    suite: the test set; the run's own if None.
  """

  def __init__(self, plan: planning.Plan, suite: suites.Suite | None = None):
    data, self._mesh = plan.config.data, plan.mesh
    self.step = jax.jit(
      evaluate.make_eval_step(
        plan.model.apply,
        data.mean,
        data.std,
        by_class=suite is None and plan.config.eval.per_class,
        pick=suite and suite.pick,
        among=suite and suite.among,
      )
    )
    self._batches = (
      pipeline.eval_batches(
        data,
        batch_size=plan.config.eval.batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
      )
      if suite is None
      else suite.batches
    )

  def batches(self) -> Iterator[dict[str, jax.Array]]:
    """Yields the split's batches, on the devices."""
    return (sharding.to_devices(self._mesh, batch) for batch in self._batches)

  def measure(
    self, variables: Any, interrupted: Callable[[], bool] = lambda: False
  ) -> dict[str, float] | None:
    """Returns what `evaluate.evaluate` finds of variables; None if interrupted."""
    count, names = self._batches.num_examples, self._batches.label_names
    return evaluate.evaluate(self.step, variables, self.batches(), count, interrupted, names)

  def __call__(
    self, now: state.TrainState, interrupted: Callable[[], bool] = lambda: False
  ) -> dict[str, float] | None:
    """Returns metrics named `eval/...` and, of averages, `eval_ema/...`; None if interrupted."""
    found: dict[str, float] = {}
    weights = {'eval': (now.params, now.batch_stats)}
    if now.ema_params is not None:
      weights['eval_ema'] = (now.ema_params, now.ema_batch_stats)
    for name, (params, batch_stats) in weights.items():
      result = self.measure({'params': params, 'batch_stats': batch_stats}, interrupted)
      if result is None:
        return None
      found |= {f'{name}/{key}': value for key, value in result.items()}
    return found


# What the weights of a run depend on, and what of their model may be changed all the same.
_TRAINED_WITH = ('data.mean', 'data.num_classes', 'data.std', 'ema.decay')
_FREE = ('model.dtype', 'model.options.drop_path', 'model.options.remat', 'model.options.scan')


def best_name(found: Mapping[str, float]) -> str:
  """Returns whose accuracy counts: the averaged weights' where there are any."""
  return 'eval_ema' if 'eval_ema/top1' in found else 'eval'


def evaluate_only(config: Any, workdir: folders.Folder) -> dict[str, float]:
  """Evaluates a run's latest checkpoint, or else the weights of `config.init`, on exact splits.

  Raw and averaged weights, on the run's own test split and on those of `config.eval.suites`; probes
  of `config.eval.kshot`; speed. What is found is printed and written to `evaluation.json` and
  `evaluation.csv` in the run's folder.

  Raises:
    FileNotFoundError: without weights; naming every data set that is missing.
    ValueError: for weights that do not fit the model as they are.
  """
  plan = planning.prepare(config)
  index, count = jax.process_index(), jax.process_count()
  others = suites.prepare(plan.config, index, count)
  probes = [_Probe(plan, name) for name in plan.config.eval.kshot]
  step, weights = _weights(plan, workdir)
  found: dict[str, float] = {}
  for suite in (None, *others):
    evaluator = Evaluator(plan, suite)
    for name, variables in weights.items():
      result = evaluator.measure(variables)
      assert result is not None
      prefix = name if suite is None else f'{name}/{suite.name}'
      found |= {f'{prefix}/{key}': value for key, value in result.items()}
      print(
        f'step {step} {prefix}: top-1 {result["top1"]:.3f} %, top-5 {result["top5"]:.3f} %, loss '
        f'{result["loss"]:.5f}, {result["count"]} test images'
        + (f', {result["skipped"]} without a label' if 'skipped' in result else '')
      )
  for probe in probes:
    for name, variables in weights.items():
      for shots, accuracy in probe(variables).items():
        found[f'{name}/{probe.name}/{shots}shot'] = accuracy
        print(f'step {step} {name}/{probe.name}: {shots} images per class {accuracy:.3f} %')
  if plan.config.eval.throughput:
    found['images_per_second'] = _throughput(Evaluator(plan), list(weights.values())[-1])
    print(
      f'{found["images_per_second"]:.1f} images/s by {jax.device_count()} x '
      f'{jax.devices()[0].device_kind}, {plan.config.eval.batch_size} at a time'
    )
  if index == 0:
    suites.write(workdir, _facts(plan, step), found)
  return found


def _facts(plan: planning.Plan, step: int) -> dict[str, Any]:
  params = jax.tree.leaves(plan.shapes[0].params)
  return {
    'model': plan.config.model.name,
    'data': plan.config.data.name,
    'image_size': plan.config.image_size,
    'step': step,
    'parameters': sum(int(np.prod(leaf.shape)) for leaf in params),
    'multiply_adds': macs.count_macs(plan.model, image_size=plan.info.image_size),
    'device': jax.devices()[0].device_kind,
  }


def _weights(plan: planning.Plan, workdir: folders.Folder) -> tuple[int, dict[str, Any]]:
  """Returns the step, and variables on the devices by the name of their results."""
  steps, now = checkpoint.steps_of(workdir), plan.shapes[0]
  name, shapes = plan.config.model.name, convert.abstract_variables(plan.model, plan.info)
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
  put = lambda tree: jax.tree.map(
    jax.device_put, tree, sharding.shardings(tree, plan.mesh, plan.config.sharding_rules)
  )
  if steps:
    _check_same_model(plan.config, workdir)
    names = {'eval': False} | ({'eval_ema': True} if now.ema_params is not None else {})
    loaded = {
      kind: checkpoint.load_variables(workdir, ema=ema, step=steps[-1])
      for kind, ema in names.items()
    }
    # Blocks may be scanned here and not there.
    fitted = {
      kind: transfer.transfer(name, variables, zeros, reinit=())[0]
      for kind, variables in loaded.items()
    }
    return steps[-1], {kind: put({'batch_stats': {}, **tree}) for kind, tree in fitted.items()}
  where = plan.config.init
  if not where.path:
    raise FileNotFoundError(
      f'{workdir} has no checkpoint to evaluate: train first, or name weights by config.init.path'
    )
  if plan.classes is not None and min(plan.classes) < 0:
    raise ValueError(
      f'{plan.classes.count(-1)} classes of {plan.config.data.name} are not in '
      f'config.init.classes {where.classes!r}: what they would be answered by is not trained'
    )
  loaded = planning.load(name, where)
  variables, report = transfer.transfer(name, loaded, zeros, reinit=(), classes=plan.classes)
  logger.info('evaluating %s: %s', where.path, report)
  # Of what they say of themselves only the source: to the form they have been fitted.
  named = loaded.get(base.CONVENTION, {})
  convention = {base.CONVENTION: {k: named[k] for k in plan.model.conventions if k in named}}
  return 0, {'eval': put({'batch_stats': {}, **variables, **convention})}


def _check_same_model(config: Any, workdir: folders.Folder) -> None:
  """Refuses what would let a run's weights answer otherwise than they were trained to.

  Raises:
    ValueError: naming the keys.
  """
  if not (workdir / checkpoint.CONFIG).exists():
    return
  other = [
    text
    for key, text in planning.changes(config, workdir).items()
    if key in _TRAINED_WITH or (key.startswith('model.') and key not in _FREE)
  ]
  if other:
    raise ValueError(
      f'the run in {workdir} was trained otherwise ({"; ".join(other)}): evaluate it with its own '
      'config, or name it by config.init.path from another --workdir'
    )


def _throughput(evaluator: Evaluator, variables: Any) -> float:
  """Returns images per second of the evaluation's compiled step, the median of some."""
  batch = next(evaluator.batches())
  seconds = []
  for _ in range(_TIMED + 2):
    began = time.monotonic()
    jax.block_until_ready(evaluator.step(variables, batch))
    seconds.append(time.monotonic() - began)
  return len(batch['image']) / statistics.median(seconds[2:])


class _Probe:
  """k-shot probes on one data set, whose images are the config's evaluation images.

  Raises:
    ValueError: with several processes, or where a class has too few images.
  """

  def __init__(self, plan: planning.Plan, name: str):
    config = plan.config
    if jax.process_count() > 1:
      raise ValueError('config.eval.kshot: probes run in one process')
    self.name = name
    headless: Any = ml_collections.ConfigDict(config.to_dict())
    headless.data.num_classes = 0
    model = checkpoint.create_model(headless)
    self._apply = jax.jit(
      lambda variables, images: model.apply(
        variables, mixing.normalize(images, config.data.mean, config.data.std), train=False
      )
    )
    self._prepare = preprocessing.compose(config.data.eval_ops)
    self._batch_size = config.eval.batch_size
    data_dir = config.data.data_dir or None
    splits = 'train', source.evaluation_split(name, data_dir)
    self._train, self._test = (source.Source(name, split, data_dir) for split in splits)
    labels = [self._train[i].label for i in range(len(self._train))]
    if min(labels) < 0:
      raise ValueError(f'config.eval.kshot: {name} has images without a label, nothing to learn by')
    try:
      self._chosen = {
        shots: [few_shot.choose(labels, shots, seed) for seed in range(_SEEDS)]
        for shots in config.eval.shots
      }
    except ValueError as error:
      raise ValueError(f'config.eval.kshot: {name}: {error}: see config.eval.shots') from error

  def __call__(self, variables: Any) -> dict[int, float]:
    """Returns the accuracy in percent, the mean of three draws, by the images per class."""
    test = self._features(variables, self._test, range(len(self._test)))
    found = {}
    for shots, draws in self._chosen.items():
      learnt = [self._features(variables, self._train, chosen) for chosen in draws]
      found[shots] = statistics.fmean(few_shot.accuracy(*each, *test) for each in learnt)
    return found

  def _features(
    self, variables: Any, records: source.Source, which: Any
  ) -> tuple[np.ndarray, np.ndarray]:
    rng, features, labels = np.random.default_rng(0), [], []
    for begin in range(0, len(which), self._batch_size):
      chunk = [records[i] for i in which[begin : begin + self._batch_size]]
      images = np.stack([self._prepare(preprocessing.decode(x.image), rng) for x in chunk])
      # One compiled program: the last batch is filled up.
      full = np.zeros((self._batch_size, *images.shape[1:]), images.dtype)
      full[: len(images)] = images
      features.append(np.asarray(self._apply(variables, jnp.asarray(full)))[: len(images)])
      labels += [record.label for record in chunk]
    return np.concatenate(features), np.asarray(labels)
