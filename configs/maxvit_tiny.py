"""MaxViT (arXiv 2204.01697) by the recipes of its Table 12.

  python main.py --config=configs/maxvit_tiny.py
  python main.py --config=configs/maxvit_tiny.py:variant=maxvit_base
  python main.py --config=configs/maxvit_tiny.py:variant=maxvit_large,data=imagenet21k
  python main.py --config=configs/maxvit_tiny.py:size=384,init=runs/maxvit_tiny
  python main.py --config=configs/maxvit_tiny.py:layout=CP
  python main.py --config=configs/maxvit_tiny.py:local --workdir=runs/digits

Arguments: `variant`; `data`; `size`, of the images, 224 or, in fine-tuning, 384 unless given (above
224 means fine-tuning); `init`, the run that fine-tuning starts from; `pretrained`, `1k`, `21k` or
`jft`, what that run was trained on; `layout`, the letters of a block's layers where they are not
`CBG`, or those of every stage (`CB/CBG/CBG/CBG`); `local`.

Published top-1 of training on ImageNet-1k (Table 2) at 224, 384 and 512 pixels: MaxViT-T 83.62,
85.24, 85.72; -S 84.45, 85.74, 86.19; -B 84.95, 86.34, 86.66; -L 85.17, 86.40, 86.70. After
ImageNet-21k (Table 3) at 384 and 512: -B 88.24 and 88.38, -L 88.32 and 88.46, -XL 88.51 and 88.70;
after JFT-300M, which is not public (`data=jft300m`): -B 88.69 and 88.82, -L 89.12 and 89.41, -XL
89.36 and 89.53. Layouts at 224 pixels (section 4.5): MaxViT-T without grid attention in stage 1, 2
or 3 (`CB`) 83.36, 83.38, 83.00, with block attention in its place (`CBB`) 83.49, 83.41, 83.40;
without MBConv in stage 1 to 4 (`BG`) 83.24, 83.02, 82.65, 83.09; `CGB` 83.54, `GCB` 83.08, `BCG`
83.07, `GBC` 83.03, `BGC` 83.02; with both attentions in parallel (`CP`, at a peak learning rate of
1e-3) -T 82.64, -S 83.45, -B 83.70, -L 83.54. Cost: not published. The runs have not been repeated
here.

The paper trains without averaged weights, the authors' code with an average of 0.9999, which is
what its checkpoints hold: here, as the paper has it. After ImageNet-1k the classifier is kept,
which the original makes anew.

`local` trains a small MaxViT on scikit-learn's digits, in a minute or two on two CPU cores, to at
least 90 % of the 355 test images.
"""

import ml_collections

from configs import common

_DROP_PATH_1K = {
  'maxvit_tiny': 0.2,
  'maxvit_small': 0.3,
  'maxvit_base': 0.4,
  'maxvit_large': 0.6,
}
_DROP_PATH_21K = {'maxvit_base': 0.3, 'maxvit_large': 0.4, 'maxvit_xlarge': 0.6}
_DROP_PATH_TUNE_21K = {'maxvit_base': 0.4, 'maxvit_large': 0.5, 'maxvit_xlarge': 0.9}
_DROP_PATH_JFT = {'maxvit_base': 0.0, 'maxvit_large': 0.0, 'maxvit_xlarge': 0.0}
_DROP_PATH_TUNE_JFT = {'maxvit_base': 0.1, 'maxvit_large': 0.2, 'maxvit_xlarge': 0.2}
# The least area of a crop is not published (unverified).
_CROP = 'random_resized_crop({size}, area=(0.08, 1.0))'


@common.takes(
  variant='maxvit_tiny',
  data='imagenet2012',
  size=0,
  init='',
  pretrained='1k',
  layout='',
  local=False,
  variants=('maxvit_*',),
)
def get_config(args: common.Arguments) -> ml_collections.ConfigDict:
  config = common.get_config()
  config.model.name = args.variant
  if args.local:
    return _local(config, args.data)
  common.use_data(config, args.data)
  config.image_size = args.size or (384 if args.init else 224)
  config.optimizer.name = 'adamw'
  config.optimizer.clip_norm = 1.0
  # Neither biases, also the relative ones, nor norms decay.
  config.optimizer.weight_decay_mask = ('/kernel$',)
  pretrained = common.pretrained(args, ('1k', '21k', 'jft'))
  if args.init or config.image_size > 224:
    _fine_tune(config, args.init, pretrained)
  elif args.data == 'imagenet21k':
    _pretrain(config, _DROP_PATH_21K, '90 epochs', '5 epochs', 1e-4)
  elif args.data == 'jft300m':
    _pretrain(config, _DROP_PATH_JFT, '14 epochs', '20_000 steps', 0.0)
  else:
    # Parallel attention does better by the smaller rate (section 4.5).
    _train(config, 1e-3 if 'P' in args.layout else 3e-3)
  if args.layout:
    stages = args.layout.split('/')
    config.model.options.layout = tuple(stages) if len(stages) > 1 else args.layout
  return config


