"""Runs one config with many values: every combination of a grid, with several seeds.

  python tools/sweep.py --config=configs/skin_lesions.py:local --workdir=runs/modules \
    --grid module=none,se,eca variant=resnet_18,resnet_34 --seeds=3 --config.total='10 epochs'

prints a command for each of the 18 runs. `--run` runs them here instead, one after the other, and
`--slurm=modules.sh` writes a script for `sbatch`. What is finished is left out, and what was
interrupted goes on, so that the same line may be given again; when nothing is left, the script is
removed and the exit code is 1.

A key with a dot is a value of the config (`optimizer.learning_rate=1e-3,3e-3`), any other an
argument after the config's colon. The keys of one `--zip` change together. Values with commas
stand in brackets. `--random 20 --range 'optimizer.learning_rate=log(1e-4,1e-2)'` draws 20
different runs; a range is log(low,high), uniform(low,high), integer(low,high) or choice(a,b,...),
and `--draw` the seed of the draw. `--gcloud=<TPU VM>` prints the lines that start each run on all
its workers. Whatever begins with `--config.` goes to every run. `tools/collect.py` makes a table of
the results.
"""

import argparse
import dataclasses
import itertools
import math
import pathlib
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

from vision_attention import folders, runs

COMMAND = 'command.txt'
PREEMPTED = 143  # how main.py leaves after it saved on SIGTERM
_OPENING, _CLOSING = '([{', ')]}'


@dataclasses.dataclass(frozen=True)
class Job:
  """One run: its folder and the command that makes it."""

  workdir: folders.Folder
  command: tuple[str, ...]

  def __str__(self) -> str:
    return shlex.join(self.command)


def parse_axis(text: str) -> tuple[str, tuple[str, ...]]:
  """Reads `key=v1,v2`; commas within brackets or quotes belong to a value.

  Raises:
    ValueError: if it does not read so, or a value stands in it twice.
  """
  key, given, rest = text.partition('=')
  values, depth, quote = [''], 0, ''
  for char in rest:
    if quote:
      quote = '' if char == quote else quote
    elif char in '\'"':
      quote = char
    depth += (char in _OPENING) - (char in _CLOSING)
    if char == ',' and not depth and not quote:
      values.append('')
    else:
      values[-1] += char
  if not key or not given or not all(values) or len(set(values)) < len(values):
    raise ValueError(f'{text!r} does not read like key=value1,value2 with different values')
  return key, tuple(values)


def draw(ranges: Iterable[str], count: int, seed: int) -> list[dict[str, str]]:
  """Returns the values of `count` runs drawn from ranges: the same for the same seed.

  Args:
    ranges: `key=log(1e-4,1e-2)`, or with `uniform`, `integer` (both ends included) or `choice`.
    count: number of runs.
    seed: of the draw; more runs of a seed begin with those of fewer.

  Raises:
    ValueError: for a range that cannot be read, or that has not as many values.
  """
  values_of: dict[str, Callable[[], str]] = {}
  for text in ranges:
    match = re.fullmatch(r'([\w.]+)=(\w+)\((.*)\)', text)
    if match is None or match[2] not in ('log', 'uniform', 'integer', 'choice'):
      raise ValueError(
        f'{text!r} does not read like key=log(1e-4,1e-2), uniform, integer or choice'
      )
    key, kind, inside = match.groups()
    # A generator of the key's own: other ranges beside it change nothing, until a run repeats.
    rng = random.Random(f'{seed} {key}')
    if kind == 'choice':
      values = parse_axis(f'{key}={inside}')[1]
      of = lambda rng=rng, values=values: rng.choice(values)
    else:
      try:
        low, high = map(float, inside.split(','))
      except ValueError:
        raise ValueError(f'{text!r} needs two numbers in its brackets') from None
      if not -math.inf < low < high < math.inf or (kind == 'log' and low <= 0):
        raise ValueError(
          f'{text!r}: the first number must be less{" and above 0" * (kind == "log")}, both finite'
        )
      if kind == 'integer' and not (low.is_integer() and high.is_integer()):
        raise ValueError(f'{text!r}: both numbers must be whole')
      if kind == 'integer':
        of = lambda rng=rng, low=low, high=high: str(rng.randint(int(low), int(high)))
      elif kind == 'log':
        of = lambda rng=rng, low=low, high=high: f'{low * (high / low) ** rng.random():.4g}'
      else:
        of = lambda rng=rng, low=low, high=high: f'{rng.uniform(low, high):.4g}'
    if key in values_of:
      raise ValueError(f'{key} is given twice')
    values_of[key] = of
  drawn: list[dict[str, str]] = []
  for _ in range(1000 * count):
    if len(drawn) == count:
      break
    row = {key: of() for key, of in values_of.items()}
    if row not in drawn:
      drawn.append(row)
  if len(drawn) < count:
    raise ValueError(f'the ranges gave {len(drawn)} different runs, not {count}: draw no more')
  return drawn


