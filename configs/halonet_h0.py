"""HaloNet (arXiv 2103.12731), by the recipe of ResNet-RS.

  python main.py --config=configs/halonet_h0.py
  python main.py --config=configs/halonet_h0.py:variant=halonet_h4
  python main.py --config=configs/halonet_h0.py:variant=halonet_h7,conv=2
  python main.py --config=configs/halonet_h0.py:local --workdir=runs/digits

Arguments: `variant`; `data`; `epochs`; `batch`; `conv`, the number of leading stages that have
convolutions in place of attention (Table 5: 2 for the fastest hybrid of H7); `local`.

Published top-1 on ImageNet-1k: H7 84.9 at 600 pixels; its hybrids with one, two and three stages
of convolutions 84.6, 84.7 and 83.8. Cost there: not published. For H0 to H6 the numbers in
`info.top1` are unverified. ImageNet runs have not been repeated here.

The paper's own recipe could not be checked: this is the one of the same authors' ResNet-RS (arXiv
2103.07579, section 4), which it is said to share.

`local` trains a small HaloNet on scikit-learn's digits, in a minute or two on two CPU cores, to at
least 95 % of the 355 test images.
"""

import ml_collections

from configs import common

_SIZES = {
  **dict.fromkeys(('halonet_h0', 'halonet_h1', 'halonet_h2', 'halonet_50'), 256),
  'halonet_h3': 320,
  'halonet_h4': 384,
  'halonet_h5': 448,
  'halonet_h6': 512,
  'halonet_h7': 600,
}
_SMALL = ('halonet_h0', 'halonet_h1', 'halonet_h2', 'halonet_50')


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  args = common.parse_arg(
    arg,
    variant='halonet_h0',
    data='imagenet2012',
    epochs=350,
    batch=4096,
    conv=0,
    local=False,
  )
  config = common.get_config()
  config.model.name = args.variant
  if args.local:
    return _local(config, args)
  if args.variant not in _SIZES:
    raise ValueError(
      f'config argument variant={args.variant!r} is no HaloNet: allowed are {", ".join(_SIZES)}'
    )
  common.use_data(config, args.data)
  # Everything but the resolution is unverified for HaloNet.
  small = args.variant in _SMALL
  common.resnet_rs(config, magnitude=10 if small else 15)
  config.image_size = _SIZES[args.variant]
  config.total = f'{args.epochs} epochs'
  config.batch_size = args.batch
  config.optimizer.learning_rate = 0.1 * args.batch / 256
  config.model.options = {
    'conv_stages': tuple(range(1, args.conv + 1)),
    'drop_path': 0.0 if small else 0.1,
    'dropout': 0.25,
    'norm_momentum': 0.0,
  }
  return config


def _local(
  config: ml_collections.ConfigDict, args: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
  """Small enough for a laptop; 8x8 maps of two blocks by two, then one block."""
  common.local(config, args.data)
  config.model.options = {
    'depths': (1, 1),
    'width': 32,
    'expansion': 2.0,
    'num_heads': 4,
    'block': 4,
    'halo': 2,
    'final_dim': 128,
    'stem': 'patch',
    'scale': 'rsqrt',
  }
  return config
