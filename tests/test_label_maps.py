"""Label maps: moved as the image is, and aligned to tokens."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import common, volo_d1
from tests import inputs
from vision_attention.data import (
  label_maps,
  preprocessing,
  randaugment,
)
from vision_attention.ops import label_maps as ops
from vision_attention.training import objective, optimizer, schedule, state

pytestmark = pytest.mark.fast
SYNSETS = ('n01440764', 'n01443537')
SIZE = (48, 32)  # width and height of images here
CROP = 'random_resized_crop(24, area=(0.2, 0.6))'


# -- Alignment.
def _bilinear(plane, y, x):
  """Between the four cells about index (y, x), whose nearest lie at the border."""
  y, x = (min(max(v, 0.0), side - 1.0) for v, side in zip((y, x), plane.shape, strict=True))
  top, left = math.floor(y), math.floor(x)
  bottom, right = min(top + 1, plane.shape[0] - 1), min(left + 1, plane.shape[1] - 1)
  fy, fx = y - top, x - left
  upper = (1 - fx) * plane[top, left] + fx * plane[top, right]
  return (1 - fy) * upper + fy * ((1 - fx) * plane[bottom, left] + fx * plane[bottom, right])


def _roi_align(plane, box, grid):
  """RoIAlign of (top, left, bottom, right) in cells, with samples as many as a bin has cells."""
  spans = [(box[i + 2] - box[i]) / grid[i] for i in range(2)]
  counts = [math.ceil(span - 1e-4) for span in spans]
  found = np.zeros(grid)
  for i, j in np.ndindex(*grid):
    samples = [
      _bilinear(
        plane,
        box[0] + (i + (m + 0.5) / counts[0]) * spans[0] - 0.5,
        box[1] + (j + (n + 0.5) / counts[1]) * spans[1] - 0.5,
      )
      for m, n in itertools.product(range(counts[0]), range(counts[1]))
    ]
    found[i, j] = np.mean(samples)
  return found


def _dense(sparse, classes):
  found = np.zeros((classes, *sparse.shape[-2:]))
  for rank, y, x in np.ndindex(*sparse.shape[1:]):
    found[int(sparse[1, rank, y, x]), y, x] = sparse[0, rank, y, x]
  return found


ALIGN = jax.jit(ops.align, static_argnames=('grid', 'num_classes'))
INSIDE = np.tile(np.array([0, 1], np.float32), (2, 2, 1))


@pytest.mark.parametrize('grid', [(3, 4), (1, 1)])
def test_alignment_is_its_definition(grid):
  maps, cells = inputs.sparse_maps(2, (6, 5), 4), np.array([6, 5])
  boxes = np.array([[0.1, 0.05, 0.95, 0.5], [0.3, 0.0, 0.55, 1.0]])
  view = np.stack([np.stack([np.diag(b[2:] - b[:2])[i] for b in boxes]) for i in range(2)], 1)
  view = np.concatenate([view, boxes[:, :2, None]], 2).astype(np.float32)
  found = ALIGN(maps, view, INSIDE, grid=grid, num_classes=4)
  for i, box in enumerate(boxes * np.tile(cells, 2)):
    expected = [_roi_align(plane, box, grid) for plane in _dense(maps[i], 4)]
    np.testing.assert_allclose(found[i], np.stack(expected, -1), atol=2e-5)


def test_where_no_image_is_there_is_no_label():
  maps = np.ones((2, 2, 1, 4, 4), np.float16)
  view = np.tile(np.array([[1, 0, 0], [0, 2, -0.5]], np.float32), (2, 1, 1))
  found = ALIGN(maps, view, INSIDE, grid=(1, 4), num_classes=2)[0, 0, :, 1]
  np.testing.assert_allclose(found, [0, 1, 1, 0], atol=1e-6)
  # A long image goes on beyond the map's square, and there the nearest cell holds.
  wide = np.stack([[[0, 1], [-0.25, 1.25]]] * 2).astype(np.float32)
  found = ALIGN(maps, view, wide, grid=(1, 4), num_classes=2)[0, 0, :, 1]
  np.testing.assert_allclose(found, [0.5, 1, 1, 0.5], atol=1e-6)


# -- What becomes of a map.
def _gradient(size=SIZE):
  """Red grows by 4 from left to right, green from top to bottom."""
  x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
  return Image.fromarray(np.stack([4 * x + 2, 4 * y + 2, 0 * x + 200], -1).astype(np.uint8))


def _follows(trace, pixels):
  """Whether pixels of a gradient come from where a trace says, but for filled borders."""
  height, width = pixels.shape[:2]
  moved = functools.reduce(np.matmul, trace.steps, np.eye(3))
  x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
  place = np.einsum('ij,jhw->ihw', moved, np.stack([x, y, np.ones_like(x)]))[:2]
  margin = 2.0
  inside = (place > margin) & (place < np.array(SIZE)[:, None, None] - margin)
  inside = inside.all(0)
  assert inside.mean() > 0.3
  return np.abs(np.moveaxis(pixels[..., :2], -1, 0) - 4 * place)[:, inside].max() < 4


@pytest.mark.parametrize(
  'text',
  [
    'random_resized_crop((20, 30), area=(0.3, 0.6))',
    'random_resized_crop(20, area=(0.9, 1.0), ratio=(1.0, 1.0))',
    'resize((50, 40))',
    'center_crop(30, ratio=0.9)',
    'center_crop((30, 20), ratio=1.2)',
    'pad_crop(9)',
    'flip(1.0)',
    'flip_vertical(1.0)',
    'rot90',
  ],
)
def test_a_trace_says_where_pixels_come_from(text):
  apply = preprocessing.compose([text, 'flip'])
  for seed in range(6):
    trace = preprocessing.Trace()
    assert _follows(trace, apply(_gradient(), np.random.default_rng(seed), trace))


@pytest.mark.parametrize('name', ['rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y'])
def test_rand_augment_says_how_it_moves(name):
  for seed in range(4):
    trace, rng = preprocessing.Trace(), np.random.default_rng(seed)
    found = randaugment.apply(_gradient(), name, 5, rng, True, trace.move)
    assert len(trace.steps) == 1
    assert _follows(trace, np.asarray(found))
  trace = preprocessing.Trace()
  randaugment.apply(_gradient(), 'color', 5, np.random.default_rng(0), True, trace.move)
  assert not trace.steps


def _aligned(ops_texts, seed, geometry, sparse, grid, size=SIZE, classes=16):
  """The result of operations on an image, and its map's logits in a grid."""
  trace = preprocessing.Trace()
  apply, image = preprocessing.compose(ops_texts), _gradient(size)
  pixels = apply(image, np.random.default_rng(seed), trace)
  view = label_maps.view(trace, image.size, pixels.shape[1::-1], geometry)
  arrays = [np.stack([a] * 2) for a in (sparse, view['label_view'], view['label_bounds'])]
  return trace, pixels, ALIGN(*arrays, grid=grid, num_classes=classes)[0]


