"""Times a model's inference and train step on this machine.

    python tools/benchmark.py coatnet_0 resnet_50 --batch_size=8 --rounds=10

    python tools/benchmark.py --memory

`--memory` runs nothing: it prints, per side of the window, the bytes that a layer of QnA, of
neighbourhood attention and of stand-alone self-attention need, forward and backward.

Prints minimum and median milliseconds of `--rounds` turns of best-of-two calls. The train step is
forward, backward and AdamW on a fixed batch. On a CPU, glibc gives every large buffer back to the
kernel after each call, which can double the time; set this before the program starts:

    limits=glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=8589934592
    export GLIBC_TUNABLES=$limits:glibc.malloc.hugetlb=1
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import vision_attention as va
from vision_attention.attention import operators


def make_steps(
  name: str, batch_size: int, image_size: int | None, dtype: Any
) -> dict[str, Callable[[], Any]]:
  """Returns `inference` and `train`, functions of no argument that run one step to its end."""
  model, info = va.create_model(name, image_size=image_size, dtype=dtype)
  images = jax.random.normal(jax.random.key(1), (batch_size, *info.image_size, 3))
  labels = jnp.arange(batch_size) % info.num_classes
  variables = jax.jit(model.init)(jax.random.key(0), images[:1])
  optimizer = optax.adamw(1e-3)

  @jax.jit
  def infer(variables, images):
    return model.apply(variables, images, train=False)

  @jax.jit
  def train(params, stats, opt_state, key):
    def loss_of(params):
      logits, changed = model.apply(
        {'params': params, **stats}, images, train=True, rngs={'dropout': key}, mutable=list(stats)
      )
      loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
      return loss, changed

    (loss, changed), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), changed, opt_state, loss

  params = variables['params']
  stats = {key: value for key, value in variables.items() if key != 'params'}
  state = (params, stats, jax.jit(optimizer.init)(params))

  def train_once():
    nonlocal state
    *new, loss = train(*state, jax.random.key(2))
    jax.block_until_ready(loss)
    jax.block_until_ready(new)
    state = tuple(new)

  return {
    'inference': lambda: jax.block_until_ready(infer(variables, images)),
    'train': train_once,
  }


def best_of(step: Callable[[], Any], calls: int = 2) -> float:
  """Returns the shortest of `calls` runs, in milliseconds."""
  times = []
  for _ in range(calls):
    start = time.perf_counter()
    step()
    times.append(1e3 * (time.perf_counter() - start))
  return min(times)


# By window: QnA's does not grow with it (arXiv 2112.11435), that of attention maps with its area.
LAYERS = ('qna', 'neighborhood', 'sasa')


def peak_bytes(name: str, kernel: int, *, size: int = 56, dim: int = 96, batch: int = 4) -> int:
  """Returns the peak memory of value and gradients of a layer, as the compiler plans it."""
  made = operators.operator({'name': name, 'kernel': kernel})
  layer = made(dim=dim, num_heads=dim // 32)
  x = jax.ShapeDtypeStruct((batch, size, size, dim), jnp.float32)
  variables = jax.eval_shape(functools.partial(layer.init, train=False), jax.random.key(0), x)

  def loss(variables, x):
    y: Any = layer.apply(variables, x, train=False)
    return jnp.square(y).sum()

  program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(variables, x).compile()
  plan = program.memory_analysis()
  assert plan is not None
  return plan.temp_size_in_bytes + plan.argument_size_in_bytes + plan.output_size_in_bytes


def print_memory(kernels: Sequence[int] = (3, 5, 7, 9, 11)) -> None:
  """Prints `peak_bytes` of every layer and window."""
  print('MB, forward and backward, 4 maps of 56x56x96, heads of 32 channels, float32')
  print('window ' + ''.join(f'{name:>14}' for name in LAYERS), flush=True)
  for kernel in kernels:
    row = [peak_bytes(name, kernel) / 1e6 for name in LAYERS]
    print(f'{kernel:>2}x{kernel:<4}' + ''.join(f'{value:>14.1f}' for value in row), flush=True)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('models', nargs='*', help='registered names')
  parser.add_argument('--memory', action='store_true', help='print memory by window')
  parser.add_argument('--batch_size', type=int, default=8)
  parser.add_argument('--image_size', type=int, default=None, help='the published one by default')
  parser.add_argument('--rounds', type=int, default=10)
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
  args = parser.parse_args()
  if args.memory:
    print_memory()
  elif not args.models:
    parser.error('pass registered names, or --memory')
  for name in args.models:
    steps = make_steps(name, args.batch_size, args.image_size, jnp.dtype(args.dtype))
    for kind, step in steps.items():
      step()  # compiles
      times = [best_of(step) for _ in range(args.rounds)]
      print(
        f'{name} {kind}: {min(times):.1f} ms min, {statistics.median(times):.1f} ms median '
        f'({jax.default_backend()}, batch {args.batch_size}, {args.dtype})',
        flush=True,
      )


if __name__ == '__main__':
  main()
