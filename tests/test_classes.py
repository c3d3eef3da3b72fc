"""Classes by name, and maps between those of weights and of data."""

import pytest

from vision_attention.data import builders, classes, source

pytestmark = pytest.mark.fast


def test_names_come_from_a_data_set_or_a_file(tmp_path):
  builders.write('digits', builders.digits(), tmp_path)
  assert classes.names('digits', str(tmp_path)) == tuple('0123456789')
  file = tmp_path / 'synsets.txt'
  file.write_text('n02\nn01\n\n')
  assert classes.names(str(file)) == ('n02', 'n01')
  file.write_text('n02\nn01\nn02\n')
  with pytest.raises(ValueError, match="names class 'n02' twice"):
    classes.names(str(file))
  with pytest.raises(source.MissingDataError, match='no file'):
    classes.names(str(tmp_path / 'none.txt'))
  with pytest.raises(source.MissingDataError, match='Prepare it with'):
    classes.names('imagenet21k', str(tmp_path))


def test_a_map_says_where_each_class_is():
  assert classes.index_map(['c', 'a', 'b'], ['a', 'x', 'c']) == [1, -1, 0]
  with pytest.raises(ValueError, match=r'none of our 2 classes \(x, y'):
    classes.index_map(['c', 'a', 'b'], ['x', 'y'])