def gcloud_line(job: Job, name: str, options: Sequence[str], folder: str) -> str:
  """Returns the line that starts a run on all workers of a TPU VM, from the project in `folder`."""
  inside = f'cd {shlex.quote(folder)} && {job}'
  command = ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', name, *options, '--worker=all']
  return shlex.join([*command, f'--command={inside}'])


def expand(
  grid: Iterable[str],
  zipped: Iterable[Iterable[str]] = (),
  seeds: int = 0,
  drawn: Sequence[dict[str, str]] = (),
) -> list[dict[str, str]]:
  """Returns the values of every run, the seeds running fastest.

  Args:
    grid: axes as text, of which every combination is made.
    zipped: groups of axes of the same length, whose keys change together.
    seeds: number of seeds, from 0; 0 for that of the config.
    drawn: values that change together, of `draw`.

  Raises:
    ValueError: for an axis that cannot be read, zipped axes of different lengths, a key twice, or
      fewer than no seeds.
  """
  if seeds < 0:
    raise ValueError(f'--seeds {seeds} must be at least 1, or 0 for that of the config')
  axes = [[{key: value} for value in values] for key, values in map(parse_axis, grid)]
  keys = [_full(key) for axis in axes for key in axis[0]]
  for group in zipped:
    parsed = [parse_axis(text) for text in group]
    lengths = {len(values) for _, values in parsed}
    if len(lengths) > 1:
      counts = ', '.join(f'{key} has {len(values)}' for key, values in parsed)
      raise ValueError(f'zipped keys must have as many values as each other: {counts}')
    keys += [_full(key) for key, _ in parsed]
    rows = zip(*(values for _, values in parsed), strict=True)
    axes.append([{key: v for (key, _), v in zip(parsed, row, strict=True)} for row in rows])
  if drawn:
    axes.append(list(drawn))
    keys += [_full(key) for key in drawn[0]]
  if seeds:
    axes.append([{'config.seed': str(seed)} for seed in range(seeds)])
    keys.append('config.seed')
  if repeated := sorted({key for key in keys if keys.count(key) > 1}):
    raise ValueError(f'{", ".join(repeated)} is given twice')
  return [
    {key: value for part in parts for key, value in part.items()}
    for parts in itertools.product(*axes)
  ]


def _full(key: str) -> str:
  """The name of a value of the config, whether or not it was written with `config.`."""
  return f'config.{key.removeprefix("config.")}' if '.' in key else key


def folder_name(values: Mapping[str, str]) -> str:
  """Returns `module=se,seed=0`: the last words of the keys, and of values what a path may hold."""
  return ','.join(
    f'{key.rpartition(".")[2]}={re.sub("[^A-Za-z0-9_.+-]+", "_", value)}'
    for key, value in values.items()
  )


def jobs(
  config: str,
  workdir: folders.Folder,
  values: Sequence[Mapping[str, str]],
  overrides: Sequence[str] = (),
  python: str = 'python',
) -> list[Job]:
  """Returns the runs, each in a folder of its own.

  Raises:
    ValueError: if two of them would get the same folder.
  """
  made = []
  for mine in values:
    arguments = [f'{key}={value}' for key, value in mine.items() if '.' not in key]
    if commas := [a for a in arguments if ',' in a]:
      raise ValueError(f'an argument of a config has no commas: {commas[0]}; name a value of it')
    path, colon, given = config.partition(':')
    text = ','.join([given] * bool(given) + arguments)
    folder = workdir / folder_name(mine) if mine else workdir
    command = [python, 'main.py', f'--config={path}{":" if text else colon}{text}', *overrides]
    command += [f'--{_full(key)}={value}' for key, value in mine.items() if '.' in key]
    made.append(Job(folder, (*command, f'--workdir={folder}')))
  places = [job.workdir for job in made]
  if len(set(places)) < len(made):
    twice = next(place for place in places if places.count(place) > 1)
    raise ValueError(f'two runs would lie in {twice}: give them keys of different names')
  return made


def is_done(job: Job) -> bool:
  """Whether the run is finished, of this very command if the folder says which it was.

  Raises:
    ValueError: if another command made what is there.
  """
  found = runs.read(job.workdir)
  if found is None or not found.finished:
    return False  # main.py itself refuses to go on with another config
  path = job.workdir / COMMAND
  if path.exists() and shlex.split(path.read_text())[1:] != list(job.command[1:]):
    raise ValueError(
      f'{job.workdir} holds the run of another command ({path.read_text().strip()}): pass another '
      '--workdir, or the same values'
    )
  return True


def run(todo: Sequence[Job], call: Callable[[Job], int]) -> list[Job]:
  """Runs one after the other, going on where one fails; returns those that failed."""
  failed = []
  for i, job in enumerate(todo):
    print(f'[{i + 1}/{len(todo)}] {job.workdir.name}', flush=True)
    job.workdir.mkdir(parents=True, exist_ok=True)
    (job.workdir / COMMAND).write_text(f'{job}\n')
    code = call(job)
    if code:
      failed.append(job)
      print(f'  failed ({code}): {job.workdir / "log.txt"}', flush=True)
  return failed


