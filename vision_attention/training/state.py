"""The state of a run, and one training step as a pure function of state, batch and seed."""

import functools
from collections.abc import Callable, Collection
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vision_attention.training import erasing, losses, mixing, objective


@flax.struct.dataclass
class TrainState:
  """Everything that a run changes. `ema_*` are None in runs without averages."""

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
  ema_params: Any
  ema_batch_stats: Any


@flax.struct.dataclass
class Window:
  """Sums over the steps since metrics were last written; part of every checkpoint.

  Attributes:
    steps: number of steps.
    loss: sum of the steps' mean losses.
    grad_norm: sum of the steps' gradient norms, before clipping.
    corrupt: number of examples that stood in for corrupt ones.
    bad_step: the first step whose loss, gradient, parameters or statistics were not finite, or -1.
  """

  steps: jax.Array
  loss: jax.Array
  grad_norm: jax.Array
  corrupt: jax.Array
  bad_step: jax.Array


def new_window() -> Window:
  """Returns an empty window."""
  zero, count = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
  return Window(count, zero, zero, count, count - 1)


def create(
  variables: Any, optimizer: optax.GradientTransformation, *, averaged: bool
) -> TrainState:
  """Returns the state before the first step."""
  params, batch_stats = variables['params'], variables.get('batch_stats', {})
  copy = lambda tree: jax.tree.map(jnp.copy, tree) if averaged else None
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=batch_stats,
    opt_state=optimizer.init(params),
    ema_params=copy(params),
    ema_batch_stats=copy(batch_stats),
  )


def make_train_step(
  apply: Callable[..., Any],
  optimizer: optax.GradientTransformation,
  config: Any,
  num_classes: int,
  class_weights: np.ndarray | None = None,
  *,
  outputs: Collection[str] = (),
  teacher: Callable[..., Any] | None = None,
) -> Callable[..., tuple[TrainState, Window]]:
  """Makes the training step.

  Randomness is derived from `(config.seed, step)` alone: the step is a function of its arguments.

  Args:
    apply: `model.apply`.
    optimizer: of the parameters.
    config: the whole config.
    num_classes: of the data set.
    class_weights: of the loss, `[num_classes]`; None weighs all classes alike.
    outputs: of a model with several, see `Classifier.outputs`.
    teacher: `model.apply` of what the config's losses learn from, if anything.

  Returns:
    `(state, window, batch[, teacher variables]) -> (state, window)`; the batch is `image` uint8
    `[b, h, w, c]`, `label` int32 `[b]`, `corrupt` int32 `[b]`, and what `objective.map_targets`
    reads where tokens are labelled by maps.
  """
  accumulate = config.accumulate
  grad_of = jax.value_and_grad(objective.make(apply, config, outputs, class_weights), has_aux=True)

  def token_grid(state: TrainState, images: jax.Array, source: str) -> tuple[int, int] | None:
    if not config.tokens.weight or config.tokens.labels != source:
      return None
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    found = jax.eval_shape(functools.partial(apply, method='named_logits'), variables, images)
    return found['tokens'].shape[1:3]

  def gradients(params, batch_stats, images, targets, key):
    if accumulate == 1:
      return grad_of(params, batch_stats, images, targets, key)

    # Micro-batch `i` takes every `accumulate`-th example, so that each stays on its device.
    def split(x):
      return x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)

    def body(carry, micro):
      stats, loss_sum, grad_sum = carry
      index, micro_images, micro_targets = micro
      (loss, stats), grads = grad_of(
        params, stats, micro_images, micro_targets, jax.random.fold_in(key, index)
      )
      return (stats, loss_sum + loss, jax.tree.map(jnp.add, grad_sum, grads)), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    micro = (jnp.arange(accumulate), split(images), jax.tree.map(split, targets))
    (stats, loss, grads), _ = jax.lax.scan(body, (batch_stats, jnp.zeros(()), zeros), micro)
    return (loss / accumulate, stats), jax.tree.map(lambda g: g / accumulate, grads)

  def augmented(key: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
    key_mix, key_erase = jax.random.split(key)
    images = mixing.normalize(batch['image'], config.data.mean, config.data.std)
    kind, smoothing = config.loss.kind, config.loss.label_smoothing
    labels = losses.smooth(batch['label'], num_classes, smoothing, kind)
    erase = functools.partial(
      erasing.erase, key_erase, prob=config.erasing.prob, mode=config.erasing.mode
    )
    if not config.erasing.after_mixing:
      images = erase(images)
    images, labels = mixing.mix(
      key_mix,
      images,
      labels,
      mixup_alpha=config.mixing.mixup_alpha,
      cutmix_alpha=config.mixing.cutmix_alpha,
      prob=config.mixing.prob,
      switch_prob=config.mixing.switch_prob,
      per=config.mixing.per,
      draw=config.mixing.draw,
    )
    return (erase(images) if config.erasing.after_mixing else images), labels

  def train_step(
    state: TrainState, window: Window, batch: Any, teacher_variables: Any = None
  ) -> tuple[TrainState, Window]:
    key_mix, key_model = jax.random.split(
      jax.random.fold_in(jax.random.key(config.seed), state.step)
    )
    images, labels = augmented(key_mix, batch)
    targets = {'labels': labels}
    if teacher is not None:
      targets |= objective.teacher_targets(
        teacher, teacher_variables, images, config, grid=token_grid(state, images, 'teacher')
      )
    if (grid := token_grid(state, images, 'maps')) is not None:
      targets |= objective.map_targets(batch, labels, config, grid)
    (loss, batch_stats), grads = gradients(
      state.params, state.batch_stats, images, targets, key_model
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    grad_norm = optax.tree.norm(grads)
    averaged = _averaged(state, params, batch_stats, config.ema)
    # A finite gradient, too, can carry parameters or statistics out of range.
    finite = jax.tree.map(lambda x: jnp.isfinite(x).all(), (loss, grad_norm, params, batch_stats))
    bad = ~jnp.stack(jax.tree.leaves(finite)).all() & (window.bad_step < 0)
    window = Window(
      steps=window.steps + 1,
      loss=window.loss + loss,
      grad_norm=window.grad_norm + grad_norm,
      corrupt=window.corrupt + batch['corrupt'].sum(),
      bad_step=jnp.where(bad, state.step + 1, window.bad_step),
    )
    return (
      TrainState(state.step + 1, params, batch_stats, opt_state, *averaged),
      window,
    )

  return train_step


def _averaged(state: TrainState, params: Any, batch_stats: Any, config: Any) -> tuple[Any, Any]:
  """The exponential moving averages of parameters and BatchNorm statistics after a step."""
  if state.ema_params is None:
    return None, None
  decay = jnp.asarray(config.decay, jnp.float32)
  if config.warmup:
    # TensorFlow's `num_updates`: young averages forget their start sooner.
    count = state.step.astype(jnp.float32) + 1
    decay = jnp.minimum(decay, (1 + count) / (10 + count))

  def average(old: Any, new: Any) -> Any:
    return jax.tree.map(lambda a, b: (a + (1 - decay) * (b - a)).astype(a.dtype), old, new)

  return average(state.ema_params, params), average(state.ema_batch_stats, batch_stats)
