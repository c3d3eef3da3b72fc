"""Random erasing on the device (arXiv 1708.04896), with the defaults of its use in DeiT."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vision_attention import errors

MODES = ('pixel', 'color', 'zero')
_ATTEMPTS = 10


def _box(key: Array, size: tuple[int, int], area: tuple[float, float], aspect: float) -> Array:
  """A rectangle as `[h, w]` bool: the first of ten that lies within the image, else none."""
  height, width = size
  keys = jax.random.split(key, 4)
  draw = lambda key, low, high: jax.random.uniform(key, (_ATTEMPTS,), minval=low, maxval=high)
  target = draw(keys[0], *area) * height * width
  ratio = jnp.exp(draw(keys[1], -jnp.log(aspect), jnp.log(aspect)))
  h, w = jnp.round(jnp.sqrt(target * ratio)), jnp.round(jnp.sqrt(target / ratio))
  fits = (h < height) & (w < width)
  first = jnp.argmax(fits)
  h, w = h[first], w[first]
  top = jnp.floor(jax.random.uniform(keys[2]) * (height - h + 1))
  left = jnp.floor(jax.random.uniform(keys[3]) * (width - w + 1))
  y, x = jnp.arange(height)[:, None], jnp.arange(width)[None]
  inside = (y >= top) & (y < top + h) & (x >= left) & (x < left + w)
  return inside & fits[first]


def erase(
  key: Array,
  images: Float[Array, 'b h w c'],
  *,
  prob: float,
  mode: str = 'pixel',
  area: tuple[float, float] = (0.02, 1 / 3),
  aspect: float = 1 / 0.3,
) -> Float[Array, 'b h w c']:
  """Replaces a rectangle of every image, each with probability `prob`.

  Args:
    key: random key of the step.
    images: normalised.
    prob: of an image to lose a rectangle.
    mode: what stands there: `pixel` (normal noise), `color` (one normal colour) or `zero`.
    area: range of the rectangle's share of the image.
    aspect: height / width is uniform in the logarithm between `1 / aspect` and `aspect`.
  """
  errors.check_choice('config.erasing.mode', mode, MODES)
  if prob == 0:
    return images
  batch, *size, channels = images.shape
  key_box, key_fill, key_apply = jax.random.split(key, 3)
  boxes = jax.vmap(lambda key: _box(key, (size[0], size[1]), area, aspect))(
    jax.random.split(key_box, batch)
  )
  chosen = jax.random.bernoulli(key_apply, prob, (batch, 1, 1))
  shape = {'pixel': images.shape, 'color': (batch, 1, 1, channels), 'zero': (1,)}[mode]
  fill = jnp.zeros(shape) if mode == 'zero' else jax.random.normal(key_fill, shape)
  return jnp.where((boxes & chosen)[..., None], fill, images)
