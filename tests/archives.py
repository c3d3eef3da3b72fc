"""Small archives of the layouts of ImageNet's, with photographs in them."""

import io
import pathlib
import tarfile
from collections.abc import Mapping

import numpy as np
from PIL import Image


def photographs(count: int, size: tuple[int, int] = (96, 80), kind: str = 'JPEG') -> list[bytes]:
  """Returns crops of scikit-learn's two sample pictures, with noise, encoded."""
  from sklearn import datasets

  pictures = [Image.fromarray(p) for p in datasets.load_sample_images().images]
  rng, found = np.random.default_rng(0), []
  for i in range(count):
    picture = pictures[i % 2]
    x, y = (int(rng.integers(side // 2)) for side in picture.size)
    crop = np.asarray(picture.crop((x, y, x + 200, y + 160)).resize(size), float)
    noisy = np.clip(crop + rng.normal(0, 6, crop.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, kind)
    found.append(buffer.getvalue())
  return found


def encode(mode: str, kind: str, size: tuple[int, int] = (64, 48)) -> bytes:
  """Returns an image of a mode, in a format."""
  pixels = np.random.default_rng(1).integers(0, 256, (size[1] // 8, size[0] // 8, 4), np.uint8)
  buffer = io.BytesIO()
  image = Image.fromarray(pixels, 'CMYK').resize(size)
  (image if mode == 'CMYK' else image.convert(mode)).save(buffer, kind, quality=95)
  return buffer.getvalue()


def tar(files: Mapping[str, bytes], mode: str = 'w') -> bytes:
  """Returns a tar archive of files."""
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode=mode) as archive:  # pyright: ignore[reportCallIssue, reportArgumentType]
    for name, content in files.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
  return buffer.getvalue()


def of_classes(classes: Mapping[str, Mapping[str, bytes]]) -> dict[str, bytes]:
  """Returns a tar archive per class, by its name."""
  return {f'{synset}.tar': tar(files) for synset, files in classes.items()}


def imagenet2012(folder: pathlib.Path, synsets: tuple[str, ...], train: int = 6, val: int = 8):
  """Writes the two archives; returns the images by file name."""
  images = iter(photographs(train * len(synsets) + val))
  classes = {s: {f'{s}_{i}.JPEG': next(images) for i in range(train)} for s in synsets}
  validation = {f'ILSVRC2012_val_{i:08d}.JPEG': next(images) for i in range(val, 0, -1)}
  classes[synsets[0]][f'{synsets[0]}_0.JPEG'] = encode('CMYK', 'JPEG')
  classes[synsets[1]][f'{synsets[1]}_0.JPEG'] = encode('RGB', 'PNG')
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'ILSVRC2012_img_train.tar').write_bytes(tar(of_classes(classes)))
  (folder / 'ILSVRC2012_img_val.tar').write_bytes(tar(validation))
  return {**{k: v for files in classes.values() for k, v in files.items()}, **validation}
