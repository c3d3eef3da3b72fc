"""The inverted residual block with pre-activation of CoAtNet and MaxViT."""

from collections.abc import Callable

from flax import linen as nn
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.layers import drop_path
from vision_attention.ops import activation, convolution

ModuleDef = Callable[..., nn.Module]
STRIDES = ('expand', 'depthwise', 'inputs')


def pool2x2(x: Float[Array, 'b h w c'], kind: str) -> Float[Array, 'b p q c']:
  """Halves a map, rounding up, by the `max` or the `avg` of 2x2 pixels."""
  errors.check_choice('pool', kind, ('max', 'avg'))
  if kind == 'max':
    return convolution.max_pool(x, window=2, stride=2, padding='same')
  return convolution.avg_pool(x, window=2, stride=2, padding='same', count_include_pad=False)


class PoolProject(nn.Module):
  """The shortcut of a block that changes the shape: 2x2 pooling, then a 1x1 with bias."""

  dim: int
  stride: int
  pool: str
  conv: ModuleDef

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b p q d']:
    x = x if self.stride == 1 else pool2x2(x, self.pool)
    if x.shape[-1] == self.dim:
      return x
    return self.conv(self.dim, kernel_size=1, use_bias=True, name='proj')(x)


class MBConv(nn.Module):
  """`norm - 1x1 - norm - act - depthwise - norm - act - SE - 1x1`, added to the shortcut.

  The form of arXiv 2106.04803, appendix A.1, as the same authors' MaxViT code has it: no activation
  after the first norm, expansion and squeeze relative to the output width, a bias in the last
  convolution only.

  Attributes:
    dim: output channels.
    stride: 1 or 2.
    stride_in: where the stride sits: `expand`, the first 1x1 (equation 5), `depthwise`, or
      `inputs`, pooling after the first norm.
    pool: of the shortcut, `max` or `avg`.
    activation: a name of `ops.activation`.
    expansion: inner width relative to `dim`.
    squeeze: squeeze-and-excitation, called with its hidden width.
    se_ratio: that width relative to `dim`.
    drop_path: rate of stochastic depth.
  """

  dim: int
  stride: int
  stride_in: str
  pool: str
  activation: str
  drop_path: float
  conv: ModuleDef
  norm: ModuleDef
  squeeze: ModuleDef
  kernel_size: int = 3
  expansion: int = 4
  se_ratio: float = 0.25

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    errors.check_choice('stride_in', self.stride_in, STRIDES)
    act = activation.by_name(self.activation)
    inner_dim = self.expansion * self.dim
    shortcut = PoolProject(self.dim, self.stride, self.pool, self.conv, name='shortcut')(x)

    def stride(place: str) -> int:
      return self.stride if self.stride_in == place else 1

    y = self.norm(name='pre_norm')(x, train=train)
    if stride('inputs') > 1:
      y = pool2x2(y, self.pool)
    y = self.conv(inner_dim, kernel_size=1, stride=stride('expand'), name='expand')(y)
    y = act(self.norm(name='norm1')(y, train=train))
    y = self.conv(
      inner_dim,
      kernel_size=self.kernel_size,
      stride=stride('depthwise'),
      groups=inner_dim,
      name='depthwise',
    )(y)
    y = act(self.norm(name='norm2')(y, train=train))
    y = self.squeeze(max(1, int(self.se_ratio * self.dim)), name='se')(y)
    y = self.conv(self.dim, kernel_size=1, use_bias=True, name='project')(y)
    return shortcut + drop_path.DropPath(self.drop_path, name='drop_path')(y, train=train)
