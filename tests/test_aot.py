"""Training steps compiled for TPUs that are not there, and what their text says."""

import jax
import jax.numpy as jnp
import pytest

from configs import coatnet0, levit_128s, vit_s16
from tests import compilation
from vision_attention import aot, planning

PROGRAM = """
  %a = bf16[4,8]{1,0} all-reduce(%x), replica_groups={}
  %b = (f32[16]{0}, f32[16]{0}) all-reduce-start(%y), replica_groups={}
  %c = f32[16]{0} all-reduce-done(%b)
  %d = f32[2,3]{1,0:T(8,128)} all-gather(%z), dimensions={0}
  %e = f32[2,3]{1,0} add(%d, %d)
"""


@pytest.mark.fast
def test_collectives_are_counted_with_their_bytes():
  assert aot.collectives(PROGRAM) == {'all-reduce': (2, 64 + 64), 'all-gather': (1, 24)}


@pytest.mark.fast
@pytest.mark.parametrize(
  ('topology', 'message'),
  [('v9:2x2', "chip of the topology 'v9' is unknown"), ('v4', 'does not read like v4:2x2x1')],
)
def test_unknown_topologies_are_refused(topology, message):
  with pytest.raises(ValueError, match=message):
    aot.devices(topology)


@pytest.mark.fast
def test_what_may_be_given_for_memory():
  config = coatnet0.get_config()
  ways = aot.ways_to_fit(config, 8)
  assert [name for name, _ in ways] == [
    'as the config says',
    'with remat',
    'with remat and fsdp=8',
  ]
  assert [way.model.options.get('remat', False) for _, way in ways] == [False, True, True]
  assert [(way.mesh.data, way.mesh.fsdp) for _, way in ways] == [(-1, 1), (-1, 1), (1, 8)]
  assert not config.model.options.get('remat')
  assert len(aot.ways_to_fit(ways[2][1], 8)) == 1


@pytest.mark.fast
@pytest.mark.parametrize(
  ('limits', 'expected'),
  [
    # Images that fit: as the config says, with remat, and split as well.
    ((20, 20, 20), ('as the config says', 16)),
    ((20, 40, 140), ('with remat and fsdp=8', 128)),
    ((0, 70, 20), ('with remat', 64)),
  ],
)
def test_the_largest_batch_is_searched_way_by_way(monkeypatch, limits, expected):
  def compile_step(config, topology, batch):
    assert topology == 'v4:2x2x2'
    remat, split = bool(config.model.options.get('remat')), config.mesh.fsdp == 8
    if batch > limits[remat + split]:
      raise aot.DoesNotFitError(batch)
    return aot.Report(8, batch, 0, 0, 0, batch, 0, {}, 0.0)

  monkeypatch.setattr(aot, 'compile_step', compile_step)
  monkeypatch.setattr(aot, 'devices', lambda topology: list(range(8)))
  way, report = aot.largest(coatnet0.get_config(), 'v4:2x2x2')
  assert (way, report.batch) == expected
  with pytest.raises(aot.DoesNotFitError, match='not even 256 images per device fit'):
    aot.largest(coatnet0.get_config(), 'v4:2x2x2', 256)


@pytest.mark.parametrize(
  'config, small',
  [(vit_s16.get_config(), {'depth': 1}), (levit_128s.get_config(), {'depths': (1, 1, 1)})],
  ids=['examples', 'epochs'],
)
def test_a_run_of_another_batch_has_as_many_steps(config, small):
  """A large one would otherwise leave no step after the warm-up."""
  with config.unlocked():
    config.model.options.update(small)
  # Of one device: nothing is computed.
  expected = planning.prepare(config, with_data=False, devices=jax.devices()[:1])
  batch = 64 * config.batch_size
  aot._take_batch(config, batch)
  plan = planning.prepare(config, with_data=False, devices=jax.devices()[:1])
  assert plan.config.batch_size == batch
  assert plan.total == pytest.approx(expected.total, rel=1e-3)


@pytest.mark.aot
@pytest.mark.parametrize(
  'topology', ['v2:2x2', 'v3:2x2', 'v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2']
)
def test_memory_of_a_device_is_what_the_compiler_says(topology):
  pytest.importorskip('libtpu', reason='libtpu exists for Linux on x86-64 only')
  place = jax.sharding.SingleDeviceSharding(aot.devices(topology)[0])
  array = jax.ShapeDtypeStruct((2**28,), jnp.float32, sharding=place)
  copies = jax.jit(lambda x: [x + i for i in range(100)])
  limit = aot.HBM[topology.partition(':')[0]]
  with (
    compilation.without_flags(),
    pytest.raises(jax.errors.JaxRuntimeError, match=rf'exceeds available HBM \({limit}G\)'),
  ):
    copies.lower(array).compile()


@pytest.mark.aot
def test_a_step_compiles_for_a_slice_and_says_what_it_holds():
  pytest.importorskip('libtpu', reason='libtpu exists for Linux on x86-64 only')
  config = coatnet0.get_config('local')
  with config.unlocked():
    config.model.options.update(depths=(1, 1), dims=(8, 16), stem_dim=8, head_dim=8)
    config.model.options.update(layout='CT', strides=(2, 2))
  # A batch that is larger than all epochs together.
  config.data.num_train, config.total, config.schedule.warmup = 4, '1 epochs', '0 steps'
  with compilation.without_flags():
    report = aot.compile_step(config, 'v4:2x2x1', batch_per_device=4)
  assert (report.devices, report.batch) == (4, 4)
  assert 0 < report.macs < 1e9
  # Parameters, two moments and averages; the step's results lie where they lay.
  assert report.arguments > 0
  assert report.aliased > 0.9 * report.outputs
  count, size = report.collectives['all-reduce']
  assert count > 0
  assert size > 0
  config.batch_size = 6
  with pytest.raises(ValueError, match='not a multiple of 4'):
    aot.compile_step(config, 'v4:2x2x1')
