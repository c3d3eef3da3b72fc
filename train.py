"""The training loop, phase by phase: check, build, restore, train, evaluate.

A run is a function of its config. Killed at any moment and started again, it goes on from its last
checkpoint with the next batch, and ends in the same state and the same metrics, bit for bit.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

from vision_attention import checkpoint, evaluation, folders, planning
from vision_attention.data import pipeline
from vision_attention.models import transfer
from vision_attention.training import metrics, sharding, state

logger = logging.getLogger('vision_attention')
PREEMPTED = 143  # 128 + SIGTERM


def _teacher_variables(plan: planning.Plan) -> Any:
  """The weights of the teacher on every device, or None without one."""
  if plan.teacher is None:
    return None
  teacher = plan.config.teacher
  variables = planning.load(teacher.name, teacher, image_size=plan.config.image_size)
  return jax.device_put(variables, sharding.shardings(variables, plan.mesh))


def _start(plan: planning.Plan, workdir: folders.Folder) -> tuple[state.TrainState, state.Window]:
  """Makes the state before the first step: fresh, or from the variables of `config.init`.

  What became of every array of those is printed, and written in full to `init.json`.
  """
  fresh, window = jax.jit(plan.init, out_shardings=plan.places)()
  config = plan.config
  if not config.init.path:
    return fresh, window
  loaded = planning.load(config.model.name, config.init)
  init = {'params': fresh.params, 'batch_stats': fresh.batch_stats}
  init = multihost_utils.process_allgather({k: v for k, v in init.items() if v}, tiled=True)
  variables, report = transfer.transfer(
    config.model.name, loaded, init, fresh_paths=config.init.fresh, classes=plan.classes
  )
  logger.info('started from %s: %s', config.init.path, report)
  if jax.process_index() == 0:
    text = json.dumps({'path': config.init.path, **dataclasses.asdict(report)}, indent=2)
    (workdir / 'init.json').write_text(text)
  create = functools.partial(state.create, optimizer=plan.optimizer, averaged=config.ema.decay > 0)
  return jax.jit(create, out_shardings=plan.places[0])(variables), window


def _report(found: dict[str, float]) -> None:
  name = evaluation.best_name(found)
  logger.info(
    'test accuracy %.2f %% (%d of %d test images%s)',
    found[f'{name}/top1'],
    found[f'{name}/correct'],
    found[f'{name}/count'],
    ', averaged weights' if name == 'eval_ema' else '',
  )


def dry_run(config: Any) -> None:
  """Prints what a run would be, without touching data."""
  planning.describe(planning.prepare(config, with_data=False))


def train_and_evaluate(config: Any, workdir: folders.Folder) -> dict[str, float]:
  """Trains to the end, from wherever the run in `workdir` stands; returns the last evaluation."""
  plan = planning.prepare(config)
  first = jax.process_index() == 0
  with folders.held(workdir) if first else contextlib.nullcontext():
    planning.check_same_run(plan.config, workdir)
    return _train(plan, workdir)


def _train(plan: planning.Plan, workdir: folders.Folder) -> dict[str, float]:
  config, total, every = plan.config, plan.total, plan.every
  # -- SIGTERM from here on means: save at the next step, then leave.
  terminated: list[int] = []
  if jax.process_count() == 1:
    # Several processes must stop at the same step, and have JAX's own handler agree on it.
    signal.signal(signal.SIGTERM, lambda number, frame: terminated.append(number))

  # -- Restore: the run's own checkpoint, else config.init, else fresh parameters.
  manager = checkpoint.Manager(
    workdir, config.checkpoint.keep_latest, config.checkpoint.keep_best, config.eval.best_by
  )
  start = manager.latest_step()
  if start is None:
    start, (now, window) = 0, _start(plan, workdir)
  else:
    place = lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)
    targets = jax.tree.map(place, plan.shapes, plan.places)
    now, window = manager.restore(start, *targets)
    logger.info('resumed at step %d of %d from %s', start, total, workdir)

  # -- Input and compiled steps.
  batches = pipeline.train_batches(
    config.data,
    seed=config.seed,
    batch_size=config.batch_size,
    start_step=start,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    phases=[(phase.first, phase.train_ops) for phase in plan.phases],
  )
  train_steps = {
    phase.first: jax.jit(
      state.make_train_step(
        phase.model.apply,
        plan.optimizer,
        config,
        config.data.num_classes,
        plan.class_weights,
        outputs=phase.model.outputs,
        teacher=plan.teacher and plan.teacher.apply,
      ),
      donate_argnums=0,
      out_shardings=plan.places,
    )
    for phase in plan.phases
  }
  train_step = train_steps[max(first for first in train_steps if first <= start)]
  teacher = _teacher_variables(plan)
  evaluator = evaluation.Evaluator(plan)
  writer = metrics.Writer(workdir, start, jax.process_index() == 0, config)
  clock = metrics.Clock(start, total, config.batch_size, plan.mesh.size)

  def check_finite() -> None:
    bad = int(window.bad_step)
    if bad >= 0:
      manager.wait()
      raise FloatingPointError(
        f'loss, gradient or parameters of step {bad} are not finite; the last good checkpoint is '
        f'step {manager.latest_step()} in {workdir}: lower the learning rate or clip gradients'
      )

  def log(step: int) -> state.Window:
    check_finite()
    sums = jax.device_get(window)
    values = {
      'train/loss': float(sums.loss / sums.steps),
      'train/grad_norm': float(sums.grad_norm / sums.steps),
      'train/corrupt': int(sums.corrupt),
      'train/learning_rate': config.optimizer.learning_rate * float(plan.factor(step - 1)),
    }
    speed = clock.lap(step)
    writer.write(step, values)
    writer.write(step, speed, timing=True)
    metrics.log_progress(step, total, values, speed)
    return jax.jit(state.new_window, out_shardings=plan.places[1])()

  def run_evaluation(step: int) -> dict[str, float] | None:
    began = time.monotonic()
    found = evaluator(now, lambda: bool(terminated))
    if found is not None:
      if not writer.row(step, 'eval/top1'):
        writer.write(step, found)
      _report(found)
    clock.pause(time.monotonic() - began)
    return found

  def scores(found: Mapping[str, float]) -> dict[str, float]:
    best = config.eval.best_by
    return {best: found[f'{evaluation.best_name(found)}/{best}']}

  def save(step: int, found: dict[str, float] | None) -> None:
    began = time.monotonic()
    check_finite()
    writer.flush()  # the lines until this step, without which it is no place to go on from
    manager.save(step, now, window, config, scores(found) if found else None)
    clock.pause(time.monotonic() - began)

  def leave(step: int) -> NoReturn:
    manager.close()
    writer.close()
    logger.info('saved step %d of %d after SIGTERM', step, total)
    sys.stdout.flush()
    os._exit(PREEMPTED)

  # -- Train. Only logging, evaluation and checkpoints wait for the devices.
  found = None
  evaluation_due = lambda step: step % every['eval'] == 0 or step == total
  if start and evaluation_due(start):
    if not writer.row(start, 'eval/top1'):
      # The run was ended between this step and the end of its evaluation.
      found = run_evaluation(start)
      if found is None:
        leave(start)
    manager.score(start, scores(found or writer.row(start, 'eval/top1')))
  running: collections.deque = collections.deque()
  profile = folders.Staging(workdir / 'profile')
  profile_end = min(config.profile.start + config.profile.steps - 1, total)
  for step in range(start + 1, total + 1):
    if step == config.profile.start:
      jax.profiler.start_trace(str(profile.path))
    began = time.monotonic()
    batch = sharding.to_devices(plan.mesh, next(batches))
    clock.wait(time.monotonic() - began)
    train_step = train_steps.get(step - 1, train_step)
    now, window = train_step(now, window, batch, teacher)
    running.append(window.loss)
    if len(running) > 2:
      # Two steps in flight keep the devices busy; more would only pile up batches.
      running.popleft().block_until_ready()
    if start < config.profile.start <= step == profile_end:
      jax.block_until_ready(now)
      jax.profiler.stop_trace()
      profile.upload()

    if step % every['log'] == 0 or step == total:
      window = log(step)
    found = run_evaluation(step) if evaluation_due(step) and not terminated else None
    stop = bool(terminated) or manager.reached_preemption(step)
    if found or stop or step % every['checkpoint'] == 0:
      save(step, found)
    if stop:
      leave(step)

  manager.close()
  writer.close()
  if found is None:
    found = run_evaluation(total)
  if found is None:
    os._exit(PREEMPTED)
  return found
