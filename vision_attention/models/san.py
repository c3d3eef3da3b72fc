"""SAN (arXiv 2004.13621): vector attention, pairwise or patchwise, in place of convolutions.

`acmix_san*` are an own reading of the numbers that ACmix (arXiv 2111.14556, Table 1) gives for
SAN hosts, without code: see `attention.san.VectorAttention.conv`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.attention import san
from vision_attention.layers import conv, heads, norm, stage
from vision_attention.models import base, reference
from vision_attention.ops import convolution

FORMS = {'pairwise': san.PairwiseAttention, 'patchwise': san.PatchwiseAttention}
LINEAR_INIT = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


class Block(nn.Module):
  """`norm - relu - attention - norm - relu - 1x1`, added to the input; attention at a quarter."""

  dim: int
  attn: base.ModuleDef
  norm: base.ModuleDef
  conv: base.ModuleDef

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c'], *, train: bool) -> Float[Array, 'b h w c']:
    y = jax.nn.relu(self.norm(name='norm1')(x, train=train))
    y = self.attn(dim=self.dim // 4, name='attn')(y, train=train)
    y = jax.nn.relu(self.norm(name='norm2')(y, train=train))
    return x + self.conv(self.dim, 1, use_bias=True, name='proj')(y)


class Transition(nn.Module):
  """What precedes a stage: maximum of 2x2 pixels and a 1x1 convolution."""

  dim: int
  conv: base.ModuleDef

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b p q d']:
    return self.conv(self.dim, 1, name='conv')(convolution.max_pool(x, window=2, stride=2))


class SAN(nn.Module):
  """A 1x1 convolution, then stages at a half, a quarter, ... of the image's size.

  Attributes:
    depths: blocks per stage.
    dims: channels per stage.
    kernels: side of the neighbourhood per stage.
    attn: the operator.
    remat: whether blocks are computed again in the backward pass.
  """

  depths: Sequence[int]
  dims: Sequence[int]
  kernels: Sequence[int]
  attn: base.ModuleDef
  remat: bool
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, images: Float[Array, 'b h w c'], *, train: bool
  ) -> dict[str, Float[Array, 'b p q d']]:
    types: dict[str, Any] = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
    layer = functools.partial(conv.Conv, kernel_init=LINEAR_INIT, **types)
    batch_norm = functools.partial(norm.BatchNorm, epsilon=1e-5, momentum=0.9, **types)
    x = layer(self.dims[0], 1, name='stem')(images.astype(self.dtype))
    x = jax.nn.relu(batch_norm(name='stem_norm')(x, train=train))
    features = {}
    for i, (depth, dim, kernel) in enumerate(
      zip(self.depths, self.dims, self.kernels, strict=True)
    ):
      name = f'stage{i + 1}'
      x = Transition(dim, layer, name=f'{name}_transition')(x)
      attn = functools.partial(self.attn, kernel=kernel, kernel_init=LINEAR_INIT, **types)
      blocks = [functools.partial(Block, dim, attn, batch_norm, layer)] * depth
      x = stage.Stage(blocks, self.remat, name=name)(x, train=train)
      x = jax.nn.relu(batch_norm(name=f'{name}_norm')(x, train=train))
      features[name] = x
    return features


def build(
  *,
  num_classes: int,
  image_size: tuple[int, int],
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  depths: Sequence[int],
  form: str,
  dims: Sequence[int] = (64, 256, 512, 1024, 2048),
  kernels: Sequence[int] = (3, 7, 7, 7, 7),
  share: int = 8,
  conv: bool = False,
  remat: bool = False,
) -> base.Parts:
  """Builds backbone and head.

  Args:
    num_classes: outputs of the head.
    image_size: height and width, at least `2^stages`.
    dtype: of activations.
    param_dtype: of parameters.
    depths: blocks per stage.
    form: `pairwise` or `patchwise`.
    dims: channels per stage.
    kernels: side of the neighbourhood per stage.
    share: channels that share a weight.
    conv: whether ACmix's convolution branch is mixed in (own reading).
    remat: whether blocks are computed again in the backward pass, to save memory.
  """
  errors.check_choice('form', form, FORMS)
  if min(image_size) < 2 ** len(depths):
    raise ValueError(
      f'image_size {image_size} is halved {len(depths)} times: pass at least {2 ** len(depths)}'
    )
  types: dict[str, Any] = {'dtype': dtype, 'param_dtype': param_dtype}
  attn = functools.partial(FORMS[form], share=share, conv=conv)
  backbone = functools.partial(
    SAN, tuple(depths), tuple(dims), tuple(kernels), attn, remat, **types
  )
  head = functools.partial(
    heads.LinearHead,
    num_classes=num_classes,
    feature=f'stage{len(depths)}',
    kernel_init=LINEAR_INIT,
    **types,
  )
  return base.Parts(backbone, head)


_DEPTHS = {10: (2, 1, 2, 4, 1), 15: (3, 2, 3, 5, 2), 19: (3, 3, 4, 6, 3)}
_SAN = 'arXiv 2004.13621; github.com/hszhao/SAN'
_ACMIX = 'arXiv 2111.14556, Table 1, which gives 12.1, 16.6 and 21.2 M parameters; own reading'


def _variant(size: int, form: str, params: int, top1: float, **options: Any):
  source = _ACMIX if options else _SAN
  built = {'depths': _DEPTHS[size], 'form': form, **options}
  return base.Variant(built, params=params, top1=top1, source=source)


VARIANTS = {
  'san10_pairwise': _variant(10, 'pairwise', 10_531_848, 74.9),
  'san15_pairwise': _variant(15, 'pairwise', 14_065_436, 76.6),
  'san19_pairwise': _variant(19, 'pairwise', 17_596_156, 76.9),
  'san10_patchwise': _variant(10, 'patchwise', 11_841_124, 77.1),
  'san15_patchwise': _variant(15, 'patchwise', 16_181_310, 78.0),
  'san19_patchwise': _variant(19, 'patchwise', 20_518_470, 78.2),
  'acmix_san10': _variant(10, 'patchwise', 11_994_612, 77.6, conv=True),
  'acmix_san15': _variant(15, 'patchwise', 16_414_134, 78.4, conv=True),
  'acmix_san19': _variant(19, 'patchwise', 20_829_278, 78.7, conv=True),
}


def _swap(array: np.ndarray, start: int, count: int, axis: int = 0) -> np.ndarray:
  """Reorders an axis from `start` on: it is `[count, taps]` there and `[taps, count]` here."""
  head, tail = np.split(np.moveaxis(array, axis, 0), [start])
  swapped = tail.reshape(count, -1, *tail.shape[1:]).swapaxes(0, 1).reshape(tail.shape)
  return np.moveaxis(np.concatenate([head, swapped]), 0, axis)


def _prepare(state: reference.State) -> reference.State:
  """Puts the taps of patchwise attention before the channels."""
  state = {key.removeprefix('module.'): value for key, value in state.items()}
  if any('.conv_p.' in key for key in state):
    return state
  for key, value in state.items():
    layer, _, leaf = key.rpartition('.conv_w.')
    if not layer:
      continue
    narrow, hidden = len(state[f'{layer}.conv1.bias']), len(state[f'{layer}.conv_w.2.weight'])
    if leaf.startswith('0.') and value.ndim:
      state[key] = _swap(value, narrow, narrow)
    elif leaf == '2.weight':
      state[key] = _swap(value, narrow, narrow, axis=1)
    elif leaf.startswith('5.'):
      state[key] = _swap(value, 0, hidden)
  return state


def _rules() -> list[reference.Rule]:
  rule, layer, norm_rule = reference.Rule, reference.CONV, reference.NORM
  theirs, block = r'layer(\d+)\.(\d+)\.', 'backbone/stage{0:+1}/block{1:02d}/'
  attention = {
    'conv1': ('query', layer),
    'conv2': ('key', layer),
    'conv3': ('value', layer),
    'conv_p': ('position', layer),
    r'conv_w\.0': ('norm1', norm_rule),
    r'conv_w\.2': ('hidden', layer),
    r'conv_w\.3': ('norm2', norm_rule),
    r'conv_w\.5': ('weights', layer),
  }
  return [
    rule('conv_in', 'backbone/stem', layer),
    rule('bn_in', 'backbone/stem_norm', norm_rule),
    rule(r'conv(\d)', 'backbone/stage{0:+1}_transition/conv', layer),
    rule(r'bn(\d)', 'backbone/stage{0:+1}_norm', norm_rule),
    rule(theirs + r'bn(\d)', block + 'norm{2}', norm_rule),
    rule(theirs + 'conv', block + 'proj', layer),
    rule('fc', 'head/classifier', layer),
    *(
      rule(rf'{theirs}sam\.{key}', f'{block}attn/{name}', kind)
      for key, (name, kind) in attention.items()
    ),
  ]


REFERENCES = {
  'official': reference.Reference(
    origin='github.com/hszhao/SAN, model/san.py',
    rules=_rules(),
    prepare=_prepare,
    infer=lambda state, options: {'num_classes': len(state['fc.bias'])},
    variants=('san*',),
  ),
}
