"""Prepares data sets as TFDS reads them, without TensorFlow and without the internet.

  python tools/prepare_data.py digits
  python tools/prepare_data.py idx --name=fashion_mnist --input=/usr/share/datasets/fashion-mnist
  python tools/prepare_data.py image_folder --name=flowers --input=flowers   # train/rose/1.jpg

Fashion-MNIST's files are in Debian's package dataset-fashion-mnist. A data set lands in
`--data_dir` (default: $TFDS_DATA_DIR or `data`), where training looks for it.
"""

import argparse
import os
import pathlib
import sys

from vision_attention.data import builders

FASHION = (
  't_shirt_top trouser pullover dress coat sandal shirt sneaker bag ankle_boot'.split()  # noqa: SIM905
)


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('kind', choices=('digits', 'idx', 'image_folder'))
  parser.add_argument('--name', help='of the data set; digits needs none')
  parser.add_argument('--input', type=pathlib.Path, help='folder of the files')
  parser.add_argument(
    '--data_dir', type=pathlib.Path, default=pathlib.Path(os.environ.get('TFDS_DATA_DIR', 'data'))
  )
  parser.add_argument('--overwrite', action='store_true')
  args = parser.parse_args()
  if args.kind != 'digits' and not (args.name and args.input):
    parser.error(f'{args.kind} needs --name and --input')
  name = args.name or 'digits'
  try:
    if args.kind == 'digits':
      raw = builders.digits()
    elif args.kind == 'idx':
      raw = builders.idx(args.input, FASHION if name == 'fashion_mnist' else None)
    else:
      raw = builders.image_folder(args.input)
    folder = builders.write(name, raw, args.data_dir, overwrite=args.overwrite)
  except FileExistsError as error:
    print(error)
    # The data set is there, which is what was asked for.
    return 0
  except (FileNotFoundError, ValueError) as error:
    print(error, file=sys.stderr)
    return 2
  print(f'wrote {name} to {folder}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
