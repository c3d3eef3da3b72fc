"""A config checked and resolved into everything that a run needs, before anything is compiled."""

import dataclasses
import functools
import itertools
import json
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from vision_attention import checkpoint, convert, errors, folders, macs, runs
from vision_attention.data import classes, pipeline
from vision_attention.models import base, depth, registry, tree
from vision_attention.training import (
  erasing,
  losses,
  metrics,
  mixing,
  objective,
  optimizer,
  per_class,
  schedule,
  sharding,
  state,
  tracking,
)

logger = logging.getLogger('vision_attention')
DTYPES = ('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class Phase:
  """Some steps of a run at one image size.

  Attributes:
    first: the step before its first one.
    train_ops: on its images.
    model: for its size; its variables are those of the run's model.
  """

  first: int
  train_ops: Sequence[str]
  model: base.Classifier


@dataclasses.dataclass(frozen=True)
class Plan:
  """A checked config with all that is derived from it, before anything is compiled."""

  config: Any
  model: base.Classifier
  info: base.ModelInfo
  mesh: jax.sharding.Mesh
  total: int
  factor: Callable[[Any], jax.Array]
  class_weights: np.ndarray | None
  optimizer: Any
  every: dict[str, int]
  init: Callable[[], tuple[state.TrainState, state.Window]]
  shapes: tuple[Any, Any]
  places: tuple[Any, Any]
  teacher: base.Classifier | None
  classes: Sequence[int] | None
  phases: Sequence[Phase]


def prepare(config: Any, *, with_data: bool = True, devices: Sequence[Any] | None = None) -> Plan:
  """Checks everything that can be checked without compiling, and refuses in one sentence.

  Args:
    config: as of a run.
    with_data: whether data are looked at, and what they say is taken over.
    devices: of the mesh; all there are by default.

  Raises:
    ValueError, FileNotFoundError: naming the value, what is allowed and the nearest fix.
  """
  config = ml_collections.ConfigDict(config.copy_and_resolve_references())
  templates = config.data.train_ops
  for key in ('train_ops', 'eval_ops'):
    config.data[key] = _of_size(config.data[key], config.image_size)
  if with_data:
    data = pipeline.dataset_info(config.data)
    if config.data.num_classes not in (0, data.num_classes):
      raise ValueError(
        f'config.data.num_classes is {config.data.num_classes} but {config.data.name} has '
        f'{data.num_classes}: leave it 0 to take what the data set says'
      )
    config.data.num_classes, config.data.num_train = data.num_classes, data.num_train
  elif not (config.data.num_classes and config.data.num_train):
    raise ValueError('without data, config.data.num_classes and num_train must be given')
  _check_values(config)
  if with_data:
    _take_over_source(config)
  weights = None
  if with_data and config.loss.class_weights != 'none':
    # Known to who has the data; a dry run can do without.
    weights = losses.class_weights(config.loss.class_weights, pipeline.class_counts(config.data))
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
  parts = sharding.batch_devices(mesh)
  share = parts * config.accumulate
  config.eval.batch_size = config.eval.batch_size or config.batch_size
  for key, value, unit in (
    ('batch_size', config.batch_size, share),
    ('eval.batch_size', config.eval.batch_size, parts),
  ):
    if value < 1 or value % unit:
      raise ValueError(
        f'config.{key} {value} is not a multiple of {unit} ({parts} devices'
        f'{f" x {config.accumulate} micro-batches" if unit != parts else ""}): the nearest are '
        f'{value // unit * unit or unit} and {(value // unit + 1) * unit}'
      )
  to_steps = functools.partial(
    schedule.steps, num_examples=config.data.num_train, batch_size=config.batch_size
  )
  total = to_steps(config.total)
  if total < 1:
    raise ValueError(f'config.total {config.total!r} is no step of {config.batch_size} images')
  every = {
    'log': to_steps(config.log_every),
    'eval': to_steps(config.eval.every),
    'checkpoint': to_steps(config.checkpoint.every),
  }
  for what, count in every.items():
    if count < 1:
      raise ValueError(f'the config writes {what} every 0 steps: make it at least 1 steps')
  factor = schedule.relative(config.schedule, total=total, to_steps=to_steps)

  model = checkpoint.create_model(config)
  objective.check(config, model.outputs)
  teacher = _teacher(config, with_data)
  mapped = with_data and bool(config.init.path and config.init.classes)
  info = registry.create_model(config.model.name, image_size=config.image_size)[1]
  variables = convert.abstract_variables(model, info)
  decay, params = config.optimizer.layer_decay, variables['params']
  factors = depth.factors(config.model.name, params, decay) if decay < 1 else None
  tx = optimizer.make(config.optimizer, factor, params, factors)

  def init() -> tuple[state.TrainState, state.Window]:
    images = jnp.zeros((1, *info.image_size, 3), jnp.float32)
    fresh = model.init(jax.random.key(config.seed), images, train=False)
    return state.create(fresh, tx, averaged=config.ema.decay > 0), state.new_window()

  shapes = jax.eval_shape(init)
  sharding.check_rules(shapes[0], config.sharding_rules)
  places = (
    sharding.shardings(shapes[0], mesh, config.sharding_rules),
    sharding.shardings(shapes[1], mesh),
  )
  return Plan(
    config.lock(),
    model,
    info,
    mesh,
    total,
    factor,
    weights,
    tx,
    every,
    init,
    shapes,
    places,
    teacher,
    _class_map(config, data.label_names) if mapped else None,
    _phases(config, templates, to_steps, total, model, variables),
  )


def _of_size(texts: Sequence[str], size: int) -> tuple[str, ...]:
  return tuple(text.replace('{size}', str(size)) for text in texts)


def _phases(
  config: Any,
  templates: Sequence[str],
  to_steps: Callable[[str], int],
  total: int,
  model: base.Classifier,
  variables: Any,
) -> list[Phase]:
  """The phases of progressive resizing, whose last and often only one is at `image_size`.

  Raises:
    ValueError: for phases of no steps, or sizes for which the model has other parameters.
  """
  found, start = [], 0
  shapes = tree.flatten(jax.tree.map(lambda leaf: leaf.shape, variables))
  for duration, size in config.progressive:
    resized = ml_collections.ConfigDict({**config.to_dict(), 'image_size': size})
    smaller = checkpoint.create_model(resized)
    info = registry.create_model(config.model.name, image_size=size)[1]
    theirs = convert.abstract_variables(smaller, info)
    theirs = tree.flatten(jax.tree.map(lambda leaf: leaf.shape, theirs))
    if other := [path for path in shapes if shapes[path] != theirs.get(path)]:
      raise ValueError(
        f'config.progressive has images of {size} pixels, for which {config.model.name} has '
        f'{len(other)} other arrays than for {config.image_size} ({other[0]}, ...): only a model '
        'without tables of positions can change its size while it trains'
      )
    found.append(Phase(start, _of_size(templates, size), smaller))
    start += to_steps(duration)
  found.append(Phase(start, tuple(config.data.train_ops), model))
  if start >= total or any(a.first == b.first for a, b in itertools.pairwise(found)):
    raise ValueError(
      f'config.progressive {tuple(config.progressive)} takes {start} of {total} steps: every phase '
      f'must take some and leave some to image_size {config.image_size}'
    )
  return found


def _class_map(config: Any, ours: Sequence[str]) -> list[int]:
  """The number of each class of the data among those of the weights to start from."""
  theirs = classes.names(config.init.classes, config.data.data_dir or None)
  return classes.index_map(theirs, ours)


def _teacher(config: Any, with_data: bool) -> base.Classifier | None:
  """The model that the config's losses learn from, whose weights are there if the data are."""
  teacher = config.teacher
  if not teacher.name:
    return None
  if config.progressive:
    raise ValueError('config.progressive changes sizes, and a teacher has one: leave one out')
  if with_data and not epath.Path(teacher.path).exists():
    raise FileNotFoundError(
      f'config.teacher.path {teacher.path!r} does not exist: give a run, a checkpoint or a weight '
      'file of the teacher'
    )
  return registry.create_model(
    teacher.name,
    num_classes=config.data.num_classes,
    image_size=config.image_size,
    dtype=jnp.dtype(config.model.dtype),
    source=teacher.source or None,
    **teacher.options,
  )[0]


def _check_values(config: Any) -> None:
  """Refuses single values that nothing later would name."""
  tracking.check(config.wandb)
  errors.check_choice('config.loss.kind', config.loss.kind, losses.KINDS)
  errors.check_choice('config.loss.class_weights', config.loss.class_weights, losses.CLASS_WEIGHTS)
  best = ('top1', 'top5', *(per_class.MEANS if config.eval.per_class else ()))
  if config.eval.best_by in per_class.MEANS and not config.eval.per_class:
    raise ValueError(
      f'config.eval.best_by {config.eval.best_by!r} needs config.eval.per_class=True'
    )
  errors.check_choice('config.eval.best_by', config.eval.best_by, best)
  errors.check_choice('config.model.dtype', config.model.dtype, DTYPES)
  errors.check_choice('config.optimizer.momentum_dtype', config.optimizer.momentum_dtype, DTYPES)
  if config.init.classes and not config.init.path:
    raise ValueError(
      f'config.init.classes {config.init.classes!r} picks from weights: name them by init.path'
    )
  errors.check_choice('config.erasing.mode', config.erasing.mode, erasing.MODES)
  errors.check_choice('config.mixing.per', config.mixing.per, mixing.PER)
  errors.check_choice('config.mixing.draw', config.mixing.draw, mixing.DRAWS)
  mixed = config.mixing
  if (
    config.model.options.get('mix_token')
    and mixed.prob
    and (mixed.mixup_alpha or mixed.cutmix_alpha)
  ):
    raise ValueError(
      'the model mixes tokens already: set config.mixing.prob to 0, or mix_token to 0'
    )
  for key, value, low, high in (
    ('accumulate', config.accumulate, 1, math.inf),
    ('mesh.tensor', config.mesh.tensor, 1, math.inf),
    ('mesh.join_seconds', config.mesh.join_seconds, 1, math.inf),
    ('mesh.heartbeat_seconds', config.mesh.heartbeat_seconds, 2, math.inf),
    ('seed', config.seed, 0, 2**32 - 1),
    ('ema.decay', config.ema.decay, 0, 1),
    ('loss.label_smoothing', config.loss.label_smoothing, 0, 1),
    ('loss.focal_gamma', config.loss.focal_gamma, 0, math.inf),
    ('mixing.prob', config.mixing.prob, 0, 1),
    ('mixing.switch_prob', config.mixing.switch_prob, 0, 1),
    ('mixing.mixup_alpha', config.mixing.mixup_alpha, 0, math.inf),
    ('mixing.cutmix_alpha', config.mixing.cutmix_alpha, 0, math.inf),
    ('erasing.prob', config.erasing.prob, 0, 1),
    ('distill.weight', config.distill.weight, 0, 1),
    ('distill.temperature', config.distill.temperature, 1e-3, math.inf),
    ('tokens.weight', config.tokens.weight, 0, math.inf),
    ('data.repeats', config.data.repeats, 1, math.inf),
    ('data.num_threads', config.data.num_threads, 0, math.inf),
    ('data.num_workers', config.data.num_workers, 0, math.inf),
    ('data.prefetch', config.data.prefetch, 0, math.inf),
    *(('data.std', value, 1e-6, math.inf) for value in config.data.std),
    ('schedule.final', config.schedule.final, 0, math.inf),
    ('schedule.warmup_init', config.schedule.warmup_init, 0, 1),
    ('optimizer.learning_rate', config.optimizer.learning_rate, 0, math.inf),
    ('optimizer.weight_decay', config.optimizer.weight_decay, 0, math.inf),
    ('optimizer.layer_decay', config.optimizer.layer_decay, 1e-3, 1),
    ('optimizer.clip_norm', config.optimizer.clip_norm, 0, math.inf),
    ('optimizer.clip_adaptive', config.optimizer.clip_adaptive, 0, math.inf),
    ('optimizer.momentum', config.optimizer.momentum, 0, 1),
    ('optimizer.b1', config.optimizer.b1, 0, 1),
    ('optimizer.b2', config.optimizer.b2, 0, 1),
    ('optimizer.epsilon', config.optimizer.epsilon, 0, math.inf),
    ('checkpoint.keep_latest', config.checkpoint.keep_latest, 1, math.inf),
    ('checkpoint.keep_best', config.checkpoint.keep_best, 0, math.inf),
    ('profile.start', config.profile.start, -1, math.inf),
    ('profile.steps', config.profile.steps, 1, math.inf),
  ):
    if not low <= value <= high:
      raise ValueError(f'config.{key} {value} is not between {low} and {high}')


def _take_over_source(config: Any) -> None:
  """Lets the model follow the conventions by which the weights of `config.init` were trained.

  Raises:
    ValueError: if the config asks for others, by which they would answer otherwise.
  """
  where, ours = config.init, config.model.source
  if not where.path:
    return
  theirs = where.source or checkpoint.source_of(where.path)
  if theirs is None or theirs == ours:
    return
  if ours:
    raise ValueError(
      f'config.model.source is {ours!r}, but the weights of {where.path} follow the conventions of '
      f'{theirs or "this package"!r}: set config.model.source={theirs!r}'
    )
  logger.info('the model follows the conventions of %r, as the weights of %s', theirs, where.path)
  config.model.source = theirs


def load(name: str, where: Any, **options: Any) -> Any:
  """Loads variables from `where.path`: of `where.source`, a weight file, or else of ours."""
  if where.source:
    return convert.load_reference(name, where.path, source=where.source, **options)
  return checkpoint.load_variables(where.path)


def describe(plan: Plan) -> None:
  """Prints what a run would be."""
  config, (shapes, _), (places, _) = plan.config, plan.shapes, plan.places
  count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes.params))
  multiply_adds = macs.count_macs(plan.model, image_size=plan.info.image_size)
  held = sharding.bytes_per_device(shapes, places)
  per_device = config.batch_size // sharding.batch_devices(plan.mesh)
  print(f'model         {config.model.name}, {config.image_size} pixels, {config.model.dtype}')
  print(f'parameters    {count:,}')
  print(f'multiply-adds {multiply_adds / 1e9:.3f} G per image, forward')
  print(f'state         {held / 2**20:.1f} MiB per device (parameters, moments, averages)')
  print(
    f'mesh          {dict(plan.mesh.shape)} of {plan.mesh.size} {jax.default_backend()} devices'
  )
  print(f'batch         {config.batch_size} images, {per_device} per device')
  print(f'micro-batches {config.accumulate}')
  print(f'steps         {plan.total} ({config.total}); every {plan.every}')


