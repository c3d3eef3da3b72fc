"""CoAtNet (arXiv 2106.04803) by the recipes of its Table 10.

  python main.py --config=configs/coatnet0.py
  python main.py --config=configs/coatnet0.py:variant=coatnet_2
  python main.py --config=configs/coatnet0.py:variant=coatnet_3,data=imagenet21k
  python main.py --config=configs/coatnet0.py:variant=coatnet_0,size=384,init=runs/coatnet0
  python main.py --config=configs/coatnet0.py:variant=coatnet_4,data=imagenet21k,augment=True
  python main.py --config=configs/coatnet0.py:variant=coatnet_5,data=jft300m
  python main.py --config=configs/coatnet0.py:variant=coatnet_5,size=512,init=runs/c5,pretrained=jft
  python main.py --config=configs/coatnet0.py:local --workdir=runs/digits

Arguments: `variant`; `data`; `size` (a size above 224 means fine-tuning); `init`, the run that
fine-tuning starts from; `pretrained`, `1k`, `21k` or `jft`, what that run was trained on;
`augment`, of CoAtNet-4 by 21k, RandAugment in both stages ("PT-RA"); `epochs` of pre-training, 0
for the recipe's (150 is "E150"); `local`.

Table 10 has no column for CoAtNet-6 and -7 on JFT-3B: they take CoAtNet-5's, unverified.

Published top-1 of training on ImageNet-1k at 224 pixels for 300 epochs, batch 4096 (Table 4):
CoAtNet-0 81.6, -1 83.3, -2 84.1, -3 84.5. Cost there: not published. ImageNet runs have not been
repeated here.

`local` trains a small CoAtNet on scikit-learn's digits, in under three minutes on two CPU cores, to
at least 97 % of the 355 test images; with `data=fashion_mnist` a wider one, in some ten.
"""

import ml_collections

from configs import common

# Table 10: stochastic depth of training on 1k and pre-training on 21k.
_DROP_PATH_1K = {'coatnet_0': 0.2, 'coatnet_1': 0.3, 'coatnet_2': 0.5, 'coatnet_3': 0.7}
_DROP_PATH_21K = {'coatnet_2': 0.3, 'coatnet_3': 0.5, 'coatnet_4': 0.7}
# Pre-training on JFT, and fine-tuning from it; of -6 and -7 (JFT-3B) nothing is published.
_DROP_PATH_JFT = {'coatnet_3': 0.0, 'coatnet_4': 0.1} | dict.fromkeys(
  ('coatnet_5', 'coatnet_6', 'coatnet_7'), 0.0
)
_DROP_PATH_FROM_JFT = {'coatnet_3': 0.1, 'coatnet_4': 0.3} | dict.fromkeys(
  ('coatnet_5', 'coatnet_6', 'coatnet_7'), 0.2
)
_CROP = 'random_resized_crop({size}, area=(0.05, 1.0))'
# The paper gives layers and magnitude; magnitudes above 10 extrapolate, as in Google's code.
_RAND_AUGMENT = 'rand_augment_tpu(2, {magnitude})'


@common.takes(
  variant='coatnet_0',
  data='imagenet2012',
  size=0,
  init='',
  pretrained='1k',
  augment=False,
  epochs=0,
  local=False,
  variants=('coatnet_*',),
)
def get_config(args: common.Arguments) -> ml_collections.ConfigDict:
  config = common.get_config()
  config.model.name = args.variant
  if args.local:
    data = 'digits' if args.data == 'imagenet2012' else args.data
    return _local(config, data, args)
  common.use_data(config, args.data)
  config.image_size = args.size or 224
  # The paper does not say what decays; the same authors' MaxViT code leaves out every bias, also
  # the relative ones, and every norm.
  config.optimizer.weight_decay_mask = ('/kernel$',)
  config.optimizer.clip_norm = 1.0
  tunes = args.init or config.image_size > 224
  if args.augment and (
    args.variant != 'coatnet_4'
    or (args.pretrained if tunes else args.data) not in ('21k', '22k', 'imagenet21k')
  ):
    raise ValueError('config argument augment goes with coatnet_4 and ImageNet-21k (PT-RA) only')
  if tunes:
    _fine_tune(config, args)
  elif args.data == 'imagenet21k':
    _pretrain_21k(config, args)
  elif args.data == 'jft300m':
    _pretrain_jft(config, args)
  else:
    _train(config, args)
  if args.epochs:
    config.total = f'{args.epochs} epochs'
  return config


def _table(table: dict[str, float], variant: str, what: str) -> float:
  if variant not in table:
    raise ValueError(f'Table 10 has no {what} for {variant!r}: it has {", ".join(table)}')
  return table[variant]