def _rate(config: ml_collections.ConfigDict, rates: dict[str, float]) -> None:
  name = config.model.name
  if name not in rates:
    raise ValueError(f'Table 12 has no such recipe for {name!r}: it has {", ".join(rates)}')
  config.model.options = {'drop_path': rates[name]}


def _augment(config: ml_collections.ConfigDict, magnitude: int) -> None:
  # The list of operations is not published (unverified).
  rand_augment = f'rand_augment_tpu(2, {magnitude})'
  config.data.train_ops = (_CROP, 'flip()', rand_augment)


def _train(config: ml_collections.ConfigDict, rate: float) -> None:
  """ImageNet-1k, column 1."""
  _rate(config, _DROP_PATH_1K)
  _augment(config, 15)
  config.total = '300 epochs'
  config.batch_size = 4096
  config.optimizer.learning_rate = rate
  config.optimizer.weight_decay = 0.05
  config.schedule.kind = 'cosine'
  config.schedule.warmup = '10_000 steps'
  config.schedule.final = 1e-5 / rate
  config.mixing.mixup_alpha = 0.8
  config.loss.label_smoothing = 0.1
  config.eval.every = '5 epochs'


def _pretrain(
  config: ml_collections.ConfigDict,
  rates: dict[str, float],
  total: str,
  warmup: str,
  smoothing: float,
) -> None:
  """ImageNet-21k and JFT, columns 3 and 5."""
  _rate(config, rates)
  _augment(config, 5)
  _half(config)
  config.total = total
  config.batch_size = 4096
  config.optimizer.learning_rate = 1e-3
  config.optimizer.weight_decay = 0.01
  config.schedule.kind = 'linear'
  config.schedule.warmup = warmup
  config.schedule.final = 0.01
  config.loss.kind = 'sigmoid'
  config.loss.label_smoothing = smoothing


def _fine_tune(config: ml_collections.ConfigDict, init: str, pretrained: str) -> None:
  """ImageNet-1k at a higher resolution or after ImageNet-21k or JFT, columns 2, 4 and 6."""
  rates = {'1k': _DROP_PATH_1K, '21k': _DROP_PATH_TUNE_21K, 'jft': _DROP_PATH_TUNE_JFT}
  _rate(config, rates[pretrained])
  _augment(config, 15)
  _half(config)
  # The tables keep the size of pre-training and are interpolated in the program.
  config.model.options.table_window = 7
  config.init.path = init
  config.total = '30 epochs'
  config.batch_size = 512
  config.optimizer.learning_rate = 5e-5
  config.optimizer.weight_decay = 1e-8
  config.schedule.kind = 'constant'
  config.loss.label_smoothing = 0.1
  config.ema.decay = 0.9999
  # "Center crop: False" of the table: the whole image is resized.
  config.data.eval_ops = ('resize({size})',)
  if pretrained == '1k':
    config.mixing.mixup_alpha = 0.8


def _half(config: ml_collections.ConfigDict) -> None:
  """All models but those of ImageNet-1k at 224 pixels see images between -1 and 1."""
  config.data.mean = (0.5, 0.5, 0.5)
  config.data.std = (0.5, 0.5, 0.5)


def _local(config: ml_collections.ConfigDict, data: str) -> ml_collections.ConfigDict:
  """Small enough for a laptop: windows and grids of 4x4 on 8x8 pixels, then on all of 4x4."""
  common.local(config, data)
  config.model.options = {
    'depths': (1, 1),
    'dims': (32, 64),
    'stem_dim': 24,
    'head_dim': 16,
    'window': 4,
    'window_policy': 'fixed',
    'norm_momentum': 0.9,
    'drop_path': 0.05,
  }
  config.loss.label_smoothing = 0.1
  return config