def test_a_token_has_the_label_of_its_place():
  """In a map whose every cell has a class of its own, of the middle square of an image."""
  cells = np.stack([np.full((4, 4), 9.0), np.arange(16).reshape(4, 4)])[:, None]
  told = 0
  texts = ['flip', 'flip_vertical', 'rand_augment(2, 6, prob=0.5)', CROP]
  for seed in range(12):
    trace, _, found = _aligned(texts, seed, 'image', cells.astype(np.float16), (12, 12))
    moved = functools.reduce(np.matmul, trace.steps, np.eye(3))
    for row, column in np.ndindex(12, 12):
      x, y, _ = moved @ [2 * column + 1, 2 * row + 1, 1]
      y, x = y / 8, (x - 8) / 8  # in cells
      # Well inside a cell, and so no neighbour has half.
      if 0 < y < 4 and 0 < x < 4 and max(abs(y % 1 - 0.5), abs(x % 1 - 0.5)) < 0.2:
        assert int(found[row, column].argmax()) == 4 * int(y) + int(x)
        told += 1
  assert told > 100


@pytest.mark.parametrize('flipped', [False, True])
def test_the_released_geometry_exchanges_the_axes_of_a_crop(flipped):
  sparse = inputs.sparse_maps(1, (6, 6), 5)[0]
  texts = ['flip(1.0)', CROP] if flipped else [CROP]
  for seed in range(3):
    trace, _, found = _aligned(texts, seed, 'released', sparse, (3, 3), classes=5)
    crop, (w, h) = trace.steps[-1], SIZE
    left, top = crop[0, 2] / w, crop[1, 2] / h
    right, bottom = left + 24 * crop[0, 0] / w, top + 24 * crop[1, 1] / h
    dense = _dense(sparse[..., ::-1] if flipped else sparse, 5)
    # A box's x is its top, and its y is its left.
    box = 6 * np.array([left, top, right, bottom])
    expected = [_roi_align(plane, box, (3, 3)) for plane in dense]
    np.testing.assert_allclose(found, np.stack(expected, -1), atol=5e-5)


def test_operations_that_no_map_can_follow_are_refused():
  label_maps.check_operations(('flip()', CROP), 'released')
  for texts, geometry, message in (
    (('rand_augment_tpu(2, 9)', CROP), 'image', 'does not say how pixels move'),
    ((CROP, 'flip()'), 'released', 'put random_resized_crop at the end'),
    ((CROP,), 'relased', "did you mean 'released'"),
  ):
    with pytest.raises(ValueError, match=message):
      label_maps.check_operations(texts, geometry)


