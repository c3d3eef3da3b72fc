"""TPU programs of operators: convolutions cost what XLA's own do, attention is not padded.

By cost and memory analysis, compiled ahead of time for a TPU v4 that need not be there.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from tests import compilation
from vision_attention.ops import convolution, local_attention

pytest.importorskip('libtpu', reason='libtpu exists for Linux on x86-64 only')
pytestmark = [pytest.mark.aot, pytest.mark.optimized]


@pytest.fixture(scope='module')
def sharding():
  """One core of a TPU v4."""
  os.environ |= {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v4-8',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  }
  with compilation.without_flags():
    topology = topologies.get_topology_desc(
      platform='tpu', topology_name='v4:2x2x1', chip_config_name='megacore'
    )
    mesh = jax.sharding.Mesh(np.array(topology.devices)[:1], ('data',))
    sharding = NamedSharding(mesh, PartitionSpec())
    _compile(jnp.sin, [(8, 128)], sharding)
  return sharding


def _compile(function, shapes, sharding):
  def loss(*args):
    y, pull = jax.vjp(function, *args)
    return y, pull(jnp.cos(y))

  args = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=sharding) for s in shapes]
  return jax.jit(loss).lower(*args).compile()


def _cost(function, shapes, sharding):
  cost = _compile(function, shapes, sharding).cost_analysis()
  return {key: cost[key] for key in ('flops', 'bytes accessed', 'optimal_seconds')}


def _plain(x, kernel, stride, groups):
  return lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )


@pytest.mark.parametrize(
  ('size', 'inputs', 'outputs', 'groups', 'stride'),
  [
    (1, 64, 128, 1, 1),
    (3, 64, 64, 1, 1),
    (3, 64, 64, 1, 2),
    (3, 128, 128, 128, 1),
    (3, 128, 128, 128, 2),
    (7, 3, 64, 1, 2),
    (4, 3, 64, 1, 4),
  ],
  ids=['1x1', 'dense', 'dense-stride', 'depthwise', 'depthwise-stride', 'stem', 'patches'],
)
def test_convolution_costs_what_the_plain_one_costs(
  size, inputs, outputs, groups, stride, sharding
):
  shapes = [(8, 16, 16, inputs), (size, size, inputs // groups, outputs)]
  ours = functools.partial(convolution.conv, stride=stride, groups=groups)
  plain = functools.partial(_plain, stride=stride, groups=groups)
  cost = _cost(ours, shapes, sharding)
  assert cost == _cost(plain, shapes, sharding)
  assert cost['flops'] > 0


def test_gradient_of_a_gate_compiles(sharding):
  """As XLA's own convolution, the gradient of this kernel takes the compiler many minutes."""
  shapes = [(128, 56, 56, 2), (7, 7, 2, 1)]
  assert _cost(convolution.conv, shapes, sharding)['flops'] > 0


def test_max_pool_costs_what_the_plain_one_costs(sharding):
  def plain(x):
    low = np.asarray(-np.inf, x.dtype)[()]
    return lax.reduce_window(x, low, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), 'SAME')

  ours = functools.partial(convolution.max_pool, window=3, stride=2, padding='same')
  shapes = [(8, 16, 16, 64)]
  assert _cost(ours, shapes, sharding) == _cost(plain, shapes, sharding)


def test_the_comparison_sees_another_form(sharding):
  """Winograd's products, forced, cost something else: the equality above is no accident."""
  from vision_attention.ops import convolution_cpu

  shapes = [(8, 16, 16, 64), (3, 3, 64, 64)]

  def forced(x, kernel):
    return convolution_cpu.winograd(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), kernel, 1)

  plain = functools.partial(_plain, stride=1, groups=1)
  assert _cost(forced, shapes, sharding) != _cost(plain, shapes, sharding)


def test_logits_of_local_attention_are_not_padded(sharding):
  """Axes of 8 or 14 pixels at the end of an array, padded to tiles, held 20 times the logits."""
  batch, size, heads, dim = 32, 16, 4, 16
  near = local_attention.halo(8, 3)
  maps, table = (batch, size, size, heads, dim), (local_attention.table_size(near), dim)
  attend = functools.partial(local_attention.local_attention, near=near)
  program = _compile(attend, [maps, maps, maps, table, table], sharding)
  logits = batch * heads * size**2 * np.prod(near.window) * 4
  assert program.memory_analysis().temp_size_in_bytes < 3 * logits
