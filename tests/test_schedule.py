"""Durations in any unit, and the schedules' values at the points that define them."""

import functools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import common
from vision_attention.training import schedule

pytestmark = pytest.mark.fast
TOTAL = 1000
TO_STEPS = functools.partial(schedule.steps, num_examples=100, batch_size=10)


def _factor(**changes):
  config = common.get_config().schedule
  config.update(changes)
  return schedule.relative(config, total=TOTAL, to_steps=TO_STEPS)


@pytest.mark.parametrize(
  'duration, expected',
  [
    ('300 epochs', 375_342),  # 300 x 1281167 / 1024 = 375341.9
    ('1 epoch', 1251),
    ('0.5 epochs', 626),
    ('10_000 steps', 10_000),
    ('1e6 examples', 977),
    ('0 steps', 0),
  ],
)
def test_durations(duration, expected):
  assert schedule.steps(duration, num_examples=1_281_167, batch_size=1024) == expected


@pytest.mark.parametrize('duration', ['300', '300 eons', 'ten steps', '-1 steps', 'nan epochs', ''])
def test_durations_that_do_not_read(duration):
  with pytest.raises(ValueError, match='does not read like'):
    schedule.steps(duration, num_examples=10, batch_size=1)


def test_warmup_is_linear_from_zero():
  factor = _factor(kind='constant', warmup='100 steps')
  for step, expected in ((0, 0.0), (25, 0.25), (99, 0.99), (100, 1.0), (900, 1.0)):
    assert float(factor(step)) == pytest.approx(expected)


def test_cosine_falls_to_its_end():
  factor = _factor(kind='cosine', warmup='100 steps', final=0.01)
  assert float(factor(100)) == pytest.approx(1.0)
  assert float(factor(550)) == pytest.approx(0.505)  # half way
  assert float(factor(325)) == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi / 4)) / 2)
  assert float(factor(1000)) == pytest.approx(0.01)
  assert float(factor(1100)) == pytest.approx(0.01), 'and stays there'


def test_linear_falls_to_its_end():
  factor = _factor(kind='linear', final=0.2)
  assert float(factor(0)) == 1.0
  assert float(factor(250)) == pytest.approx(0.8)
  assert float(factor(1000)) == pytest.approx(0.2)


def test_step_decay_changes_at_its_boundaries():
  factor = _factor(kind='step', warmup='5 epochs', boundaries=('30 epochs', '60 epochs'))
  values = [float(factor(step)) for step in (25, 50, 299, 300, 599, 600)]
  assert values == pytest.approx([0.5, 1.0, 1.0, 0.1, 0.1, 0.01])


def test_rsqrt_with_cooldown():
  """arXiv 2106.04560: one over the square root of time from the timescale on, then down to zero."""
  factor = _factor(kind='rsqrt', timescale=100, warmup='100 steps', cooldown='200 steps')
  assert float(factor(100)) == pytest.approx(1.0)
  assert float(factor(400)) == pytest.approx(0.5)
  assert float(factor(900)) == pytest.approx(math.sqrt(100 / 900) / 2)
  assert float(factor(1000)) == 0.0


def test_timms_schedule_moves_by_epochs_beneath_its_warm_up_and_holds_at_the_end():
  factor = _factor(
    warmup='20 epochs',
    warmup_init=0.1,
    warmup_prefix=False,
    final=0.01,
    hold='10 epochs',
    every='1 epochs',
  )
  assert float(factor(0)) == float(factor(9)) == pytest.approx(0.1)
  assert float(factor(105)) == pytest.approx(0.1 + 0.9 * 10 / 20)
  # 100 epochs in all, of which the cosine has 90, counted from the first.
  cosine = lambda epoch: 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * epoch / 90))
  assert float(factor(459)) == pytest.approx(cosine(45))
  assert float(factor(200)) == pytest.approx(cosine(20))
  assert float(factor(900)) == float(factor(999)) == pytest.approx(0.01)


@given(
  kind=st.sampled_from(schedule.KINDS),
  warmup=st.integers(0, TOTAL - 1),
  step=st.integers(0, 2 * TOTAL),
)
def test_factors_stay_between_zero_and_one(kind, warmup, step):
  value = float(_factor(kind=kind, warmup=f'{warmup} steps', cooldown='100 steps')(step))
  assert -1e-6 <= value <= 1 + 1e-6


def test_refusals():
  with pytest.raises(ValueError, match="did you mean 'cosine'"):
    _factor(kind='cosin')
  with pytest.raises(ValueError, match='warm-up of 1000 steps leaves none of the 1000'):
    _factor(warmup='1000 steps')
  with pytest.raises(ValueError, match='hold of 900 steps leave none'):
    _factor(warmup='100 steps', hold='900 steps')
