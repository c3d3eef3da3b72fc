"""What every model file is made of: a table of variants and a classifier of backbone and head."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

ModuleDef = Callable[..., nn.Module]
# Collection whose only key names the code that the other variables were trained with.
CONVENTION = 'convention'


@dataclasses.dataclass(frozen=True)
class Variant:
  """One row of a paper's model table.

  Attributes:
    options: arguments of the model file's `build`.
    image_size: resolution of the published numbers, in pixels.
    num_classes: classes of the published numbers.
    params: exact number of parameters at that resolution and number of classes.
    flops: multiply-adds of one image.
    top1: published ImageNet-1k top-1 accuracy in percent, or None.
    source: where the published numbers stand.
  """

  options: Mapping[str, Any]
  image_size: int = 224
  num_classes: int = 1000
  params: int | None = None
  flops: float | None = None
  top1: float | None = None
  source: str = ''


@dataclasses.dataclass(frozen=True)
class ModelInfo:
  """What is published about a model, beside the options it was made with."""

  name: str
  image_size: tuple[int, int]
  num_classes: int
  options: Mapping[str, Any]
  params: int | None
  flops: float | None
  top1: float | None
  source: str


@dataclasses.dataclass(frozen=True)
class Parts:
  """A backbone and the head that reads its features, both still without a name."""

  backbone: ModuleDef
  head: ModuleDef


def extends(parent: Callable[..., Parts], *without: str) -> Callable[..., Any]:
  """Gives a `build(..., **options)` the options of the one that it calls.

  Models are created with the options of a `build`'s signature: that of the decorated one has its
  own and, of its parent's, those that are neither its own nor in `without`, which it sets itself.
  """

  def decorate(build: Callable[..., Parts]) -> Callable[..., Parts]:
    mine = inspect.signature(build).parameters
    own = [each for each in mine.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    theirs = inspect.signature(parent).parameters.items()
    inherited = [each for name, each in theirs if name not in mine and name not in without]
    signature = inspect.Signature([*own, *inherited], return_annotation=Parts)
    build.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    return build

  return decorate


def form(options: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns build options as texts, `name=value`, in order."""

  def plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
      return tuple(map(plain, value))
    return value.item() if isinstance(value, np.generic) else value

  return tuple(sorted(f'{key}={plain(value)!r}' for key, value in options.items()))


class Classifier(nn.Module):
  """`head(backbone(images))`, with variables `{'params': {'backbone': ..., 'head': ...}, ...}`.

  The reimplementations of one paper differ in details that carry no parameters: the form of GELU,
  an epsilon, a padding. Variables from `load_reference` name their origin in the collection
  `convention`, and the classifier computes what that code computes. They also name there the
  options without which it would leave some of them unused, and are refused where it lacks one.

  Attributes:
    parts: what is built for variables without a `convention`.
    source: whose convention `parts` follows, when one was asked for; other variables are refused.
    conventions: by source, what is built for variables that name it.
    options: the build options that were given, as `form` has them.

  Raises:
    ValueError: for variables of another source or form.
  """

  parts: Parts
  source: str | None = None
  conventions: Mapping[str, Parts] = nn.FrozenDict()
  options: tuple[str, ...] = ()

  def setup(self):
    parts = self.parts
    named = set(self.variables.get(CONVENTION, {}))
    if missing := sorted(named - self.conventions.keys() - set(self.options)):
      raise ValueError(
        f'the variables are of a model with {", ".join(missing)}, of which this one would leave '
        'some unused: pass that to create_model'
      )
    for source, other in self.conventions.items():
      if self.has_variable(CONVENTION, source):
        if self.source not in (None, source):
          raise ValueError(
            f'the variables come from {source!r} but the model was created with '
            f'source={self.source!r}: create it with source={source!r}, or without source'
          )
        parts = other
    self.backbone = parts.backbone()
    self.head = parts.head()

  def __call__(
    self, images: Float[Array, 'b h w c'], *, train: bool = False
  ) -> Float[Array, 'b k']:
    """Returns float32 logits `[batch, num_classes]` of `[batch, height, width, channels]`."""
    return self.head(self.features(images, train=train), train=train)

  def features(
    self, images: Float[Array, 'b h w c'], *, train: bool = False
  ) -> dict[str, Float[Array, 'b ...']]:
    """Returns the backbone's features by name: `stage1` ... and what the head reads."""
    return self.backbone(jnp.asarray(images), train=train)

  @property
  def outputs(self) -> tuple[str, ...]:
    """Names of the outputs of a head that has several, beside what `named_logits` says of them.

    `classifier` and `distilled` (LeViT, DeiT: the second learns from a teacher), or `classifier`
    and `tokens` (VOLO); none for a head with one.
    """
    return tuple(getattr(self.parts.head(), 'outputs', ()))

  def named_logits(
    self, images: Float[Array, 'b h w c'], *, train: bool = False
  ) -> dict[str, Float[Array, 'b ...']]:
    """Returns the logits of a head with several outputs, by name; `__call__` combines them.

    Called as `model.apply(variables, images, train=True, method='named_logits')`.

    Raises:
      ValueError: if the model has one output.
    """
    if not getattr(self.head, 'outputs', ()):
      raise ValueError('the model has one output: its logits are those of the plain call')
    return self.head(self.features(images, train=train), train=train, named=True)

  def dense_logits(self, images: Float[Array, 'b h w c']) -> Float[Array, 'b h w k']:
    """Returns the logits at every place of the last map: the head on it, without the mean.

    Raises:
      ValueError: if the head does not read a map by its mean.
    """
    features, name = self.features(images), getattr(self.head, 'feature', '')
    if getattr(self.head, 'pool', '') != 'gap' or features[name].ndim != 4:
      raise ValueError(
        'logits of places are those of a head that takes the mean over a map: a convolutional '
        "network, or pool='gap'"
      )
    batch, height, width, channels = features[name].shape
    places = features[name].reshape(-1, 1, 1, channels)
    return self.head({name: places}, train=False).reshape(batch, height, width, -1)


def check_image_size(images: Float[Array, 'b h w c'], expected: tuple[int, int]) -> None:
  """Raises ValueError unless the images have the size that the model's tables are made for."""
  size = tuple(images.shape[1:3])
  if size != tuple(expected):
    raise ValueError(
      f'images are {size[0]}x{size[1]} but the model was created for {expected[0]}x{expected[1]}: '
      f'pass image_size={size} to create_model, and to load_reference, which resizes tables'
    )
