"""Devices as a mesh of `data`, `fsdp` and `tensor`, and where each array lies on it."""

import logging
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vision_attention.training import optimizer, rendezvous

logger = logging.getLogger('vision_attention')
AXES = ('data', 'fsdp', 'tensor')
BATCH_AXES = ('data', 'fsdp')
# Which axis of an array `tensor` splits, by path, from the end: the heads of attention and the
# width of MLPs, so that a block's only sums over devices are those after its last projections.
TENSOR_RULES = (
  (r'/(query|key|value)/(kernel|bias)$', -1),
  (r'/attn/proj/kernel$', -2),
  (r'/mlp/expand/(kernel|bias)$', -1),
  (r'/mlp/project/kernel$', -2),
)
# Smaller arrays are not worth the messages that gather them.
MIN_SIZE = 2**14
# How a process ends that has lost another one (EX_UNAVAILABLE), and what is said of it below.
LOST = 69
_NOTICE = 3.0  # seconds
_LOST = 'gloo|connection|coordination|heartbeat|barrier|unavailable|deadline|peer|socket'
# In errors of other kinds, which may tell of a bucket's connections too.
_LOST_ELSEWHERE = 'gloo|coordination service|heartbeat|sync_global_devices'
_VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
# Ports from here on are none that Linux gives to connections by itself.
_PORTS = range(61440, 65536)


def join_processes(join_seconds: int = 180, heartbeat_seconds: int = 60) -> None:
  """Joins the processes of a TPU slice, of srun or mpirun; one process alone needs nothing.

  Elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, which also go before
  what srun says. Call it before any array is made.

  Args:
    join_seconds: how long processes wait for each other.
    heartbeat_seconds: a process silent for so long is lost, which ends the others.

  Raises:
    ValueError: if the variables say nothing, or not the same, or the devices form no slice.
    TimeoutError: if not all processes came in time.
  """
  env = os.environ
  on_tpu = any(pathlib.Path('/dev').glob('accel[0-9]*')) or any(
    pathlib.Path('/dev/vfio').glob('[0-9]*')
  )
  limits: dict[str, Any] = {
    'initialization_timeout': join_seconds,
    'heartbeat_timeout_seconds': heartbeat_seconds,
  }
  # Tasks of srun may be what mpirun itself starts on the nodes.
  mpi = int(env.get('OMPI_COMM_WORLD_SIZE', 1))
  if found := coordinator(env) or (slurm_step(env) if mpi == 1 else None):
    address, count, index = found
    if count == 1:
      return
    rendezvous.meet(address, count, index, join_seconds)
    jax.distributed.initialize(address, count, index, **limits)
    check_joined(count, jax.process_count())
  elif mpi > 1:
    jax.distributed.initialize(**limits)
    check_joined(mpi, jax.process_count())
  elif on_tpu and env.get('JAX_PLATFORMS', 'tpu') != 'cpu':
    try:
      jax.distributed.initialize(**limits)
    except ValueError:
      logger.warning('this TPU belongs to no slice that names its workers: it is used alone')


def coordinator(env: Mapping[str, str]) -> tuple[str, int, int] | None:
  """Returns address, number of processes and which this is, or None where nothing says so.

  Raises:
    ValueError: if one of the three variables is missing or out of range.
  """
  missing = [name for name in _VARIABLES if not env.get(name)]
  if len(missing) == len(_VARIABLES):
    return None
  if missing:
    raise ValueError(
      f'{", ".join(missing)} is not set: set all of {", ".join(_VARIABLES)}, or none'
    )
  of_address, of_count, of_index = _VARIABLES
  match = re.fullmatch(r'\S+:(\d{1,5})', env[of_address])
  if not match or not 0 < int(match[1]) < 2**16:
    raise ValueError(f'{of_address} {env[of_address]!r} does not read like host:port')
  return env[of_address], *_place(env, of_count, of_index)


