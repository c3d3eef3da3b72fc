"""Pairwise functions of the non-local block (arXiv 1711.07971, section 3.2; 1904.11492, 3.1)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.ops import attention

SCALES = ('none', 'inverse_sqrt', 'inverse_sqrt_input', 'sqrt')


def scale_of(name: str, dim: int, input_dim: int) -> float:
  """Returns the factor of the logits for queries of `dim` channels in a map of `input_dim`.

  `none` is the papers' block. `inverse_sqrt` is `dim ** -0.5`, as of mmcv 2, and
  `inverse_sqrt_input` is `input_dim ** -0.5`, as of timm. `sqrt` is `dim ** 0.5`: GCNet's published
  code divides by `dim ** -0.5`, and weights trained with it need that.
  """
  errors.check_choice('scale', name, SCALES)
  factors = {'inverse_sqrt': dim**-0.5, 'inverse_sqrt_input': input_dim**-0.5, 'sqrt': dim**0.5}
  return factors.get(name, 1.0)


def softmax_weights(
  query: Float[Array, 'b q d'], key: Float[Array, 'b k d'], scale: float
) -> Float[Array, 'b q k']:
  """Returns `softmax_k(scale query . key)`: the (embedded) Gaussian form, in float32."""
  return attention.attention_weights(query[:, :, None], key[:, :, None], scale=scale)[:, 0]


def softmax_mix(
  query: Float[Array, 'b q d'],
  key: Float[Array, 'b k d'],
  value: Float[Array, 'b k e'],
  scale: float,
) -> Float[Array, 'b q e']:
  """Returns `softmax_weights(query, key) value`, one head of ordinary attention."""
  heads = (x[:, :, None] for x in (query, key, value))
  return attention.dot_product_attention(*heads, scale=scale)[:, :, 0]


def dot_product_weights(
  query: Float[Array, 'b q d'], key: Float[Array, 'b k d']
) -> Float[Array, 'b q k']:
  """Returns `query . key / k`; rows do not sum to one."""
  factor = 1 / key.shape[1]
  return jnp.einsum('bqd,bkd->bqk', query * factor, key, preferred_element_type=jnp.float32)


def dot_product_mix(
  query: Float[Array, 'b q d'], key: Float[Array, 'b k d'], value: Float[Array, 'b k e']
) -> Float[Array, 'b q e']:
  """Returns `dot_product_weights(query, key) value`, without the weights where that is cheaper.

  Nothing stands between the two products, so `key^T value` may come first:
  `d e (q + k)` multiply-adds in place of `q k (d + e)`.
  """
  (_, queries, dim), (_, keys, width) = query.shape, value.shape
  types: dict[str, Any] = {'preferred_element_type': jnp.float32}
  if dim * width * (queries + keys) < queries * keys * (dim + width):
    summary = jnp.einsum('bkd,bke->bde', key, value / keys, **types).astype(value.dtype)
    mixed = jnp.einsum('bqd,bde->bqe', query, summary, **types)
  else:
    weights = dot_product_weights(query, key).astype(value.dtype)
    mixed = jnp.einsum('bqk,bke->bqe', weights, value, **types)
  return mixed.astype(value.dtype)


def concatenation_weights(
  query: Float[Array, 'b q'], key: Float[Array, 'b k']
) -> Float[Array, 'b q k']:
  """Returns `relu(query + key) / k` of the two halves of `w_f . [query; key]`, in float32."""
  total = query[:, :, None].astype(jnp.float32) + key[:, None].astype(jnp.float32)
  return jax.nn.relu(total) / key.shape[1]


def mix(weights: Float[Array, 'b q k'], value: Float[Array, 'b k e']) -> Float[Array, 'b q e']:
  """Returns `weights value` in the type of the values."""
  mixed = jnp.einsum(
    'bqk,bke->bqe', weights.astype(value.dtype), value, preferred_element_type=jnp.float32
  )
  return mixed.astype(value.dtype)
