"""LESA-ResNet (arXiv 2107.05637) on ImageNet-1k by the commands of the official code.

  python main.py --config=configs/lesa_resnet50.py
  python main.py --config=configs/lesa_resnet50.py:variant=lesa_wrn_50
  python main.py --config=configs/lesa_resnet50.py:local --workdir=runs/digits

Arguments: `variant`; `data`; `batch`; `local`.

Published top-1 (github.com/Chenglin-Yang/LESA_classification): LESA-ResNet-50 79.55, LESA-WRN-50
80.18. Cost: not published; 4 GPUs. These runs have not been repeated here. The code's BatchNorm
statistics are those of the 32 images of one GPU, these are of the whole batch. Whether the paper's
numbers took more augmentation than the commands do is not verified.

`local` trains a small LESA-ResNet on scikit-learn's digits, in a minute or two on two CPU cores, to
at least 90 % of the 355 test images.
"""

import ml_collections

from configs import common


@common.takes(
  variant='lesa_resnet_50', data='imagenet2012', batch=128, local=False, variants=('lesa_*',)
)
def get_config(args: common.Arguments) -> ml_collections.ConfigDict:
  config = common.get_config()
  config.model.name = args.variant
  if args.local:
    return _local(config, args)
  common.use_data(config, args.data)
  config.batch_size = args.batch
  config.total = '95 epochs'
  config.optimizer.name = 'sgd'
  config.optimizer.learning_rate = 0.05 * args.batch / 128
  config.optimizer.momentum = 0.9
  config.optimizer.nesterov = True
  config.optimizer.weight_decay = 8e-5
  config.optimizer.weight_decay_mask = ('.',)  # everything
  config.schedule.kind = 'cosine'
  config.schedule.warmup = '5 epochs'
  config.data.train_ops = (
    'random_resized_crop({size}, area=(0.08, 1.0), interpolation="bilinear")',
    'flip()',
  )
  config.data.eval_ops = ('center_crop({size}, ratio=0.875, interpolation="bilinear")',)
  config.eval.every = '5 epochs'
  return config


def _local(config: ml_collections.ConfigDict, args: common.Arguments) -> ml_collections.ConfigDict:
  """Attention over 8x8 positions in the last of three stages."""
  common.local(config, args.data, size=16)
  config.total = '12 epochs'
  config.model.options = {
    'depths': (1, 1, 1),
    'strides': (1, 2, 1),
    'stages': (3,),
    'first_conv': (),
    'width': 16,
    'stem': 'small',
    'num_heads': 4,
  }
  return config
