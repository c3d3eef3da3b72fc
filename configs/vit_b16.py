"""Vision Transformers (arXiv 2010.11929), by AugReg (2106.10270), and scaled (2106.04560).

  python main.py --config=configs/vit_b16.py                                   # ImageNet-1k
  python main.py --config=configs/vit_b16.py:variant=vit_l16,data=imagenet21k
  python main.py --config=configs/vit_b16.py:variant=vit_h14,data=jft300m
  python main.py --config=configs/vit_b16.py:variant=vit_g14,data=jft3b        # scaled
  python main.py --config=configs/vit_b16.py:augment=medium2                   # AugReg
  python main.py --config=configs/vit_b16.py:augment=light2,data=imagenet21k,regularize=True
  python main.py --config=configs/vit_b16.py:init=runs/vit_b16                 # fine-tuning at 384
  python main.py --config=configs/vit_b16.py:init=runs/vit_b16,data=cifar10,steps=10000,rate=0.01
  python main.py --config=configs/vit_b16.py:init=runs/b16,data=cifar10,steps=10000,crop=resmall

Arguments: `variant`; `data`, of which `jft3b` takes the scaled recipe; `augment`, of AugReg's
recipes: none, light1, light2, medium1, medium2, strong1 or strong2; `decay`, `regularize` (dropout
and stochastic depth of 0.1) and `epochs`, of AugReg's grid; `init`, the weights that fine-tuning
starts from; `size`, `rate` and `steps` of fine-tuning; `crop`, as AugReg's models are transferred
(big_vision, configs/transfer.py): `inception`, `resmall` (a random window of the image of 7/6 of
the size) or `resize` (of the image made square); they are evaluated on the middle 6/7.

Published top-1 on ImageNet-1k after fine-tuning at 384 pixels, trained on ImageNet-1k / -21k /
JFT-300M (Table 5): B/16 77.91 / 83.97 / 84.15, L/16 76.53 / 85.15 / 87.12; H/14 by JFT-300M 88.04.
Cost (Table 2), in days of one TPU v3 core: L/16 230 on ImageNet-21k and 680 on JFT-300M, H/14 2500.
The runs have not been repeated here. `configs/vit_s16.py` has the better plain recipe for S/16.
"""

import ml_collections

from configs import common

# Table 3: peak learning rate and epochs on JFT-300M; where two are given, the longer.
_JFT = {
  'vit_b32': (8e-4, 7),
  'vit_b16': (8e-4, 7),
  'vit_l32': (6e-4, 7),
  'vit_l16': (4e-4, 14),
  'vit_h14': (3e-4, 14),
  'vit_r50_b32': (8e-4, 7),
  'vit_r50_b16': (8e-4, 7),
  'vit_r50_l32': (2e-4, 7),
  'vit_r50_l16': (4e-4, 14),
}
_SCALED = ('vit_g14', 'vit_gigantic14')
# Layers and magnitude of RandAugment, None for none of it, and mixup's alpha.
_AUGREG = {
  'none': (None, 0.0),
  'light1': ((2, 0), 0.0),
  'light2': ((2, 10), 0.2),
  'medium1': ((2, 15), 0.2),
  'medium2': ((2, 15), 0.5),
  'strong1': ((2, 20), 0.5),
  'strong2': ((2, 20), 0.8),
}
_CROP = 'random_resized_crop({size}, area=(0.05, 1.0), interpolation="bilinear")'
# Of AugReg's transfer: from 448 pixels to 384.
_WINDOW = '{size}, ratio=0.857142, interpolation="bilinear"'
_TRANSFER_CROPS = {
  'inception': _CROP,
  'resmall': f'random_crop({_WINDOW})',
  'resize': f'random_crop({_WINDOW}, square=True)',
}


@common.takes(
  variant='vit_b16',
  data='imagenet2012',
  augment='',
  decay=0.1,
  regularize=False,
  epochs=0,
  init='',
  size=0,
  rate=0.03,
  steps=20_000,
  crop='',
  variants=('vit_*',),
)
def get_config(args: common.Arguments) -> ml_collections.ConfigDict:
  config = common.get_config()
  common.use_data(config, args.data)
  config.model.name = args.variant
  config.image_size = args.size or (384 if args.init else 224)
  config.data.train_ops = (_CROP, 'flip()')
  config.data.eval_ops = ('center_crop({size}, ratio=0.875, interpolation="bilinear")',)
  config.data.mean = (0.5, 0.5, 0.5)
  config.data.std = (0.5, 0.5, 0.5)
  config.eval.every = '5 epochs'
  if args.init:
    _fine_tune(config, args)
    return config
  config.batch_size = 4096
  config.model.options = {'pre_logits': True}
  config.optimizer.name = 'adamw'
  # The decay is quoted before it is multiplied by the learning rate.
  config.optimizer.weight_decay_mask = ('/kernel$',)
  config.schedule.warmup = '10_000 steps'
  if args.augment:
    _augreg(config, args)
  elif args.data == 'jft3b':
    _scaled(config, args)
  else:
    _original(config, args)
  return config


