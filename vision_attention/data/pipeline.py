"""Batches for training and evaluation: a pure function of (config, seed, step).

The chain is random access from end to end, so batch `k` is the same whether the run came to it or
began there, and whatever the number of processes: shuffle and repeat the record numbers, read and
augment each with a generator seeded by (seed, position), batch. Each process reads one block of
every batch, and the blocks in the processes' order are the batch of one process, so that what
depends on a place in it (pairs of mixup, dropped paths) is the same as well. What a checkpoint must
remember of the input is the step.

Reads of `config.data`: `name`, `data_dir`, `train_split`, `eval_split`, `train_ops`, `eval_ops`
(see `data.preprocessing`), `repeats` (augmented copies of an image in a row), `label_maps` and
`label_geometry` (see `data.label_maps`), `on_corrupt` (`raise` or `skip`), `num_threads`,
`num_workers`, `prefetch`.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from vision_attention import errors
from vision_attention.data import label_maps, preprocessing, source, tfrecord, workers

Batch = dict[str, np.ndarray]
_MAX_SKIPS = 100


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
  """What the data set itself says."""

  num_classes: int
  num_train: int
  num_eval: int
  label_names: Sequence[str]


def dataset_info(config: Any) -> DatasetInfo:
  """Returns sizes and classes; raises what `source.Source` raises, before anything else is done."""
  for texts in (config.train_ops, config.eval_ops):
    preprocessing.compose(texts)
  errors.check_choice('config.data.on_corrupt', config.on_corrupt, ('raise', 'skip'))
  train = source.Source(config.name, config.train_split, config.data_dir or None)
  evaluation = source.Source(config.name, config.eval_split, config.data_dir or None)
  if config.label_maps:
    label_maps.check_operations(config.train_ops, config.label_geometry)
    maps = label_maps.LabelMaps(config.label_maps, config.name, train.num_classes)
    if len(maps) < len(train):
      raise source.MissingDataError(
        f'config.data.label_maps {config.label_maps!r} has {len(maps)} maps and {config.name} '
        f'{len(train)} images in {config.train_split}: make the maps of all of them'
      )
  return DatasetInfo(train.num_classes, len(train), len(evaluation), train.label_names)


def class_counts(config: Any) -> np.ndarray:
  """Returns the number of training examples of every class; reads the training split once."""
  return source.Source(config.name, config.train_split, config.data_dir or None).class_counts()


class Decoded:
  """A source of decoded images; what cannot be decoded raises, or its successor takes its place.

  Args:
    records: the encoded source.
    on_corrupt: `raise` or `skip`.
    several: whether all labels of an example are given, beside the first one.
    maps: of the images, if examples have them.
  """

  def __init__(
    self,
    records: source.Source,
    on_corrupt: str,
    several: bool = False,
    maps: label_maps.LabelMaps | None = None,
  ):
    self._records, self._several, self._maps = records, several, maps
    self._skip = on_corrupt == 'skip'

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    for offset in range(_MAX_SKIPS):
      place = (index + offset) % len(self)
      try:
        record = self._records[place]
      except tfrecord.BrokenRecordError:
        if not self._skip:
          raise
        continue
      try:
        return {
          'image': preprocessing.decode(record.image),
          'label': np.int32(record.label),
          'corrupt': np.int32(offset > 0),
          **({'labels': record.labels} if self._several else {}),
          **(
            {'label_map': self._maps.find(record.image, record.name)}
            if self._maps is not None
            else {}
          ),
        }
      except preprocessing.CorruptImageError as error:
        if not self._skip:
          raise ValueError(
            f'record {record.name} is no whole image ({error}): replace it, or set '
            "config.data.on_corrupt='skip' to count such records and take the next one"
          ) from error
    raise ValueError(f'{_MAX_SKIPS} records from {index} on are corrupt: is this the data?')


class _Repeated(grain.MapDataset):
  """Every example some times in a row; a pass stays as long, and sees the fewer examples.

  A pass over `n` examples takes the first `n / repeats` of the parent's order (arXiv 1901.09335, as
  DeiT samples), the next pass those of the parent's next order.
  """

  def __init__(self, parent: grain.MapDataset, repeats: int, size: int):
    super().__init__(parent)
    self._repeats, self._size = repeats, size

  def __len__(self) -> int:
    return len(self._parents[0])

  def __getitem__(self, index: int | slice) -> Any:
    if isinstance(index, slice):
      return self.slice(index)
    turn, place = divmod(index, self._size)
    return self._parents[0][turn * self._size + place // self._repeats]


class _Augment(grain.transforms.RandomMap):
  """Applies the operations of the config to an example's image, and says what became of a map."""

  def __init__(self, texts: Sequence[str], geometry: str = 'image'):
    self._apply, self._geometry = preprocessing.compose(texts), geometry

  def random_map(self, element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    trace, whole = preprocessing.Trace(), element['image'].size
    image = self._apply(element['image'], rng, trace)
    found = {**element, 'image': image}
    if 'label_map' in element:
      found |= label_maps.view(trace, whole, image.shape[1::-1], self._geometry)
    return found


def train_batches(
  config: Any,
  *,
  seed: int,
  batch_size: int,
  start_step: int,
  process_index: int = 0,
  process_count: int = 1,
  phases: Sequence[tuple[int, Sequence[str]]] = (),
) -> Iterator[Batch]:
  """Yields this process's share of the batch of every step from `start_step` on, without end.

  Args:
    config: `config.data`.
    seed: of shuffling and augmentation.
    batch_size: of all processes together.
    start_step: the first step, from 0.
    process_index: which process this is.
    process_count: number of processes; divides the batch.
    phases: pairs of a first step and the operations from there on, in order, the first from step
      0; `config.train_ops` throughout if empty.

  Yields:
    `image` uint8 `[b, h, w, 3]`, `label` int32 `[b]`, `corrupt` int32 `[b]` (1 for an example that
    stands in for a corrupt one). With label maps also `label_map` float16 `[b, 2, n, h, w]`, and
    where in it the image lies: `label_view` and `label_bounds`, see `label_maps.view`.
  """
  if batch_size % process_count:
    raise ValueError(f'batch_size {batch_size} is not a multiple of {process_count} processes')
  records = source.Source(config.name, config.train_split, config.data_dir or None)
  maps = None
  if config.label_maps:
    maps = label_maps.LabelMaps(config.label_maps, config.name, records.num_classes)
  decoded = Decoded(records, config.on_corrupt, maps=maps)
  dataset = grain.MapDataset.source(decoded).seed(seed).shuffle().repeat()
  if config.repeats > 1:
    dataset = _Repeated(dataset, config.repeats, len(records))
  options = grain.ReadOptions(
    num_threads=config.num_threads, prefetch_buffer_size=max(config.prefetch, config.num_threads)
  )

  def batches(first: int, end: int | None, texts: Sequence[str]) -> Iterator[Batch]:
    blocks = dataset.random_map(_Augment(texts, config.label_geometry)).batch(
      batch_size // process_count, drop_remainder=True
    )
    found = blocks[process_index::process_count][first:end].to_iter_dataset(options)
    if config.num_workers:
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # nobody has in a notebook, and grain looks for its own
      processes = grain.MultiprocessingOptions(num_workers=config.num_workers)
      found = found.mp_prefetch(processes, worker_init_fn=workers.end_with_parent)
    return iter(found)

  if not phases:
    return batches(start_step, None, config.train_ops)
  ends = [first for first, _ in phases[1:]] + [None]
  # A phase's reader starts when the one before it is through.
  return itertools.chain.from_iterable(
    batches(max(first, start_step), end, texts)
    for (first, texts), end in zip(phases, ends, strict=True)
    if end is None or end > start_step
  )


class EvalBatches:
  """The evaluation split in order, once per iteration; every process sees as many batches.

  Attributes:
    num_examples: of the whole split.
    num_classes: of the data set.
    label_names: of the data set.
  """

  def __init__(self, config: Any, batch_size: int, process_index: int, process_count: int):
    if batch_size % process_count:
      raise ValueError(f'batch_size {batch_size} is not a multiple of {process_count} processes')
    self._records = source.Source(config.name, config.eval_split, config.data_dir or None)
    self._config = config
    self._batch_size = batch_size
    self._process = process_index, process_count
    self.num_examples = len(self._records)
    self.num_classes = self._records.num_classes
    self.label_names = self._records.label_names

  def __len__(self) -> int:
    return math.ceil(self.num_examples / self._batch_size)

  def __iter__(self) -> Iterator[Batch]:
    index, count = self._process
    share = self._batch_size // count
    # A substitute for a corrupt image would be counted twice, so evaluation always raises.
    dataset = (
      grain.MapDataset.source(Decoded(self._records, 'raise', self._records.has_several))
      .seed(0)
      .random_map(_Augment(self._config.eval_ops))
    )
    # This process's block of every batch; that of the last may be short, or of no example.
    starts = range(index * share, self.num_examples, self._batch_size)
    blocks = [dataset[start : start + share] for start in starts]
    options = grain.ReadOptions(
      num_threads=self._config.num_threads,
      prefetch_buffer_size=max(self._config.prefetch * share, self._config.num_threads),
    )
    examples = iter(grain.MapDataset.concatenate(blocks).to_iter_dataset(options) if blocks else ())
    for _ in range(len(self)):
      chunk = [example for _, example in zip(range(share), examples, strict=False)]
      first: Any = chunk[0] if chunk else dataset[0]
      image = np.zeros((share, *first['image'].shape), np.uint8)
      label, mask = np.zeros(share, np.int32), np.zeros(share, np.float32)
      for i, example in enumerate(chunk):
        image[i], label[i], mask[i] = example['image'], example['label'], 1
      batch = {'image': image, 'label': label, 'mask': mask}
      if self._records.has_several:
        batch['labels'] = np.zeros((share, self.num_classes), bool)
        for i, example in enumerate(chunk):
          batch['labels'][i, list(example['labels'])] = True
      yield batch


def eval_batches(
  config: Any, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> EvalBatches:
  """Returns the evaluation split in batches of `image`, `label` and `mask` (0 for padding).

  Of a data set with any number of labels per image there is also `labels`, boolean `[b, k]`, and
  `label` is -1 where there is none.
  """
  return EvalBatches(config, batch_size, process_index, process_count)
