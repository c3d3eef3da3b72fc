"""The inverted residual block with pre-activation of CoAtNet and MaxViT."""

from collections.abc import Callable

from flax import linen as nn
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.layers import drop_path
from vision_attention.ops import activation, convolution

ModuleDef = Callable[..., nn.Module]
STRIDES = ('expand', 'depthwise', 'inputs')


def halve(x: Float[Array, 'b h w c'], kind: str) -> Float[Array, 'b p q c']:
  """Halves a map, rounding up: `max` or `avg` of 2x2 pixels, or `max3` of 3x3 (timm's `max`)."""
  errors.check_choice('pool', kind, ('max', 'avg', 'max3'))
  if kind == 'max3':
    return convolution.max_pool(x, window=3, stride=2, padding='symmetric')
  if kind == 'max':
    return convolution.max_pool(x, window=2, stride=2, padding='same')
  return convolution.avg_pool(x, window=2, stride=2, padding='same', count_include_pad=False)


class PoolProject(nn.Module):
  """The shortcut of a block that changes the shape: pooling, then a 1x1."""

  dim: int
  stride: int
  pool: str
  conv: ModuleDef
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b p q d']:
    x = x if self.stride == 1 else halve(x, self.pool)
    if x.shape[-1] == self.dim:
      return x
    return self.conv(self.dim, kernel_size=1, use_bias=self.use_bias, name='proj')(x)


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
    pool: of the shortcut, see `halve`.
    activation: a name of `ops.activation`.
    expansion: inner width relative to `dim`.
    squeeze: squeeze-and-excitation, called with its hidden width.
    se_ratio: that width relative to `dim`, or to the inner width if that follows the input.
    pre_norm_act: whether an activation follows the first norm.
    expand_from: the width that is expanded, `output` or `input`.
    squeeze_early: whether the squeeze comes before the last norm.
    project_bias: whether the last convolution and the shortcut have biases.
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
  pre_norm_act: bool = False
  expand_from: str = 'output'
  squeeze_early: bool = False
  project_bias: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b p q d']:
    errors.check_choice('stride_in', self.stride_in, STRIDES)
    act = activation.by_name(self.activation)
    errors.check_choice('expand_from', self.expand_from, ('output', 'input'))
    from_input = self.expand_from == 'input'
    inner_dim = self.expansion * (x.shape[-1] if from_input else self.dim)
    squeezed = max(1, int(self.se_ratio * (inner_dim if from_input else self.dim)))
    shortcut = PoolProject(
      self.dim, self.stride, self.pool, self.conv, self.project_bias, name='shortcut'
    )(x)

    def stride(place: str) -> int:
      return self.stride if self.stride_in == place else 1

    y = self.norm(name='pre_norm')(x, train=train)
    y = act(y) if self.pre_norm_act else y
    if stride('inputs') > 1:
      # In every model that pools here, the pool of the branch averages.
      y = halve(y, 'avg' if from_input else self.pool)
    y = self.conv(inner_dim, kernel_size=1, stride=stride('expand'), name='expand')(y)
    y = act(self.norm(name='norm1')(y, train=train))
    y = self.conv(
      inner_dim,
      kernel_size=self.kernel_size,
      stride=stride('depthwise'),
      groups=inner_dim,
      name='depthwise',
    )(y)
    squeeze = self.squeeze(squeezed, name='se')
    if self.squeeze_early:
      y = act(self.norm(name='norm2')(squeeze(y), train=train))
    else:
      y = squeeze(act(self.norm(name='norm2')(y, train=train)))
    y = self.conv(self.dim, kernel_size=1, use_bias=self.project_bias, name='project')(y)
    return shortcut + drop_path.DropPath(self.drop_path, name='drop_path')(y, train=train)
