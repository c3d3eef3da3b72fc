"""The table of a comparison: cells, pairs, and statistics against SciPy and by hand."""

import csv
import io
import json
import math
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from configs import skin_lesions
from tools import collect
from vision_attention import comparison, runs

pytestmark = pytest.mark.fast


def _run(folder: pathlib.Path, module, seed, top1, *, variant='resnet_18', ema=False, **changes):
  """A finished run of a hundred steps whose first evaluation was the best."""
  folder.mkdir(parents=True)
  config = {
    'seed': seed,
    'total': '100 steps',
    'batch_size': 64,
    'image_size': 16,
    'log_every': f'{seed} steps',
    'model': {'name': variant, 'options': {'module': module, 'depths': [1, 1]}},
    'data': {'num_train': 1000, 'train_split': 'train', 'eval_split': 'test'},
    **changes,
  }
  (folder / runs.CONFIG).write_text(json.dumps(config))
  last = {'step': 100, 'eval/top1': top1, 'eval/macro_auc': top1 / 100, 'eval/recall/mel': 3.0}
  if ema:
    last['eval_ema/top1'] = top1 + 1
  rows = [{'step': 50, 'eval/top1': 99.0}, {'step': 100, 'train/loss': 0.1}, last]
  (folder / runs.METRICS).write_text('\n'.join(map(json.dumps, rows)))


SCORES = {
  None: (80.0, 82.0, 81.0, 79.0),
  'se': (82.0, 83.5, 82.0, 81.5),
  'eca': (80.5, 81.0, 81.5, 79.0),
}


@pytest.fixture
def folder(tmp_path):
  for module, scores in SCORES.items():
    for seed, score in enumerate(scores):
      _run(tmp_path / f'{module},{seed}', module, seed, score)
  return tmp_path


def _compare(folder, **options):
  options = {'metrics': ('top1',), 'baseline': {'model.options.module': 'None'}, **options}
  rows = comparison.compare(runs.find([folder]), **options)
  return {dict(row.cell).get('model.options.module'): row.scores['top1'] for row in rows}


def test_means_deviations_and_tests_are_those_of_scipy(folder):
  got = _compare(folder)
  assert list(got) == [None, 'eca', 'se'], 'the baseline comes first'
  for module, scores in SCORES.items():
    assert got[module].mean == pytest.approx(np.mean(scores))
    assert got[module].std == pytest.approx(np.std(scores, ddof=1))
  raw = {m: stats.ttest_rel(SCORES[m], SCORES[None]).pvalue for m in ('se', 'eca')}
  for module in raw:
    assert got[module].p == pytest.approx(raw[module])
    assert got[module].difference == pytest.approx(np.mean(SCORES[module]) - np.mean(SCORES[None]))
  assert got['se'].corrected == pytest.approx(2 * raw['se'])
  assert got['eca'].corrected == pytest.approx(max(2 * raw['se'], raw['eca']))
  assert (got[None].difference, got[None].pairs) == (None, 0)
  signed = _compare(folder, test='wilcoxon')
  assert signed['se'].p == pytest.approx(stats.wilcoxon(SCORES['se'], SCORES[None]).pvalue)


def test_only_runs_of_the_same_seed_make_a_pair(folder, tmp_path_factory):
  other = tmp_path_factory.mktemp('other')
  for seed in (1, 2, 7):
    _run(other / str(seed), 'gc', seed, SCORES[None][seed % 4] + 1 + seed % 2)
  rows = comparison.compare(
    runs.find([folder, other]), ('top1',), baseline={'model.options.module': 'None'}
  )
  gc = next(row.scores['top1'] for row in rows if dict(row.cell)['model.options.module'] == 'gc')
  assert (len(gc.values), gc.pairs) == (3, 2)
  assert gc.difference == pytest.approx(1.5)


def test_every_backbone_has_its_own_baseline(folder):
  for module, scores in SCORES.items():
    for seed, score in enumerate(scores):
      _run(folder / f'34,{module},{seed}', module, seed, 2 * score - 80, variant='resnet_34')
  rows = comparison.compare(
    runs.find([folder]), ('top1',), baseline={'model.options.module': 'None'}
  )
  cells = [tuple(value for _, value in row.cell) for row in rows]
  assert cells[:3] == [('resnet_18', None), ('resnet_18', 'eca'), ('resnet_18', 'se')]
  difference = {cell: row.scores['top1'].difference for cell, row in zip(cells, rows, strict=True)}
  for module in ('se', 'eca'):
    small, large = difference['resnet_18', module], difference['resnet_34', module]
    assert large == pytest.approx(2 * small)
  # One cell by name for all.
  one = {'model.options.module': 'None', 'model.name': 'resnet_18'}
  rows = comparison.compare(runs.find([folder]), ('top1',), baseline=one)
  assert sum(row.scores['top1'].difference is None for row in rows) == 1


