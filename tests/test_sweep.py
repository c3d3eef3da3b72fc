"""Sweeps: which runs a line means, where they lie, which of them are finished."""

import json
import pathlib
import shlex
import subprocess
import sys
import time

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vision_attention as va
from configs import skin_lesions
from tools import sweep
from vision_attention import convert, planning, runs
from vision_attention.models import transfer, tree

pytestmark = pytest.mark.fast
CONFIG = 'configs/skin_lesions.py:local'


def _write_run(folder: pathlib.Path, step: int, total: int = 90, **metrics: float) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  config = {'total': '1 epochs', 'batch_size': 10, 'data': {'num_train': 10 * total}, 'seed': 0}
  (folder / runs.CONFIG).write_text(json.dumps(config))
  rows = [{'step': 1, 'train/loss': 2.0}, {'step': step, 'eval/top1': 50.0, **metrics}]
  (folder / runs.METRICS).write_text('\n'.join(map(json.dumps, rows)) + '\n{"step": 9')


def test_a_grid_has_every_combination_with_seeds_running_fastest():
  got = sweep.expand(['module=none,se', 'variant=resnet_18,resnet_34'], seeds=2)
  assert len(got) == 8
  assert got[0] == {'module': 'none', 'variant': 'resnet_18', 'config.seed': '0'}
  assert [v['config.seed'] for v in got] == ['0', '1'] * 4
  assert [v['module'] for v in got] == ['none'] * 4 + ['se'] * 4
  assert sweep.expand([]) == [{}]


def test_zipped_keys_change_together():
  got = sweep.expand(['seed=0,1'], [['lr=1e-3,3e-3', 'wd=0.1,0.2']])
  assert len(got) == 4
  assert {(v['lr'], v['wd']) for v in got} == {('1e-3', '0.1'), ('3e-3', '0.2')}
  assert len(sweep.expand([], [['a=1,2'], ['b=1,2,3']])) == 6


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 3))
def test_no_two_runs_are_alike(lengths, seeds):
  grid = [f'k{i}=' + ','.join(map(str, range(n))) for i, n in enumerate(lengths)]
  values = sweep.expand(grid, seeds=seeds)
  expected = seeds
  for n in lengths:
    expected *= n
  found = sweep.jobs(CONFIG, pathlib.Path('runs/x'), values)
  assert len({job.workdir for job in found}) == len({job.command for job in found}) == expected


def test_commas_within_brackets_belong_to_a_value():
  key, values = sweep.parse_axis('model.options.depths=(1, 2),(2, 2)')
  assert (key, values) == ('model.options.depths', ('(1, 2)', '(2, 2)'))
  assert sweep.parse_axis("data.train_ops=('a(1, b=2)','c'),()")[1] == ("('a(1, b=2)','c')", '()')


@pytest.mark.parametrize(
  'grid, zipped, message',
  [
    (['module'], [], "'module' does not read like key=value1,value2"),
    (['module='], [], 'does not read like'),
    (['module=se,se'], [], 'with different values'),
    (['a=1,2', 'a=3'], [], 'a is given twice'),
    (['optimizer.b1=1', 'config.optimizer.b1=2'], [], 'config.optimizer.b1 is given twice'),
    ([], [['a=1,2', 'b=1,2,3']], 'a has 2, b has 3'),
    ([], [['a=1,2', 'a=3,4']], 'a is given twice'),
  ],
)
def test_what_cannot_be_meant_is_refused(grid, zipped, message):
  with pytest.raises(ValueError, match=message):
    sweep.expand(grid, zipped)