def _original(config: ml_collections.ConfigDict, args: common.Arguments) -> None:
  """Table 3; which loss stands there for many labels is not said: a sigmoid of each."""
  if args.data == 'jft300m':
    if args.variant not in _JFT:
      raise ValueError(f'Table 3 has no {args.variant!r} on JFT-300M: it has {", ".join(_JFT)}')
    config.optimizer.learning_rate, epochs = _JFT[args.variant]
    config.optimizer.weight_decay = 0.1
  elif args.data == 'imagenet21k':
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.03
    config.model.options.dropout = 0.1
    # Large models were trained for 30 as well.
    epochs = 90
  else:
    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 0.3
    config.optimizer.clip_norm = 1.0
    config.model.options.dropout = 0.1
    epochs = 300
  config.total = f'{args.epochs or epochs} epochs'
  if args.data in ('jft300m', 'imagenet21k'):
    config.schedule.kind = 'linear'
    config.loss.kind = 'sigmoid'
  else:
    config.schedule.kind = 'cosine'


def _augreg(config: ml_collections.ConfigDict, args: common.Arguments) -> None:
  if args.augment not in _AUGREG:
    raise ValueError(f'augment={args.augment!r} is none of {", ".join(_AUGREG)}')
  if args.data.startswith('jft'):
    raise ValueError(
      f'augment={args.augment!r} is for ImageNet-1k and -21k, not data={args.data!r}'
    )
  rand_augment, config.mixing.mixup_alpha = _AUGREG[args.augment]
  if rand_augment:
    layers, magnitude = rand_augment
    config.data.train_ops = (_CROP, 'flip()', f'rand_augment_tpu({layers}, {magnitude})')
  config.total = f'{args.epochs or 300} epochs'
  config.optimizer.learning_rate = 1e-3
  config.optimizer.weight_decay = args.decay
  config.optimizer.clip_norm = 1.0
  config.schedule.kind = 'cosine'
  config.loss.kind = 'sigmoid'
  config.model.options.head_bias = -10.0 if args.data == 'imagenet21k' else -6.9
  if args.regularize:
    config.model.options.update({'dropout': 0.1, 'drop_path': 0.1})


def _scaled(config: ml_collections.ConfigDict, args: common.Arguments) -> None:
  """ViT-g and -G, by the authors' code (github.com/google-research/big_vision).

  There is no class token and no layer before the classifier, whose weights decay a hundredfold.
  """
  if args.variant not in _SCALED:
    raise ValueError(f'data=jft3b has a recipe of {", ".join(_SCALED)}, not of {args.variant!r}')
  config.batch_size = 16_384
  config.total = '1_000_000 steps'
  config.model.options = {'pool': 'map', 'head_bias': -10.0}
  config.loss.kind = 'sigmoid'
  config.optimizer.name = 'adafactor'
  config.optimizer.momentum_dtype = 'bfloat16'
  config.optimizer.learning_rate = 8e-4
  config.optimizer.clip_norm = 1.0
  config.optimizer.weight_decay = 0.03
  config.optimizer.weight_decay_multipliers = (('classifier/kernel$', 100.0),)
  config.schedule.kind = 'rsqrt'
  config.schedule.timescale = 10_000
  config.schedule.cooldown = '50_000 steps'
  config.eval.every = '10_000 steps'


def _fine_tune(config: ml_collections.ConfigDict, args: common.Arguments) -> None:
  """Appendix B.1.1; the default rate and warm-up are those of the authors' code."""
  config.init.path = args.init
  config.batch_size = 512
  config.total = f'{args.steps} steps'
  config.data.eval_ops = ('resize({size}, interpolation="bilinear")',)
  if args.crop:
    if args.crop not in _TRANSFER_CROPS:
      raise ValueError(f'crop={args.crop!r} is none of {", ".join(_TRANSFER_CROPS)}')
    config.data.train_ops = (_TRANSFER_CROPS[args.crop], 'flip()')
    config.data.eval_ops = (f'center_crop({_WINDOW})',)
  config.optimizer.name = 'sgd'
  config.optimizer.learning_rate = args.rate
  config.optimizer.momentum = 0.9
  config.optimizer.momentum_dtype = 'bfloat16'
  config.optimizer.weight_decay = 0.0
  config.optimizer.clip_norm = 1.0
  config.schedule.kind = 'cosine'
  # AugReg's grid: 500 steps with 100, 2500 with 200, 10,000 and more with 500.
  warmup = 500 if args.steps >= 10_000 else 200 if args.steps >= 2500 else 100
  config.schedule.warmup = f'{warmup} steps'
  config.eval.every = '500 steps'
  if args.size > 384:
    # Of L/16 at 512 and H/14 at 518 pixels.
    config.ema.decay = 0.9999