def slurm_step(env: Mapping[str, str]) -> tuple[str, int, int] | None:
  """Returns the same of the tasks that one srun starts, or None in a process that has no others.

  A batch script and a shell of salloc are such processes, whatever the job's number of tasks. The
  address is the step's first node, where Slurm puts task 0, and JAX_COORDINATOR_PORT or else a port
  made of the numbers of job and step. The variables are those of srun(1).

  Raises:
    ValueError: if a variable is missing, out of range or unreadable.
  """
  if (env.get('SLURM_STEP_NUM_TASKS') or '1') == '1':
    if (tasks := env.get('SLURM_NTASKS', '1')) != '1':
      logger.warning(
        'the Slurm job has %s tasks, but this process is none of them and trains alone: start one '
        'in every task by `srun python main.py ...`',
        tasks,
      )
    return None
  names = ('SLURM_PROCID', 'SLURM_STEP_NODELIST', 'SLURM_JOB_ID')
  if missing := [name for name in names if not env.get(name)]:
    raise ValueError(
      f'{", ".join(missing)} is not set, though SLURM_STEP_NUM_TASKS={env["SLURM_STEP_NUM_TASKS"]} '
      f'is: let the container keep the variables of srun, or set {", ".join(_VARIABLES)}'
    )
  count, index = _place(env, 'SLURM_STEP_NUM_TASKS', 'SLURM_PROCID')
  port = env.get('JAX_COORDINATOR_PORT') or str(
    # The step too, since one node may begin several of a job; far apart, since jobs are neighbours.
    _PORTS[(_number(env, 'SLURM_JOB_ID') + 509 * _number(env, 'SLURM_STEP_ID')) % len(_PORTS)]
  )
  if not port.isdecimal() or not 0 < int(port) < 2**16:
    raise ValueError(f'JAX_COORDINATOR_PORT {port!r} is no port: set it to one from 1 to 65535')
  return f'{first_node(env["SLURM_STEP_NODELIST"])}:{port}', count, index


def first_node(nodes: str) -> str:
  """Returns the first of a list of nodes as Slurm writes it, `node003` of `node[003-008,010],big1`.

  Raises:
    ValueError: if it does not read like one.
  """
  # Up to a comma that is in no bracket; of each bracket what its first range begins with.
  first = re.match(r'((?:[^],[]|\[[^][]*\])*)(,|$)', nodes)
  host = re.sub(r'\[(\w+)[^]]*\]', r'\1', first[1] if first else '')
  if not re.fullmatch(r'[\w.-]+', host):
    raise ValueError(
      f'SLURM_STEP_NODELIST {nodes!r} does not read like node[003-008,010],big1: set '
      f'{", ".join(_VARIABLES)}'
    )
  return host


def _number(env: Mapping[str, str], name: str) -> int:
  text = env.get(name) or '0'
  if not text.isdecimal():
    raise ValueError(f'{name} {text!r} is no whole number')
  return int(text)


def _place(env: Mapping[str, str], of_count: str, of_index: str) -> tuple[int, int]:
  count, index = _number(env, of_count), _number(env, of_index)
  if count < 1:
    raise ValueError(f'{of_count} {count} is not at least 1')
  if index >= count:
    raise ValueError(
      f'{of_index} {index} is not between 0 and {count - 1}, as {of_count} {count} says'
    )
  return count, index


def check_joined(count: int, found: int) -> None:
  """Refuses processes that have met but whose devices do not see each other.

  Raises:
    ValueError: if so.
  """
  if found != count:
    raise ValueError(
      f'{count} processes have met, but their devices see {found}: TPU VMs that were made one by '
      'one cannot be joined to a slice. Create one slice (such as v4-16) and start the run on all '
      'its workers, or train on one VM without JAX_COORDINATOR_ADDRESS'
    )


def end_if_others_are_lost(job: Callable[[], Any]) -> Any:
  """Does a job; if another process is lost, says so and ends this one at once.

  What follows such an error in order would wait for the lost process.
  """
  try:
    return job()
  except Exception as error:  # of many kinds, by what was under way
    if jax.process_count() == 1 or not _tells_of_loss(error):
      raise
    logger.error(  # a traceback would hide it
      'process %d of %d lost another one, and ends (%s): start all processes again, in any number; '
      'the run goes on from its last checkpoint',
      jax.process_index(),
      jax.process_count(),
      str(error).splitlines()[0][:200],
    )
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
      time.sleep(_NOTICE)  # JAX aborts who has not noticed the loss when process 0 ends
    os._exit(LOST)


