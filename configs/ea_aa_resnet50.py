"""EA-AA-ResNet (arXiv 2102.12895) by the released code (github.com/pkuyym/EvolvingAttention).

  python main.py --config=configs/ea_aa_resnet50.py
  python main.py --config=configs/ea_aa_resnet50.py:variant=ea_aa_resnet_101
  python main.py --config=configs/ea_aa_resnet50.py:alpha=0,beta=0
  python main.py --config=configs/ea_aa_resnet50.py:local --workdir=runs/digits

Arguments: `variant`; `data`; `batch`; `alpha` and `beta`, the shares of the convolution over logits
and of the previous block's logits (0 and 0 give AA-ResNet); `local`.

Published results on ImageNet-1k have not been compared with the paper's text and are therefore not
repeated. The code trains on 8 GPUs. The run has not been repeated here.

`local` trains a small model on scikit-learn's digits in a minute or two on two CPU cores, to at
least 90 % of the 355 test images.
"""

import ml_collections

from configs import common

_MEAN = (123.68, 116.78, 103.94)


@common.takes(
  with_local=('data', 'alpha', 'beta'),
  variant='ea_aa_resnet_50',
  data='imagenet2012',
  batch=256,
  alpha=1.0,
  beta=0.5,
  local=False,
  variants=('ea_aa_resnet_*',),
)
def get_config(args: common.Arguments) -> ml_collections.ConfigDict:
  config = common.get_config()
  config.model.name = args.variant
  options = {'alpha': args.alpha, 'beta': args.beta}
  if args.local:
    return _local(config, args.data, options)
  config.model.options = options
  common.use_data(config, args.data)
  config.batch_size = args.batch
  config.total = '100 epochs'
  config.optimizer.name = 'sgd'
  config.optimizer.learning_rate = 0.128 * args.batch / 256
  config.optimizer.momentum = 0.9
  # A term of the loss over everything but BatchNorm.
  config.optimizer.weight_decay = 1e-4
  config.optimizer.weight_decay_mask = (
    '/kernel$',
    '(classifier|query|key|value|proj|evolve)/bias$',
    '_offsets$',
  )
  config.schedule.kind = 'step'
  config.schedule.warmup = '5 epochs'
  config.schedule.boundaries = ('30 epochs', '60 epochs', '80 epochs', '90 epochs')
  config.schedule.factor = 0.1
  config.data.train_ops = ('random_resized_crop({size}, area=(0.05, 1.0))', 'flip()')
  # The short side to 256 pixels.
  config.data.eval_ops = ('center_crop({size}, ratio=0.875)',)
  # Pixels of 0 to 255 less their mean.
  config.data.mean = tuple(value / 255 for value in _MEAN)
  config.data.std = (1 / 255, 1 / 255, 1 / 255)
  config.eval.every = '5 epochs'
  return config


def _local(
  config: ml_collections.ConfigDict, data: str, options: dict[str, float]
) -> ml_collections.ConfigDict:
  """A chain of three maps of logits over 4x4 positions, through two stages."""
  common.local(config, data, size=16)
  config.model.options = {
    **options,
    'depths': (1, 1, 2),
    'width': 16,
    'stem': 'small',
    'kappa': 0.5,
    'upsilon': 0.5,
    'num_heads': 4,
    'norm_momentum': 0.9,
  }
  return config