def test_commands_are_those_of_the_trainer():
  values = sweep.expand(['module=se', 'optimizer.learning_rate=1e-3'], seeds=1)
  (job,) = sweep.jobs(CONFIG, pathlib.Path('runs/x'), values, ['--config.total=3 steps'])
  assert shlex.split(str(job)) == [
    'python',
    'main.py',
    '--config=configs/skin_lesions.py:local,module=se',
    '--config.total=3 steps',
    '--config.optimizer.learning_rate=1e-3',
    '--config.seed=0',
    '--workdir=runs/x/module=se,learning_rate=1e-3,seed=0',
  ]
  (plain,) = sweep.jobs('configs/vit_s16.py', pathlib.Path('runs/x'), [{}])
  assert plain.command[2:] == ('--config=configs/vit_s16.py', '--workdir=runs/x')
  (first,) = sweep.jobs('configs/vit_s16.py', pathlib.Path('runs/x'), [{'epochs': '3'}])
  assert first.command[2] == '--config=configs/vit_s16.py:epochs=3'
  with pytest.raises(ValueError, match='two runs would lie in'):
    sweep.jobs(CONFIG, pathlib.Path('x'), [{'a.b': '/1'}, {'a.b': '_1'}])
  with pytest.raises(ValueError, match='has no commas'):
    sweep.jobs(CONFIG, pathlib.Path('x'), [{'a': '(1, 2)'}])


@pytest.mark.parametrize('step, done', [(90, True), (80, False)])
def test_a_run_is_finished_at_its_last_step(tmp_path, step, done):
  (job,) = sweep.jobs(CONFIG, tmp_path, [{'module': 'se'}])
  assert not sweep.is_done(job)
  _write_run(job.workdir, step)
  assert sweep.is_done(job) is done
  (job.workdir / sweep.COMMAND).write_text(f'{job}\n')
  assert sweep.is_done(job) is done


def test_a_folder_of_another_command_is_not_taken_for_done(tmp_path):
  (job,) = sweep.jobs(CONFIG, tmp_path, [{'module': 'se'}], ['--config.total=3 steps'])
  (other,) = sweep.jobs(CONFIG, tmp_path, [{'module': 'se'}])
  _write_run(job.workdir, 90)
  (job.workdir / sweep.COMMAND).write_text(f'{job}\n')
  with pytest.raises(ValueError, match='holds the run of another command'):
    sweep.is_done(other)


def test_runs_go_on_where_one_fails_and_finished_ones_are_left_out(tmp_path):
  values = sweep.expand(['module=none,se,eca'])
  found = sweep.jobs(CONFIG, tmp_path, values)
  called = []

  def call(job):
    called.append(job.workdir.name)
    if job.workdir.name == 'module=se':
      return 2
    _write_run(job.workdir, 90)
    return 0

  assert sweep.run(found, call) == [found[1]]
  assert called == ['module=none', 'module=se', 'module=eca']
  assert [job for job in found if not sweep.is_done(job)] == [found[1]]


