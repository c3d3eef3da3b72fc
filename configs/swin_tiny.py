"""Swin Transformer (arXiv 2103.14030) by the recipes of its code.

  python main.py --config=configs/swin_tiny.py
  python main.py --config=configs/swin_tiny.py:variant=swin_base
  python main.py --config=configs/swin_tiny.py:variant=swin_base,data=imagenet21k
  python main.py --config=configs/swin_tiny.py:variant=swin_base_w12,init=runs/base,pretrained=21k
  python main.py --config=configs/swin_tiny.py:local --workdir=runs/digits

Arguments: `variant`; `data`; `init`, the run that fine-tuning starts from, whose tables are resized
where the window is another; `pretrained`, `1k` or `21k`, what that run was trained on; `size`, of
the images, by the variant unless given; `local`. After ImageNet-22k the classifier keeps the rows
of the classes that ImageNet-1k has.

Published top-1 of training on ImageNet-1k at 224 pixels for 300 epochs: Swin-T 81.3, -S 83.0, -B
83.5, and -B with windows of 12 at 384 pixels 84.5. After ImageNet-22k: -T 80.9, -S 83.2, -B 85.2
and 86.4 at 384, -L 86.3 and 87.3. Cost: not published. The runs have not been repeated here.

`local` trains a small Swin on scikit-learn's digits, in a minute on two CPU cores, to at least 90 %
of the 355 test images.
"""

import ml_collections

from configs import common

_DROP_PATH_1K = {'swin_tiny': 0.2, 'swin_small': 0.3, 'swin_base': 0.5}
_DROP_PATH_22K = {'swin_tiny': 0.1, 'swin_small': 0.2, 'swin_base': 0.2, 'swin_large': 0.2}


@common.takes(
  variant='swin_tiny',
  data='imagenet2012',
  size=0,
  init='',
  pretrained='1k',
  local=False,
  variants=('swin_*',),
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
  config.image_size = args.size or (384 if args.variant.endswith('_w12') else 224)
  # At more than 224 pixels the whole image is resized.
  whole = config.image_size > 224
  config.data.eval_ops = ('resize({size})' if whole else 'center_crop({size}, ratio=0.875)',)
  config.optimizer.name = 'adamw'
  config.optimizer.clip_norm = 5.0
  # Neither biases nor norms nor tables of relative positions decay.
  config.optimizer.weight_decay_mask = ('/kernel$',)
  config.schedule.kind = 'cosine'
  config.schedule.warmup_init = 1e-3
  config.schedule.final = 0.01
  config.eval.every = '5 epochs'
  pretrained = common.pretrained(args)
  if args.init:
    _fine_tune(config, args.init, pretrained)
  elif args.data == 'imagenet21k':
    _recipe(config, _DROP_PATH_22K, 90, 4096, 1.25e-4, 0.05)
  else:
    _recipe(config, _DROP_PATH_1K, 300, 1024, 5e-4, 0.05)
    config.schedule.warmup = '20 epochs'
  return config


def _fine_tune(config: ml_collections.ConfigDict, init: str, pretrained: str) -> None:
  """On ImageNet-1k, at another resolution or after ImageNet-22k; mixup and CutMix stay on."""
  rates = _DROP_PATH_1K if pretrained == '1k' else _DROP_PATH_22K
  _recipe(config, rates, 30, 1024, 2e-5, 1e-8)
  config.init.path = init
  if pretrained == '21k':
    config.init.classes = common.IMAGENET21K


def _recipe(
  config: ml_collections.ConfigDict,
  rates: dict[str, float],
  epochs: int,
  batch: int,
  rate_per_512: float,
  weight_decay: float,
) -> None:
  variant = config.model.name.removesuffix('_w12')
  if variant not in rates:
    raise ValueError(f'the code has no such recipe for {variant!r}: it has {", ".join(rates)}')
  config.model.options = {'drop_path': rates[variant]}
  config.total = f'{epochs} epochs'
  config.batch_size = batch
  config.optimizer.learning_rate = rate_per_512 * batch / 512
  config.optimizer.weight_decay = weight_decay
  config.schedule.warmup = '5 epochs'


def _local(config: ml_collections.ConfigDict, data: str) -> ml_collections.ConfigDict:
  """Small enough for a laptop: 4x4 windows over 8x8 patches, shifted, then over the whole map."""
  common.local(config, data)
  config.model.options = {
    'depths': (2, 1, 1),
    'dim': 32,
    'num_heads': (2, 4, 8),
    'window': 4,
    'drop_path': 0.05,
  }
  config.optimizer.learning_rate = 4e-3
  config.loss.label_smoothing = 0.1
  return config
