"""VOLO (arXiv 2106.13112) by the recipes of its code.

  python main.py --config=configs/volo_d1.py:maps=data/label_maps/imagenet2012
  python main.py --config=configs/volo_d1.py:variant=volo_d2
  python main.py --config=configs/volo_d1.py:teacher_name=convnext_large,teacher=convnext_large.pth
  python main.py --config=configs/volo_d1.py:variant=volo_d3,init=runs/volo_d3,maps=<folder>
  python main.py --config=configs/volo_d1.py:local --workdir=runs/digits

Arguments: `variant`, of VOLO or ELSA-VOLO; `data`; `maps`, the folder of the published label maps
(`python tools/prepare_data.py label_maps`), by which tokens are labelled as in the paper, or
`teacher`, weights of a convolutional network that labels them, `teacher_name`, its model, and
`teacher_source`, whose weights; without either, tokens have their image's label, as in the code;
`init`, the run that fine-tuning starts from; `size`, of the images, by the variant unless given;
`local`.

Published top-1 at 224 pixels: VOLO-D1 84.2, -D2 85.2, -D3 85.4, -D4 85.7, -D5 86.1; fine-tuned -D1
85.2 and -D2 86.0 at 384, -D3 86.3, -D4 86.8 and -D5 87.0 at 448, and -D5 87.1 at 512. Cost: not
published. The runs have not been repeated here.

What differs from the code: a token's label is that of its place in the image. The code takes a map
of an image's middle square for one of the whole image, and exchanges the axes of a crop's place:
`--config.data.label_geometry=released` does, too, but for RandAugment, whose moves it applies to
the map in whole cells. D4 and D5 are evaluated in a black border, as the code has it at all sizes.

`local` trains a small VOLO with labels of tokens and mixed tokens on scikit-learn's digits, in a
minute or two on two CPU cores, to at least 90 % of the 355 test images.
"""

import ml_collections

from configs import common

# Stochastic depth, peak learning rate, batch and size in fine-tuning. Of D4 and D5 there are no
# commands (unverified).
_RECIPES = {
  'd1': (0.1, 1.6e-3, 512, 384),
  'd2': (0.2, 1e-3, 384, 384),
  'd3': (0.5, 1e-3, 240, 448),
  'd4': (0.5, 1e-3, 240, 448),
  'd5': (0.75, 1e-3, 240, 448),
}


@common.takes(
  variant='volo_d1',
  data='imagenet2012',
  maps='',
  teacher='',
  teacher_name='convnext_large',
  teacher_source='',
  init='',
  size=0,
  local=False,
  variants=('volo_*', 'elsa_volo_*'),
)
def get_config(args: common.Arguments) -> ml_collections.ConfigDict:
  config = common.get_config()
  config.model.name = args.variant
  if args.local:
    return _local(config, args.data)
  size = args.variant.removeprefix('elsa_').removeprefix('volo_')
  if size not in _RECIPES:
    raise ValueError(f'no recipe for {args.variant!r}: there are volo_{", volo_".join(_RECIPES)}')
  drop_path, rate, batch, fine_size = _RECIPES[size]
  common.use_data(config, args.data)
  common.deit_augmentation(config, interpolation='random')
  # Tokens are mixed in place of images.
  config.mixing.mixup_alpha = 0.0
  config.mixing.cutmix_alpha = 0.0
  config.model.options = {'drop_path': drop_path, 'mix_token': 1.0}
  config.tokens.weight = 0.5
  if args.maps and args.teacher:
    raise ValueError('config arguments maps and teacher both label tokens: leave one out')
  if args.maps:
    config.tokens.labels = 'maps'
    config.tokens.ground_truth = bool(args.init)
    config.data.label_maps = args.maps
    # Whole images are flipped and augmented, with their maps, and then cut.
    crop, *others = config.data.train_ops
    config.data.train_ops = (*others, crop)
  if args.teacher:
    config.tokens.labels = 'teacher'
    config.teacher.name = args.teacher_name
    config.teacher.path = args.teacher
    config.teacher.source = args.teacher_source
  config.image_size = args.size or (fine_size if args.init else 224)
  ratio = 1.15 if size in ('d4', 'd5') else 0.96
  config.data.eval_ops = (f'center_crop({{size}}, ratio={ratio})',)
  config.optimizer.name = 'adamw'
  # Neither biases nor norms nor positions nor the class token decay.
  config.optimizer.weight_decay_mask = ('/kernel$',)
  config.schedule.kind = 'cosine'
  config.schedule.warmup_prefix = False
  config.schedule.every = '1 epochs'
  config.schedule.hold = '10 epochs'
  config.eval.every = '5 epochs'
  if args.init:
    config.init.path = args.init
    _recipe(config, epochs=30, batch=batch, rate=8e-6, last=4e-6, weight_decay=1e-8)
    config.schedule.warmup = '5 epochs'
  else:
    _recipe(config, epochs=300, batch=1024, rate=rate, last=1e-5, weight_decay=0.05)
    config.schedule.warmup = '20 epochs'
  return config


def _recipe(
  config: ml_collections.ConfigDict,
  *,
  epochs: int,
  batch: int,
  rate: float,
  last: float,
  weight_decay: float,
) -> None:
  """Ten more epochs at the smallest rate follow those of the schedule."""
  config.total = f'{epochs + 10} epochs'
  config.batch_size = batch
  config.optimizer.learning_rate = rate
  config.optimizer.weight_decay = weight_decay
  config.schedule.warmup_init = 1e-6 / rate
  config.schedule.final = last / rate


def _local(config: ml_collections.ConfigDict, data: str) -> ml_collections.ConfigDict:
  """Small enough for a laptop: outlooks over 8x8 patches, and the tokens of 4x4."""
  common.local(config, data)
  config.model.options = {
    'depths': (1, 2),
    'dims': (32, 64),
    'num_heads': (2, 4),
    'stem_dim': 16,
    'patch': 4,
    'class_depth': 1,
    'mix_token': 1.0,
    'drop_path': 0.05,
  }
  config.tokens.weight = 0.5
  config.loss.label_smoothing = 0.1
  return config
