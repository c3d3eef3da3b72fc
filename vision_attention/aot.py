"""The real training step of a config, compiled for accelerators that need not be there.

Needs `libtpu`, on Linux. Compiled programs tell what they hold in memory, exactly, and what their
devices say to each other; they tell nothing of speed.
"""

import dataclasses
import logging
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from vision_attention import errors, macs, planning
from vision_attention.training import objective, schedule, sharding, state

logger = logging.getLogger('vision_attention')
_GIB = 2**30
# Usable GiB of a device, as the compiler names them when a program is too large. Those of a v2 or
# v3 are a core's; a chip has two.
HBM = {'v2': 7.48, 'v3': 15.48, 'v4': 30.75, 'v5e': 15.75, 'v5p': 95.73, 'v6e': 31.24}
# Whose two cores work as one device.
_MEGACORE = {'v4', 'v5p'}
_TYPES = {'f32': 4, 'bf16': 2, 's32': 4, 'u32': 4, 'f16': 2, 'pred': 1, 's8': 1, 'u8': 1}
_COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')


class DoesNotFitError(ValueError):
  """The program needs more memory than a device has."""


@dataclasses.dataclass(frozen=True)
class Report:
  """What a compiled step says of itself, per device.

  Attributes:
    devices: number of devices.
    batch: images per device; those along `tensor` share them.
    arguments: bytes of state and batch.
    outputs: bytes of the results, of which `aliased` lie where arguments lay.
    aliased: see there.
    temporaries: bytes of everything between.
    macs: multiply-adds of the forward pass of one image.
    collectives: by kind, how many and how many bytes they give; the body of a loop counts once.
    seconds: of compilation.
  """

  devices: int
  batch: int
  arguments: int
  outputs: int
  aliased: int
  temporaries: int
  macs: int
  collectives: dict[str, tuple[int, int]]
  seconds: float

  @property
  def total(self) -> int:
    """Bytes that a device must hold at once."""
    return self.arguments + self.outputs - self.aliased + self.temporaries


