"""Removes heads from a run of the paper on attention and convolution, to train what is left on.

  python tools/prune_heads.py runs/general runs/pruned
  python tools/prune_heads.py runs/quadratic runs/pruned --heads 0:3,5 4:0

The first line removes the heads that are degenerate: those that look everywhere alike and, of the
non-isotropic Gaussians, those that look along one line alike (arXiv 1911.03584). `--heads` names
the heads of a layer instead, both counted from zero. Averaged weights are taken where the run has
any.

What is written has one checkpoint and the run's config, with the heads that each layer has left as
`model.options.num_heads`: `va.load` makes the model of it, and a run starts from it by the recipe
of `configs/conv_attention_quadratic.py` with the arguments `init` and `heads`, which are printed.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

import vision_attention as va
from vision_attention import checkpoint, errors, folders
from vision_attention.models import pruning
from vision_attention.training import state


def parse_heads(texts: Sequence[str]) -> dict[int, tuple[int, ...]]:
  """Reads `layer:head,head,...`.

  Raises:
    ValueError: if one does not read so, or a layer stands in two.
  """
  found: dict[int, tuple[int, ...]] = {}
  for text in texts:
    layer, _, heads = text.partition(':')
    if not all(part.isdigit() for part in (layer, *heads.split(','))):
      raise ValueError(f'--heads {text!r} is not layer:head,head,...: for example 0:3,5')
    if int(layer) in found:
      raise ValueError(f'--heads names layer {layer} twice: put its heads together')
    found[int(layer)] = tuple(int(head) for head in heads.split(','))
  return found


def write(out: folders.Folder, variables: Mapping[str, Any], config: Any) -> None:
  """Writes variables and their config as a run before its first step.

  Raises:
    FileExistsError: if there is a run already.
  """
  if (out / checkpoint.CONFIG).exists() or checkpoint.steps_of(out):
    raise FileExistsError(f'{out} holds a run already: name another folder, or remove it')
  folders.make(out)
  folders.write(out / checkpoint.CONFIG, config.to_json_best_effort(indent=2))
  manager = checkpoint.Manager(out, keep_latest=1, keep_best=0)
  manager.save(0, dict(variables), state.new_window(), config, None)
  manager.close()


def prune(
  run: str, out: folders.Folder, heads: Mapping[int, Sequence[int]] | None = None
) -> tuple[int, ...]:
  """Prunes a run into a folder; see above. Returns how many heads each layer has left.

  Raises:
    FileNotFoundError: if there is no such run.
    FileExistsError: if there is one in `out`.
    ValueError: if there is nothing to remove, or not this.
  """
  _, variables, config = va.load(run)
  before = pruning.num_heads(variables)
  heads = pruning.degenerate(variables) if heads is None else heads
  if not any(heads.values()):
    raise ValueError(f'no head of {run} is degenerate: name those to remove by --heads')
  pruned, left = pruning.prune(variables, heads)
  # The config's own number may be one for all layers.
  options = {**config.model.options.to_dict(), 'num_heads': left}
  config.model.options = ml_collections.ConfigDict(options)
  config.init.path = str(run)
  config.ema.decay = 0.0
  write(out, pruned, config)
  for layer, (many, few) in enumerate(zip(before, left, strict=True)):
    gone = ', '.join(map(str, sorted(heads.get(layer, ())))) or 'none'
    print(f'layer {layer}: {few} of {many} heads are left, removed: {gone}')
  sizes = [
    sum(np.size(leaf) for leaf in jax.tree.leaves(tree['params'])) for tree in (variables, pruned)
  ]
  print(f'{sizes[1]:,} of {sizes[0]:,} parameters')
  print(f'variant={config.model.name},init={out},heads={"/".join(map(str, left))}')
  return left


def main(argv: Sequence[str] | None = None) -> None:
  summary, _, rest = (__doc__ or '').partition('\n')
  parser = argparse.ArgumentParser(
    description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('run', help='folder of a run, or of one of its checkpoints')
  parser.add_argument('out', help='folder to write to')
  parser.add_argument('--heads', nargs='+', metavar='LAYER:HEADS', help='what to remove')
  args = parser.parse_args(argv)
  errors.run(
    lambda: prune(args.run, folders.folder(args.out), args.heads and parse_heads(args.heads))
  )


if __name__ == '__main__':
  sys.exit(main())
