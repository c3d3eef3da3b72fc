"""Self-attention over relative positions (arXiv 1911.03584): heads as the taps of a convolution."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.layers import initializers
from vision_attention.ops import quadratic_attention


class ConvAttention(nn.Module):
  """Means of the map, one per head, weighted by relative position, and one linear layer over them.

  Every head sees all input channels: its values are the inputs, and value and output matrices are
  merged into `proj` (section 4). Subclasses give the scores per axis, or jointly where they do not
  factorise. `[batch, heads, queries, keys]` is sown as `attention`.

  Attributes:
    dim: output width.
    num_heads: number of heads; a convolution's taps.
    stride: distance of the queries along either axis.
    margin: zeros that are put around the map before, and cut off after.
    window: an odd number leaves keys out that are further away than half of it along an axis; 0
      leaves out none.
    attention_dropout: rate on the weights, the same for all images of a batch unless they depend
      on the content, as in the authors' code.
    dropout: rate after the output projection.
  """

  needs_map: ClassVar[bool] = True
  stages: ClassVar[tuple[int, ...]] = (4,)
  dim: int
  num_heads: int
  stride: int = 1
  margin: int = 0
  window: int = 0
  attention_dropout: float = 0.0
  dropout: float = 0.0
  kernel_init: nn.initializers.Initializer = initializers.TORCH_KERNEL
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  def axis_scores(
    self, x: Float[Array, 'b h w c']
  ) -> tuple[Float[Array, 'n y'], Float[Array, 'n x']] | None:
    """Returns the scores of vertical and horizontal offsets, if their sum is the score."""
    raise NotImplementedError

  def joint_scores(self, x: Float[Array, 'b h w c']) -> Float[Array, 'n y x']:
    """Returns the scores of all offsets, where those of `axis_scores` do not do."""
    raise NotImplementedError

  def content_scores(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b n h w i j'] | None:
    """Returns what the content adds to the scores, for all queries, or None."""
    del x

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    if self.window and self.window % 2 == 0:
      raise ValueError(f'window {self.window} has no centre: pass {self.window + 1}, or 0 for none')
    x = x.astype(self.dtype)
    size, margin = x.shape[1:3], self.margin
    x = jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    rows, columns = (slice(margin, margin + n, self.stride) for n in size)
    axes, content = self.axis_scores(x), self.content_scores(x)
    weights, factors = None, None
    if axes is not None:
      scores = [quadratic_attention.expand_axis(self._truncated(axis)) for axis in axes]
      scores = scores[0][:, rows], scores[1][:, columns]
      if content is None:
        factors = tuple(jax.nn.softmax(axis, axis=-1) for axis in scores)
      else:
        joint = scores[0][:, :, None, :, None] + scores[1][:, None, :, None]
        weights = self._softmax(joint + content[:, :, rows, columns])
    else:
      table = self._truncated(self._truncated(self.joint_scores(x)).swapaxes(1, 2)).swapaxes(1, 2)
      joint = quadratic_attention.expand(table)[None, :, rows, columns]
      weights = self._softmax(joint if content is None else joint + content[:, :, rows, columns])
    sow = self.is_mutable_collection('intermediates')
    drop = train and self.attention_dropout > 0
    if factors is not None and (sow or drop):
      weights = quadratic_attention.joint_weights(factors[0], factors[1])[None]
    if sow:
      assert weights is not None
      _, heads, *queries, height, width = weights.shape
      flat = weights.reshape(-1, heads, queries[0] * queries[1], height * width)
      self.sow('intermediates', 'attention', jnp.broadcast_to(flat, (len(x), *flat.shape[1:])))
    if factors is not None and not drop:
      y = quadratic_attention.mix_axes(factors[0], factors[1], x)
    else:
      assert weights is not None
      weights = nn.Dropout(self.attention_dropout, deterministic=not train)(weights)
      y = quadratic_attention.mix(weights, x)
    y = self._dense(self.dim, y.shape[-2] * y.shape[-1], 'proj')(y.reshape(*y.shape[:3], -1))
    return nn.Dropout(self.dropout, deterministic=not train)(y)

  def _truncated(self, scores: Float[Array, '... o']) -> Float[Array, '... o']:
    return quadratic_attention.truncate(scores, self.window) if self.window else scores

  def _softmax(self, scores: Float[Array, 'b n h w i j']) -> Float[Array, 'b n h w i j']:
    return jax.nn.softmax(scores.astype(jnp.float32), axis=(-2, -1))

  def _dense(self, dim: int, fan_in: int, name: str) -> nn.Dense:
    return nn.Dense(
      dim,
      kernel_init=self.kernel_init,
      bias_init=initializers.torch_bias(fan_in),
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name=name,
    )


class QuadraticAttention(ConvAttention):
  """Every head a Gaussian over offsets, of learned centre and width; no query, no key.

  `ops.quadratic_attention.conv_to_attention` makes its parameters from a convolution's.

  Attributes:
    isotropic: whether a head has one width; otherwise a matrix `G` with `G G^T` its inverse
      covariance ("quadratic gen.").
    center_std: of the centres' initial distribution, in pixels.
    spread_std: of the noise of the initial inverse widths about 1.
  """

  isotropic: bool = True
  center_std: float = 2.0
  spread_std: float = 0.01

  def _gaussians(self) -> tuple[Float[Array, 'n 2'], Float[Array, 'n *matrix']]:
    def spreads_init(key, shape, dtype):
      mean = jnp.ones(shape, dtype) if self.isotropic else jnp.eye(2, dtype=dtype)
      return mean + self.spread_std * jax.random.normal(key, shape, dtype)

    centers_init = nn.initializers.normal(self.center_std)
    centers = self.param('centers', centers_init, (self.num_heads, 2), self.param_dtype)
    shape = (self.num_heads,) if self.isotropic else (self.num_heads, 2, 2)
    spreads = self.param('spreads', spreads_init, shape, self.param_dtype)
    return jnp.asarray(centers, jnp.float32), jnp.asarray(spreads, jnp.float32)

  def axis_scores(
    self, x: Float[Array, 'b h w c']
  ) -> tuple[Float[Array, 'n y'], Float[Array, 'n x']] | None:
    if not self.isotropic:
      return None
    centers, spreads = self._gaussians()
    rows, columns = (
      quadratic_attention.axis_scores(centers[:, i], spreads, x.shape[1 + i]) for i in (0, 1)
    )
    return rows, columns

  def joint_scores(self, x: Float[Array, 'b h w c']) -> Float[Array, 'n y x']:
    return quadratic_attention.joint_scores(*self._gaussians(), *x.shape[1:3])


class LearnedPositionAttention(ConvAttention):
  """A learned score per head and axis, `key_h . r[d]`, of a learned vector per offset.

  Attributes:
    max_size: longest axis that the vectors are made for; the map's own unless given.
    position_dim: width of the vectors; that of the inputs unless given.
    content: whether `query . key / sqrt(head_dim)` is added.
    head_dim: width of a query; that of the inputs unless given.
  """

  max_size: int | None = None
  position_dim: int | None = None
  content: bool = False
  head_dim: int | None = None

  def axis_scores(
    self, x: Float[Array, 'b h w c']
  ) -> tuple[Float[Array, 'n y'], Float[Array, 'n x']]:
    return self._scores('height', x.shape[1], x), self._scores('width', x.shape[2], x)

  def _scores(self, axis: str, size: int, x: Float[Array, 'b h w c']) -> Float[Array, 'n o']:
    longest, dim = self.max_size or size, self.position_dim or x.shape[-1]
    if self.has_variable('params', f'{axis}_table'):
      # Vectors that were made for a larger map serve a smaller one.
      rows, dim = self.get_variable('params', f'{axis}_table').shape
      longest = (rows + 1) // 2
    if size > longest:
      raise ValueError(
        f'a map of {axis} {size} has offsets beyond max_size={longest}: pass max_size={size}'
      )
    table = self.param(
      f'{axis}_table', nn.initializers.normal(1.0), (2 * longest - 1, dim), self.param_dtype
    )
    key = self.param(f'{axis}_key', self.kernel_init, (dim, self.num_heads), self.param_dtype)
    near = jnp.asarray(table, jnp.float32)[longest - size : longest + size - 1]
    return (near @ jnp.asarray(key, jnp.float32)).T

  def content_scores(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b n h w i j'] | None:
    if not self.content:
      return None
    dim = self.head_dim or x.shape[-1]

    def heads(name: str) -> Float[Array, 'b h w n d']:
      y = self._dense(self.num_heads * dim, x.shape[-1], name)(x)
      return y.reshape(*x.shape[:3], self.num_heads, dim)

    return jnp.einsum(
      'bhwnd,bijnd->bnhwij',
      heads('query') * dim**-0.5,
      heads('key'),
      preferred_element_type=jnp.float32,
    )


OPERATORS = {'quadratic': QuadraticAttention, 'learned_position': LearnedPositionAttention}