def test_folds_repeat_a_cell_and_intervals_do_not_divide_it(tmp_path):
  for fold in range(3):
    for module in (None, 'se'):
      data = {'num_train': 1000 + fold, 'train_split': f'not{fold}', 'eval_split': f'fold{fold}'}
      _run(tmp_path / f'{module}{fold}', module, 0, 70.0 + fold, data=data)
  found = runs.find([tmp_path])
  assert comparison.varying(found) == ['model.options.module']
  got = _compare(tmp_path)
  assert (got['se'].pairs, got['se'].difference, got['se'].p) == (3, 0.0, 1.0)


def test_the_last_evaluation_counts_and_averaged_weights_where_there_are_any(tmp_path):
  _run(tmp_path / 'a', None, 0, 80.0)
  _run(tmp_path / 'b', 'se', 0, 80.0, ema=True)
  first, second = runs.find([tmp_path])
  assert first.metrics == {'top1': 80.0, 'macro_auc': 0.8, 'recall/mel': 3.0}
  assert second.metrics == {'top1': 81.0}
  assert first.finished
  (tmp_path / 'b' / runs.METRICS).write_text('{"step": 50, "eval/top1": 1.0}\n{"step": 10')
  assert not runs.find([tmp_path])[1].finished
  assert runs.read(tmp_path / 'c') is None
  with pytest.raises(FileNotFoundError, match='no run lies in'):
    runs.find([tmp_path / 'c'])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_between_the_raw_value_and_bonferroni(values):
  got = comparison.holm(values)
  count = len(values)
  for raw, corrected in zip(values, got, strict=True):
    assert raw <= corrected <= 1
    # The bound of Bonferroni holds for the largest value that is not larger.
    assert corrected <= min(1, count * raw) + 1e-12
  order = np.argsort(values)
  assert (np.diff(np.array(got)[order]) >= 0).all()


def test_holm_by_hand():
  assert comparison.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
  with_nan = comparison.holm([0.02, math.nan, 0.01])
  assert with_nan[::2] == pytest.approx([0.02, 0.02])
  assert math.isnan(with_nan[1])


def test_what_cannot_be_tested_has_no_p_value():
  assert math.isnan(comparison.paired_test([1.0], [2.0]))
  assert comparison.paired_test([1.0, 2.0], [1.0, 2.0]) == 1
  assert math.isnan(comparison.paired_test([1.1, 2.1], [1.0, 2.0])), 'no deviation'
  with pytest.raises(ValueError, match="test 'ttest' is unknown"):
    comparison.paired_test([1.0, 2.0], [2.0, 2.0], 'ttest')


@pytest.mark.parametrize(
  'options, message',
  [
    ({'metrics': ('top_1',)}, "no metric 'top_1': did you mean 'top1'"),
    ({'baseline': {'model.options.module': 'sse'}}, r'no finished run has .*module=sse'),
    ({'baseline': {'model.options.modul': 'None'}}, "did you mean 'model.options.module'"),
    ({'by': ('model.name',)}, 'are the same cell and seed'),
  ],
)
def test_what_is_refused(folder, options, message):
  with pytest.raises(ValueError, match=message):
    _compare(folder, **options)


def test_the_table_as_markdown_and_csv(folder, tmp_path_factory, capsys):
  _run(folder / 'unfinished', 'srm', 0, 10.0, total='200 steps')
  assert collect.main([str(folder), '--baseline', 'module=None', '--metrics', 'top1']) == 0
  out, err = capsys.readouterr()
  assert 'unfinished stands at 100 of 200 steps' in err
  lines = out.splitlines()
  assert lines[0] == '| module | n | top1 | difference | p (Holm) |'
  assert lines[2] == '| None | 4 | 80.50 ± 1.29 | - | - |'
  raw = stats.ttest_rel(SCORES['se'], SCORES[None]).pvalue
  assert lines[4] == f'| se | 4 | 82.25 ± 0.87 | +1.75 | {2 * raw:.3f} |'
  path = tmp_path_factory.mktemp('out') / 'table.csv'
  collect.main([str(folder), '--baseline', 'module=None', f'--out={path}'])
  rows = list(csv.DictReader(io.StringIO(path.read_text())))
  assert [row['metric'] for row in rows] == ['top1', 'macro_auc'] * 3
  assert float(rows[4]['p']) == pytest.approx(raw)
  assert rows[0]['difference'] == ''
  assert collect.main([str(folder), '--by', 'sead']) == 2
  assert "did you mean 'seed'" in capsys.readouterr().err


