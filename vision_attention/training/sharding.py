"""Devices as a mesh of `data` and `fsdp`, and where each array lies on it."""

import logging
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vision_attention.training import optimizer

logger = logging.getLogger('vision_attention')
AXES = ('data', 'fsdp')
# Smaller arrays are not worth the messages that gather them.
MIN_SIZE = 2**14


def join_processes() -> None:
  """Joins the processes of a TPU slice, of srun or mpirun; one process alone needs nothing.

  Elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Call it before any
  array is made.
  """
  env = os.environ
  on_tpu = any(pathlib.Path('/dev').glob('accel[0-9]*')) or any(
    pathlib.Path('/dev/vfio').glob('[0-9]*')
  )
  if 'JAX_COORDINATOR_ADDRESS' in env:
    jax.distributed.initialize(
      num_processes=int(env['JAX_NUM_PROCESSES']), process_id=int(env['JAX_PROCESS_ID'])
    )
  elif int(env.get('SLURM_STEP_NUM_TASKS', 1)) > 1 or int(env.get('OMPI_COMM_WORLD_SIZE', 1)) > 1:
    jax.distributed.initialize()
  elif on_tpu and env.get('JAX_PLATFORMS', 'tpu') != 'cpu':
    try:
      jax.distributed.initialize()
    except ValueError:
      logger.warning('this TPU belongs to no slice that names its workers: it is used alone')


def make_mesh(data: int, fsdp: int, devices: Sequence[Any] | None = None) -> Mesh:
  """Makes the mesh; an axis of -1 takes what the other leaves.

  Raises:
    ValueError: if the axes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [data, fsdp]
  if sizes.count(-1) == 1:
    known = math.prod(size for size in sizes if size != -1)
    sizes[sizes.index(-1)] = len(devices) // max(known, 1)
  if min(sizes) < 1 or math.prod(sizes) != len(devices):
    raise ValueError(
      f'config.mesh data={data}, fsdp={fsdp} does not give {len(devices)} devices: one of them may '
      'be -1, and the other must divide that number'
    )
  return Mesh(np.asarray(devices).reshape(sizes), AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The batch is split over all devices."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def to_devices(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
  """Puts this process's share of a batch on its devices."""
  place = batch_sharding(mesh)
  return {key: jax.make_array_from_process_local_data(place, x) for key, x in batch.items()}


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Sequence) -> PartitionSpec:
  for pattern, axes in rules:
    if re.search(pattern, path):
      spec = PartitionSpec(*axes)
      for size, axis in zip(shape, axes, strict=False):
        if axis is not None and size % mesh.shape[axis]:
          raise ValueError(
            f'config.sharding_rules {pattern!r} splits {path} {shape} over {mesh.shape[axis]} '
            f'devices of axis {axis!r}, which do not divide {size}'
          )
      if len(axes) > len(shape):
        raise ValueError(f'config.sharding_rules {pattern!r} has more axes than {path} {shape}')
      return spec
  count = mesh.shape['fsdp']
  divisible = [i for i, size in enumerate(shape) if size % count == 0]
  if count == 1 or math.prod(shape) < MIN_SIZE or not divisible:
    return PartitionSpec()
  widest = max(divisible, key=lambda i: shape[i])
  return PartitionSpec(*(('fsdp' if i == widest else None) for i in range(widest + 1)))


def shardings(tree: Any, mesh: Mesh, rules: Sequence = ()) -> Any:
  """Returns where each array of a tree of shapes lies.

  The first rule (pattern, axes) whose pattern is found in the array's path decides; otherwise the
  widest axis that `fsdp` divides is split over it. Moments and averages lie like their parameters.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: NamedSharding(
      mesh, _spec(optimizer.path_of(path), tuple(leaf.shape), mesh, rules)
    ),
    tree,
  )


def bytes_per_device(tree: Any, placed: Any) -> int:
  """Returns how many bytes of a tree of shapes each device holds."""
  sizes = jax.tree.map(
    lambda leaf, where: math.prod(where.shard_shape(tuple(leaf.shape))) * leaf.dtype.itemsize,
    tree,
    placed,
  )
  return sum(jax.tree.leaves(sizes))
