"""What every config starts from, and the arguments after a config's colon.

Durations are text (`300 epochs`, `10_000 steps`, `1e6 examples`) and become steps when the run
starts, so that an override of the batch size moves them along. `{size}` in a data operation stands
for `image_size`.
"""

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

# The release that papers train on, of 21,841 classes; a later one is named by `config.data.name`.
IMAGENET21K = 'imagenet21k/fall11'
# Classes and training images, for a dry run without the data; a run reads them off the data set.
DATASETS = {
  'imagenet2012': {'num_classes': 1000, 'num_train': 1_281_167, 'eval_split': 'validation'},
  'imagenet21k': {'num_classes': 21_841, 'num_train': 12_700_000, 'eval_split': 'validation'},
  'fashion_mnist': {'num_classes': 10, 'num_train': 60_000, 'eval_split': 'test'},
  'jft300m': {'num_classes': 18_291, 'num_train': 303_000_000, 'eval_split': 'validation'},
  # "Nearly 3 billion" images.
  'jft3b': {'num_classes': 29_593, 'num_train': 3_000_000_000, 'eval_split': 'validation'},
  'cifar10': {'num_classes': 10, 'num_train': 50_000, 'eval_split': 'test'},
  'cifar100': {'num_classes': 100, 'num_train': 50_000, 'eval_split': 'test'},
  'oxford_iiit_pet': {'num_classes': 37, 'num_train': 3680, 'eval_split': 'test'},
  'oxford_flowers102': {'num_classes': 102, 'num_train': 1020, 'eval_split': 'test'},
  'digits': {'num_classes': 10, 'num_train': 1442, 'eval_split': 'test'},
  'ham10000': {'num_classes': 7, 'num_train': 8012, 'eval_split': 'fold0'},
  'ham10000_holdout': {'num_classes': 7, 'num_train': 7010, 'eval_split': 'test'},
}


class Arguments:
  """What stands after a config's colon, with defaults for the rest, as attributes.

  It notes which were read: one that a user gave and that no part of the recipe reads would be
  dropped without a word.
  """

  def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any]):
    self._values = dict(values)
    self._unread = {key for key, value in values.items() if value != defaults[key]}

  def __getattr__(self, name: str) -> Any:
    if name.startswith('_') or name not in self._values:
      raise AttributeError(name)
    self._unread.discard(name)
    return self._values[name]

  def check_read(self) -> None:
    """Raises ValueError where an argument was given that the recipe has no use for."""
    if self._unread:
      given = ', '.join(f'{key}={self._values[key]}' for key in sorted(self._unread))
      raise ValueError(
        f'config argument {given} changes nothing in the recipe that the other arguments choose: '
        "leave it out, or give what it goes with (the config's docstring says)"
      )


