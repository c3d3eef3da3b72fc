"""AA-ResNet, AA-Wide-ResNet, AA-MnasNet (arXiv 1904.09925) by the recipes of its appendix.

  python main.py --config=configs/aa_resnet50.py
  python main.py --config=configs/aa_resnet50.py:variant=aa_resnet_101
  python main.py --config=configs/aa_resnet50.py:variant=aa_wide_resnet_28_10,data=cifar100
  python main.py --config=configs/aa_resnet50.py:variant=aa_mnasnet
  python main.py --config=configs/aa_resnet50.py:variant=aa_mnasnet,augmented=False
  python main.py --config=configs/aa_resnet50.py:local --workdir=runs/digits

Arguments: `variant`, also a baseline: `resnet_*`, `se_resnet_*` or `wide_resnet_28_10`; `data`;
`batch`; `augmented`, whether MnasNet-A1 has attention; `local`.

Published top-1 on ImageNet-1k (Table 2): AA-ResNet-34 74.7, -50 77.7, -101 78.7, -152 79.1; on
CIFAR-100 (Table 1): AA-Wide-ResNet-28-10 81.6. The baselines there: ResNet-34 73.6, -50 76.4, -101
77.9, -152 78.4; SE-ResNet-34 74.3, -50 77.5, -101 78.4, -152 78.9; Wide-ResNet-28-10 80.3; MnasNet
75.2, and 75.7 with attention. Cost: not published; 8 V100 were used. These runs have not been
repeated here.

The recipe is recalled and has not been compared with the appendix, but for the architecture.

`local` trains a small AA-ResNet on scikit-learn's digits in a minute or two on two CPU cores, to at
least 90 % of the 355 test images.
"""

import ml_collections

from configs import common

# Everything but BatchNorm: weights, biases, tables of offsets.
_DECAYED = ('/kernel$', '(classifier|query|key|value|proj)/bias$', '_offsets$')
_DECAYED_BASELINE = ('/kernel$', '(classifier|squeeze|excite)/bias$')


@common.takes(
  variant='aa_resnet_50',
  data='imagenet2012',
  batch=0,
  augmented=True,
  local=False,
  variants=('aa_*', 'resnet_*', 'se_resnet_*', 'wide_resnet_28_10'),
)
def get_config(args: common.Arguments) -> ml_collections.ConfigDict:
  config = common.get_config()
  config.model.name = args.variant
  if args.local:
    return _local(config, args)
  common.use_data(config, args.data)
  config.optimizer.name = 'sgd'
  config.optimizer.momentum = 0.9
  augmented = args.variant.startswith('aa_')
  config.optimizer.weight_decay_mask = _DECAYED if augmented else _DECAYED_BASELINE
  if args.variant == 'aa_mnasnet':
    return _mnasnet(config, args.batch or 1024, args.augmented)
  if not args.augmented:
    raise ValueError(
      f'augmented is for aa_mnasnet: name a baseline in place of variant={args.variant!r}'
    )
  if 'wide_resnet' in args.variant:
    return _cifar(config, args.batch or (256 if augmented else 1024), 5e-4 if augmented else 2e-4)
  # The paper takes the largest batch that fits, of 32 to 256 for each of 8 workers.
  config.batch_size = args.batch or 1024
  config.total = '100 epochs'
  config.optimizer.learning_rate = 0.128 * config.batch_size / 256
  config.optimizer.weight_decay = 1e-4
  config.schedule.kind = 'step'
  config.schedule.warmup = '5 epochs'
  config.schedule.boundaries = ('30 epochs', '60 epochs', '80 epochs', '90 epochs')
  config.schedule.factor = 0.1
  config.data.train_ops = ('random_resized_crop({size}, area=(0.08, 1.0))', 'flip()')
  config.data.eval_ops = ('center_crop({size}, ratio=0.875)',)
  config.eval.every = '5 epochs'
  return config


def _cifar(
  config: ml_collections.ConfigDict, batch: int, decay: float
) -> ml_collections.ConfigDict:
  config.image_size = 32
  config.batch_size = batch
  config.total = '500 epochs'
  config.optimizer.learning_rate = 0.2 * batch / 256
  config.optimizer.weight_decay = decay
  config.schedule.kind = 'cosine'
  config.schedule.warmup = '25 epochs'
  config.data.train_ops = ('pad_crop(4)', 'flip()')
  config.data.eval_ops = ()
  config.data.mean = (0.507, 0.487, 0.441)
  config.data.std = (1.0, 1.0, 1.0)  # the mean only
  config.eval.every = '10 epochs'
  return config


def _mnasnet(
  config: ml_collections.ConfigDict, batch: int, augmented: bool
) -> ml_collections.ConfigDict:
  """MnasNet's recipe (github.com/tensorflow/tpu); with attention from half its rate to its last."""
  config.batch_size = batch
  config.total = '350 epochs'
  config.model.options = {'dropout': 0.2}
  config.optimizer.name = 'rmsprop'
  config.optimizer.learning_rate = 0.016 * batch / 256
  config.optimizer.b2 = 0.9
  config.optimizer.epsilon = 1e-3
  config.optimizer.weight_decay = 1e-5
  config.optimizer.weight_decay_mask = (*_DECAYED, '(squeeze|excite)/bias$')
  config.schedule.kind = 'step'
  config.schedule.warmup = '5 epochs'
  config.schedule.warmup_prefix = False
  # 145 times.
  drops = 145
  config.schedule.boundaries = tuple(f'{2.4 * (i + 1):.1f} epochs' for i in range(drops))
  config.schedule.factor = 0.97
  if augmented:
    config.optimizer.learning_rate *= 0.5
    config.schedule.factor *= 2 ** (1 / drops)
  else:
    config.model.options.augmented = False
    config.optimizer.weight_decay_mask = _DECAYED_BASELINE
  config.loss.label_smoothing = 0.1
  config.ema.decay = 0.9999
  config.ema.warmup = True
  config.data.train_ops = ('random_resized_crop({size}, area=(0.08, 1.0))', 'flip()')
  config.data.eval_ops = ('center_crop({size}, ratio=0.875)',)
  config.eval.every = '5 epochs'
  return config


def _local(config: ml_collections.ConfigDict, args: common.Arguments) -> ml_collections.ConfigDict:
  """Attention over 4x4 positions, interpolated to 8x8, and over 4x4."""
  common.local(config, args.data, size=16)
  config.model.options = {
    'depths': (1, 1, 2),
    'width': 16,
    'stem': 'small',
    'kappa': 0.5,
    'upsilon': 0.5,
    'num_heads': 4,
    'min_head_dim': 8,
  }
  return config
