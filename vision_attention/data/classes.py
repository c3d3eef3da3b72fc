"""The classes of data sets and of weights by name, and where one's are among another's."""

from collections.abc import Sequence

from etils import epath

from vision_attention.data import source


def names(where: str, data_dir: str | None = None) -> tuple[str, ...]:
  """Returns the names of classes in their order, such as the synsets of ImageNet (`n01440764`).

  Args:
    where: a text file with a name in every line, or a prepared data set.
    data_dir: see `source.find`.

  Raises:
    source.MissingDataError: if it is neither.
    ValueError: if a name is there twice.
  """
  path = epath.Path(where).expanduser()
  if path.suffix == '.txt':
    if not path.is_file():
      raise source.MissingDataError(f'there is no file {where} of the names of classes')
    found = tuple(filter(None, (line.strip() for line in path.read_text().splitlines())))
  else:
    found = source.label_names(where, data_dir)
  if len(set(found)) < len(found):
    twice = next(name for name in found if found.count(name) > 1)
    raise ValueError(f'{where} names class {twice!r} twice')
  return found


def index_map(theirs: Sequence[str], ours: Sequence[str]) -> list[int]:
  """Returns the number of each of our classes among theirs, -1 for one that they lack.

  Raises:
    ValueError: if no class is known to both, which is no map but a mistake.
  """
  numbers = {name: i for i, name in enumerate(theirs)}
  found = [numbers.get(name, -1) for name in ours]
  if not found or max(found) < 0:
    raise ValueError(
      f'none of our {len(ours)} classes ({", ".join(ours[:3])}, ...) is among the {len(theirs)} '
      f'of the weights ({", ".join(theirs[:3])}, ...): both must be named alike, as by synsets'
    )
  return found
