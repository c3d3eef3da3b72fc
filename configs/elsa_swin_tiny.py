"""ELSA-Swin (arXiv 2112.12786) by the recipe of its code.

  python main.py --config=configs/elsa_swin_tiny.py
  python main.py --config=configs/elsa_swin_tiny.py:variant=elsa_swin_base
  python main.py --config=configs/elsa_swin_tiny.py:local --workdir=runs/digits

Arguments: `variant`; `data`; `local`. ELSA-VOLO has the recipes of VOLO: `configs/volo_d1.py`.

Published top-1 at 224 pixels: ELSA-Swin-T 82.7, -S 83.5, -B 84.0, the last with averaged weights.
Cost: not published. The runs have not been repeated here.

`local` trains a small ELSA-Swin on scikit-learn's digits, in a minute or two on two CPU cores, to
at least 90 % of the 355 test images.
"""

import ml_collections

from configs import common

_DROP_PATH = {'elsa_swin_tiny': 0.1, 'elsa_swin_small': 0.3, 'elsa_swin_base': 0.5}


@common.takes(variant='elsa_swin_tiny', data='imagenet2012', local=False, variants=('elsa_swin_*',))
def get_config(args: common.Arguments) -> ml_collections.ConfigDict:
  config = common.get_config()
  config.model.name = args.variant
  if args.local:
    return _local(config, args.data)
  if args.variant not in _DROP_PATH:
    raise ValueError(f'no recipe for {args.variant!r}: there are {", ".join(_DROP_PATH)}')
  common.use_data(config, args.data)
  common.deit_augmentation(config, interpolation='random')
  config.model.options = {'drop_path': _DROP_PATH[args.variant]}
  config.data.eval_ops = ('center_crop({size}, ratio=0.9)',)
  # Ten more epochs at the smallest rate follow those of the schedule.
  config.total = '310 epochs'
  config.batch_size = 1024
  config.optimizer.name = 'adamw'
  config.optimizer.learning_rate = 1e-3
  config.optimizer.clip_norm = 5.0
  config.optimizer.weight_decay = 0.05
  # Neither biases nor norms decay; ghost heads and the last stage's table of positions do.
  config.optimizer.weight_decay_mask = (
    '/kernel$',
    '/ghost_(mul|add)$',
    '/relative_position$',
  )
  config.schedule.kind = 'cosine'
  config.schedule.warmup = '20 epochs'
  config.schedule.warmup_init = 1e-3  # 1e-6
  config.schedule.warmup_prefix = False
  config.schedule.final = 0.01  # 1e-5
  config.schedule.hold = '10 epochs'
  config.schedule.every = '1 epochs'
  config.eval.every = '5 epochs'
  if args.variant == 'elsa_swin_base':
    config.ema.decay = 0.99992
  return config


def _local(config: ml_collections.ConfigDict, data: str) -> ml_collections.ConfigDict:
  """Small enough for a laptop: neighbourhoods of 3 on 8x8 patches, then a window over all."""
  common.local(config, data)
  config.model.options = {
    'depths': (2, 1, 1),
    'dim': 32,
    'num_heads': (2, 4, 8),
    'stages': (1, 2),
    'kernel': 3,
    'drop_path': 0.05,
  }
  config.optimizer.learning_rate = 4e-3
  config.loss.label_smoothing = 0.1
  return config
