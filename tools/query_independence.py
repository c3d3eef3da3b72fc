"""Prints how much the attention of a trained model depends on its queries.

  python tools/query_independence.py runs/nl_resnet50
  python tools/query_independence.py runs/nl_resnet50 --batch_size=16 --batches=4

The statistic of GCNet (arXiv 1904.11492, section 3.1): the mean cosine distance over all pairs of
positions, of what goes into a layer of attention, of what it gives (of a residual block, without
what it adds to), and of the rows of its map; beside it the Jensen-Shannon divergence of rows. A
large number for the input and almost none for the rest means that all queries see the same. In the
paper: 0.4 for the input and 0.00 to 0.18 for the maps of non-local blocks.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import vision_attention as va
from vision_attention.data import pipeline
from vision_attention.ops import attention_statistics
from vision_attention.training import mixing

COLUMNS = ('input', 'output', 'att', 'att_jsd')


def measure(model: nn.Module, variables: Any, images: jax.Array) -> dict[str, dict[str, jax.Array]]:
  """Returns, by the path of every layer that sows a map of attention, its `COLUMNS`.

  Distances are means over the images, and for maps over the heads. Rows of a map that are not
  distributions have no divergence: NaN.
  """
  seen: dict[str, dict[str, jax.Array]] = {}

  def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    result = call(*args, **kwargs)
    if context.method_name == '__call__' and isinstance(result, jax.Array) and args:
      x, path = args[0], '/'.join(context.module.path)
      # A module that keeps the shape and is residual is one of those with a placement.
      residual = getattr(context.module, 'placement', None) and x.shape == result.shape
      seen[path] = {'input': x, 'output': result - x if residual else result}
    return result

  with nn.intercept_methods(watch):
    _, sown = model.apply(variables, images, train=False, mutable=['intermediates'])  # pyright: ignore

  table = {}
  for key_path, weights in jax.tree_util.tree_leaves_with_path(sown):
    keys = [str(getattr(key, 'key', key)) for key in key_path]
    if 'attention' not in keys or weights.ndim != 4:
      continue
    path = '/'.join(keys[1 : keys.index('attention')])
    values = {
      name: attention_statistics.cosine_distance(value.reshape(len(value), -1, value.shape[-1]))
      for name, value in seen.get(path, {}).items()
    }
    values['att'] = attention_statistics.cosine_distance(weights)
    divergence = attention_statistics.sampled_jensen_shannon(jax.random.key(0), weights)
    stochastic = jnp.allclose(weights.sum(-1), 1.0, atol=1e-3)
    values['att_jsd'] = jnp.where(stochastic, divergence, jnp.nan)
    table[path] = {name: value.mean() for name, value in values.items()}
  return table


def main() -> None:
  parser = argparse.ArgumentParser(description='Statistics of attention maps.')
  parser.add_argument('run', help='folder of a run')
  parser.add_argument('--batch_size', type=int, default=16)
  parser.add_argument('--batches', type=int, default=1)
  args = parser.parse_args()
  model, variables, config = va.load(args.run)
  step = jax.jit(lambda variables, images: measure(model, variables, images))
  tables = []
  batches = pipeline.eval_batches(config.data, batch_size=args.batch_size)
  for _, batch in zip(range(args.batches), batches, strict=False):
    images = mixing.normalize(jnp.asarray(batch['image']), config.data.mean, config.data.std)
    tables.append(jax.device_get(step(variables, images)))
  if not tables[0]:
    raise SystemExit(f'{config.model.name} in {args.run} sows no map of attention')
  print('  '.join([f'{"layer":40}', *(f'{name:>8}' for name in COLUMNS)]))
  for path in tables[0]:
    values = [np.mean([table[path].get(name, np.nan) for table in tables]) for name in COLUMNS]
    print('  '.join([f'{path:40}', *(f'{value:8.4f}' for value in values)]))


if __name__ == '__main__':
  main()
