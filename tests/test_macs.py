"""Multiply-adds of programs whose count is known by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from vision_attention import macs
from vision_attention.ops import convolution

pytestmark = pytest.mark.fast


def _shape(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_products():
  assert macs.count_macs(jnp.matmul, _shape(3, 4), _shape(4, 5)) == 3 * 4 * 5
  product = lambda q, k: jnp.einsum('bqnd,bknd->bnqk', q, k)
  assert macs.count_macs(product, _shape(2, 7, 3, 4), _shape(2, 9, 3, 4)) == 2 * 3 * 7 * 9 * 4


@pytest.mark.parametrize(
  ('kernel', 'groups', 'stride', 'expected'),
  [
    ((3, 3, 8, 16), 1, 1, 10 * 10 * 16 * 9 * 8),
    ((3, 3, 8, 16), 1, 2, 5 * 5 * 16 * 9 * 8),
    ((1, 1, 8, 16), 1, 1, 10 * 10 * 16 * 8),
    ((3, 3, 1, 8), 8, 1, 10 * 10 * 8 * 9),
    ((3, 3, 4, 16), 2, 1, 10 * 10 * 16 * 9 * 4),
  ],
)
def test_convolutions_count_their_taps_whatever_form_the_backend_runs(
  kernel, groups, stride, expected
):
  def function(x, k):
    return convolution.conv(x, k, stride=stride, groups=groups)

  assert macs.count_macs(function, _shape(1, 10, 10, 8), _shape(*kernel)) == expected


def test_loops_count_every_turn_and_calls_are_looked_into():
  def function(x):
    return lax.scan(lambda c, _: (jax.checkpoint(jax.jit(jnp.matmul))(c, c), None), x, None, 5)[0]

  assert macs.count_macs(function, _shape(3, 3)) == 5 * 27


def test_unknown_loops_are_refused_and_choices_count_the_costliest():
  def loop(x):
    return lax.while_loop(lambda c: c.sum() < 0, lambda c: c @ c, x)

  with pytest.raises(ValueError, match='while loop'):
    macs.count_macs(loop, _shape(3, 3))

  def choice(x):
    return lax.cond(x.sum() > 0, lambda y: y @ y, lambda y: y, x)

  assert macs.count_macs(choice, _shape(3, 3)) == 27


def test_the_default_platform_counts():
  def function(x):
    return lax.platform_dependent(x, cpu=lambda y: y @ y @ y, default=lambda y: y @ y)

  assert macs.count_macs(function, _shape(3, 3)) == 27