def devices(topology: str) -> list[Any]:
  """Returns the devices of a topology such as `v4:2x2x1`.

  Raises:
    ValueError: for an unknown chip or shape.
    ModuleNotFoundError: without libtpu.
  """
  chip, _, shape = topology.partition(':')
  errors.check_choice('chip of the topology', chip, HBM)
  if not re.fullmatch(r'\d+(x\d+){1,2}', shape):
    raise ValueError(f'topology {topology!r} does not read like v4:2x2x1 or v5e:16x16')
  # libtpu asks for these where it runs; here they only keep it from looking for a TPU.
  os.environ |= {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v4-8',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  }
  import libtpu  # noqa: F401  # an error here names the package
  from jax.experimental import topologies

  options = {'chip_config_name': 'megacore'} if chip in _MEGACORE else {}
  return list(
    topologies.get_topology_desc(platform='tpu', topology_name=topology, **options).devices
  )


def _take_batch(config: Any, batch_size: int) -> None:
  """Changes the batch and leaves run and epoch as many steps: a warm-up may need them."""
  examples = max(config.data.num_train, config.batch_size)
  total = schedule.steps(config.total, num_examples=examples, batch_size=config.batch_size)
  config.total = f'{total} steps'
  config.data.num_train = examples * batch_size // config.batch_size
  config.batch_size, config.eval.batch_size = batch_size, 0


def compile_step(config: Any, topology: str, batch_per_device: int | None = None) -> Report:
  """Compiles the training step of a config.

  Args:
    config: as of a run; data are not touched.
    topology: see `devices`.
    batch_per_device: images per device, in place of the config's batch.

  Raises:
    DoesNotFitError: if a device has too little memory; the message is the compiler's.
    ValueError: for whatever a run would be refused for.
  """
  found = devices(topology)
  config = ml_collections.ConfigDict(config.copy_and_resolve_references())
  if batch_per_device is not None:
    _take_batch(config, batch_per_device * (len(found) // max(config.mesh.tensor, 1)))
  # How often a run writes is no part of its step, nor how long an epoch is: one step, at least.
  config.log_every = config.eval.every = config.checkpoint.every = '1 steps'
  config.data.num_train = max(config.data.num_train, config.batch_size)
  plan = planning.prepare(config, with_data=False, devices=found)
  step = jax.jit(
    state.make_train_step(
      plan.model.apply,
      plan.optimizer,
      plan.config,
      plan.config.data.num_classes,
      outputs=plan.model.outputs,
      teacher=plan.teacher and plan.teacher.apply,
    ),
    donate_argnums=0,
    out_shardings=plan.places,
  )
  place = lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)
  arguments = list(jax.tree.map(place, plan.shapes, plan.places))
  batch, (height, width) = plan.config.batch_size, plan.info.image_size
  split = sharding.batch_sharding(plan.mesh)
  fields: dict[str, tuple[tuple[int, ...], Any]] = {
    'image': ((height, width, 3), jnp.uint8),
    'label': ((), jnp.int32),
    'corrupt': ((), jnp.int32),
  }
  if plan.config.data.label_maps:
    fields['label_map'] = objective.PUBLISHED_MAP, jnp.float16
    fields |= {'label_view': ((2, 3), jnp.float32), 'label_bounds': ((2, 2), jnp.float32)}
  arguments.append(
    {
      key: jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=split)
      for key, (shape, dtype) in fields.items()
    }
  )
  if plan.teacher is not None:
    images = jnp.zeros((1, height, width, 3))
    shapes = jax.eval_shape(plan.teacher.init, jax.random.key(0), images)
    arguments.append(jax.tree.map(place, shapes, sharding.shardings(shapes, plan.mesh)))
  began = time.monotonic()
  try:
    compiled = step.lower(*arguments).compile()
  except jax.errors.JaxRuntimeError as error:
    if 'hbm' not in str(error).lower():
      raise
    raise DoesNotFitError(str(error).splitlines()[0]) from error
  seconds = time.monotonic() - began
  memory, text = compiled.memory_analysis(), compiled.as_text()
  assert memory is not None
  assert text is not None
  return Report(
    devices=len(found),
    batch=batch // sharding.batch_devices(plan.mesh),
    arguments=memory.argument_size_in_bytes,
    outputs=memory.output_size_in_bytes,
    aliased=memory.alias_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    macs=macs.count_macs(plan.model, image_size=plan.info.image_size),
    collectives=collectives(text),
    seconds=seconds,
  )


def ways_to_fit(config: Any, count: int) -> list[tuple[str, Any]]:
  """Returns a config and what may be changed in it to save memory, from what costs the least.

  Args:
    config: as of a run.
    count: of devices.

  Returns:
    Names and configs: as it is; with the blocks' activations computed again; and with the state
    split over all devices besides. What the config does already is not there twice.
  """
  ways = [('as the config says', config)]
  changed: Any = ml_collections.ConfigDict(config.copy_and_resolve_references())
  if not config.model.options.get('remat'):
    with changed.unlocked():
      changed.model.options.remat = True
    ways.append(('with remat', changed))
  count //= config.mesh.tensor
  if config.mesh.fsdp != count:
    split: Any = ml_collections.ConfigDict(changed.copy_and_resolve_references())
    with split.unlocked():
      split.mesh.data, split.mesh.fsdp = 1, count
    ways.append((f'with remat and fsdp={count}', split))
  return ways


def largest(config: Any, topology: str, batch_per_device: int = 16) -> tuple[str, Report]:
  """Doubles the images per device until they fit in no way that `ways_to_fit` knows.

  Args:
    config: as of a run.
    topology: see `devices`.
    batch_per_device: images to begin with.

  Returns:
    The way in which most images fit, and its report.

  Raises:
    DoesNotFitError: if not even the first batch fits.
  """
  ways = ways_to_fit(config, len(devices(topology)))
  best, batch = None, batch_per_device
  while ways:
    name, changed = ways[0]
    try:
      report = compile_step(changed, topology, batch)
    except DoesNotFitError:
      ways.pop(0)
      continue
    logger.info('%d images fit %s: %.2f GiB', batch, name, report.total / _GIB)
    best, batch = (name, report), 2 * batch
  if best is None:
    raise DoesNotFitError(
      f'not even {batch_per_device} images per device fit: pass fewer, or a larger topology'
    )
  return best


def collectives(program: str) -> dict[str, tuple[int, int]]:
  """Returns by kind how many collectives a program text has, and the bytes of their results."""
  found: dict[str, tuple[int, int]] = {}
  for line in program.splitlines():
    match = re.search(rf'= (.*?) ({"|".join(_COLLECTIVES)})(-start)?\(', line)
    if match is None:
      continue
    shapes = re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', match[1])
    size = sum(
      _TYPES.get(kind, 4) * int(np.prod([int(n) for n in dims.split(',') if n], dtype=np.int64))
      for kind, dims in shapes
    )
    count, total = found.get(match[2], (0, 0))
    # The result of an asynchronous start holds operand and result.
    found[match[2]] = (count + 1, total + (size // 2 if match[3] else size))
  return found
