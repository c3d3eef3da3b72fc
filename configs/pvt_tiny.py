"""PVT (arXiv 2102.12122) by the recipe of its code, which is near that of DeiT.

  python main.py --config=configs/pvt_tiny.py
  python main.py --config=configs/pvt_tiny.py:variant=pvt_large
  python main.py --config=configs/pvt_tiny.py:variant=acmix_pvt_tiny
  python main.py --config=configs/pvt_tiny.py:local --workdir=runs/digits

Arguments: `variant`; `data`; `local`.

Published top-1 on ImageNet-1k at 224 pixels (Table 2): PVT-Tiny 75.1, -Small 79.8, -Medium 81.2,
-Large 81.7; with ACmix (arXiv 2111.14556, Table 2) -Tiny 78.0, -Small 81.7, for which no recipe is
published: it is PVT's here. Cost: not published. The runs have not been repeated here.

Positions decay, as they do in that code; the class token does not.

`local` trains a small PVT on scikit-learn's digits, in a minute or two on two CPU cores, to at
least 90 % of the 355 test images.
"""

import ml_collections

from configs import common

# Stochastic depth and bound on the gradient's norm.
_RECIPES = {
  'pvt_tiny': (0.1, 0.0),
  'pvt_small': (0.1, 0.0),
  'pvt_medium': (0.3, 1.0),
  'pvt_large': (0.3, 1.0),
  'acmix_pvt_tiny': (0.1, 0.0),
  'acmix_pvt_small': (0.1, 0.0),
}


@common.takes(variant='pvt_tiny', data='imagenet2012', local=False, variants=tuple(_RECIPES))
def get_config(args: common.Arguments) -> ml_collections.ConfigDict:
  config = common.get_config()
  config.model.name = args.variant
  if args.local:
    return _local(config, args.data)
  common.use_data(config, args.data)
  common.deit_augmentation(config)
  config.erasing.after_mixing = False
  config.data.repeats = 3
  config.data.eval_ops = ('center_crop({size}, ratio=0.875)',)
  drop_path, config.optimizer.clip_norm = _RECIPES[args.variant]
  config.model.options = {'drop_path': drop_path}
  config.total = '300 epochs'
  config.batch_size = 1024
  config.optimizer.name = 'adamw'
  config.optimizer.learning_rate = 5e-4 * config.batch_size / 512
  config.optimizer.weight_decay = 0.05
  # Neither biases nor norms nor the class token decay, nor ACmix's two rates.
  config.optimizer.weight_decay_mask = ('/kernel$', '/(cls_)?position$')
  if args.variant.startswith('acmix_'):
    config.optimizer.weight_decay_mask += ('/mixing$',)
  config.schedule.kind = 'cosine'
  config.schedule.warmup = '5 epochs'
  config.schedule.warmup_init = 1e-3  # 1e-6
  config.schedule.warmup_prefix = False
  config.schedule.every = '1 epochs'
  config.schedule.final = 0.01  # 1e-5
  config.eval.every = '5 epochs'
  return config


def _local(config: ml_collections.ConfigDict, data: str) -> ml_collections.ConfigDict:
  """Small enough for a laptop: 8x8 patches with keys of 2x2 of them, then 4x4."""
  common.local(config, data)
  config.model.options = {
    'depths': (1, 2),
    'dims': (32, 64),
    'num_heads': (1, 2),
    'mlp_ratios': (4, 4),
    'reductions': (2, 1),
    'drop_path': 0.05,
  }
  config.total = '30 epochs'
  config.optimizer.learning_rate = 4e-3
  config.loss.label_smoothing = 0.1
  return config
