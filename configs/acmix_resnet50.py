"""ACmix-ResNet (arXiv 2111.14556) on ImageNet-1k by the official code's settings.

  python main.py --config=configs/acmix_resnet50.py
  python main.py --config=configs/acmix_resnet50.py:variant=acmix_resnet_26
  python main.py --config=configs/acmix_resnet50.py:local --workdir=runs/digits

Arguments: `variant`; `data`; `batch`; `epochs`; `local`.

Published top-1: ACmix-ResNet-26 76.1, -38 77.4, -50 77.8. Cost: not published. These runs have not
been repeated here.

Unverified: the code's default is 90 epochs, and the paper is recalled to say 100. The code
multiplies the learning rate by nothing when the batch changes; here it grows with the batch.

`local` trains a small ACmix-ResNet on scikit-learn's digits, in two minutes on two CPU cores, to
at least 90 % of the 355 test images.
"""

import ml_collections

from configs import common


@common.takes(
  variant='acmix_resnet_50',
  data='imagenet2012',
  batch=128,
  epochs=90,
  local=False,
  variants=('acmix_resnet_*',),
)
def get_config(args: common.Arguments) -> ml_collections.ConfigDict:
  config = common.get_config()
  config.model.name = args.variant
  if args.local:
    return _local(config, args)
  common.use_data(config, args.data)
  config.batch_size = args.batch
  config.total = f'{args.epochs} epochs'
  config.optimizer.name = 'sgd'
  config.optimizer.learning_rate = 0.1 * args.batch / 128
  config.optimizer.momentum = 0.9
  config.optimizer.weight_decay = 1e-4
  config.optimizer.weight_decay_mask = ('.',)  # everything
  config.schedule.kind = 'cosine'
  config.schedule.warmup = '5 epochs'
  config.schedule.warmup_init = 0.25
  # The code spreads 0.1 over the 999 other classes, and not over all 1000.
  classes = config.data.num_classes or 1000
  config.loss.label_smoothing = 0.1 * classes / (classes - 1)
  config.data.train_ops = (
    'random_resized_crop({size}, area=(0.08, 1.0), interpolation="bilinear")',
    'flip()',
  )
  config.data.eval_ops = ('center_crop({size}, ratio=0.875, interpolation="bilinear")',)
  config.eval.every = '5 epochs'
  return config


def _local(config: ml_collections.ConfigDict, args: common.Arguments) -> ml_collections.ConfigDict:
  """Mixed on 12x12 and 6x6 positions."""
  common.local(config, args.data, size=12)
  config.model.options = {'depths': (1, 1), 'width': 16, 'stem': 'small', 'kernel': 5}
  return config
