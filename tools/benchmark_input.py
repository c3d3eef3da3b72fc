"""Times the input pipeline on this machine: images per second of a config's training operations.

  python tools/benchmark_input.py --config=configs/coatnet0.py
  python tools/benchmark_input.py --config=configs/vit_b16.py:augment=medium2 --images=256

Reads synthetic photographs (crops of scikit-learn's two sample pictures, enlarged, with noise, as
JPEGs of 500x375 pixels at quality 90) through the whole chain: record, decode, augment, batch.
Images per second of one core are counted in the seconds of the processor, so that other load does
not matter.
"""

import io
import os
import pathlib
import sys
import tempfile
import time

import numpy as np
from absl import app, flags
from ml_collections import config_flags
from PIL import Image

from vision_attention.data import builders, pipeline

sys.path.append(str(pathlib.Path(__file__).parents[1]))  # configs are no part of the package
FLAGS = flags.FLAGS
BATCH = 64
config_flags.DEFINE_config_file(
  'config', 'configs/coatnet0.py', 'Config file whose train_ops are timed, with its arguments.'
)
flags.DEFINE_integer('images', 1024, f'Images to read, in batches of {BATCH}.', lower_bound=BATCH)
flags.DEFINE_integer('threads', 2, 'Reading threads.')
flags.DEFINE_integer('workers', 0, 'Reading processes.')


def photographs(count: int) -> list[tuple[bytes, int]]:
  """Returns `count` JPEGs of 500x375 pixels."""
  from sklearn import datasets

  rng = np.random.default_rng(0)
  pictures = [Image.fromarray(p) for p in datasets.load_sample_images().images]
  examples = []
  for i in range(count):
    picture = pictures[i % len(pictures)]
    w, h = picture.size
    x, y = (int(v) for v in (rng.integers(w // 3), rng.integers(h // 3)))
    crop = np.asarray(picture.crop((x, y, x + 2 * w // 3, y + 2 * h // 3)).resize((500, 375)))
    noisy = np.clip(crop + rng.normal(0, 6, crop.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, 'JPEG', quality=90)
    examples.append((buffer.getvalue(), i % 2))
  return examples


def _processor_seconds() -> float:
  times = os.times()
  return times.user + times.system


def main(argv: list[str]) -> None:
  del argv
  config = FLAGS.config
  size = str(config.image_size)
  with tempfile.TemporaryDirectory() as folder:
    examples = photographs(200)
    raw = builders.Raw({'train': examples}, ['a', 'b'], (None, None, 3), 'Synthetic photographs.')
    builders.write('photographs', raw, pathlib.Path(folder))
    config.data.name, config.data.data_dir, config.data.train_split = 'photographs', folder, 'train'
    config.data.train_ops = tuple(op.replace('{size}', size) for op in config.data.train_ops)
    config.data.num_threads, config.data.num_workers = FLAGS.threads, FLAGS.workers
    batches = pipeline.train_batches(config.data, seed=0, batch_size=BATCH, start_step=0)
    next(batches)
    start, busy = time.perf_counter(), _processor_seconds()
    for _ in range(FLAGS.images // BATCH):
      next(batches)
    count = FLAGS.images // BATCH * BATCH
    rate = count / (time.perf_counter() - start)
    if FLAGS.workers == 0:  # those of living children are not counted
      print(f'{count / (_processor_seconds() - busy):.0f} images/s of one core; ', end='')
  print(f'{rate:.0f} images/s with {FLAGS.threads} threads and {FLAGS.workers} processes: ', end='')
  print(', '.join(config.data.train_ops))


if __name__ == '__main__':
  app.run(main)
