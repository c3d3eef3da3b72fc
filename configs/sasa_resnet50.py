"""Stand-alone self-attention (arXiv 1906.05909) by the recipe of its appendix A.2.

  python main.py --config=configs/sasa_resnet50.py
  python main.py --config=configs/sasa_resnet50.py:variant=sasa_resnet_26,stem=attention
  python main.py --config=configs/sasa_resnet50.py:kernel=11
  python main.py --config=configs/sasa_resnet50.py:conv=12,held_out
  python main.py --config=configs/sasa_resnet50.py:variant=resnet_50
  python main.py --config=configs/sasa_resnet50.py:local --workdir=runs/digits

Arguments: `variant`, or a baseline, `resnet_26`, `resnet_38` or `resnet_50`; `data`; `epochs`;
`batch`; `smoothing`, of labels; `local`; and of the ablations `stem` (`conv`, `attention`,
`attention_plain` or `attention_convvalue`, Table 7), `conv`, the stages that keep convolutions
(`12` is 1 and 2, Table 3), `kernel` (Table 4), `position` (`relative`, `absolute` or `none`, Table
5), `content=False` (Table 6), `width`, a factor of all widths (Figure 5), and `held_out`, to train
on 96 % of the training images and evaluate on the rest, as Tables 3 and 5 do.

Published top-1 on ImageNet-1k at 224 pixels, conv-stem + attention (Table 1): ResNet-26 75.8, -38
77.1, -50 77.4; with the attention stem 74.8, 76.9 and 77.6; the baselines 74.5, 76.2 and 76.9.
Trained on 128 cores of TPU v3. The run has not been repeated here.

The statistics of BatchNorm keep 0.9999 of the old per step: expect poor evaluation for the first
epochs.

`local` trains a small one on scikit-learn's digits, in two minutes on two CPU cores, to at least
95 % of the 355 test images; attention stems take three times as long.
"""

from typing import Any

import ml_collections

from configs import common


@common.takes(
  with_local=('data', 'stem'),
  variant='sasa_resnet_50',
  data='imagenet2012',
  epochs=130,
  batch=4096,
  stem='conv',
  conv='',
  kernel=7,
  position='relative',
  content=True,
  width=1.0,
  held_out=False,
  smoothing=0.0,
  local=False,
  variants=('sasa_*', 'resnet_*'),
)
def get_config(args: common.Arguments) -> ml_collections.ConfigDict:
  config = common.get_config()
  config.model.name = args.variant
  if args.local:
    return _local(config, args)
  common.use_data(config, args.data)
  if args.held_out:
    # The paper's are drawn at random; the files' order is.
    config.data.train_split, config.data.eval_split = 'train[:96%]', 'train[96%:]'
    config.data.num_train = round(0.96 * config.data.num_train)
  config.model.options = {'norm_momentum': 0.9999}
  if not args.variant.startswith('resnet_'):
    config.model.options.update(_ablation(args))
  config.image_size = 224
  config.total = f'{args.epochs} epochs'
  config.batch_size = args.batch

  # Augmentation, weight decay and label smoothing are not published: those of ResNets on TPU.
  config.data.train_ops = ('random_resized_crop({size}, area=(0.08, 1.0))', 'flip()')
  config.data.eval_ops = ('center_crop({size}, ratio=0.875)',)
  config.loss.label_smoothing = args.smoothing
  config.optimizer.weight_decay = 1e-4
  config.optimizer.weight_decay_mask = (r'^(?!.*/norm\d?/)',)  # everything but BatchNorm

  config.optimizer.name = 'sgd'
  config.optimizer.learning_rate = 1.6 * args.batch / 4096
  config.optimizer.momentum = 0.9  # not published
  config.optimizer.nesterov = True
  config.schedule.kind = 'cosine'
  config.schedule.warmup = '10 epochs'
  config.ema.decay = 0.9999
  config.eval.every = '5 epochs'
  return config


def _ablation(args: common.Arguments) -> dict[str, Any]:
  """Returns the options of the model that the tables of ablations vary."""
  if not set(args.conv) <= set('1234'):
    raise ValueError(f'config argument conv={args.conv!r} must be stages of 1234, such as 12')
  return {
    'stem': args.stem,
    'kernel': args.kernel,
    'conv_stages': tuple(int(stage) for stage in args.conv),
    'position': args.position,
    'content': args.content,
    'width': args.width,
  }


def _local(config: ml_collections.ConfigDict, args: common.Arguments) -> ml_collections.ConfigDict:
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
