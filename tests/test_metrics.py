"""Metrics of a run: what a restart keeps."""

import json

import pytest

from vision_attention.training import metrics

pytestmark = pytest.mark.fast


def test_a_restart_drops_what_was_written_after_its_step(tmp_path):
  writer = metrics.Writer(tmp_path, 0, True)
  for step in (1, 2, 3):
    writer.write(step, {'train/loss': step / 2})
  writer.close()
  with (tmp_path / metrics.METRICS).open('a') as file:
    file.write('{"step": 4, "tra')  # a kill cut it short
  metrics.Writer(tmp_path, 2, True).close()
  rows = [json.loads(line) for line in (tmp_path / metrics.METRICS).read_text().splitlines()]
  assert [row['step'] for row in rows] == [1, 2]