def test_the_command_line(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  line = [f'--config={CONFIG}', '--workdir=runs', '--grid', 'module=none,se', '--seeds=2']
  assert sweep.main([*line, '--config.total=3 steps']) == 0
  printed = capsys.readouterr().out.splitlines()
  assert printed[0] == '# 4 runs, 0 of them finished'
  assert len(printed) == 5
  assert "'--config.total=3 steps'" in printed[1]
  _write_run(tmp_path / 'runs/module=none,seed=1', 90)
  sweep.main(line)
  printed = capsys.readouterr().out.splitlines()
  assert printed[0] == '# 4 runs, 1 of them finished'
  assert not [text for text in printed if 'module=none,seed=1' in text]
  with pytest.raises(SystemExit):
    sweep.main([*line, '--seds=3'])
  assert "unknown arguments ['--seds=3']" in capsys.readouterr().err
  assert sweep.main([*line, '--grid', 'module=eca']) == 2
  assert 'module is given twice' in capsys.readouterr().err


def test_a_slurm_script_runs_the_task_of_its_number(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'main.py').write_text('import sys; print(sys.argv[1:])')
  values = sweep.expand(['module=none,se'])
  overrides = ['--config.total=3 steps', "--config.model.options.stem='small'"]
  found = sweep.jobs(CONFIG, pathlib.Path('runs'), values, overrides, sys.executable)
  (tmp_path / 'job.sh').write_text(sweep.slurm_script(found, pathlib.Path('runs')))
  assert '#SBATCH --array=0-1\n' in (tmp_path / 'job.sh').read_text()
  done = subprocess.run(
    ['bash', 'job.sh'], capture_output=True, text=True, check=True, env={'SLURM_ARRAY_TASK_ID': '1'}
  )
  assert done.stdout.strip() == str(list(found[1].command[2:]))


def test_a_task_that_is_told_to_stop_saves_and_queues_again(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  # A run that takes its time to save, and leaves as main.py does.
  (tmp_path / 'main.py').write_text(
    'import os, signal, time\n'
    'def save(*_):\n'
    '  time.sleep(0.2)\n'
    "  open('saved', 'w').close()\n"
    '  os._exit(143)\n'
    'signal.signal(signal.SIGTERM, save)\n'
    "open('began', 'w').close()\n"
    'time.sleep(60)\n'
  )
  (tmp_path / 'scontrol').write_text('#!/bin/bash\necho "$@" > asked\n')
  (tmp_path / 'scontrol').chmod(0o755)
  found = sweep.jobs(CONFIG, pathlib.Path('runs'), [{'module': 'se'}], (), sys.executable)
  (tmp_path / 'job.sh').write_text(sweep.slurm_script(found, pathlib.Path('runs')))
  env = {'SLURM_ARRAY_TASK_ID': '0', 'SLURM_ARRAY_JOB_ID': '7', 'PATH': f'{tmp_path}:/usr/bin:/bin'}
  task = subprocess.Popen(['bash', 'job.sh'], env=env)
  end = time.monotonic() + 30
  while not (tmp_path / 'began').exists() and time.monotonic() < end:
    time.sleep(0.02)
  task.terminate()
  assert task.wait(30) == sweep.PREEMPTED
  assert (tmp_path / 'saved').exists()
  assert (tmp_path / 'asked').read_text() == 'requeue 7_0\n'


# -- What is swept.


def test_the_protocol_for_skin_lesions():
  """The crossed folds, the two regimes, and what the loss and the best checkpoint go by."""
  config = skin_lesions.get_config('module=cbam,variant=resnet_50,fold=2,seed=4')
  assert config.data.name == 'ham10000'
  assert config.data.eval_split == 'fold2'
  assert config.data.train_split == 'fold0+fold1+fold3+fold4'
  assert (config.seed, config.model.options.module) == (4, 'cbam')
  assert config.loss.class_weights == 'inverse'
  assert (config.eval.per_class, config.eval.best_by) == (True, 'balanced_accuracy')
  assert (config.batch_size, config.total, config.optimizer.name) == (64, '60 epochs', 'sgd')
  tuned = skin_lesions.get_config('init=r50.pth,source=torchvision')
  assert (tuned.optimizer.name, tuned.optimizer.learning_rate) == ('adamw', 1e-4)
  assert tuned.model.options.module is None
  holdout = skin_lesions.get_config('fold=-1')
  assert holdout.data.name == 'ham10000_holdout'
  assert (holdout.data.train_split, holdout.data.eval_split) == ('train', 'test')
  for arg in ('fold=5', 'fold=-2'):
    with pytest.raises(ValueError, match='must be 0 to 4'):
      skin_lesions.get_config(arg)
  with pytest.raises(ValueError, match='go with ham10000'):
    skin_lesions.get_config('local,fold=1')


@pytest.mark.parametrize('module, count', [('none', 11_180_103), ('se', 11_269_183)])
def test_seven_classes_have_the_parameters_as_counted(module, count):
  """A thousand classes less 993 of 512 inputs and a bias."""
  plan = planning.prepare(skin_lesions.get_config(f'module={module}'), with_data=False)
  assert sum(x.size for x in jax.tree.leaves(plan.shapes[0].params)) == count
  assert plan.total == round(60 * 8012 / 64)


@pytest.mark.parametrize('module', ['cbam', 'bam', 'nl', 'dual_attention', 'halo', 'sk'])
def test_weights_of_the_plain_network_start_one_with_a_module(module):
  """Everything that both have is loaded; only what the module replaces is left over."""
  options = {'depths': (1, 1, 1, 1), 'width': 16, 'image_size': 64}
  shapes = []
  for name, classes in ((None, 1000), (module, 7)):
    model, info = va.create_model('resnet_18', num_classes=classes, module=name, **options)
    shapes.append(convert.abstract_variables(model, info))
  fresh = skin_lesions.get_config('init=r18.pth,source=torchvision').init.fresh
  _, report = transfer.transfer('resnet_18', *shapes, fresh_paths=fresh)
  plain, mine = (set(tree.flatten(variables)) for variables in shapes)
  backbone = {path for path in plain & mine if '/backbone/' in path}
  assert set(report.loaded) == backbone
  assert len(backbone) >= 40
  assert set(report.dropped) == plain - mine
  assert bool(report.dropped) == (module in ('halo', 'sk'))


def test_random_search_draws_within_its_ranges_and_the_same_again():
  ranges = ['a.lr=log(1e-4,1e-2)', 'a.wd=uniform(0,0.3)', 'depth=integer(1,3)', 'm=choice(se,eca)']
  drawn = sweep.draw(ranges, 400, seed=1)
  assert drawn == sweep.draw(ranges, 400, seed=1)
  assert drawn[:7] == sweep.draw(ranges, 7, seed=1)
  alone = sweep.draw(ranges[:1], 50, seed=1)
  assert [v['a.lr'] for v in drawn[:50]] == [v['a.lr'] for v in alone]
  assert drawn != sweep.draw(ranges, 400, seed=2)
  rates = sorted(float(v['a.lr']) for v in drawn)
  assert 1e-4 <= rates[0] < 2e-4
  assert 5e-3 < rates[-1] <= 1e-2
  assert 7e-4 < rates[200] < 1.4e-3  # the middle of the exponents
  assert 0.12 < sorted(float(v['a.wd']) for v in drawn)[200] < 0.18
  assert {v['depth'] for v in drawn} == {'1', '2', '3'}
  assert {v['m'] for v in drawn} == {'se', 'eca'}
  found = sweep.expand(['n=1,2'], seeds=3, drawn=drawn[:5])
  assert len(found) == 2 * 5 * 3


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('lr=log(0,1)', 'above 0'),
    ('lr=uniform(2,1)', 'must be less'),
    ('lr=log(1e-4,inf)', 'both finite'),
    ('depth=integer(0.5,0.9)', 'must be whole'),
    ('m=choice(se,eca)', 'gave 2 different runs, not 3'),
    ('lr=normal(0,1)', 'does not read like'),
    ('lr=log(1)', 'two numbers'),
  ],
)
def test_ranges_that_cannot_be_drawn_from_are_refused(text, message):
  with pytest.raises(ValueError, match=message):
    sweep.draw([text], 3, seed=0)


