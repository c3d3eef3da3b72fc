"""The script for TPU slices, with a stand-in for gcloud that says what it was asked."""

import os
import pathlib
import shlex
import subprocess

import pytest

from tests import launcher

pytestmark = pytest.mark.fast
SCRIPT = pathlib.Path(__file__).parents[1] / 'scripts' / 'run_tpu.sh'
WHERE = ('--name=pod', '--zone=us-central2-b', '--project=lab', '--type=v4-128')
RUN = ('--', '--config=configs/coatnet0.py', '--workdir=/mnt/b/run 1')
# Answers `describe` from a file of states and `ssh ... main.py` from a file of exit codes.
GCLOUD = """#!/bin/bash
echo "$(printf '%q ' "$@")" >> "$HERE/calls"
take() { head -1 "$HERE/$1"; sed -i 1d "$HERE/$1"; }
case "$*" in
  *describe*) take states ;;
  *main.py*) exit "$(take codes)" ;;
esac
"""


def _script(tmp_path, *arguments, states=(), codes=()):
  for name, values in (('states', states), ('codes', codes)):
    (tmp_path / name).write_text(''.join(f'{value}\n' for value in values))
  fake = tmp_path / 'gcloud'
  fake.write_text(GCLOUD)
  fake.chmod(0o755)
  done = subprocess.run(
    ['bash', str(SCRIPT), *arguments],
    capture_output=True,
    text=True,
    timeout=launcher.PATIENCE,
    env=os.environ
    | {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'HERE': str(tmp_path), 'RETRY_SECONDS': '0'},
  )
  calls = (tmp_path / 'calls').read_text().splitlines() if (tmp_path / 'calls').exists() else []
  return done, [shlex.split(call) for call in calls]


def _kinds(calls):
  return ['main' if 'main.py' in call[-1] else call[3] for call in calls]


def test_help_is_what_stands_at_the_top(tmp_path):
  done, calls = _script(tmp_path, '--help')
  assert done.returncode == 0
  assert done.stdout.startswith('Trains on a Cloud TPU slice')
  assert '--name=pod' in done.stdout
  assert 'set -euo' not in done.stdout
  assert not calls


def test_a_preempted_slice_is_made_anew_and_the_run_goes_on(tmp_path):
  done, calls = _script(
    tmp_path,
    *WHERE,
    '--repository=https://example.org/va.git',
    '--spot',
    *RUN,
    states=('READY', 'PREEMPTED'),
    codes=(143, 0),
  )
  assert done.returncode == 0, done.stderr
  assert _kinds(calls) == [
    *('describe', 'ssh', 'main'),
    *('describe', 'delete', 'create', 'ssh', 'main', 'delete'),
  ]
  assert all(call[4:7] == ['pod', '--zone=us-central2-b', '--project=lab'] for call in calls)
  create = next(call for call in calls if call[3] == 'create')
  assert {'--accelerator-type=v4-128', '--spot'} <= set(create)
  inside = calls[-2][-1].removeprefix('--command=')
  assert shlex.split(inside)[-2:] == ['--config=configs/coatnet0.py', '--workdir=/mnt/b/run 1']
  assert all('--worker=all' in call for call in calls if call[3] == 'ssh')
  assert 'try 1 of 100 ended with 143' in done.stderr


def test_what_main_refuses_is_not_tried_again(tmp_path):
  done, calls = _script(
    tmp_path, *WHERE, '--repository=x', *RUN, states=('READY',) * 3, codes=(2, 0)
  )
  assert done.returncode == 2
  assert 'refused' in done.stderr
  assert _kinds(calls).count('main') == 1
  done, _ = _script(
    tmp_path, *WHERE, '--repository=x', '--tries=2', *RUN, states=('READY',) * 3, codes=(1, 1)
  )
  assert done.returncode == 2
  assert 'gave up after 2 tries' in done.stderr


def test_a_dry_run_prints_and_calls_nothing(tmp_path):
  done, calls = _script(
    tmp_path, *WHERE, '--repository=x', '--dry_run', '--keep', '--bucket=b', *RUN
  )
  assert done.returncode == 0, done.stderr
  assert calls == []
  assert 'warning' not in done.stderr
  lines = [shlex.split(line) for line in done.stdout.splitlines()]
  assert _kinds([line[1:] for line in lines if len(line) > 4]) == [
    *('delete', 'create', 'ssh', 'ssh', 'main')
  ]
  assert 'gcsfuse --implicit-dirs b /mnt/b' in lines[3][-1]
  assert "install --quiet -e '.[gcs]'" in lines[2][-1]
  for workdir, warned in (('gs://b/run', False), ('runs/one', True)):
    run = ('--', '--config=x', f'--workdir={workdir}')
    done, _ = _script(tmp_path, *WHERE, '--repository=x', '--dry_run', *run)
    assert ('warning: no --workdir=gs://' in done.stderr) is warned


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((*WHERE[1:], *RUN), '--name is missing'),
    ((*WHERE, '--repository=x'), 'nothing for main.py'),
    ((*WHERE, '--tpu', *RUN), 'unknown argument --tpu'),
    ((*WHERE, '--repository=x', '--tries=many', *RUN), 'no number of tries'),
  ],
)
def test_mistakes_are_refused_before_anything_is_made(tmp_path, arguments, message):
  done, calls = _script(tmp_path, *arguments)
  assert (done.returncode, calls) == (2, [])
  assert message in done.stderr
