"""Selective kernels and split attention, each against its equations written out."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_attention.attention import operators, selective_kernel


def _map():
  return jax.random.normal(jax.random.key(0), (2, 6, 8, 16))


def _drawn(spec):
  module = operators.operator(spec)()
  init = jax.jit(functools.partial(module.init, train=False))
  variables = init(jax.random.key(1), _map())
  keys = iter(jax.random.split(jax.random.key(2), 100))
  moved = jax.tree.map(
    lambda p: p + 0.2 * jnp.abs(jax.random.normal(next(keys), p.shape)), variables
  )
  return module, moved


def _apply(module, variables, x):
  return jax.jit(functools.partial(module.apply, train=False))(variables, x)


def _norm_relu(y, variables, name):
  params, stats = variables['params'][name], variables['batch_stats'][name]
  y = (y - stats['mean']) / jnp.sqrt(stats['var'] + 1e-5)
  return jax.nn.relu(y * params['scale'] + params['bias'])


def _conv(x, kernel, stride=1, dilation=1, groups=1):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    [(dilation, dilation)] * 2,
    rhs_dilation=(dilation, dilation),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )


def _branches(variables, inputs, stride, groups):
  params = variables['params']
  return [
    _norm_relu(_conv(x, params[f'conv{i}']['kernel'], stride, i, groups), variables, f'norm{i}')
    for i, x in enumerate(inputs, 1)
  ]


@pytest.mark.parametrize('split', [False, True])
def test_selective_kernel_is_a_softmax_over_branches(split):
  spec = {'name': 'sk', 'dim': 32, 'stride': 2, 'split': split, 'groups': 4, 'least': 8}
  module, variables = _drawn(spec)
  x, params = _map(), variables['params']
  inputs = (x[..., :8], x[..., 8:]) if split else (x, x)
  first, second = _branches(variables, inputs, 2, 4)
  hidden = (first + second).mean((1, 2)) @ params['squeeze']['kernel']
  hidden = _norm_relu(hidden, variables, 'squeeze_norm')
  assert hidden.shape == (2, 8)
  logits = (hidden @ params['select']['kernel']).reshape(2, 2, 32)
  weights = jax.nn.softmax(logits, 1)[:, :, None, None]
  expected = first * weights[:, 0] + second * weights[:, 1]
  np.testing.assert_allclose(_apply(module, variables, x), expected, rtol=1e-4, atol=1e-5)
  equal = {**params, 'select': {'kernel': jnp.zeros_like(params['select']['kernel'])}}
  y = _apply(module, {**variables, 'params': equal}, x)
  np.testing.assert_allclose(y, (first + second) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('radix', 'groups'), [(1, 2), (2, 1), (2, 2), (4, 2)])
def test_split_attention_is_a_softmax_over_maps(radix, groups):
  module, variables = _drawn({'name': 'splat', 'dim': 12, 'radix': radix, 'groups': groups})
  x, params = _map(), variables['params']
  y = _conv(x, params['conv']['kernel'], groups=groups * radix)
  y = _norm_relu(y, variables, 'norm')
  maps = [y[..., 12 * r : 12 * (r + 1)] for r in range(radix)]
  mean = sum(maps).mean((1, 2), keepdims=True)

  def pointwise(x, name):
    kernel, bias = params[name]['kernel'], params[name]['bias']
    parts = [
      part @ kernel[0, 0][:, columns]
      for part, columns in zip(
        jnp.split(x, groups, -1), jnp.split(jnp.arange(kernel.shape[-1]), groups), strict=True
      )
    ]
    return jnp.concatenate(parts, -1) + bias

  hidden = _norm_relu(pointwise(mean, 'squeeze'), variables, 'squeeze_norm')
  logits = pointwise(hidden, 'select').reshape(2, groups, radix, 12 // groups)
  weights = jax.nn.softmax(logits, 2) if radix > 1 else jax.nn.sigmoid(logits)
  expected = sum(maps[r] * weights[:, :, r].reshape(2, 1, 1, 12) for r in range(radix))
  np.testing.assert_allclose(_apply(module, variables, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('size', [(6, 8), (7, 5)])
@pytest.mark.parametrize('pool', ['none', 'before', 'after'])
def test_split_attention_halves_any_map(pool, size):
  module = operators.operator({'name': 'splat', 'dim': 8, 'stride': 2, 'pool': pool})()
  init = functools.partial(module.init_with_output, train=False)
  y, _ = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, *size, 8)))
  assert y.shape == (1, -(-size[0] // 2), -(-size[1] // 2), 8)


def test_widths_that_do_not_divide_are_refused():
  for spec, message in (
    ({'name': 'sk', 'dim': 8, 'split': True, 'branches': 3}, '3 branches do not divide 16'),
    ({'name': 'splat', 'dim': 8, 'radix': 3}, '1 groups of 3 do not divide 16 channels'),
    ({'name': 'splat', 'dim': 8, 'pool': 'max'}, "pool 'max' is unknown"),
  ):
    with pytest.raises(ValueError, match=message):
      _drawn(spec)


@pytest.mark.parametrize(
  ('spec', 'expected'),
  [
    ({'name': 'sk', 'split': True, 'groups': 1, 'divisor': 8, 'least': 8}, 38_672),
    # timm's 43,168 is without the two norms.
    ({'name': 'splat'}, 43_168 + 2 * (128 + 32)),
    ({'name': 'lambda'}, 7616),
  ],
)
def test_parameters_at_64_channels(spec, expected):
  module = operators.operator({**spec, 'dim': 64})()
  init = functools.partial(module.init, train=False)
  shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 8, 8, 64)))
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes['params'])) == expected


def test_squeezes_are_rounded_to_no_less_than_nine_tenths():
  widths = [selective_kernel.squeezed_dim(c, 1 / 16, 1, 32) for c in (128, 256, 512, 1024)]
  assert widths == [32, 32, 32, 64]
  assert selective_kernel.squeezed_dim(80 * 4, 1 / 4, 8, 32) == 80
  assert selective_kernel.squeezed_dim(176, 1 / 16, 8, 8) == 16  # 11 would be 8: a tenth too few
