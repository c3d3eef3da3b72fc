"""Trains, evaluates or describes a run: `python main.py --config=configs/coatnet0.py`."""

import logging
import os
import pathlib

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

import train
from vision_attention import errors, evaluation, folders
from vision_attention.training import sharding

FLAGS = flags.FLAGS
CONFIGS = [str(path) for path in pathlib.Path('configs').glob('*.py')]
config_flags.DEFINE_config_file(
  'config', None, 'Config file, with arguments after a colon.', lock_config=True
)
flags.DEFINE_string(
  'workdir', None, 'Folder of the run, also gs://...; runs/<config>-<its arguments> by default.'
)
flags.DEFINE_enum('mode', 'train', ['train', 'eval', 'dry_run'], 'What to do.')
flags.mark_flag_as_required('config')


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line; of a mistake in it, the config files' own message is shown."""
  try:
    rest = FLAGS(argv)
  except flags.Error as error:
    errors.refuse(str(error).strip().splitlines()[-1].removeprefix('ValueError: '))
  except (AttributeError, KeyError) as error:
    # An unknown key of the config: what was meant stands in the last line of the first cause.
    cause = error.args[0] if error.args else error
    errors.refuse(f'unknown config key: {str(getattr(cause, "args", [cause])[0]).splitlines()[-1]}')
  path = pathlib.Path(config_flags.get_config_filename(FLAGS['config']).partition(':')[0])
  if not path.is_file():
    errors.refuse(f'there is no config file {path}: {errors.nearest(str(path), CONFIGS)}')
  return rest


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  # Progress has a logger of its own; of the libraries, which use absl's, only warnings are shown.
  absl_logging.set_verbosity(absl_logging.WARNING)
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter('%(asctime)s  %(message)s', '%H:%M:%S'))
  logger = logging.getLogger('vision_attention')
  logger.addHandler(handler)
  logger.setLevel(logging.DEBUG if FLAGS.verbosity > 0 else logging.INFO)
  logger.propagate = False
  config = FLAGS.config
  mesh = config.mesh
  errors.run(lambda: sharding.join_processes(mesh.join_seconds, mesh.heartbeat_seconds))
  if config.compile_cache and 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    jax.config.update('jax_compilation_cache_dir', os.path.expanduser(config.compile_cache))
  where = FLAGS.workdir or folders.of_config(config_flags.get_config_filename(FLAGS['config']))
  if FLAGS.mode == 'dry_run':
    errors.run(lambda: train.dry_run(config))
  elif FLAGS.mode == 'eval':
    errors.run(lambda: evaluation.evaluate_only(config, folders.folder(where)))
  else:
    job = lambda: train.train_and_evaluate(config, folders.folder(where))
    errors.run(lambda: sharding.end_if_others_are_lost(job))


if __name__ == '__main__':
  app.run(main, flags_parser=_parse_flags)
