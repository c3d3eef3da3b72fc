"""ResNet-50 on ImageNet-1k by the recipe of Google's TPU code (github.com/tensorflow/tpu).

  python main.py --config=configs/resnet50.py
  python main.py --config=configs/resnet50.py:variant=resnet_101,smoothing=0.1

Published top-1 of this architecture at 90 epochs: 76.4 (arXiv 1904.09925, Table 2) to 76.9 (arXiv
1906.05909, Table 1). The run has not been repeated here. The reference's BatchNorm statistics are
those of one TPU core, these are of the whole batch.
"""

import ml_collections

from configs import common


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  args = common.parse_arg(
    arg, variant='resnet_50', data='imagenet2012', epochs=90, batch=1024, smoothing=0.0
  )
  config = common.get_config()
  common.use_data(config, args.data)
  config.model.name = args.variant
  # The TPU code pools with TensorFlow's padding.
  config.model.options = {'pool_padding': 'same'}
  config.total = f'{args.epochs} epochs'
  config.batch_size = args.batch
  config.image_size = 224

  config.data.train_ops = ('random_resized_crop({size}, area=(0.08, 1.0))', 'flip()')
  config.data.eval_ops = ('center_crop({size}, ratio=0.875)',)
  config.loss.label_smoothing = args.smoothing

  config.optimizer.name = 'sgd'
  config.optimizer.learning_rate = 0.1 * args.batch / 256
  config.optimizer.momentum = 0.9
  config.optimizer.nesterov = True
  # A term of the loss over everything but BatchNorm.
  config.optimizer.weight_decay = 1e-4
  config.optimizer.weight_decay_mask = ('/kernel$', '(classifier|squeeze|excite)/bias$')
  config.schedule.kind = 'step'
  config.schedule.warmup = '5 epochs'
  config.schedule.boundaries = ('30 epochs', '60 epochs', '80 epochs')
  config.schedule.factor = 0.1
  config.eval.every = '5 epochs'
  return config