def parse_arg(arg: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
  """Reads `key=value,key=value` after a config's colon; `key` alone means `key=True`.

  Args:
    arg: the text after the colon.
    defaults: every allowed key with its default, whose type the value takes.

  Returns:
    The defaults with what was given in place of theirs.

  Raises:
    ValueError: for an unknown key, or a value of another type.
  """
  values = dict(defaults)
  for item in filter(None, (arg or '').split(',')):
    key, given, text = item.partition('=')
    if key not in defaults:
      close = difflib.get_close_matches(key, defaults, 1)
      hint = f'did you mean {close[0]!r}?' if close else f'allowed: {", ".join(defaults)}'
      raise ValueError(f'config argument {key!r} is unknown: {hint}')
    kind = type(defaults[key])
    try:
      if kind is bool:
        values[key] = {'': True, 'true': True, 'false': False}[text.lower()]
      else:
        values[key] = kind(text)
    except (KeyError, ValueError):
      raise ValueError(f'config argument {key}={text!r} is not a {kind.__name__}') from None
    if kind is not bool and not given:
      raise ValueError(f'config argument {key!r} needs a value: {key}=...')
  return values


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A config's `get_config`, of the text after the config's colon; see `takes`."""

  build: Callable[[Arguments], ml_collections.ConfigDict]
  defaults: Mapping[str, Any]
  with_local: Sequence[str]
  variants: Sequence[str]

  def __call__(self, arg: str = '') -> ml_collections.ConfigDict:
    """Returns the config that the arguments give.

    Raises:
      ValueError: for an unknown argument, a value of another type, a model of another family, or
        an argument without effect.
    """
    values = parse_arg(arg, self.defaults)
    if values.get('local'):
      for key in values.keys() - {'local', *self.with_local}:
        if values[key] != self.defaults[key]:
          raise ValueError(
            'local is a model and recipe of its own: only '
            f'{", ".join(self.with_local)} goes with it, not {key}={values[key]!r}'
          )
    variant = values.get('variant', '')
    if not any(fnmatch.fnmatchcase(variant, pattern) for pattern in self.variants):
      raise ValueError(
        f'config argument variant={variant!r} is not of this recipe, which has '
        f'{", ".join(self.variants)}: take the config of its family, or train it by this recipe '
        f'with --config.model.name={variant}'
      )
    args = Arguments(values, self.defaults)
    config = self.build(args)
    args.check_read()
    return config


def takes(
  *, with_local: Sequence[str] = ('data',), variants: Sequence[str] = ('*',), **defaults: Any
) -> Callable[[Callable[[Arguments], ml_collections.ConfigDict]], Recipe]:
  """Decorates a config's function of its arguments, which then takes the text after the colon.

  Args:
    with_local: what may be other than its default where `local` is given, which is a model and
      recipe of its own.
    variants: patterns of models that the recipe is of.
    **defaults: every allowed argument with its default, whose type the value takes.
  """
  return lambda build: Recipe(build, defaults, with_local, variants)


def pretrained(args: Arguments, allowed: Sequence[str] = ('1k', '21k')) -> str:
  """Returns what the weights in `init` were trained on: the argument `pretrained`.

  Some papers count the 21,841 classes of ImageNet-21k as 22k: both names mean the same.

  Raises:
    ValueError: for something else than a recipe knows, or without `init`.
  """
  name = '21k' if args.pretrained == '22k' else args.pretrained
  if name not in allowed:
    raise ValueError(
      f'config argument pretrained={args.pretrained!r} must be {" or ".join(allowed)}'
    )
  if name != allowed[0] and not args.init:
    raise ValueError(f'config argument pretrained={args.pretrained!r} goes with init, its weights')
  return name


def use_data(config: ml_collections.ConfigDict, name: str) -> None:
  """Sets the data set, with what is known of it here.

  Raises:
    ValueError: for a release of ImageNet-21k, by whose name no config knows its recipe.
  """
  if name.startswith('imagenet21k/'):
    raise ValueError(
      f'config argument data={name!r}: say data=imagenet21k, and --config.data.name={name} '
      '--config.data.num_classes=0 for that release'
    )
  known = DATASETS.get(name, {})
  config.data.name = IMAGENET21K if name == 'imagenet21k' else name
  config.data.num_classes = known.get('num_classes', 0)
  config.data.num_train = known.get('num_train', 0)
  config.data.eval_split = known.get('eval_split', 'test')


def local(config: ml_collections.ConfigDict, data: str = 'digits', *, size: int = 32) -> None:
  """Sets what trains a small model on a laptop: data, optimizer, schedule, averages, intervals.

  The model's own options are the config's to set: a model of some hundred thousand parameters.

  Args:
    config: changed in place.
    data: `digits` (1442 images, 20 epochs of 22 steps) or `fashion_mnist`.
    size: of the images, in pixels.
  """
  use_data(config, 'digits' if data == 'imagenet2012' else data)
  config.image_size = size
  config.batch_size = 64
  config.model.dtype = 'float32'
  resize = 'resize({size}, interpolation="bilinear")'
  config.data.train_ops = (resize, 'pad_crop(3)')
  config.data.eval_ops = (resize,)
  config.data.mean = (0.3, 0.3, 0.3)
  config.data.std = (0.35, 0.35, 0.35)
  config.data.num_threads = 2
  config.optimizer.name = 'adamw'
  config.optimizer.learning_rate = 2e-3
  config.optimizer.weight_decay = 0.05
  config.optimizer.clip_norm = 1.0
  config.schedule.kind = 'cosine'
  config.schedule.final = 0.01
  config.ema.decay = 0.99
  config.ema.warmup = True
  config.log_every = '50 steps'
  config.checkpoint.every = '200 steps'
  config.total = '20 epochs'
  config.schedule.warmup = '3 epochs'
  config.eval.every = '10 epochs'
  if config.data.name == 'fashion_mnist':
    # Few epochs and images that are centred already: no crops.
    config.data.train_ops = (resize, 'flip()')
    config.batch_size = 128
    config.total = '6 epochs'
    config.schedule.warmup = '200 steps'
    config.eval.every = '1 epochs'


def timm_rand_augment(layers: int = 2, magnitude: int = 9, *, interpolation: str) -> str:
  """Returns the operation that timm calls `rand-m9-mstd0.5-inc1`, with the crop's interpolation."""
  return (
    f'rand_augment({layers}, {magnitude}, prob=0.5, magnitude_std=0.5, increasing=True, '
    f'interpolation="{interpolation}")'
  )


def deit_augmentation(config: ml_collections.ConfigDict, *, interpolation: str = 'bicubic') -> None:
  """Sets the augmentation of DeiT (arXiv 2012.12877, Table 9), which many later recipes share.

  Crops, flips, RandAugment in timm's form `rand-m9-mstd0.5-inc1`, mixup, CutMix, random erasing and
  smoothed labels.

  Args:
    config: changed in place.
    interpolation: of crops and RandAugment; `random` where a recipe leaves timm's default.
  """
  config.data.train_ops = (
    f'random_resized_crop({{size}}, area=(0.08, 1.0), interpolation="{interpolation}")',
    'flip()',
    timm_rand_augment(interpolation=interpolation),
  )
  config.mixing.mixup_alpha = 0.8
  config.mixing.cutmix_alpha = 1.0
  config.mixing.prob = 1.0
  config.mixing.switch_prob = 0.5
  config.erasing.prob = 0.25
  config.loss.label_smoothing = 0.1


def resnet_rs(config: ml_collections.ConfigDict, magnitude: int) -> None:
  """Sets the recipe of ResNet-RS (arXiv 2103.07579, section 4), but for the model's own options.

  The code's weight decay is a term of the loss over everything but BatchNorm, whose statistics are
  those of the last batch, smoothed by the running average: `norm_momentum=0` goes with it.

  Args:
    config: changed in place.
    magnitude: of RandAugment, 10 for small models and images, 15 for large ones.
  """
  config.total = '350 epochs'
  config.batch_size = 4096
  config.data.train_ops = (
    'random_resized_crop({size}, area=(0.08, 1.0))',
    'flip()',
    f'rand_augment_tpu(2, {magnitude})',
  )
  config.data.eval_ops = ('center_crop({size}, ratio=0.875)',)
  config.loss.label_smoothing = 0.1
  config.optimizer.name = 'sgd'
  config.optimizer.learning_rate = 0.1 * config.batch_size / 256
  config.optimizer.momentum = 0.9
  config.optimizer.nesterov = True
  config.optimizer.weight_decay = 4e-5
  config.optimizer.weight_decay_mask = (
    '/kernel$',
    '(classifier|squeeze|excite)/bias$',
    '/(height|width)_table$',
  )
  config.schedule.kind = 'cosine'
  config.schedule.warmup = '5 epochs'
  config.ema.decay = 0.9999
  config.ema.warmup = True
  config.eval.every = '5 epochs'


def get_config() -> ml_collections.ConfigDict:
  """Returns every key there is, switched off or at the value that most recipes share."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.image_size = 224
  config.batch_size = 1024  # of all devices together
  config.accumulate = 1  # micro-batches per step
  config.total = '300 epochs'
  # Of progressive resizing: durations and sizes before `image_size`, (('100 epochs', 128), ...).
  config.progressive = ()

  config.model = ml_collections.ConfigDict()
  config.model.name = ''
  config.model.dtype = 'bfloat16'  # of activations; parameters are float32
  config.model.source = ''  # conventions of a reference implementation, or ours
  config.model.options = ml_collections.ConfigDict()  # of the model file's build

  config.init = ml_collections.ConfigDict()
  config.init.path = ''  # a run, a checkpoint or a weight file to start from
  config.init.source = ''  # whose weight file, of a model's REFERENCES; ours if empty
  config.init.classes = ''  # data set, or class map, of the weights' classes, to pick ours by
  config.init.fresh = ()  # patterns of paths that the weights may lack, such as '/module/'

  config.data = ml_collections.ConfigDict()
  config.data.name = 'imagenet2012'
  config.data.data_dir = ''  # else $TFDS_DATA_DIR, ~/tensorflow_datasets or data
  config.data.train_split = 'train'
  config.data.eval_split = 'validation'
  config.data.num_classes = 0  # 0: what the data set says
  config.data.num_train = 0
  config.data.train_ops = ('random_resized_crop({size}, area=(0.05, 1.0))', 'flip()')
  config.data.eval_ops = ('center_crop({size})',)
  config.data.label_maps = ''  # folder of label maps, of every training image
  config.data.label_geometry = 'image'  # or 'released', where they are cut wrong as in the code
  config.data.repeats = 1  # augmented copies of an image in a row; an epoch stays as long
  config.data.mean = (0.485, 0.456, 0.406)
  config.data.std = (0.229, 0.224, 0.225)
  config.data.on_corrupt = 'raise'  # or 'skip': count it and take the next
  config.data.num_threads = 16
  config.data.num_workers = 0  # processes; 0 decodes in threads
  config.data.prefetch = 4  # batches

  config.mixing = ml_collections.ConfigDict()
  config.mixing.mixup_alpha = 0.0
  config.mixing.cutmix_alpha = 0.0
  config.mixing.prob = 1.0
  config.mixing.switch_prob = 0.5
  config.mixing.per = 'batch'  # or 'weight', 'example': what is drawn once
  config.mixing.draw = 'beta'  # or 'power', QnA's

  config.erasing = ml_collections.ConfigDict()
  config.erasing.prob = 0.0
  config.erasing.mode = 'pixel'  # or 'color', 'zero'
  config.erasing.after_mixing = True  # timm's loader; DeiT's comes before

  config.loss = ml_collections.ConfigDict()
  config.loss.kind = 'softmax'
  config.loss.label_smoothing = 0.0
  config.loss.class_weights = 'none'  # or 'inverse': by the number of training images of a class
  config.loss.focal_gamma = 0.0  # arXiv 1708.02002

  config.teacher = ml_collections.ConfigDict()
  config.teacher.name = ''  # of a model
  config.teacher.path = ''  # a run, a checkpoint or a weight file
  config.teacher.source = ''  # whose weight file; ours if empty
  config.teacher.options = ml_collections.ConfigDict()
  config.distill = ml_collections.ConfigDict()
  config.distill.kind = 'none'  # or 'hard', 'soft'
  config.distill.weight = 0.5  # of the teacher's loss, the labels' having the rest
  config.distill.temperature = 3.0  # of 'soft'
  config.tokens = ml_collections.ConfigDict()
  config.tokens.weight = 0.0  # of the loss of every token's label, beside the image's
  config.tokens.labels = 'image'  # or 'teacher', or 'maps', those of data.label_maps
  config.tokens.ground_truth = False  # whether the image's own label corrects the maps'

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.name = 'adamw'
  config.optimizer.learning_rate = 1e-3
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.999
  config.optimizer.epsilon = 1e-8
  config.optimizer.momentum = 0.9
  config.optimizer.nesterov = False
  config.optimizer.momentum_dtype = 'float32'
  config.optimizer.weight_decay = 0.0
  config.optimizer.weight_decay_mask = ('/kernel$',)
  config.optimizer.weight_decay_multipliers = ()  # pairs of pattern and factor of its decay
  config.optimizer.weight_decay_times_lr = True
  config.optimizer.lr_multipliers = ()
  config.optimizer.layer_decay = 1.0  # of the learning rate, per layer from the head to the stem
  config.optimizer.clip_norm = 0.0
  config.optimizer.clip_adaptive = 0.0

  config.schedule = ml_collections.ConfigDict()
  config.schedule.kind = 'cosine'
  config.schedule.warmup = '0 steps'
  config.schedule.warmup_init = 0.0  # relative to the peak
  config.schedule.warmup_prefix = True  # False: the decay counts from the first step
  config.schedule.final = 0.0  # relative to the peak
  config.schedule.hold = '0 steps'  # at the end, at the final rate
  config.schedule.every = '0 steps'  # how long a rate stays: '1 epochs' to move by epochs
  config.schedule.boundaries = ()
  config.schedule.factor = 0.1
  config.schedule.timescale = 10_000
  config.schedule.cooldown = '0 steps'

  config.ema = ml_collections.ConfigDict()
  config.ema.decay = 0.0
  config.ema.warmup = False

  config.mesh = ml_collections.ConfigDict()
  config.mesh.data = -1
  config.mesh.fsdp = 1
  config.mesh.tensor = 1  # splits attention heads and MLP widths, within a process
  config.mesh.join_seconds = 180  # how long processes wait for each other at the start
  config.mesh.heartbeat_seconds = 60  # a process silent for so long is lost, and ends the others
  config.sharding_rules = ()  # pairs of pattern and axes: ('classifier/kernel', (None, 'fsdp'))

  config.log_every = '100 steps'
  config.eval = ml_collections.ConfigDict()
  config.eval.every = '1 epochs'
  config.eval.batch_size = 0  # 0: that of training
  config.eval.per_class = False  # recall, precision and AUC of every class, and their means
  # Of --mode=eval: other test sets, such as 'imagenet_a' or 'imagenet_v2/matched-frequency'; data
  # sets for probes of so many images per class; the speed of the model.
  config.eval.suites = ()
  config.eval.kshot = ()
  config.eval.shots = (1, 5, 10, 25)
  config.eval.throughput = False
  config.eval.best_by = 'top1'  # what the best checkpoint is best by
  config.checkpoint = ml_collections.ConfigDict()
  config.checkpoint.every = '1000 steps'
  config.checkpoint.keep_latest = 1
  config.checkpoint.keep_best = 1
  config.wandb = ml_collections.ConfigDict()
  config.wandb.project = ''  # at Weights & Biases; none if empty
  config.wandb.mode = 'offline'  # or 'online'
  config.profile = ml_collections.ConfigDict()
  config.profile.start = -1  # step of the run; -1 for none
  config.profile.steps = 5
  config.compile_cache = '~/.cache/vision_attention/jax'
  return config.lock()