def test_every_value_of_a_small_range_is_drawn_once():
  drawn = sweep.draw(['a.m=choice(se,eca,cbam)', 'b=integer(0,1)'], 6, seed=0)
  assert len({tuple(row.items()) for row in drawn}) == 6


def test_a_script_of_nothing_is_not_left_to_be_sent_again(monkeypatch, tmp_path, capsys):
  script = tmp_path / 'scripts' / 'a.sh'
  arguments = ['--config=c.py', f'--workdir={tmp_path / "my sweep"}', f'--slurm={script}']
  assert sweep.main(arguments) == 0
  assert f"#SBATCH --output='{tmp_path}/my sweep/slurm-%A_%a.txt'" in script.read_text()
  monkeypatch.setattr(sweep, 'is_done', lambda job: True)
  assert sweep.main(arguments) == 1
  assert not script.exists()
  assert 'nothing is left to run' in capsys.readouterr().err
  assert sweep.main([*arguments, '--seeds=-1']) == 2
  assert '--seeds -1 must be at least 1' in capsys.readouterr().err


def test_lines_for_a_tpu_vm_run_the_job_there(capsys):
  arguments = ['--config', CONFIG, '--workdir', '/mnt/b/x', '--grid', 'a.b=(1, 2),(3, 4)']
  assert sweep.main([*arguments, '--gcloud=pod', '--zone=us-central2-b', '--project=lab']) == 0
  lines = capsys.readouterr().out.splitlines()[1:]
  assert len(lines) == 2
  words = shlex.split(lines[1])
  assert words[:6] == ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', 'pod']
  assert words[6:9] == ['--zone=us-central2-b', '--project=lab', '--worker=all']
  inside = words[9].removeprefix('--command=').removeprefix('cd vision_attention && ')
  assert shlex.split(inside)[:2] == ['.venv/bin/python', 'main.py']
  assert '--config.a.b=(3, 4)' in shlex.split(inside)
