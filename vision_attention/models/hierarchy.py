"""The backbone of hierarchical models: stages of blocks with a downsampling in between."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vision_attention.layers import stage
from vision_attention.models import base

ModuleDef = Callable[..., nn.Module]


class Hierarchy(nn.Module):
  """A stem, then stages of blocks, with a downsampling before every stage but the first.

  Features are the last map of every stage, that of the last stage after the norm, if there is one.

  Attributes:
    stem: from images to the first map.
    stages: per stage, its blocks.
    downsamples: what precedes every stage but the first.
    norm: after the last block, or None.
    image_size: height and width that tables are made for, other images being refused; None for
      backbones without.
    smallest: side that images must have for every stage to have a pixel.
    remat: whether blocks are computed again in the backward pass.
    scan: whether equal blocks are compiled once.
  """

  stem: ModuleDef
  stages: Sequence[Sequence[ModuleDef]]
  downsamples: Sequence[ModuleDef]
  norm: ModuleDef | None = None
  image_size: tuple[int, int] | None = None
  smallest: int = 1
  remat: bool = False
  scan: bool = False
  dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, images: Float[Array, 'b h w c'], *, train: bool
  ) -> dict[str, Float[Array, 'b p q d']]:
    if self.image_size is not None:
      base.check_image_size(images, self.image_size)
    if min(images.shape[1:3]) < self.smallest:
      raise ValueError(
        f'images are {images.shape[1]}x{images.shape[2]}, of which {len(self.stages)} stages leave '
        f'no pixel: the smallest side is {self.smallest}'
      )
    x = self.stem(name='stem')(images.astype(self.dtype), train=train)
    features = {}
    for i, blocks in enumerate(self.stages, 1):
      if i > 1:
        x = self.downsamples[i - 2](name=f'downsample{i}')(x, train=train)
      x = stage.Stage(blocks, self.remat, scan=self.scan, name=f'stage{i}')(x, train=train)
      if self.norm is not None and i == len(self.stages):
        x = self.norm(name='norm')(x, train=train)
      features[f'stage{i}'] = x
    return features
