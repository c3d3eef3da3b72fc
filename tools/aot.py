"""Compiles a config's training step for TPUs that need not be there, and prints what it holds.

  python tools/aot.py --config=configs/cvt_13.py --batch_per_device=128 --options="{'remat': True}"
  python tools/aot.py --config=configs/coatnet0.py:local --topology=v5e:2x2
  python tools/aot.py --config=configs/coatnet0.py:local --batch_per_device=8192 --fit

Overrides of the config are those of main.py; options of the model, which a config need not list,
are given by `--options`. Topologies: v2:2x2, v3:2x2, v4:2x2x1 ... v4:8x8x8, v5e:2x2, v5p:2x2x1,
v6e:2x2, ... . `--fit` doubles the images per device until they no longer fit, first as the config
says, then with remat, then with the state split over all chips. Memory is what the compiler plans;
of speed, a program that does not run says nothing. Needs libtpu (pip install libtpu), Linux.
"""

import ast
import logging
import pathlib
import sys

from absl import app, flags
from ml_collections import config_flags

from vision_attention import aot, errors

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file('config', None, 'Config file, with arguments after a colon.')
flags.DEFINE_string('topology', 'v4:2x2x1', 'Chip and shape.')
flags.DEFINE_integer('batch_per_device', 0, "Images per device; 0 for the config's batch.")
flags.DEFINE_string('options', '', 'Options of the model, as a Python dict.')
flags.DEFINE_integer('tensor', 0, "Devices that share heads and widths; 0 for the config's.")
flags.DEFINE_bool('fit', False, 'Search the largest batch per device.')
flags.DEFINE_bool('row', False, 'Print one row of a Markdown table.')
flags.mark_flag_as_required('config')
_GIB = 2**30


def _print(name: str, report: aot.Report) -> None:
  gib = lambda size: f'{size / _GIB:.2f} GiB'
  if FLAGS.row:
    print(
      f'| {name} | {report.batch} x {report.devices} | {gib(report.arguments)} | '
      f'{gib(report.temporaries)} | {gib(report.total)} | {report.macs / 1e9:.2f} G | '
      f'{report.seconds:.0f} s |'
    )
    return
  print(f'model         {name}, {report.macs / 1e9:.3f} G multiply-adds per image, forward')
  print(f'batch         {report.batch} images on each of {report.devices} devices')
  print(f'arguments     {gib(report.arguments)} (state and batch)')
  print(f'temporaries   {gib(report.temporaries)}')
  print(f'outputs       {gib(report.outputs)}, {gib(report.aliased)} of them in place')
  limit = aot.HBM[FLAGS.topology.partition(':')[0]]
  print(f'together      {gib(report.total)} of {limit:.2f} GiB')
  for kind, (count, size) in sorted(report.collectives.items()):
    print(f'{kind:<19} {count} in the program, {size / 2**20:.1f} MiB')
  print(f'compilation   {report.seconds:.0f} s on this machine')


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  config = FLAGS.config
  if FLAGS.options:
    with config.unlocked():
      config.model.options.update(ast.literal_eval(FLAGS.options))
  if FLAGS.tensor:
    config.mesh.tensor = FLAGS.tensor
  try:
    if FLAGS.fit:
      logging.basicConfig(level=logging.INFO, format='%(message)s')
      way, report = aot.largest(config, FLAGS.topology, FLAGS.batch_per_device or 16)
      print(f'most images   fit {way}')
    else:
      report = aot.compile_step(config, FLAGS.topology, FLAGS.batch_per_device or None)
  except (ValueError, ModuleNotFoundError) as error:
    errors.refuse(str(error))
  _print(config.model.name, report)


if __name__ == '__main__':
  sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # configs import each other
  app.run(main)
