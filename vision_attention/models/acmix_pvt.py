"""ACmix-PVT: an own reading of the numbers that ACmix (arXiv 2111.14556, Table 2) gives for PVT.

Neither code nor description of it is public. The host is the Pyramid Vision Transformer (arXiv
2102.12122) with the mean over positions in place of its class token; what is mixed in is told at
`attention.spatial_reduction`. No weights of others fit.
"""

from collections.abc import Sequence

from vision_attention.models import base, pvt

RESIZE = pvt.RESIZE
build, drop_path_rates = pvt.build, pvt.drop_path_rates


def _variant(depths: Sequence[int], params: int, top1: float) -> base.Variant:
  return base.Variant(
    {
      'depths': depths,
      'pool': 'gap',
      'attn': {'name': 'spatial_reduction', 'conv': True},
    },
    params=params,
    top1=top1,
    source='arXiv 2111.14556, Table 2, which gives 13 and 25 M parameters; own reading',
  )


VARIANTS = {
  'acmix_pvt_tiny': _variant((2, 2, 2, 2), 13_395_104, 78.0),
  'acmix_pvt_small': _variant((3, 4, 6, 3), 24_823_731, 81.7),
}
