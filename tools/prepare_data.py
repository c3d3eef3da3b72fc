"""Prepares data sets as TFDS reads them, without TensorFlow and without the internet.

  python tools/prepare_data.py digits
  python tools/prepare_data.py idx --name=fashion_mnist --input=/usr/share/datasets/fashion-mnist
  python tools/prepare_data.py image_folder --name=flowers --input=flowers   # train/rose/1.jpg
  python tools/prepare_data.py ham10000 --source=HAM10000                    # five folds
  python tools/prepare_data.py ham10000 --source=HAM10000 --splits=holdout   # 70 / 10 / 20 %
  python tools/prepare_data.py imagenet2012 --input=<folder> --workers=8     # ILSVRC2012_img_*.tar
  python tools/prepare_data.py imagenet21k --input=winter21_whole.tar.gz --classes=winter21
  python tools/prepare_data.py imagenet_v2 --input=<folder> --variant=matched-frequency
  python tools/prepare_data.py imagenet_r --input=<folder>    # also _a, _sketch, imagenet2012_real
  python tools/prepare_data.py label_maps --input=<folder>    # of n01440764/*.pt; imagenet2012's

ImageNet's may be killed and repeated: finished files are kept, and the data set appears when it is
whole, the same to the byte; so may label maps (github.com/zihangJiang/TokenLabeling), which need
the data set, and land in `label_maps/imagenet2012`, for `config.data.label_maps`. Fashion-MNIST's
files are in Debian's package dataset-fashion-mnist. A data set lands in `--data_dir` (default:
$TFDS_DATA_DIR or `data`), where training looks for it.
"""

import argparse
import os
import pathlib
import sys

from vision_attention import torch_file
from vision_attention.data import builders, ham10000, shards

FASHION = (
  't_shirt_top trouser pullover dress coat sandal shirt sneaker bag ankle_boot'.split()  # noqa: SIM905
)
SMALL = ('digits', 'idx', 'image_folder', 'ham10000')
LARGE = [
  'imagenet2012',
  'imagenet21k',
  'imagenet_v2',
  'imagenet_a',
  'imagenet_r',
  'imagenet_sketch',
  'imagenet2012_real',
]


def _local_path(text: str) -> pathlib.Path:
  return pathlib.Path(text).expanduser()


def _large(args: argparse.Namespace) -> pathlib.Path:
  """Writes what needs shards and processes."""
  from vision_attention.data import imagenet, imagenet21k  # TFDS is slow to import

  options = {
    'file_format': args.file_format,
    'workers': args.workers,
    'overwrite': args.overwrite,
    'shard_bytes': args.shard_megabytes * 2**20,
    'partial': args.partial,
  }
  if args.kind == 'imagenet2012':
    return imagenet.imagenet2012(args.input, args.data_dir, seed=args.seed, **options)
  if args.kind == 'imagenet21k':
    return imagenet21k.imagenet21k(
      args.input,
      args.data_dir,
      kind=args.classes,
      validation=args.validation,
      seed=args.seed,
      **options,
    )
  return imagenet.evaluation_set(
    args.kind, args.input, args.data_dir, variant=args.variant, **options
  )


def _label_maps(args: argparse.Namespace) -> pathlib.Path:
  """Writes the label maps of a data set's training images."""
  from vision_attention.data import label_maps, source

  name = args.name or 'imagenet2012'
  records = source.Source(name, 'train', str(args.data_dir))
  return label_maps.write(
    args.data_dir / 'label_maps' / name, records, args.input, torch_file.load, args.workers
  )


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('kind', choices=(*SMALL, *LARGE, 'label_maps'))
  parser.add_argument('--name', help='of the data set; digits and ham10000 need none')
  parser.add_argument(
    '--input', '--source', type=_local_path, help='folder of the files, or archive'
  )
  parser.add_argument('--splits', choices=tuple(ham10000.SPLITS), default='folds', help='ham10000')
  parser.add_argument(
    '--seed', type=int, default=0, help="of ham10000's splits, of ImageNet's order"
  )
  parser.add_argument('--file_format', default='array_record', help="or tfrecord; ImageNet's")
  parser.add_argument(
    '--workers', type=int, default=os.cpu_count(), help="processes; ImageNet's, maps'"
  )
  parser.add_argument('--shard_megabytes', type=int, default=256, help="ImageNet's files")
  parser.add_argument('--classes', default='winter21', help='or fall11, 21k_p, google21843')
  parser.add_argument('--validation', type=float, default=0.01, help="imagenet21k's share")
  parser.add_argument('--variant', default='matched-frequency', help='or threshold-0.7, topimages')
  parser.add_argument(
    '--partial', action='store_true', help='take archives of fewer images or classes than published'
  )
  parser.add_argument(
    '--data_dir', type=_local_path, default=_local_path(os.environ.get('TFDS_DATA_DIR', 'data'))
  )
  parser.add_argument('--overwrite', action='store_true')
  args = parser.parse_args()
  if args.kind != 'digits' and not args.input:
    parser.error(f'{args.kind} needs --{"source" if args.kind == "ham10000" else "input"}')
  if args.kind in ('idx', 'image_folder') and not args.name:
    parser.error(f'{args.kind} needs --name')
  holdout = args.kind == 'ham10000' and args.splits == 'holdout'
  name = args.name or ('ham10000_holdout' if holdout else args.kind)
  try:
    shards.check_local(args.data_dir)
    if args.kind == 'label_maps':
      print(f'wrote label maps to {_label_maps(args)}')
      return 0
    if args.kind in LARGE:
      print(f'wrote {args.kind} to {_large(args)}')
      return 0
    if args.kind == 'digits':
      raw = builders.digits()
    elif args.kind == 'idx':
      raw = builders.idx(args.input, FASHION if name == 'fashion_mnist' else None)
    elif args.kind == 'ham10000':
      raw = ham10000.ham10000(args.input, splits=args.splits, seed=args.seed)
    else:
      raw = builders.image_folder(args.input)
    folder = builders.write(name, raw, args.data_dir, overwrite=args.overwrite)
  except FileExistsError as error:
    print(error)
    # The data set is there, which is what was asked for.
    return 0
  except (OSError, RuntimeError, ValueError) as error:
    print(error, file=sys.stderr)
    return 2
  print(f'wrote {name} to {folder}')
  if args.kind == 'ham10000':
    print(ham10000.summary(raw.files['splits.csv']))
  return 0


if __name__ == '__main__':
  sys.exit(main())
