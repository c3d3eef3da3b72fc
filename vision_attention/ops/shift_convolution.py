"""The convolution that ACmix makes of the projections of attention (arXiv 2111.14556, section 4.1).

A `k x k` convolution is `k^2` 1x1 convolutions whose results are shifted and summed. Here linear
combinations of the heads' queries, keys and values take the place of the 1x1 convolutions, and a
grouped `k x k` convolution, which begins as pure shifts, does the rest.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vision_attention.ops import convolution, cost

# Small groups are merged to blocks with zeros between them: more products, on units that have them
# to spare, in place of a convolution in as many groups as a head has channels.
_MERGED = 8


def shift_kernel(size: int, dim: int) -> np.ndarray:
  """Returns the kernel `[size, size, size^2, dim]` whose input `t` is shifted by tap `t`."""
  taps = np.eye(size**2, dtype=np.float32).reshape(size, size, size**2, 1)
  return np.broadcast_to(taps, (size, size, size**2, dim))


def _convolve(
  maps: Float[Array, 'b h w j d'],
  mixing: Float[Array, 'j t'],
  kernel: Float[Array, 'y x t o'],
  bias: Float[Array, ' t'] | None,
  *,
  stride: int,
) -> Float[Array, 'b p q o']:
  batch, height, width, _, dim = maps.shape
  side, _, taps, outputs = kernel.shape
  mixed = jnp.einsum('bhwjd,jt->bhwdt', maps, mixing)
  if bias is not None:
    mixed = mixed + bias
  mixed = mixed.reshape(batch, height, width, dim * taps)
  merged = next(n for n in range(min(_MERGED, dim), 0, -1) if dim % n == 0)
  blocks = kernel.reshape(side, side, taps, dim // merged, merged, outputs // dim)
  eye = jnp.eye(merged, dtype=kernel.dtype)
  blocks = jnp.einsum('yxtgmn,lm->yxltgmn', blocks, eye)
  return convolution.conv(
    mixed,
    blocks.reshape(side, side, merged * taps, outputs),
    stride=stride,
    padding='symmetric',
    groups=dim // merged,
  )


@functools.cache
def _compiled(stride: int, macs: int) -> Callable[..., jax.Array]:
  return cost.declare(functools.partial(_convolve, stride=stride), macs)


def shift_convolution(
  maps: Float[Array, 'b h w j d'],
  mixing: Float[Array, 'j t'],
  kernel: Float[Array, 'y x t o'],
  bias: Float[Array, ' t'] | None = None,
  *,
  stride: int = 1,
) -> Float[Array, 'b p q o']:
  """Returns `out[c, n] = sum_ty'x' kernel[y', x', t, c n] f[y + y', x + x', c, t]`.

  With `f[.., c, t] = sum_j maps[.., j, c] mixing[j, t] + bias[t]`, and zeros around `f`. Outputs
  are ordered channel first, `[d, o / d]`, where the heads of attention come first there: the two
  are added as they are, in the official code and here.

  Args:
    maps: queries, keys and values of all heads, each `d` channels.
    mixing: weights of the `t = k^2` combinations of maps, the same for every channel.
    kernel: of the grouped convolution, in `d` groups of `t` inputs.
    bias: of the combinations.
    stride: of the convolution.
  """
  batch, height, width, count, dim = maps.shape
  side, _, taps, outputs = kernel.shape
  if outputs % dim:
    raise ValueError(f'{dim} groups, one per channel of a head, do not divide {outputs} outputs')
  positions = -(-height // stride) * -(-width // stride)
  macs = batch * taps * (height * width * count * dim + positions * side**2 * outputs)
  return _compiled(stride, macs)(maps, mixing, kernel, bias)