def _augment(config: ml_collections.ConfigDict, magnitude: int) -> None:
  config.data.train_ops = (_CROP, 'flip()', _RAND_AUGMENT.replace('{magnitude}', str(magnitude)))


def _train(config: ml_collections.ConfigDict, args: common.Arguments) -> None:
  """ImageNet-1k, column 1."""
  rate = _table(_DROP_PATH_1K, args.variant, 'training on ImageNet-1k')
  config.model.options = {'drop_path': rate}
  config.total = '300 epochs'
  config.batch_size = 4096
  config.optimizer.learning_rate = 1e-3
  config.optimizer.weight_decay = 0.05
  config.schedule.kind = 'cosine'
  config.schedule.warmup = '10_000 steps'
  config.schedule.final = 0.01  # minimum 1e-5
  config.loss.label_smoothing = 0.1
  config.mixing.mixup_alpha = 0.8
  config.eval.every = '5 epochs'
  _augment(config, 15)


def _pretrain_21k(
  config: ml_collections.ConfigDict, args: common.Arguments, rate: float | None = None
) -> None:
  """ImageNet-21k, column 3; with the `rate` of stochastic depth of another column's."""
  if rate is None:
    rate = _table(_DROP_PATH_21K, args.variant, 'pre-training on ImageNet-21k')
  config.model.options = {'drop_path': rate}
  config.total = '90 epochs'
  config.batch_size = 4096
  config.optimizer.learning_rate = 1e-3
  config.optimizer.weight_decay = 0.01
  config.schedule.kind = 'linear'
  config.schedule.warmup = '5 epochs'
  config.schedule.final = 0.01
  config.loss.kind = 'sigmoid'
  config.loss.label_smoothing = 1e-4
  config.eval.every = '1 epochs'
  config.data.train_ops = (_CROP, 'flip()')
  if args.augment:
    _augment(config, 5)


def _pretrain_jft(config: ml_collections.ConfigDict, args: common.Arguments) -> None:
  """JFT-300M, column 5."""
  _pretrain_21k(config, args, _table(_DROP_PATH_JFT, args.variant, 'pre-training on JFT'))
  config.total = '14 epochs'
  config.schedule.warmup = '20_000 steps'
  config.optimizer.learning_rate = 1e-3 if args.variant == 'coatnet_3' else 5e-4
  # The minimum is 1e-5 for either peak.
  config.schedule.final = 1e-5 / config.optimizer.learning_rate
  _augment(config, 5)


def _fine_tune(config: ml_collections.ConfigDict, args: common.Arguments) -> None:
  """ImageNet-1k at a higher resolution, columns 2, 4 and 6."""
  source = common.pretrained(args, ('1k', '21k', 'jft'))
  from_1k = source == '1k'
  rates = {'1k': _DROP_PATH_1K, '21k': _DROP_PATH_21K, 'jft': _DROP_PATH_FROM_JFT}[source]
  config.model.options = {'drop_path': _table(rates, args.variant, 'fine-tuning')}
  config.init.path = args.init
  config.total = '30 epochs'
  config.batch_size = 1024 if source == '21k' else 512
  config.optimizer.learning_rate = 5e-5
  config.optimizer.weight_decay = 1e-8
  config.schedule.kind = 'constant'
  config.loss.label_smoothing = 0.1
  config.ema.decay = 0.9999
  # "Center crop: False" of the table: the whole image is resized.
  config.data.eval_ops = ('resize({size})',)
  config.data.train_ops = (_CROP, 'flip()')
  if from_1k:
    config.mixing.mixup_alpha = 0.8
    _augment(config, 20 if args.variant == 'coatnet_3' else 15)
  elif args.augment or source == 'jft':
    _augment(config, 5)


def _local(
  config: ml_collections.ConfigDict, data: str, args: common.Arguments
) -> ml_collections.ConfigDict:
  """Small enough for a laptop, with every part of the real recipe in it."""
  common.local(config, data)
  config.model.options = {
    'depths': (1, 1, 2, 1),
    'dims': (32, 48, 64, 96),
    'stem_dim': 24,
    'head_dim': 16,
    'norm_momentum': 0.9,
    'drop_path': 0.05,
  }
  if data == 'digits':
    config.total = '45 epochs'
    config.mixing.mixup_alpha = 0.2
    config.mixing.prob = 0.2
  else:
    # Wider, with convolutions down to maps of 2x2, none of which skips pixels as equation 5 does.
    config.model.options.update(
      layout='CCCT',
      strides=(2, 2, 2, 1),
      depths=(1, 2, 2, 1),
      dims=(48, 96, 128, 128),
      stem_dim=32,
      stride_in='depthwise',
      drop_path=0.0,
    )
    config.batch_size = 64
    config.optimizer.learning_rate = 3e-3
  config.loss.label_smoothing = 0.1
  return config
