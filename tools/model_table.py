"""Writes the model table of README.md from the model files' `VARIANTS`.

python tools/model_table.py          # rewrite the table in README.md
python tools/model_table.py --check  # fail if README.md is not what would be written
"""

import argparse
import itertools
import pathlib
import sys

from vision_attention.models import base, registry

README = pathlib.Path(__file__).parents[1] / 'README.md'
BEGIN, END = '<!-- model table: begin -->', '<!-- model table: end -->'


def row(name: str, variant: base.Variant) -> str:
  """Returns one line of the table; what is not published or not counted is a dash."""
  params = f'{variant.params:,}' if variant.params else '-'
  flops = f'{variant.flops / 1e9:.2f}' if variant.flops else '-'
  top1 = f'{variant.top1:.1f}' if variant.top1 else '-'
  size = f'{variant.image_size}'
  return f'| `{name}` | {size} | {params} | {flops} | {top1} | {variant.source} |'


def table() -> str:
  """Returns the Markdown of all families, each under its model file's first line."""
  lines = []
  names = sorted(registry.list_models(), key=lambda name: registry.module_of(name).__name__)
  for _, group in itertools.groupby(names, key=registry.module_of):
    group = list(group)
    module = registry.module_of(group[0])
    title = (module.__doc__ or '').strip().splitlines()[0]
    lines += [
      f'**{title}** (`{module.__name__.split(".")[-1]}.py`)',
      '',
      '| model | pixels | parameters | GMACs | top-1 | source of the published numbers |',
      '|---|---|---|---|---|---|',
    ]
    lines += [row(name, variant) for name, variant in module.VARIANTS.items()]
    lines.append('')
  return '\n'.join(lines)


def rendered(readme: str) -> str:
  """Returns the README with a fresh table between the two markers."""
  before, rest = readme.split(BEGIN)
  _, after = rest.split(END)
  return f'{before}{BEGIN}\n\n{table()}\n{END}{after}'


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--check', action='store_true', help='change nothing, fail when stale')
  args = parser.parse_args()
  old = README.read_text()
  new = rendered(old)
  if args.check and new != old:
    print('README.md has an old model table: run python tools/model_table.py')
    return 1
  if not args.check:
    README.write_text(new)
  return 0


if __name__ == '__main__':
  sys.exit(main())
