"""README.md shows the table that the model files give."""

import pytest

from tools import model_table


@pytest.mark.fast
def test_readme_table_is_fresh():
  readme = model_table.README.read_text()
  assert model_table.rendered(readme) == readme, 'stale: run python tools/model_table.py'


@pytest.mark.fast
def test_table_follows_the_variants():
  readme = model_table.README.read_text()
  begin = readme.index(model_table.BEGIN)
  stale = readme[:begin] + readme[begin:].replace('| `', '| `old_', 1)
  assert stale != readme
  assert model_table.rendered(stale) == model_table.rendered(readme)
