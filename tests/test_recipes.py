"""Configs against tables of published recipes, which are written by hand from their sources."""

import importlib
import pathlib

import jax
import pytest

from configs import common
from tools import recipes
from vision_attention import planning
from vision_attention.models import registry
from vision_attention.training import optimizer

pytestmark = pytest.mark.usefixtures('unchecked')

CONFIGS = pathlib.Path(common.__file__).parent
# Of no paper's recipe: what configs share, and an application.
NO_SYSTEM = {'__init__', 'common', 'skin_lesions'}
# What every table has to say of every setting.
REQUIRED = {
  'accumulate',
  'batch_size',
  'data.eval_ops',
  'data.mean',
  'data.name',
  'data.repeats',
  'data.std',
  'data.train_ops',
  'distill.kind',
  'ema.decay',
  'erasing.prob',
  'first_rate',
  'image_size',
  'init.classes',
  'init.path',
  'last_rate',
  'loss.kind',
  'loss.label_smoothing',
  'mixing.cutmix_alpha',
  'mixing.mixup_alpha',
  'model.options',
  'optimizer.clip_adaptive',
  'optimizer.clip_norm',
  'optimizer.layer_decay',
  'optimizer.learning_rate',
  'optimizer.lr_multipliers',
  'optimizer.name',
  'optimizer.weight_decay',
  'optimizer.weight_decay_mask',
  'optimizer.weight_decay_multipliers',
  'schedule.every',
  'schedule.hold',
  'schedule.kind',
  'schedule.warmup',
  'schedule.warmup_prefix',
  'tokens.weight',
  'total',
}
SETTINGS = [setting for name in recipes.names() for setting in recipes.settings(name)]
MASKS = [(name, mask) for name in recipes.names() for mask in recipes.table(name)['masks']]


def _plain(value):
  """Tuples as the lists that JSON has."""
  if isinstance(value, dict):
    return {key: _plain(item) for key, item in value.items()}
  return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _differences(setting: recipes.Setting, config) -> dict:
  """The keys in which a config is not what its table says, with both values."""
  got = recipes.flat(config)
  wrong = {}
  for key, expected in {**setting.values, 'model.name': setting.variant}.items():
    value = _plain(got.get(key, 'no such key'))
    equal = pytest.approx(expected, rel=1e-6, abs=0) if type(expected) is float else expected
    if value != equal:
      wrong[key] = (value, expected)
  return wrong


@pytest.mark.fast
@pytest.mark.parametrize(
  'setting', SETTINGS, ids=[f'{setting.config}:{setting.arguments}' for setting in SETTINGS]
)
def test_a_config_has_the_published_values(setting):
  assert setting.values.keys() >= REQUIRED, sorted(REQUIRED - setting.values.keys())
  # Before or after mixing: codes differ, and most do not say it where they say the rest.
  assert not setting.values['erasing.prob'] or 'erasing.after_mixing' in setting.values
  assert not _differences(setting, setting.get_config())
  assert setting.source


@pytest.mark.fast
def test_a_value_that_drifts_is_seen():
  setting = next(setting for setting in SETTINGS if setting.config == 'swin_tiny')
  for key, value in {
    'optimizer.learning_rate': 1.01e-3,
    'optimizer.layer_decay': 0.9,
    'schedule.warmup': '19 epochs',
    'mixing.cutmix_alpha': 0.9,
    'data.eval_ops': ('resize({size})',),
  }.items():
    config = setting.get_config()
    config.update_from_flattened_dict({key: value})
    assert key in _differences(setting, config)
  config = setting.get_config()
  with config.unlocked():
    config.model.options.mlp_ratio = 3
  assert _differences(setting, config).keys() == {'model.options'}


@pytest.mark.fast
def test_every_config_of_a_system_has_a_table():
  configs = {path.stem for path in CONFIGS.glob('*.py')} - NO_SYSTEM
  assert set(recipes.names()) == configs


def _family(model: str) -> str:
  return registry.module_of(model).__name__.split('.')[-1]


@pytest.mark.fast
def test_every_family_has_a_table():
  found = {family for name in recipes.names() for family in recipes.table(name)['families']}
  assert found == {_family(model) for model in registry.list_models()}


@pytest.mark.fast
@pytest.mark.parametrize('name', recipes.names())
def test_every_variant_has_a_recipe_or_a_reason(name):
  table = recipes.table(name)
  models = registry.list_models()
  known = {model for model in models if _family(model) in table['families']}
  assert known
  covered = {setting.variant for setting in recipes.settings(name)}
  assert covered <= set(models)
  without = {variant for names in table.get('without', {}) for variant in names.split(', ')}
  assert not covered & without
  # Baselines of other families may be there as well.
  assert without <= known <= covered | without
  arguments = [setting.arguments for setting in recipes.settings(name)]
  assert len(set(arguments)) == len(arguments)


def _other(key: str, default) -> object:
  """Another value than an argument's default, of its type."""
  match default:
    case bool():
      return not default
    case int():
      return default + 8 if default else 96
    case float():
      return default + 0.25
  names = {'data': 'imagenet21k', 'pretrained': '21k'}
  return names.get(key, 'of_a_user')


@pytest.mark.fast
@pytest.mark.parametrize('name', [*recipes.names(), 'skin_lesions'])
def test_no_argument_is_dropped(name):
  """Whatever else is given, an argument changes the config or is refused."""
  get_config = importlib.import_module(f'configs.{name}').get_config
  settings = recipes.settings(name) if name in recipes.names() else ()
  # One variant of every published setting.
  bases = {setting.name: setting.arguments for setting in settings}
  bases |= {'default': ''} | ({'local': 'local'} if 'local' in get_config.defaults else {})
  heeded = set()
  for base in bases.values():
    given = {item.partition('=')[0] for item in base.split(',')}
    for key in get_config.defaults.keys() - given - {'local'}:
      argument = f'{key}={_other(key, get_config.defaults[key])}'
      try:
        config = get_config(','.join(filter(None, (base, argument))))
      except ValueError:
        continue
      assert recipes.flat(config) != recipes.flat(get_config(base)), (base, argument)
      heeded.add(key)
  # A test by values that are always refused would prove nothing.
  assert heeded


@pytest.mark.parametrize('name, mask', MASKS, ids=[f'{n}:{m["arguments"]}' for n, m in MASKS])
def test_a_dry_run_decays_what_the_recipe_decays(name, mask):
  """The recipe's config for a small model, which the mask or the config's `local` describes."""
  module = importlib.import_module(f'configs.{name}')
  config = module.get_config(mask['arguments'])
  if 'small' in mask:
    small = dict(mask['small'])
    size = small.pop('image_size')
  else:
    local = module.get_config('local')
    small, size = local.model.options.to_dict(), local.image_size
  # What the recipe says of regularisation stays; the rest is the small model's.
  with config.unlocked():
    config.model.options = {**small, **config.model.options.to_dict()}
    config.image_size = size
  plan = planning.prepare(config, with_data=False)
  assert plan.total > 0
  found = {True: set(), False: set()}
  matched = optimizer.matches(plan.shapes[0].params, config.optimizer.weight_decay_mask)
  for path, decayed in jax.tree_util.tree_leaves_with_path(matched):
    found[bool(decayed)].add(optimizer.path_of(path).rsplit('/', 1)[1])
  assert found[True] == set(mask['decayed'])
  assert found[False] == set(mask['exempt'])


@pytest.mark.fast
def test_the_document_is_current():
  assert recipes.DOCS.read_text() == recipes.document(), 'run python tools/recipes.py --write'
