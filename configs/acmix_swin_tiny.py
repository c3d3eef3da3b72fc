"""ACmix-Swin (arXiv 2111.14556) by the recipe of its code, which is Swin's.

  python main.py --config=configs/acmix_swin_tiny.py
  python main.py --config=configs/acmix_swin_tiny.py:variant=acmix_swin_small
  python main.py --config=configs/acmix_swin_tiny.py:local --workdir=runs/digits

Arguments: `variant`; `data`; `local`.

Published top-1 of training on ImageNet-1k at 224 pixels for 300 epochs: ACmix-Swin-T 81.9 (0.6 more
than Swin-T), -S 83.5 (0.5 more). Cost: not published. The runs have not been repeated here.

`local` trains a small ACmix-Swin on scikit-learn's digits, in a minute or two on two CPU cores, to
at least 90 % of the 355 test images.
"""

import ml_collections

from configs import common

_DROP_PATH = {'acmix_swin_tiny': 0.2, 'acmix_swin_small': 0.3}


@common.takes(
  variant='acmix_swin_tiny', data='imagenet2012', local=False, variants=('acmix_swin_*',)
)
def get_config(args: common.Arguments) -> ml_collections.ConfigDict:
  config = common.get_config()
  config.model.name = args.variant
  if args.local:
    return _local(config, args.data)
  if args.variant not in _DROP_PATH:
    raise ValueError(f'the code has no recipe for {args.variant!r}: it has {", ".join(_DROP_PATH)}')
  common.use_data(config, args.data)
  common.deit_augmentation(config)
  # As the code of Swin does, from which this one comes (unverified).
  config.erasing.after_mixing = False
  config.data.eval_ops = ('center_crop({size}, ratio=0.875)',)
  config.model.options = {'drop_path': _DROP_PATH[args.variant]}
  config.total = '300 epochs'
  config.batch_size = 1024
  config.optimizer.name = 'adamw'
  config.optimizer.learning_rate = 5e-4 * config.batch_size / 512
  config.optimizer.weight_decay = 0.05
  config.optimizer.clip_norm = 5.0
  # Neither biases nor norms nor tables of relative positions nor the two rates decay.
  config.optimizer.weight_decay_mask = ('/kernel$', '/mixing$')
  config.schedule.kind = 'cosine'
  config.schedule.warmup = '20 epochs'
  config.schedule.warmup_init = 1e-3
  config.schedule.warmup_prefix = False
  config.schedule.final = 0.01
  config.eval.every = '5 epochs'
  return config


def _local(config: ml_collections.ConfigDict, data: str) -> ml_collections.ConfigDict:
  """Small enough for a laptop: 4x4 windows over 8x8 patches, shifted, then over the whole map."""
  common.local(config, data)
  config.model.options = {
    'depths': (2, 1),
    'dim': 32,
    'num_heads': (2, 4),
    'window': 4,
    'drop_path': 0.05,
  }
  config.optimizer.learning_rate = 4e-3
  config.total = '12 epochs'
  config.loss.label_smoothing = 0.1
  return config
