"""BoTNet (arXiv 2101.11605) on ImageNet-1k: the family T3 to T7, and BoTNet-50, -101, -152.

  python main.py --config=configs/botnet_t3.py
  python main.py --config=configs/botnet_t3.py:variant=botnet_t5
  python main.py --config=configs/botnet_t3.py:variant=botnet_50,last_stride=1
  python main.py --config=configs/botnet_t3.py:variant=botnet_50,last_stride=1,epochs=100
  python main.py --config=configs/botnet_t3.py:variant=botnet_50,last_stride=1,silu
  python main.py --config=configs/botnet_t3.py:local --workdir=runs/digits

Arguments: `variant`, one of T3 to T7, BoTNet-50, -101, -152, -200 or their baseline `resnet_50`;
`data`; `local`; and of all but T3 to T7 `last_stride` (1 is "S1"), `epochs` (200, or 100 of the
standard recipe) and `silu`, the ablation with SiLU, squeeze-and-excitation and less weight decay.

Published top-1: T3 81.7, T4 82.8 (224 pixels), T5 83.5 (256), T6 84.0 (320), T7 84.7 (384). Time of
a training step on TPU v3 there: T4 181 ms, T5 355 ms, T6 579 ms, T7 805 ms. From memory,
unverified: ResNet-50, BoTNet-50 and its S1 reach 76.8, 77.0 and 77.7 in 100 epochs, 77.7, 78.3 and
79.1 in 200; with `silu` ResNet-50 has 79.2 and S1 80.3. The runs have not been repeated here.

The paper's own recipe of T3 to T7 is not known here in every number. This one is that of ResNet-RS
(arXiv 2103.07579), by some of the same authors and of the same kind; which of its regularisations
belongs to which variant is this project's choice.

`local` trains a small network with attention on scikit-learn's digits, in two minutes on two CPU
cores, to at least 97 % of the 355 test images.
"""

import ml_collections

from configs import common

# Resolution, magnitude of RandAugment, dropout, stochastic depth.
_T = {
  'botnet_t3': (224, 10, 0.25, 0.0),
  'botnet_t4': (224, 15, 0.25, 0.0),
  'botnet_t5': (256, 15, 0.25, 0.1),
  'botnet_t6': (320, 15, 0.25, 0.1),
  'botnet_t7': (384, 15, 0.4, 0.1),
}
_PLAIN = ('botnet_50', 'botnet_101', 'botnet_152', 'botnet_200', 'resnet_50')


@common.takes(
  variant='botnet_t3',
  data='imagenet2012',
  last_stride=0,
  epochs=0,
  silu=False,
  local=False,
  variants=('botnet_*', 'resnet_50'),
)
def get_config(args: common.Arguments) -> ml_collections.ConfigDict:
  config = common.get_config()
  config.model.name = args.variant
  if args.local:
    return _local(config, args.data)
  common.use_data(config, args.data)
  config.batch_size = 4096
  config.data.eval_ops = ('center_crop({size}, ratio=0.875)',)
  config.loss.label_smoothing = 0.1
  config.optimizer.name = 'sgd'
  config.optimizer.momentum = 0.9
  # A term of the loss over everything but BatchNorm.
  tables = () if args.variant == 'resnet_50' else ('/relative_(height|width)$',)
  config.optimizer.weight_decay_mask = ('/kernel$', '(classifier|squeeze|excite)/bias$', *tables)
  config.schedule.kind = 'cosine'
  config.schedule.warmup = '5 epochs'
  config.eval.every = '5 epochs'
  if args.variant in _T:
    if args.last_stride or args.epochs or args.silu:
      raise ValueError(
        f'last_stride, epochs and silu go with {", ".join(_PLAIN)}; {args.variant} has 1, 350 and '
        'SiLU'
      )
    _family_t(config, args.variant)
  elif args.variant in _PLAIN:
    _plain(config, args)
  else:
    raise ValueError(
      f'config argument variant={args.variant!r} must be one of {", ".join((*_T, *_PLAIN))}'
    )
  return config


def _augment(config: ml_collections.ConfigDict, magnitude: int) -> None:
  config.data.train_ops = (
    'random_resized_crop({size}, area=(0.08, 1.0))',
    'flip()',
    f'rand_augment_tpu(2, {magnitude})',
  )


def _family_t(config: ml_collections.ConfigDict, variant: str) -> None:
  size, magnitude, dropout, drop_path = _T[variant]
  config.image_size = size
  # BatchNorm's statistics are those of the last batch, which the running average smooths.
  config.model.options = {'dropout': dropout, 'drop_path': drop_path, 'norm_momentum': 0.0}
  config.ema.decay = 0.9999
  config.ema.warmup = True
  config.total = '350 epochs'
  config.optimizer.learning_rate = 0.1 * config.batch_size / 256
  config.optimizer.nesterov = True
  config.optimizer.weight_decay = 4e-5
  _augment(config, magnitude)


def _plain(config: ml_collections.ConfigDict, args: common.Arguments) -> None:
  """The ablation's schedules; epochs, batch and weight decay are from memory, unverified."""
  if args.epochs not in (0, 100, 200):
    raise ValueError(f'epochs={args.epochs} must be 100 (standard) or 200 (improved)')
  config.image_size = 224
  if args.variant == 'resnet_50' and args.last_stride:
    raise ValueError('last_stride is for BoTNet: resnet_50 has 2')
  options = {} if args.variant == 'resnet_50' else {'last_stride': args.last_stride or 2}
  if args.epochs == 100:
    if args.silu:
      raise ValueError('silu goes with epochs=200')
    config.total = '100 epochs'
    config.batch_size = 1024
    config.loss.label_smoothing = 0.0
    config.optimizer.weight_decay = 1e-4
    config.data.train_ops = ('random_resized_crop({size}, area=(0.08, 1.0))', 'flip()')
  else:
    config.total = '200 epochs'
    config.optimizer.weight_decay = 8e-5
    _augment(config, 10)
  if args.silu:
    config.optimizer.weight_decay = 4e-5
    options.update({'se_ratio': 1 / 16, 'activation': 'silu'})
  config.model.options = options
  config.optimizer.learning_rate = 0.1 * config.batch_size / 256


def _local(config: ml_collections.ConfigDict, data: str) -> ml_collections.ConfigDict:
  """Small enough for a laptop: attention of four heads over 8x8 places."""
  common.local(config, data)
  config.model.options = {
    'depths': (1, 2),
    'attn_stages': (2,),
    'width': 24,
    'drop_path': 0.05,
  }
  config.loss.label_smoothing = 0.1
  return config
