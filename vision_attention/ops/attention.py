"""Dense softmax attention (arXiv 1706.03762, equation 1) with an additive bias on the logits."""

import jax
import jax.numpy as jnp
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
  weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
  total = jnp.einsum('bnqk->bnq', weights)
  # Heads come first in both factors: a product that also moves axes takes twice as long on a CPU.
  value = value.swapaxes(1, 2)
  mixed = jnp.einsum(
    'bnqk,bnke->bnqe', weights.astype(value.dtype), value, preferred_element_type=jnp.float32
  )
  return (mixed / total[..., None]).astype(value.dtype).swapaxes(1, 2)


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
