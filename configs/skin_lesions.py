"""Attention modules in ResNets for skin lesions, compared (the question of arXiv 2112.12748).

  python main.py --config=configs/skin_lesions.py:module=cbam,variant=resnet_50
  python main.py --config=configs/skin_lesions.py:module=se,init=resnet50.pth,source=torchvision
  python main.py --config=configs/skin_lesions.py:local,module=eca --workdir=runs/eca

Arguments: `module`, any name of `operators.list_modules()` or `list_operators()`, or `none`, the
plain ResNet; `variant`, a ResNet; `fold`, the one of five to test on, or -1 to train on 70 % of the
lesions and test on 20 %; `seed`; `data`, `ham10000` or, to demonstrate, `digits` or
`fashion_mnist`; `weights`, of the classes; `init` and `source`, weights of the plain ResNet to
start from, the module's own parameters being fresh; `epochs`; `local`.

The protocol is this project's own: of the paper's, splits, depths and hyperparameters are not known
here, nor are its results. docs/skin_lesions.md has the commands of the whole comparison. Cost: not
measured on HAM10000.

`local` trains a small ResNet on scikit-learn's digits, in a minute or two on two CPU cores, to at
least 90 % of the test images.
"""

import ml_collections

from configs import common

FOLDS = 5
_DEMONSTRATIONS = ('digits', 'fashion_mnist')


@common.takes(
  with_local=('data', 'module', 'variant', 'fold', 'seed', 'weights', 'epochs', 'init', 'source'),
  module='none',
  variant='resnet_18',
  data='ham10000',
  fold=0,
  seed=0,
  weights='inverse',
  init='',
  source='',
  epochs=60,
  local=False,
)
def get_config(args: common.Arguments) -> ml_collections.ConfigDict:
  config = common.get_config()
  config.seed = args.seed
  config.model.name = args.variant
  config.loss.class_weights = args.weights
  config.eval.per_class = True
  config.eval.best_by = 'balanced_accuracy'
  if args.local or args.data in _DEMONSTRATIONS:
    _demonstrate(config, args)
  else:
    _ham10000(config, args)
  return config


def _module(args: common.Arguments) -> str | None:
  return None if args.module == 'none' else args.module


def _ham10000(config: ml_collections.ConfigDict, args: common.Arguments) -> None:
  if not -1 <= args.fold < FOLDS:
    raise ValueError(f'config argument fold={args.fold} must be 0 to {FOLDS - 1}, or -1 for none')
  if args.fold < 0:
    common.use_data(config, f'{args.data}_holdout')
  else:
    common.use_data(config, args.data)
    folds = [f'fold{i}' for i in range(FOLDS)]
    config.data.eval_split = folds.pop(args.fold)
    config.data.train_split = '+'.join(folds)
  config.model.options = {'module': _module(args)}
  config.image_size = 224
  config.batch_size = 64
  config.total = f'{args.epochs} epochs'
  config.data.train_ops = (
    # The crop is resized once, from the whole image, rather than from one of 256 pixels.
    'random_resized_crop({size}, area=(0.5, 1.0))',
    # A lesion has no top.
    'flip()',
    'flip_vertical()',
    'rot90()',
    'color_jitter(0.2, 0.2, 0.2, 0.05)',
  )
  config.data.eval_ops = ('center_crop({size}, ratio=0.875)',)
  config.schedule.kind = 'cosine'
  config.schedule.warmup = '5 epochs'
  config.optimizer.weight_decay = 1e-4
  if args.init:
    config.init.path, config.init.source = args.init, args.source
    # The module and, where it is an operator, what it stands in the place of.
    config.init.fresh = ('/module/', r'/after\d+/', '/attn/', r'/(conv|norm)[12]/')
    config.optimizer.name = 'adamw'
    config.optimizer.learning_rate = 1e-4
    # Its decay is multiplied by the learning rate.
    config.optimizer.weight_decay = 0.01
  else:
    config.optimizer.name = 'sgd'
    config.optimizer.learning_rate = 0.01
  config.eval.every = '5 epochs'


def _demonstrate(config: ml_collections.ConfigDict, args: common.Arguments) -> None:
  """A small network on small images, by the classes' weights and metrics of the real protocol."""
  if args.init or args.source or args.fold:
    raise ValueError('init, source and fold go with ham10000: the demonstration has none of them')
  if args.data not in ('ham10000', *_DEMONSTRATIONS):
    raise ValueError(
      f'data={args.data!r} is not for a demonstration: local has {", ".join(_DEMONSTRATIONS)}'
    )
  common.local(config, args.data if args.data in _DEMONSTRATIONS else 'digits', size=16)
  config.model.options = {
    'module': _module(args),
    'depths': (1, 1, 1),
    'width': 16,
    'stem': 'small',
    'zero_init_last': False,
    'norm_momentum': 0.9,
  }
  if args.epochs != 60:
    config.total = f'{args.epochs} epochs'
