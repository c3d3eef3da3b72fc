"""Dense softmax attention (arXiv 1706.03762, equation 1) with an additive bias on the logits."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from vision_attention.ops import reduction


def attention_logits(
  query: Float[Array, 'b q n d'],
  key: Float[Array, 'b k n d'],
  bias: Float[Array, '#b n #q k'] | None = None,
  *,
  scale: float | None = None,
) -> Float[Array, 'b n q k']:
  """Returns `scale * query . key + bias` in float32; the scale is `d ** -0.5` unless given."""
  factor = query.shape[-1] ** -0.5 if scale is None else scale
  logits = jnp.einsum('bqnd,bknd->bnqk', query * factor, key, preferred_element_type=jnp.float32)
  if bias is None:
    return logits
  bias = bias.astype(jnp.float32)
  return logits + bias if len(bias) > 1 else reduction.add_shared(logits, bias[0])


def attention_weights(
  query: Float[Array, 'b q n d'],
  key: Float[Array, 'b k n d'],
  bias: Float[Array, '#b n #q k'] | None = None,
  *,
  scale: float | None = None,
) -> Float[Array, 'b n q k']:
  """Returns the attention map itself, each row summing to one, in float32."""
  return jax.nn.softmax(attention_logits(query, key, bias, scale=scale), axis=-1)


def attend(
  logits: Float[Array, 'b n q k'], value: Float[Array, 'b k n e']
) -> Float[Array, 'b q n e']:
  """Returns `softmax(logits) value`, in the values' type; see `dot_product_attention`."""
  weights = jnp.exp(logits - lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
  return _traced_mean(weights, value)


# Axes of values and of what they are mixed to. A product that also moves axes takes twice as long
# on a CPU, and moving them before and after costs memory traffic on a TPU.
_PLAIN, _HEADS_FIRST = ('bkne', 'bqne'), ('bnke', 'bnqe')


@jax.custom_vjp
def _mean(
  weights: Float[Array, 'b n q k'], value: Float[Array, 'b k n e']
) -> Float[Array, 'b q n e']:
  """Returns the mean of values, weighted by positive float32 weights."""
  return _mean_forward(weights, value)[0]


def _mean_forward(weights: jax.Array, value: jax.Array) -> tuple[jax.Array, Any]:
  def plain(weights: jax.Array, value: jax.Array, axes: tuple[str, str] = _PLAIN) -> jax.Array:
    total = jnp.einsum(f'bnqk->{axes[1][:-1]}', weights)
    mixed = jnp.einsum(
      f'bnqk,{axes[0]}->{axes[1]}',
      weights.astype(value.dtype),
      value,
      preferred_element_type=jnp.float32,
    )
    return (mixed / total[..., None]).astype(value.dtype)

  def heads_first(weights: jax.Array, value: jax.Array) -> jax.Array:
    return plain(weights, value.swapaxes(1, 2), _HEADS_FIRST).swapaxes(1, 2)

  y = lax.platform_dependent(weights, value, cpu=heads_first, default=plain)
  return y, (weights, value, y)


def _mean_backward(saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
  def plain(
    weights: jax.Array, value: jax.Array, y: jax.Array, g: jax.Array, axes: tuple = _PLAIN
  ) -> tuple[jax.Array, jax.Array]:
    rows = axes[1][:-1]
    g = g.astype(jnp.float32) / jnp.einsum(f'bnqk->{rows}', weights)[..., None]
    shared = jnp.einsum(f'{axes[1]}->bnq', g * y.astype(jnp.float32))
    g = g.astype(value.dtype)
    products = {'preferred_element_type': jnp.float32}
    of_weights = jnp.einsum(f'{axes[1]},{axes[0]}->bnqk', g, value, **products)
    of_value = jnp.einsum(f'bnqk,{axes[1]}->{axes[0]}', weights.astype(value.dtype), g, **products)
    return of_weights - shared[..., None], of_value.astype(value.dtype)

  def heads_first(
    weights: jax.Array, value: jax.Array, y: jax.Array, g: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    value, y, g = (x.swapaxes(1, 2) for x in (value, y, g))
    of_weights, of_value = plain(weights, value, y, g, _HEADS_FIRST)
    return of_weights, of_value.swapaxes(1, 2)

  return lax.platform_dependent(*saved, g, cpu=heads_first, default=plain)


_mean.defvjp(_mean_forward, _mean_backward)
# Traced once per shape, however many blocks have it.
_traced_mean = jax.jit(_mean)


def dot_product_attention(
  query: Float[Array, 'b q n d'],
  key: Float[Array, 'b k n d'],
  value: Float[Array, 'b k n e'],
  bias: Float[Array, '#b n #q k'] | None = None,
  *,
  scale: float | None = None,
) -> Float[Array, 'b q n e']:
  """Returns `softmax(scale * query . key + bias) value`.

  The softmax runs in float32. Its sum divides the result and not the weights: `d` divisions per
  query in place of `k`.

  Args:
    query: queries, `n` heads of `d` channels.
    key: keys.
    value: values.
    bias: added to the logits, for example a relative position bias; broadcasts over the batch.
    scale: factor of the logits, `d ** -0.5` unless given.
  """
  return attend(attention_logits(query, key, bias, scale=scale), value)
