"""ResNets on ImageNet-1k by the recipes of Google's code, ResNet-RS (arXiv 2103.07579) among them.

  python main.py --config=configs/resnet50.py
  python main.py --config=configs/resnet50.py:variant=resnet_101,smoothing=0.1
  python main.py --config=configs/resnet50.py:recipe=garden
  python main.py --config=configs/resnet50.py:variant=resnetrs101,size=160

Arguments: `variant`; `recipe`, `tpu` (github.com/tensorflow/tpu, models/official/resnet) or
`garden` (github.com/tensorflow/models, the configs of ResNet-26 and -50); `size`, of the images of
`resnetrs*`; `data`; `epochs`, `batch` and `smoothing`, of labels, in place of the recipe's.

Published top-1 of ResNet-50 at 90 epochs: 76.4 (arXiv 1904.09925, Table 2) to 76.9 (arXiv
1906.05909, Table 1). Of ResNet-RS (its code's README): 50 at 160 pixels 78.8; 101 at 160 and 192
80.3 and 81.2; 152 at 192, 224 and 256 82.0, 82.2 and 83.0; 200 at 256 83.4; 270 at 256 83.8; 350 at
256 and 320 84.0 and 84.2; 420 at 320 84.4. Cost: not published. The runs have not been repeated
here. The reference's BatchNorm statistics are those of one TPU core, these are of the whole batch.
"""

import ml_collections

from configs import common

# Everything but BatchNorm, as a term of the loss.
_DECAYED = ('/kernel$', '(classifier|squeeze|excite)/bias$')
# Sizes of images, the largest last.
_RS = {
  'resnetrs50': (160,),
  'resnetrs101': (160, 192),
  'resnetrs152': (192, 224, 256),
  'resnetrs200': (256,),
  'resnetrs270': (256,),
  'resnetrs350': (256, 320),
  'resnetrs420': (320,),
}


@common.takes(
  variant='resnet_50',
  recipe='tpu',
  size=0,
  data='imagenet2012',
  epochs=0,
  batch=0,
  smoothing=0.0,
  variants=('resnet*', 'wide_resnet_*', 'se_resnet_*'),
)
def get_config(args: common.Arguments) -> ml_collections.ConfigDict:
  if args.recipe not in ('tpu', 'garden'):
    raise ValueError(f'config argument recipe={args.recipe!r} must be tpu or garden')
  config = common.get_config()
  common.use_data(config, args.data)
  config.model.name = args.variant
  if args.variant in _RS:
    return _rs(config, args)
  if args.size:
    raise ValueError(f'size goes with {", ".join(_RS)}; {args.variant} has 224')
  garden = args.recipe == 'garden'
  # Both pool with TensorFlow's padding.
  config.model.options = {'pool_padding': 'same'}
  config.total = f'{args.epochs or 90} epochs'
  config.batch_size = args.batch or (4096 if garden else 1024)
  config.image_size = 224

  config.data.train_ops = ('random_resized_crop({size}, area=(0.08, 1.0))', 'flip()')
  config.data.eval_ops = ('center_crop({size}, ratio=0.875)',)
  config.loss.label_smoothing = args.smoothing or (0.1 if garden else 0.0)

  config.optimizer.name = 'sgd'
  config.optimizer.learning_rate = 0.1 * config.batch_size / 256
  config.optimizer.momentum = 0.9
  config.optimizer.nesterov = not garden
  config.optimizer.weight_decay = 1e-4
  config.optimizer.weight_decay_mask = _DECAYED
  config.schedule.kind = 'step'
  config.schedule.warmup = '5 epochs'
  config.schedule.boundaries = ('30 epochs', '60 epochs', '80 epochs')
  config.schedule.factor = 0.1
  config.eval.every = '5 epochs'
  return config


def _rs(config: ml_collections.ConfigDict, args: common.Arguments) -> ml_collections.ConfigDict:
  sizes = _RS[args.variant]
  config.image_size = args.size or sizes[-1]
  if config.image_size not in sizes:
    raise ValueError(f'{args.variant} is published at {sizes} pixels, not at size={args.size}')
  if args.recipe != 'tpu':
    raise ValueError(f'recipe={args.recipe!r} is not for {args.variant}, which has its own')
  common.resnet_rs(config, magnitude=10 if config.image_size == 160 else 15)
  config.total = f'{args.epochs or 350} epochs'
  config.batch_size = args.batch or 4096
  config.loss.label_smoothing = args.smoothing or 0.1
  config.optimizer.learning_rate = 0.1 * config.batch_size / 256
  config.optimizer.weight_decay_mask = _DECAYED
  deep = args.variant not in ('resnetrs50', 'resnetrs101', 'resnetrs152')
  config.model.options = {
    'drop_path': 0.1 if deep else 0.0,
    'dropout': 0.4 if config.image_size == 320 else 0.25,
    'norm_momentum': 0.0,
  }
  return config