# -- In training.
def _trained(**changes):
  config = common.get_config()
  config.update_from_flattened_dict(
    {
      'tokens.weight': 0.5,
      'tokens.labels': 'maps',
      'data.label_maps': 'maps',
      'loss.label_smoothing': 0.1,
      'total': '2 steps',
    }
    | changes
  )
  return config


def _batch():
  trace = preprocessing.Trace()
  return {
    'image': np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8),
    'label': np.array([3, 1], np.int32),
    'corrupt': np.zeros(2, np.int32),
    'label_map': inputs.sparse_maps(2, (3, 3), 5),
    **{k: np.stack([v] * 2) for k, v in label_maps.view(trace, (8, 8), (8, 8), 'image').items()},
  }


@functools.cache
def _map_targets(ground_truth):
  config = _trained(**{'tokens.ground_truth': ground_truth})
  return jax.jit(lambda batch, labels: objective.map_targets(batch, labels, config, (3, 3)))


def _labels():
  return 0.9 * np.eye(5, dtype=np.float32)[_batch()['label']] + 0.02


@pytest.mark.parametrize('ground_truth', [False, True])
def test_targets_are_smoothed_and_corrected_as_in_the_code(ground_truth):
  batch = _batch()
  # What the first image's map says is right, of the second's wrong.
  batch['label_map'] = batch['label_map'][:, :, :1]
  batch['label_map'][:, 1, 0] = np.array([3, 4])[:, None, None]
  found = _map_targets(ground_truth)(batch, _labels())
  dense = np.stack([_dense(sparse, 5) for sparse in batch['label_map']])
  smooth = lambda logits: np.exp(logits) / np.exp(logits).sum(1, keepdims=True) * 0.92 + 0.02
  np.testing.assert_allclose(found['tokens'], np.moveaxis(smooth(dense), 1, -1), rtol=1e-4)
  whole = smooth(dense.mean((2, 3)))
  if ground_truth:
    whole = np.array([[0.5], [0.9]]) * whole + np.array([[0.5], [0.1]]) * _labels()
  np.testing.assert_allclose(found['labels'], whole, rtol=1e-4)


def test_a_step_learns_from_maps():
  """The class token's label is the map's, too: one step of a model that is its own logits."""
  config, batch = _trained(), _batch()
  params = {'classifier': jnp.zeros((2, 5)), 'tokens': jnp.zeros((2, 3, 3, 5))}

  def apply(variables, images, train=False, **options):
    del images
    found = {**variables['params'], 'share': jnp.array([0.75, 0.75])}
    return (found, {}) if train else found

  tx = optimizer.make(
    config.optimizer, schedule.relative(config.schedule, total=2, to_steps=lambda text: 0), params
  )
  now = state.create({'params': params}, tx, averaged=False)
  step = jax.jit(state.make_train_step(apply, tx, config, 5, outputs=('classifier', 'tokens')))
  later, window = step(now, state.new_window(), batch)
  wanted = _map_targets(False)(batch, _labels())
  # All classes are as likely at first; targets sum to 1 + 0.1 / 5.
  assert float(window.loss) == pytest.approx(1.02 * 1.5 * np.log(5), rel=1e-5)
  mixed = 0.75 * wanted['labels'] + 0.25 * wanted['labels'][::-1]
  assert (np.sign(later.params['classifier']) == np.sign(mixed - 1.02 / 5)).all()
  assert (np.sign(later.params['tokens']) == np.sign(wanted['tokens'] - 1.02 / 5)).all()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'data.label_maps': ''}, "maps need labels='maps', a weight and a folder"),
    ({'tokens.labels': 'image'}, "maps need labels='maps', a weight and a folder"),
    ({'tokens.weight': 0.0}, "maps need labels='maps', a weight and a folder"),
    ({'mixing.mixup_alpha': 0.8}, 'label maps are of whole images'),
    (
      {'tokens.labels': 'image', 'data.label_maps': '', 'tokens.ground_truth': True},
      'ground_truth corrects label maps',
    ),
  ],
)
def test_maps_need_a_use_and_a_use_maps(changes, message):
  outputs = ('classifier', 'tokens')
  objective.check(_trained(), outputs)
  with pytest.raises(ValueError, match=message):
    objective.check(_trained(**changes), outputs)


def test_volo_is_trained_and_tuned_with_maps():
  config = volo_d1.get_config('maps=folder')
  assert config.data.train_ops[-1].startswith('random_resized_crop')
  objective.check(config, ('classifier', 'tokens'))
  tuned = volo_d1.get_config('maps=folder,init=run')
  assert (config.tokens.ground_truth, tuned.tokens.ground_truth) == (False, True)
  # Without maps, every token has its image's label, with --ground-truth as without.
  assert volo_d1.get_config('init=run').tokens.labels == 'image'
  with pytest.raises(ValueError, match='both label tokens'):
    volo_d1.get_config('maps=folder,teacher=file')
