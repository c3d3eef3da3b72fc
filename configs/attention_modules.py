"""A ResNet with a module of channel or spatial attention, by the modules' own ImageNet recipe.

  python main.py --config=configs/attention_modules.py:module=cbam,variant=resnet_50
  python main.py --config=configs/attention_modules.py:variant=eca_resnet_50
  python main.py --config=configs/attention_modules.py:variant=san10_patchwise
  python main.py --config=configs/attention_modules.py:local,module=bam --workdir=runs/bam

Arguments: `module`, any name of `operators.list_modules()` or `list_operators()`, or `none`;
`variant`, a ResNet, or a network of vector self-attention (`san*`); `data`; `epochs`; `local`.

The authors of BAM, CBAM, ECA, SRM and triplet attention share one recipe (their repositories'
scripts); the epochs are 90 for SRM and 100 in the commands of the others. Published top-1 on
ImageNet-1k of ResNet-50: BAM 76.86 (in 90 epochs), SE 77.63, CBAM 77.62, ECA 77.42, triplet 77.48;
of ResNet-18: ECA 70.92, triplet 71.09. SAN's own recipe (github.com/hszhao/SAN) is near; top-1 of
SAN10, 15 and 19 pairwise 74.9, 76.6 and 76.9, patchwise 77.1, 78.0 and 78.2. Cost: not published.
These runs have not been repeated here.

`local` trains a small ResNet on scikit-learn's digits, in a minute or two on two CPU cores, to at
least 90 % of the 355 test images.
"""

import ml_collections

from configs import common


def get_config(arg: str = '') -> ml_collections.ConfigDict:
  args = common.parse_arg(
    arg,
    with_local=('data', 'module', 'variant'),
    module='',
    variant='resnet_50',
    data='imagenet2012',
    epochs=0,
    local=False,
  )
  config = common.get_config()
  config.model.name = args.variant
  if args.local:
    return _local(config, args)
  common.use_data(config, args.data)
  if args.module or args.variant.startswith('resnet_'):
    # The authors' residual branches do not start at zero.
    config.model.options = {'module': _module(args), 'zero_init_last': False}
  config.image_size = 224
  config.batch_size = 256
  srm = 'srm' in (args.module, args.variant.partition('_')[0])
  config.total = f'{args.epochs or (90 if srm else 100)} epochs'
  config.data.train_ops = (
    'random_resized_crop({size}, area=(0.08, 1.0), interpolation="bilinear")',
    'flip()',
  )
  config.data.eval_ops = ('center_crop({size}, ratio=0.875, interpolation="bilinear")',)
  config.optimizer.name = 'sgd'
  config.optimizer.learning_rate = 0.1
  config.optimizer.momentum = 0.9
  config.optimizer.weight_decay = 1e-4
  # Everything decays but SRM's weights and norm.
  config.optimizer.weight_decay_mask = (r'^(?!.*/module/)',) if srm else ('.',)
  config.eval.every = '5 epochs'
  if args.variant.startswith('san'):
    config.schedule.kind = 'cosine'
    config.schedule.every = '1 epochs'
    # The code spreads 0.1 over the 999 other classes, and not over all 1000.
    classes = config.data.num_classes or 1000
    config.loss.label_smoothing = 0.1 * classes / (classes - 1)
    return config
  config.schedule.kind = 'step'
  drops = ('31 epochs', '61 epochs') if srm else ('30 epochs', '60 epochs', '90 epochs')
  config.schedule.boundaries = drops
  config.schedule.factor = 0.1
  return config


def _module(args: ml_collections.ConfigDict) -> str | None:
  return None if args.module == 'none' else args.module or 'cbam'


def _local(
  config: ml_collections.ConfigDict, args: ml_collections.ConfigDict
) -> ml_collections.ConfigDict:
  if not args.variant.startswith('resnet_'):
    raise ValueError(
      f'local is a small ResNet of its own: variant={args.variant!r} must be resnet_18, resnet_34 '
      'or resnet_50, whose blocks it takes'
    )
  common.local(config, args.data, size=16)
  config.model.options = {
    'module': _module(args),
    'depths': (1, 1, 1),
    'width': 16,
    'stem': 'small',
    'zero_init_last': False,
  }
  return config
