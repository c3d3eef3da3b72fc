"""Trains, evaluates or describes a run: `python main.py --config=configs/coatnet0.py`."""

import logging
import os
import pathlib
import sys

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

import train

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file(
  'config', None, 'Config file, with arguments after a colon.', lock_config=True
)
flags.DEFINE_string('workdir', None, 'Folder of the run; runs/<name of the config> by default.')
flags.DEFINE_enum('mode', 'train', ['train', 'eval', 'dry_run'], 'What to do.')
flags.mark_flag_as_required('config')


def _initialize_processes() -> None:
  """Joins the processes of a TPU slice or a cluster; one process alone needs nothing."""
  hosts = os.environ.get('TPU_WORKER_HOSTNAMES', '')
  if ',' in hosts or 'JAX_COORDINATOR_ADDRESS' in os.environ or 'SLURM_JOB_ID' in os.environ:
    jax.distributed.initialize()


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  # Progress has a logger of its own; of the libraries, which use absl's, only warnings are shown.
  absl_logging.set_verbosity(absl_logging.WARNING)
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter('%(asctime)s  %(message)s', '%H:%M:%S'))
  logger = logging.getLogger('vision_attention')
  logger.addHandler(handler)
  logger.setLevel(logging.INFO)
  logger.propagate = False
  _initialize_processes()
  config = FLAGS.config
  if config.compile_cache and 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    jax.config.update('jax_compilation_cache_dir', os.path.expanduser(config.compile_cache))
  name = pathlib.Path(config_flags.get_config_filename(FLAGS['config'])).stem
  workdir = pathlib.Path(FLAGS.workdir or pathlib.Path('runs') / name)
  try:
    if FLAGS.mode == 'dry_run':
      train.dry_run(config)
    elif FLAGS.mode == 'eval':
      train.evaluate_only(config, workdir)
    else:
      train.train_and_evaluate(config, workdir)
  except (ValueError, FileNotFoundError, FloatingPointError) as error:
    # What the user can put right is said in one message; a traceback is for our own mistakes.
    logger.debug('refused', exc_info=True)
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
  app.run(main)