def _call(job: Job) -> int:
  with (job.workdir / 'log.txt').open('a') as log:
    return subprocess.run(job.command, stdout=log, stderr=subprocess.STDOUT).returncode


def slurm_script(todo: Sequence[Job], workdir: folders.Folder) -> str:
  """Returns a job array for `sbatch`, a run per task.

  Slurm's SIGTERM, two minutes before the end of the allotted time, reaches the run, which saves and
  leaves with 143; the task then queues again by itself, as after a preemption, and goes on.
  """
  lines = '\n'.join(f'  {shlex.quote(str(job))}' for job in todo)
  return f"""#!/bin/bash
#SBATCH --job-name={re.sub('[^A-Za-z0-9_.-]', '_', workdir.name) or 'sweep'}
#SBATCH --array=0-{len(todo) - 1}
#SBATCH --output={shlex.quote(f'{workdir}/slurm-%A_%a.txt')}
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
cd {shlex.quote(str(pathlib.Path.cwd()))} || exit 1
commands=(
{lines}
)
bash -c "exec ${{commands[$SLURM_ARRAY_TASK_ID]}}" &
run=$!
trap 'kill -TERM "$run"' TERM
while true; do
  wait "$run"
  code=$?
  # A signal ends the waiting, not the run.
  kill -0 "$run" 2>/dev/null || break
done
if [ "$code" -eq {PREEMPTED} ]; then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit "$code"
"""


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument('--config', required=True, help='as main.py takes it')
  parser.add_argument(
    '--workdir', required=True, help='folder of all runs, for --gcloud also gs://...'
  )
  parser.add_argument('--grid', nargs='+', action='extend', default=[], metavar='KEY=V1,V2')
  parser.add_argument('--zip', nargs='+', action='append', default=[], metavar='KEY=V1,V2')
  parser.add_argument('--seeds', type=int, default=0, help='number of seeds, from 0')
  parser.add_argument('--random', type=int, default=0, metavar='N', help='draw N runs')
  parser.add_argument('--range', nargs='+', action='extend', default=[], metavar='KEY=log(A,B)')
  parser.add_argument('--draw', type=int, default=0, help='seed of the draw')
  parser.add_argument('--gcloud', metavar='NAME', help='print lines for a TPU VM')
  parser.add_argument('--zone', help='of the TPU VM')
  parser.add_argument('--project', help='of the TPU VM')
  parser.add_argument('--folder', default='vision_attention', help='of the project, there')
  parser.add_argument('--run', action='store_true', help='run them here')
  parser.add_argument('--slurm', type=pathlib.Path, help='write a script for sbatch')
  args, rest = parser.parse_known_args(argv)
  if unknown := [text for text in rest if not re.match(r'--config\.[\w.]+=', text)]:
    parser.error(f'unknown arguments {unknown}: values of the config read --config.key=value')
  if bool(args.random) != bool(args.range) or args.random < 0:
    parser.error('--random N and --range KEY=... go together')
  try:
    drawn = draw(args.range, args.random, args.draw)
    values = expand(args.grid, args.zip, args.seeds, drawn)
    workdir = folders.folder(args.workdir)
    if folders.is_bucket(workdir) and (args.run or args.slurm):
      raise ValueError(
        f'--workdir {args.workdir} lies in a bucket, which takes no logs: mount it and name the '
        'folder there'
      )
    if args.run or args.slurm:
      python = sys.executable
    else:
      # On a TPU VM as scripts/run_tpu.sh installs it.
      python = '.venv/bin/python' if args.gcloud else 'python'
    found = jobs(args.config, workdir, values, rest, python)
    todo = [job for job in found if not is_done(job)]
  except ValueError as error:
    print(error, file=sys.stderr)
    return 2
  print(f'# {len(found)} runs, {len(found) - len(todo)} of them finished')
  if args.slurm and todo:
    folders.make(workdir)
    args.slurm.parent.mkdir(parents=True, exist_ok=True)
    args.slurm.write_text(slurm_script(todo, workdir))
    print(f'sbatch {args.slurm}')
  elif args.slurm:
    # An old script would run again what is finished.
    args.slurm.unlink(missing_ok=True)
    print('nothing is left to run', file=sys.stderr)
    return 1
  elif args.run:
    failed = run(todo, _call)
    for job in failed:
      print(f'failed: {job}', file=sys.stderr)
    return 1 if failed else 0
  elif args.gcloud:
    options = [f'--{k}={v}' for k in ('zone', 'project') if (v := getattr(args, k))]
    for job in todo:
      print(gcloud_line(job, args.gcloud, options, args.folder))
  else:
    print('\n'.join(map(str, todo)))
  return 0


if __name__ == '__main__':
  sys.exit(main())
