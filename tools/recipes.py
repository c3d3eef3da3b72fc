"""Writes docs/recipes.md: every published setting that a config trains, from tests/recipes/*.json.

python tools/recipes.py          # print the table
python tools/recipes.py --write  # write docs/recipes.md
python tools/recipes.py --check  # fail if docs/recipes.md is not what would be written

The tables are written by hand from papers and their code. What is printed are the values of the
configs, which tests/test_recipes.py holds against the tables.
"""

import argparse
import dataclasses
import importlib
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT))  # configs are no part of the package
TABLES = ROOT / 'tests' / 'recipes'
DOCS = ROOT / 'docs' / 'recipes.md'
SHARED = 'shared'


@dataclasses.dataclass(frozen=True)
class Setting:
  """A published recipe of one variant.

  Attributes:
    config: name of the config's file.
    name: of the setting, such as `ImageNet-1k`.
    variant: registered name of the model.
    arguments: after the config's colon.
    values: expected ones by flattened key, of which `first_rate` and `last_rate` are learning rates
      at the first step and at the end.
    source: table and section of the paper, or file of the code.
    unverified: keys whose values are nowhere published or were not looked up.
  """

  config: str
  name: str
  variant: str
  arguments: str
  values: Mapping[str, Any]
  source: str
  unverified: tuple[str, ...]

  def get_config(self) -> Any:
    """Returns the config that the arguments give."""
    return importlib.import_module(f'configs.{self.config}').get_config(self.arguments)


def names() -> list[str]:
  """Returns the configs that have a table."""
  return sorted(path.stem for path in TABLES.glob('*.json') if path.stem != SHARED)


def table(name: str) -> dict[str, Any]:
  """Returns a config's table as it is written."""
  return json.loads((TABLES / f'{name}.json').read_text())


def settings(name: str) -> Iterator[Setting]:
  """Returns the settings of a config's table, with its blocks filled in.

  Raises:
    ValueError: for a key that a setting marks unverified and does not give.
  """
  ours = table(name)
  blocks = {**table(SHARED)['blocks'], **ours.get('blocks', {})}
  for entry in ours['settings']:
    for variant, own in entry['variants'].items():
      values: dict[str, Any] = {}
      for block in entry['blocks']:
        values.update(blocks[block])
      values.update(entry.get('values', {}))
      values.update(own)
      unverified = tuple(entry.get('unverified', ()))
      if unknown := set(unverified) - values.keys():
        raise ValueError(f'{name}.json, {entry["name"]}: no value of {", ".join(sorted(unknown))}')
      arguments = entry['arguments'].replace('{variant}', variant)
      source = entry['source'].replace('{variant}', variant)
      yield Setting(name, entry['name'], variant, arguments, values, source, unverified)


def flat(config: Any) -> dict[str, Any]:
  """Returns a config's values by flattened key, with the keys that `Setting.values` adds."""

  def walk(prefix: str, tree: Any) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
      path = f'{prefix}{key}'
      # Options of a model are one value, so that a recipe has none that its table does not name.
      if hasattr(value, 'items') and path != 'model.options':
        yield from walk(f'{path}.', value)
      else:
        yield path, value

  values = dict(walk('', config.to_dict()))
  peak, schedule = config.optimizer.learning_rate, config.schedule
  warm = schedule.warmup.split()[0] != '0'
  values['first_rate'] = peak * schedule.warmup_init if warm else peak
  values['last_rate'] = peak if schedule.kind == 'constant' else peak * schedule.final
  return values


def row(setting: Setting) -> str:
  """Returns one line of the Markdown table, of values as the config has them."""
  values = flat(setting.get_config())
  decay = values['optimizer.weight_decay']
  cells = [
    setting.name,
    f'`{setting.config}.py:{setting.arguments}`',
    str(values['image_size']),
    values['total'],
    str(values['batch_size']),
    f'{values["optimizer.name"]} {values["optimizer.learning_rate"]:.4g}',
    f'{decay:.4g}',
    f'{values["model.options"].get("drop_path", 0):.4g}',
    ', '.join(f'`{key}`' for key in setting.unverified) or '-',
    setting.source,
  ]
  return f'| {" | ".join(cells)} |'


def document() -> str:
  """Returns the text of docs/recipes.md."""
  lines, count = [], 0
  for name in names():
    found = list(settings(name))
    count += len(found)
    lines += [
      f'## {table(name)["system"]}',
      '',
      '| setting | `configs/` | pixels | length | batch | optimizer, peak rate | weight decay | '
      'drop path | unverified | source |',
      '|---|---|---|---|---|---|---|---|---|---|',
      *map(row, found),
      '',
    ]
    for variants, why in table(name).get('without', {}).items():
      lines += [f'No recipe: {variants}: {why}', '']
  head = [
    '# Recipes',
    '',
    f'{len(names())} configs, {count} settings. `python main.py --config=configs/<line>` trains '
    'one; `init=` and `teacher=` take paths of your own. `tests/recipes/` holds all values of each '
    'as its source has them; `python tools/recipes.py --write` writes this page. Values that are '
    'unverified stand in for what is not published.',
    '',
  ]
  return '\n'.join(head + lines).rstrip() + '\n'


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--write', action='store_true', help='write docs/recipes.md')
  parser.add_argument('--check', action='store_true', help='change nothing, fail when stale')
  args = parser.parse_args()
  text = document()
  if args.check:
    if not DOCS.exists() or DOCS.read_text() != text:
      print('docs/recipes.md is old: run python tools/recipes.py --write')
      return 1
  elif args.write:
    DOCS.write_text(text)
  else:
    print(text, end='')
  return 0


if __name__ == '__main__':
  sys.exit(main())