def test_short_keys_are_unambiguous():
  keys = ['eval.every', 'checkpoint.every', 'seed']
  assert collect.full_key('seed', keys) == 'seed'
  assert collect.full_key('eval.every', keys) == 'eval.every'
  with pytest.raises(ValueError, match=r'any of checkpoint\.every, eval\.every'):
    collect.full_key('every', keys)


def test_costs_are_those_of_the_runs_model(tmp_path):
  config = skin_lesions.get_config('local,module=se')
  with config.unlocked():
    config.data.num_classes, config.data.num_train = 10, 1442
  (tmp_path / runs.CONFIG).write_text(config.to_json_best_effort())
  run = runs.read(tmp_path)
  assert run is not None
  count, multiply_adds = collect.cost(run)
  assert run.flat['model.options.depths'] == (1, 1, 1)
  # One module of two dense layers per block, of 16, 32 and 64 channels, all squeezed to C / 16.
  plain = skin_lesions.get_config('local')
  with plain.unlocked():
    plain.data.num_classes, plain.data.num_train = 10, 1442
  (tmp_path / runs.CONFIG).write_text(plain.to_json_best_effort())
  again = runs.read(tmp_path)
  assert again is not None
  base, base_adds = collect.cost(again)
  assert count - base == sum(2 * c * (c // 16) + c // 16 + c for c in (16, 32, 64))
  assert 0 < multiply_adds - base_adds < 1e-4


def test_curves_are_drawn_over_the_seeds_of_a_cell(tmp_path, capsys):
  for module in ('se', 'eca'):
    for seed in (0, 1):
      _run(tmp_path / f'{module}{seed}', module, seed, 60.0 + seed, ema=True)
  found = runs.find([tmp_path])
  assert runs.curve(found[0], 'top1') == [(100, 61.0)]  # of averages, which began late
  assert runs.curve(found[0], 'train/loss') == [(100, 0.1)]
  assert runs.curve(found[0], 'none') == []
  image = tmp_path / 'curves.png'
  arguments = [str(tmp_path), '--metrics', 'top1', '--plot', str(image)]
  assert collect.main([*arguments, '--curves', 'top1', 'train/loss']) == 0
  assert image.read_bytes()[:4] == b'\x89PNG'
  assert collect.main([*arguments, '--curves', 'lost']) == 2
  assert "no run has 'lost'" in capsys.readouterr().err


def test_what_changes_no_result_divides_no_cell(tmp_path):
  for seed, mode in enumerate(('online', 'offline')):
    _run(tmp_path / mode, 'se', seed, 80.0, wandb={'mode': mode}, mesh={'fsdp': seed + 1})
  assert comparison.varying(runs.find([tmp_path])) == []


def test_config_files_of_others_are_passed_over(folder, caplog):
  (folder / 'weights').mkdir()
  for text in ('{"model_type": "pvt"}', '[]', '{"total": '):
    (folder / 'weights' / runs.CONFIG).write_text(text)
    assert len(runs.find([folder])) == 12
    assert 'is not the config of a run' in caplog.text
    caplog.clear()


def test_a_table_without_metrics_or_a_place_is_refused(folder, tmp_path_factory, capsys):
  for path in folder.glob(f'*/{runs.METRICS}'):
    path.write_text('{"step": 100, "eval/recall/mel": 1.0}')
  assert collect.main([str(folder)]) == 2
  assert 'pass --metrics; all have recall/mel' in capsys.readouterr().err
  nowhere = tmp_path_factory.mktemp('out') / 'tables' / 'a.md'
  assert collect.main([str(folder), '--metrics', 'recall/mel', f'--out={nowhere}']) == 2
  assert f'make {nowhere.parent} first' in capsys.readouterr().err
