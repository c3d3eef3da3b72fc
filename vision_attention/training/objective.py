"""What a step minimises: the labels' loss, and a teacher's and the tokens' where a recipe has them.

A model with several outputs names them (`Classifier.outputs`): `distilled` learns from a teacher,
`tokens` from a label for every token.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vision_attention import errors
from vision_attention.ops import label_maps
from vision_attention.training import losses

DISTILL = ('none', 'hard', 'soft')
TOKEN_LABELS = ('image', 'teacher', 'maps')
# Of the published label maps: logits and classes, of five classes, in 18x18 cells.
PUBLISHED_MAP = (2, 5, 18, 18)
Targets = dict[str, Array]


def check(config: Any, outputs: Collection[str]) -> None:
  """Refuses a teacher without a use, a use without a teacher, and outputs that nothing trains.

  Args:
    config: the whole config.
    outputs: of the model, see `Classifier.outputs`.

  Raises:
    ValueError: naming the key.
  """
  distill, tokens, teacher = config.distill, config.tokens, config.teacher
  errors.check_choice('config.distill.kind', distill.kind, DISTILL)
  errors.check_choice('config.tokens.labels', tokens.labels, TOKEN_LABELS)
  from_teacher = distill.kind != 'none' or (tokens.weight > 0 and tokens.labels == 'teacher')
  if from_teacher and not (teacher.name and teacher.path):
    raise ValueError('the config learns from a teacher: give config.teacher.name and .path')
  if teacher.name and not from_teacher:
    raise ValueError(
      f'config.teacher.name is {teacher.name!r} and nothing learns from it: set '
      "config.distill.kind='hard' (or 'soft'), or leave it empty"
    )
  if tokens.weight > 0 and 'tokens' not in outputs:
    raise ValueError(
      f'config.tokens.weight is {tokens.weight} but {config.model.name} classifies no tokens: '
      'set it to 0, or take a model with such a head, such as volo_d1'
    )
  maps, mixed = tokens.weight > 0 and tokens.labels == 'maps', config.mixing
  if maps != bool(config.data.label_maps):
    raise ValueError(
      f'config.tokens.labels is {tokens.labels!r}, of weight {tokens.weight}, and '
      f"config.data.label_maps {config.data.label_maps!r}: maps need labels='maps', a weight and "
      'a folder, and other labels none'
    )
  if tokens.ground_truth and not maps:
    raise ValueError(
      f'config.tokens.ground_truth corrects label maps, and tokens.labels is {tokens.labels!r}, '
      "which the image's own label is in already: set it to False"
    )
  if maps and mixed.prob and (mixed.mixup_alpha or mixed.cutmix_alpha):
    raise ValueError(
      'label maps are of whole images: set config.mixing.prob to 0; the model may mix tokens'
    )
  if 'distilled' in outputs and distill.kind == 'none':
    raise ValueError(
      f'{config.model.name} has a classifier for a teacher and the config has none: name one in '
      "config.teacher with config.distill.kind='hard', or pass the model distillation=False"
    )


def teacher_targets(
  apply: Callable[..., Any],
  variables: Any,
  images: Float[Array, 'b h w c'],
  config: Any,
  grid: tuple[int, int] | None = None,
) -> Targets:
  """Returns what a teacher says about images, as they are after augmentation and mixing.

  Args:
    apply: `model.apply` of the teacher.
    variables: of the teacher.
    images: normalised as the student sees them.
    config: the whole config.
    grid: of the student's tokens, where they are labelled by the teacher.

  Returns:
    `teacher` `[b, k]`, a distribution (`soft`, at the config's temperature) or the one-hot vector
    of the likeliest class (`hard`); `tokens` `[b, h, w, k]`, the distribution at every place: the
    teacher's classifier on its last map, without the mean, resized to `grid`.
  """
  found = {}
  if config.distill.kind != 'none':
    logits = apply(variables, images)
    if config.distill.kind == 'hard':
      found['teacher'] = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1])
    else:
      found['teacher'] = jax.nn.softmax(logits / config.distill.temperature)
  if grid is not None:
    dense = apply(variables, images, method='dense_logits')
    shape = (len(dense), *grid, dense.shape[-1])
    found['tokens'] = jax.nn.softmax(jax.image.resize(dense, shape, 'bilinear'))
  return jax.lax.stop_gradient(found)


def map_targets(
  batch: Mapping[str, Array],
  labels: Float[Array, 'b k'],
  config: Any,
  grid: tuple[int, int],
) -> Targets:
  """Returns what label maps say about images, as the code of arXiv 2104.10858 does.

  Args:
    batch: with `label_map`, `label_view` and `label_bounds`, see `ops.label_maps.align`.
    labels: of the images, smoothed.
    config: the whole config.
    grid: of the tokens.

  Returns:
    `tokens` `[b, h, w, k]`, the distribution at every token, and `labels` `[b, k]`, that of the
    whole view, for the class token. Both are smoothed by the config's share, and so sum to a little
    more than 1. With `config.tokens.ground_truth`, `labels` has a share of the image's own: half
    where both have the same likeliest class, and else a tenth.
  """
  count, smoothing = labels.shape[-1], config.loss.label_smoothing
  view = (batch['label_map'], batch['label_view'], batch['label_bounds'])

  def distribution(bins: tuple[int, int]) -> Array:
    found = jax.nn.softmax(label_maps.align(*view, bins, count))
    return found * (1 - smoothing + smoothing / count) + smoothing / count

  whole = distribution((1, 1))[:, 0, 0]
  if config.tokens.ground_truth:
    same = whole.argmax(-1, keepdims=True) == labels.argmax(-1, keepdims=True)
    share = jnp.where(same, 0.5, 0.1)
    whole = (1 - share) * whole + share * labels
  return {'labels': whole, 'tokens': distribution(grid)}


def make(
  apply: Callable[..., Any],
  config: Any,
  outputs: Collection[str],
  class_weights: np.ndarray | None = None,
) -> Callable[..., tuple[jax.Array, Any]]:
  """Makes the loss of a batch.

  With a teacher of weight `a` the loss is `(1 - a) L(labels) + a L(teacher)`: hard, the
  cross-entropy with the teacher's decision, or soft, at temperature `t`, `t^2` times the divergence
  from the teacher's distribution (arXiv 2012.12877, equations 2 and 3). A second classifier learns
  from the teacher alone, and the first from the labels. Labels of tokens add the config's weight
  times the mean cross-entropy of all tokens (arXiv 2104.10858, equation 4); where the model mixes
  tokens, the label of the class token is mixed by its share.

  Args:
    apply: `model.apply`.
    config: the whole config.
    outputs: of the model, see `Classifier.outputs`.
    class_weights: of the labels' loss, `[num_classes]`; None weighs all classes alike.

  Returns:
    `(params, batch_stats, images, targets, key) -> (loss, batch_stats)`, with targets `labels`
    `[b, k]`, and what `teacher_targets` or `map_targets` give.
  """
  distill, token_weight, temperature = config.distill, config.tokens.weight, 1.0
  if distill.kind == 'soft':
    temperature = config.distill.temperature
  loss_fn = functools.partial(
    losses.classification,
    kind=config.loss.kind,
    class_weights=None if class_weights is None else jnp.asarray(class_weights, jnp.float32),
    focal_gamma=config.loss.focal_gamma,
  )
  by_name = 'distilled' in outputs or token_weight > 0
  options = {'method': 'named_logits'} if by_name else {}

  def loss(params, batch_stats, images, targets: Mapping[str, Array], key):
    found, changed = apply(
      {'params': params, 'batch_stats': batch_stats},
      images,
      train=True,
      rngs={'dropout': key},
      mutable=['batch_stats'],
      **options,
    )
    found = found if by_name else {'classifier': found}
    labels = targets['labels']
    if 'share' in found:
      share = found['share'][:, None]
      labels = share * labels + (1.0 - share) * labels[::-1]
    total = loss_fn(found['classifier'], labels).mean()
    if distill.kind != 'none':
      logits = found.get('distilled', found['classifier']) / temperature
      learnt = losses.classification(logits, targets['teacher'], 'softmax')
      if distill.kind == 'soft':
        # From cross-entropy to divergence: less the teacher's entropy, which has no gradient.
        learnt -= losses.entropy(targets['teacher'])
      learnt = temperature**2 * learnt.mean()
      total = (1.0 - distill.weight) * total + distill.weight * learnt
    if token_weight > 0:
      tokens = found['tokens']
      wanted = targets.get('tokens', targets['labels'][:, None, None])
      wanted = jnp.broadcast_to(wanted, tokens.shape)
      logits, wanted = (a.reshape(-1, a.shape[-1]) for a in (tokens, wanted))
      total += token_weight * losses.classification(logits, wanted, 'softmax').mean()
    return total, changed.get('batch_stats', batch_stats)

  return loss