def _tells_of_loss(error: BaseException | None) -> bool:
  """Whether an error, or what caused it, is of the kind that a lost process leaves behind."""
  while error is not None:
    pattern = _LOST if isinstance(error, jax.errors.JaxRuntimeError) else _LOST_ELSEWHERE
    if re.search(pattern, str(error), re.IGNORECASE):
      return True
    error = error.__cause__
  return False


def make_mesh(data: int, fsdp: int, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
  """Makes the mesh; an axis of -1 takes what the others leave.

  Each process has one block of the batch, and the blocks lie in the order of the processes.

  Raises:
    ValueError: if the axes do not multiply to the number of devices, or if `tensor` reaches from
      one process to another, which read different images.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [data, fsdp, tensor]
  if sizes.count(-1) == 1:
    known = math.prod(size for size in sizes if size != -1)
    sizes[sizes.index(-1)] = len(devices) // max(known, 1)
  if min(sizes) < 1 or math.prod(sizes) != len(devices):
    raise ValueError(
      f'config.mesh data={data}, fsdp={fsdp}, tensor={tensor} does not give {len(devices)} '
      'devices: one of them may be -1, and the others must divide that number'
    )
  # The numbers of a TPU slice's devices follow its shape, not its processes.
  devices = sorted(devices, key=lambda device: device.process_index)
  grid = np.asarray(devices).reshape(sizes)
  for row in grid.reshape(-1, sizes[2]):
    if len({device.process_index for device in row}) > 1:
      local = sum(device.process_index == row[0].process_index for device in devices)
      raise ValueError(
        f'config.mesh.tensor {sizes[2]} reaches over processes, which have {local} devices each: '
        'it must divide that number'
      )
  return Mesh(grid, AXES)


def batch_devices(mesh: Mesh) -> int:
  """Into how many parts a batch is split; the devices along `tensor` share one."""
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The batch is split over `data` and `fsdp`, and the same along `tensor`."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def to_devices(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
  """Puts this process's block of a batch on its devices; process `i` has the `i`-th."""
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
  axes: list[str | None] = [None] * len(shape)
  if (parts := mesh.shape['tensor']) > 1:
    for pattern, axis in TENSOR_RULES:
      # Moments that an optimizer keeps in another shape are found by the same path.
      if re.search(pattern, path) and len(shape) >= -axis and not shape[axis] % parts:
        axes[axis] = 'tensor'
  count = mesh.shape['fsdp']
  free = [i for i, size in enumerate(shape) if size % count == 0 and axes[i] is None]
  if count > 1 and math.prod(shape) >= MIN_SIZE and free:
    axes[max(free, key=lambda i: shape[i])] = 'fsdp'
  while axes and axes[-1] is None:
    axes.pop()
  return PartitionSpec(*axes)


def shardings(tree: Any, mesh: Mesh, rules: Sequence = ()) -> Any:
  """Returns where each array of a tree of shapes lies.

  The first rule (pattern, axes) whose pattern is found in the array's path decides; otherwise
  `tensor` splits what TENSOR_RULES say, and `fsdp` the widest other axis that it divides.
  Moments and averages lie like their parameters.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: NamedSharding(
      mesh, _spec(optimizer.path_of(path), tuple(leaf.shape), mesh, rules)
    ),
    tree,
  )


def check_rules(tree: Any, rules: Sequence) -> None:
  """Raises ValueError for a rule whose pattern is in no path of a whole state."""
  paths = [optimizer.path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  for pattern, _ in rules:
    if not any(re.search(pattern, path) for path in paths):
      raise ValueError(
        f'config.sharding_rules {pattern!r} matches none of {len(paths)} arrays, such as {paths[0]}'
      )


def bytes_per_device(tree: Any, placed: Any) -> int:
  """Returns how many bytes of a tree of shapes each device holds."""
  sizes = jax.tree.map(
    lambda leaf, where: math.prod(where.shard_shape(tuple(leaf.shape))) * leaf.dtype.itemsize,
    tree,
    placed,
  )
  return sum(jax.tree.leaves(sizes))