def changes(config: Any, workdir: folders.Folder) -> dict[str, str]:
  """Returns by key, as `key: old -> new`, in what a config differs from that of a run."""
  new = json.loads(config.to_json_best_effort())
  old, new = _flat(json.loads((workdir / checkpoint.CONFIG).read_text())), _flat(new)
  return {
    key: f'{key}: {old.get(key)!r} -> {new.get(key)!r}'
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key)
  }


def check_same_run(config: Any, workdir: folders.Folder) -> None:
  """A folder holds one run: another config in it is refused, not mixed in."""
  tracking.check(config.wandb, workdir)
  path = workdir / checkpoint.CONFIG
  if path.exists() and (checkpoint.steps_of(workdir) or (workdir / metrics.METRICS).exists()):
    changed = [text for key, text in changes(config, workdir).items() if not runs.is_volatile(key)]
    if changed:
      raise ValueError(
        f'{workdir} holds a run of another config ({"; ".join(changed)}): pass another --workdir, '
        'or the same config, or delete the folder if it is not needed'
      )
  if jax.process_index() == 0:
    folders.make(workdir)
    folders.write(path, json.dumps(json.loads(config.to_json_best_effort()), indent=2))


def _flat(tree: Any, prefix: str = '') -> dict[str, Any]:
  if not isinstance(tree, dict):
    return {prefix[:-1]: tree}
  return {k: v for key, sub in tree.items() for k, v in _flat(sub, f'{prefix}{key}.').items()}
