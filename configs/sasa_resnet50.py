"""Stand-alone self-attention (arXiv 1906.05909) by the recipe of its appendix A.2.

  python main.py --config=configs/sasa_resnet50.py
  python main.py --config=configs/sasa_resnet50.py:variant=sasa_resnet_26,stem=attention
  python main.py --config=configs/sasa_resnet50.py:kernel=11
  python main.py --config=configs/sasa_resnet50.py:local --workdir=runs/digits

Arguments: `variant`; `data`; `epochs`; `batch`; `stem` (`conv`, `attention`, `attention_plain` or
`attention_convvalue`); `kernel`; `smoothing`, of labels; `local`.

Published top-1 on ImageNet-1k at 224 pixels, conv-stem + attention (Table 1): ResNet-26 75.8, -38
77.1, -50 77.4; with the attention stem 74.8, 76.9 and 77.6. Trained on 128 cores of TPU v3. The run
has not been repeated here.

The statistics of BatchNorm keep 0.9999 of the old per step: expect poor evaluation for the first
epochs.

`local` trains a small one on scikit-learn's digits, in two minutes on two CPU cores, to at least
95 % of the 355 test images; attention stems take three times as long.
"""

import ml_collections

from configs import common


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  args = common.parse_arg(
    arg,
    with_local=('data', 'stem'),
    variant='sasa_resnet_50',
    data='imagenet2012',
    epochs=130,
    batch=4096,
    stem='conv',
    kernel=7,
    smoothing=0.0,
    local=False,
  )
  config = common.get_config()
  config.model.name = args.variant
  if args.local:
    return _local(config, args)
  common.use_data(config, args.data)
  config.model.options = {'stem': args.stem, 'kernel': args.kernel, 'norm_momentum': 0.9999}
  config.image_size = 224
  config.total = f'{args.epochs} epochs'
  config.batch_size = args.batch

  # Augmentation, weight decay and label smoothing are not published: those of ResNets on TPU.
  config.data.train_ops = ('random_resized_crop({size}, area=(0.08, 1.0))', 'flip()')
  config.data.eval_ops = ('center_crop({size}, ratio=0.875)',)
  config.loss.label_smoothing = args.smoothing
  config.optimizer.weight_decay = 1e-4
  stem = ('stem/value$',) if args.stem == 'attention' else ()
  config.optimizer.weight_decay_mask = ('/kernel$', *stem)

  config.optimizer.name = 'sgd'
  config.optimizer.learning_rate = 1.6 * args.batch / 4096
  config.optimizer.momentum = 0.9  # not published
  config.optimizer.nesterov = True
  config.schedule.kind = 'cosine'
  config.schedule.warmup = '10 epochs'
  config.ema.decay = 0.9999
  config.eval.every = '5 epochs'
  return config


def _local(
  config: ml_collections.ConfigDict, args: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
  """Small enough for a laptop."""
  common.local(config, args.data)
  config.model.options = {
    'depths': (1, 1),
    'width': 0.5,
    'num_heads': 4,
    'kernel': 3,
    'stem': args.stem,
    'scale': 'rsqrt',
  }
  return config
