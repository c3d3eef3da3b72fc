"""Multiply-adds, counted on the jaxpr: what papers print as FLOPs or MACs."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from vision_attention.models import base
from vision_attention.ops import cost


def count_macs(
  model: base.Classifier | Callable[..., Any],
  *args: Any,
  image_size: int | tuple[int, int] = 224,
  channels: int = 3,
) -> int:
  """Counts the multiply-adds of matrix products and convolutions; computes nothing.

  Elementwise work, norms and softmax count nothing, as in the tables of papers. A convolution
  counts every tap, also those on padding. Where a program differs by backend, the accelerators'
  form counts, which has the products that the mathematics has, or what `ops.cost` declares.

  Args:
    model: a model of `create_model`, counted for one image in inference; or any function, but
      neither a gradient nor one that `vmap` has batched, in which a cost that is declared counts as
      it was declared.
    *args: the function's arguments, arrays or shapes.
    image_size: of the model's image.
    channels: of the model's image.

  Returns:
    The number of multiply-adds.

  Raises:
    ValueError: for a loop whose number of turns is not known before it runs.
  """
  if isinstance(model, base.Classifier):
    if args:
      raise ValueError('a model takes no further arguments here: pass image_size')
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    images = jax.ShapeDtypeStruct((1, *size, channels), jnp.float32)
    # It is applied while it is initialised, and initializers multiply no matrices.
    args, model = (jax.random.key(0), images), model.init
  return _count(jax.make_jaxpr(model)(*args).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
  return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _shape(variable: Any) -> tuple[int, ...]:
  return variable.aval.shape


def _count_equation(equation: core.JaxprEqn) -> int:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    shape = _shape(equation.invars[0])
    return math.prod(_shape(equation.outvars[0])) * math.prod(shape[i] for i in contracted)
  if name == 'conv_general_dilated':
    kernel = _shape(equation.invars[1])
    outputs = kernel[params['dimension_numbers'].rhs_spec[0]]
    return math.prod(_shape(equation.outvars[0])) * math.prod(kernel) // outputs
  if name == 'scan':
    return params['length'] * _count(params['jaxpr'].jaxpr)
  if name == 'while':
    if any(_count(params[key].jaxpr) for key in ('cond_jaxpr', 'body_jaxpr')):
      raise ValueError('a while loop holds products and its number of turns is unknown: use scan')
    return 0
  if name == 'cond':
    return _count_branches(params)
  declared = cost.declared(str(params.get('name', '')))
  if declared is not None:
    return declared
  return sum(_count(inner) for inner in _jaxprs(params.values()))


def _count_branches(params: dict[str, Any]) -> int:
  """The default branch of a choice by platform, the costliest of any other choice."""
  branches = params['branches']
  platforms = params.get('branches_platforms')
  if platforms is not None and None in platforms:
    return _count(branches[platforms.index(None)].jaxpr)
  return max(_count(branch.jaxpr) for branch in branches)


def _jaxprs(values: Any) -> Iterator[core.Jaxpr]:
  """The jaxprs that an equation calls: of jit, remat, custom derivatives, shard_map, ... ."""
  for value in values:
    if isinstance(value, core.ClosedJaxpr):
      yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
      yield value
    elif isinstance(value, (tuple, list)):
      yield from _jaxprs(value)
