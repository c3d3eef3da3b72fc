"""Blocks of pixels into channels and back."""

from jaxtyping import Array, Float


def space_to_depth(x: Float[Array, 'b h w c'], patch: int) -> Float[Array, 'b p q d']:
  """Puts every block of `patch x patch` pixels into one, channels ordered row, column, channel.

  Raises:
    ValueError: if the patch does not divide the map.
  """
  batch, height, width, dim = x.shape
  if height % patch or width % patch:
    raise ValueError(f'patch {patch} does not divide a map of {height}x{width}: pad it first')
  blocks = x.reshape(batch, height // patch, patch, width // patch, patch, dim)
  return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(
    batch, height // patch, width // patch, patch * patch * dim
  )


def depth_to_space(x: Float[Array, 'b p q d'], patch: int) -> Float[Array, 'b h w c']:
  """Undoes `space_to_depth`.

  Raises:
    ValueError: if the channels are not those of blocks.
  """
  batch, height, width, dim = x.shape
  if dim % patch**2:
    raise ValueError(f'{dim} channels are not those of {patch}x{patch} pixels')
  blocks = x.reshape(batch, height, width, patch, patch, dim // patch**2)
  return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(
    batch, height * patch, width * patch, dim // patch**2
  )
