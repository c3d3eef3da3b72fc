"""ConvNeXt (arXiv 2201.03545) by the recipes of its code.

  python main.py --config=configs/convnext_tiny.py
  python main.py --config=configs/convnext_tiny.py:variant=convnext_base
  python main.py --config=configs/convnext_tiny.py:variant=convnext_base,data=imagenet21k
  python main.py --config=configs/convnext_tiny.py:variant=convnext_base,init=runs/base
  python main.py --config=configs/convnext_tiny.py:local --workdir=runs/digits

Arguments: `variant`; `data`; `init`, the run that fine-tuning starts from; `pretrained`, `1k` or
`21k`, what that run was trained on; `size`, of the images, 224 or, in fine-tuning after 1k, 384
unless given; `local`.

Published top-1 of training on ImageNet-1k at 224 pixels for 300 epochs: ConvNeXt-T 82.1, -S 83.1,
-B 83.8, -L 84.3; at 384 pixels -B 85.1, -L 85.5. After ImageNet-22k, at 224 and 384: -T 82.9 and
84.1, -S 84.6 and 85.8, -B 85.8 and 86.8, -L 86.6 and 87.5, -XL 87.0 and 87.8. Cost: not published.
The runs have not been repeated here. The published numbers of training at 224 pixels, and of -XL,
are those of averaged weights.

`local` trains a small ConvNeXt on scikit-learn's digits, in a minute on two CPU cores, to at least
90 % of the 355 test images.
"""

import ml_collections

from configs import common

_DROP_PATH_1K = {
  'convnext_tiny': 0.1,
  'convnext_small': 0.4,
  'convnext_base': 0.5,
  'convnext_large': 0.5,
}
# Those of -T and -S are unverified.
_DROP_PATH_22K = {
  'convnext_tiny': 0.0,
  'convnext_small': 0.0,
  'convnext_base': 0.1,
  'convnext_large': 0.1,
  'convnext_xlarge': 0.2,
}
# Fine-tuning at 384 pixels after 1k, and at 224 or 384 after 22k.
_DROP_PATH_TUNE = {
  '1k': {'convnext_base': 0.8, 'convnext_large': 0.95},
  '21k': {
    # Of -T and -S not published: those of their pre-training (unverified).
    'convnext_tiny': 0.0,
    'convnext_small': 0.0,
    'convnext_base': 0.2,
    'convnext_large': 0.3,
    'convnext_xlarge': 0.4,
  },
}


@common.takes(
  variant='convnext_tiny',
  data='imagenet2012',
  size=0,
  init='',
  pretrained='1k',
  local=False,
  variants=('convnext_*',),
)
def get_config(args: common.Arguments) -> ml_collections.ConfigDict:
  config = common.get_config()
  config.model.name = args.variant
  if args.local:
    return _local(config, args.data)
  common.use_data(config, args.data)
  common.deit_augmentation(config)
  # The code erases as it loads an image.
  config.erasing.after_mixing = False
  pretrained = common.pretrained(args)
  config.image_size = args.size or (384 if args.init and pretrained == '1k' else 224)
  whole = config.image_size >= 384
  config.data.eval_ops = ('resize({size})' if whole else 'center_crop({size}, ratio=0.875)',)
  config.optimizer.name = 'adamw'
  # Neither biases nor norms nor the factors of branches decay.
  config.optimizer.weight_decay_mask = ('/kernel$',)
  config.schedule.kind = 'cosine'
  config.eval.every = '5 epochs'
  if args.init:
    _fine_tune(config, args.init, pretrained)
  else:
    _train(config, large=args.data == 'imagenet21k')
  return config


def _rate(config: ml_collections.ConfigDict, rates: dict[str, float]) -> float:
  name = config.model.name
  if name not in rates:
    raise ValueError(f'the code has no such recipe for {name!r}: it has {", ".join(rates)}')
  return rates[name]


def _train(config: ml_collections.ConfigDict, large: bool) -> None:
  """On ImageNet-1k, or on ImageNet-22k if `large`."""
  rates = _DROP_PATH_22K if large else _DROP_PATH_1K
  config.model.options = {'drop_path': _rate(config, rates)}
  config.total = '90 epochs' if large else '300 epochs'
  config.batch_size = 4096
  config.optimizer.learning_rate = 4e-3
  config.optimizer.weight_decay = 0.05
  config.schedule.warmup = '5 epochs' if large else '20 epochs'
  config.schedule.final = 2.5e-4  # 1e-6
  if not large:
    config.ema.decay = 0.9999


def _fine_tune(config: ml_collections.ConfigDict, init: str, pretrained: str) -> None:
  """On ImageNet-1k, with a learning rate that falls towards the stem."""
  config.model.options = {
    'drop_path': _rate(config, _DROP_PATH_TUNE[pretrained]),
    'head_init_scale': 0.001,
  }
  config.init.path = init
  config.total = '30 epochs'
  config.batch_size = 512
  config.optimizer.learning_rate = 5e-5
  config.optimizer.weight_decay = 1e-8
  config.optimizer.layer_decay = 0.7 if pretrained == '1k' else 0.8
  config.schedule.final = 0.02  # 1e-6, the code's default
  config.mixing.mixup_alpha = 0.0
  config.mixing.cutmix_alpha = 0.0
  if config.model.name == 'convnext_xlarge':
    # The code's commands average the weights of no other model in fine-tuning.
    config.ema.decay = 0.9999


def _local(config: ml_collections.ConfigDict, data: str) -> ml_collections.ConfigDict:
  """Small enough for a laptop; branches begin larger than in hundreds of epochs."""
  common.local(config, data)
  config.model.options = {
    'depths': (2, 2),
    'dims': (32, 64),
    'layer_scale': 0.1,
    'drop_path': 0.05,
  }
  config.loss.label_smoothing = 0.1
  return config
