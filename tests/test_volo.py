"""What is particular to VOLO: outlook attention, the class token, labels of tokens, other names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vision_attention as va
from configs import volo_d1
from tests import abstract
from vision_attention import convert
from vision_attention.attention import class_attention, outlook
from vision_attention.models import transfer, tree, volo
from vision_attention.ops import attention, bicubic, mix_token, outlook_attention

TINY = dict(depths=(1, 1), dims=(8, 16), num_heads=(1, 2), stem_dim=8)


def _normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def _places(size, kernel, step):
  """Returns `[windows, taps, pixels]`, 1 where a window's tap is a pixel."""
  grid = [-(-side // step) for side in size]
  out = np.zeros((*grid, kernel**2, *size), np.float32)
  for y, x, tap in np.ndindex(out.shape[:3]):
    i, j = step * y + tap // kernel - kernel // 2, step * x + tap % kernel - kernel // 2
    if 0 <= i < size[0] and 0 <= j < size[1]:
      out[y, x, tap, i, j] = 1
  return out.reshape(-1, kernel**2, size[0] * size[1])


@pytest.mark.parametrize(
  ('size', 'kernel', 'step'), [((4, 3), 3, 2), ((2, 3), 3, 1), ((4, 6), 5, 3), ((3, 2), 1, 1)]
)
def test_outlook_attention_is_its_definition(size, kernel, step):
  places, taps = _places(size, kernel, step), kernel**2
  cut = outlook_attention.windows(kernel, step)
  grid = [cut.count(side) for side in size]
  value, logits = _normal(2, *size, 2, 3), _normal(2, *grid, 2, taps, taps, seed=1)

  def slow(value, logits):
    weights = jax.nn.softmax(logits, -1).reshape(2, -1, 2, taps, taps)
    pixels = value.reshape(2, -1, 2, 3)
    mixed = jnp.einsum('bwnrt,wtp,bpnd->bwrnd', weights, places, pixels)
    return jnp.einsum('wrp,bwrnd->bpnd', places, mixed).reshape(value.shape)

  @jax.jit
  def both(value, logits, g):
    functions = (functools.partial(outlook_attention.outlook_attention, step=step), slow)
    return [(y, *pull(g)) for y, pull in (jax.vjp(f, value, logits) for f in functions)]

  for ours, theirs in zip(*both(value, logits, _normal(*value.shape, seed=2)), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize('size', [(7, 7), (6, 5)])
def test_windows_that_mix_nothing_count_how_often_a_pixel_is_seen(size):
  grid = [-(-side // 2) for side in size]
  # Only itself: every window gives back its values.
  logits = jnp.broadcast_to(100 * jnp.eye(9), (1, *grid, 1, 9, 9))
  value = _normal(1, *size, 1, 2)
  seen = [np.where(np.arange(n) % 2, np.where(np.arange(n) < n - 1, 2, 1), 1) for n in size]
  count = seen[0][:, None] * seen[1]
  assert set(count.flat) <= {1, 2, 4}
  y = jax.jit(functools.partial(outlook_attention.outlook_attention, step=2))(value, logits)
  np.testing.assert_allclose(y[0, :, :, 0], value[0, :, :, 0] * count[:, :, None], rtol=1e-5)


@pytest.mark.parametrize(('size', 'kernel', 'step'), [((5, 4), 3, 2), ((9, 3), 3, 3)])
def test_folding_is_the_transpose_of_unfolding(size, kernel, step):
  cut = outlook_attention.windows(kernel, step)
  x = _normal(1, *size, 1, 1)
  places = _places(size, kernel, step)
  unfolded = jax.jit(functools.partial(outlook_attention.unfold, cut=cut))(x)
  expected = np.einsum('wtp,p->wt', places, x.ravel())
  np.testing.assert_array_equal(unfolded.reshape(-1, kernel**2), expected)
  folded = jax.jit(functools.partial(outlook_attention.fold, size=size, cut=cut))(unfolded)
  expected = np.einsum('wtp,wt->p', places, expected)
  np.testing.assert_allclose(folded.ravel(), expected, rtol=1e-5, atol=1e-6)


def test_maps_are_sown_per_window_and_sum_to_one():
  x = _normal(2, 5, 4, 6)
  module = outlook.OutlookAttention(6, num_heads=2)
  init = functools.partial(module.init_with_output, train=False, mutable=True)
  _, aux = jax.jit(init)(jax.random.key(0), x)
  [weights] = aux['intermediates']['attention']
  assert weights.shape == (2, 2, 3 * 2 * 9, 9)
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)


def test_shapes_that_make_no_sense_are_refused():
  x = _normal(1, 4, 4, 6)
  for fields, message in (
    (dict(kernel=2), 'kernel 2 has no centre: pass 3'),
    (dict(step=4), 'step 4 leaves pixels between windows of 3: pass 1 to 3'),
    (dict(num_heads=4), '4 heads do not divide width 6'),
  ):
    with pytest.raises(ValueError, match=message):
      outlook.OutlookAttention(6, **{'num_heads': 2, **fields}).init(
        jax.random.key(0), x, train=False
      )
  with pytest.raises(ValueError, match='has 2x2 windows at step 2'):
    outlook_attention.outlook_attention(_normal(1, 4, 4, 1, 2), _normal(1, 4, 4, 1, 9, 9), step=2)


@functools.cache
def _tiny(size=(32, 48), **options):
  model, info = va.create_model('volo_d1', num_classes=3, image_size=size, **TINY, **options)
  return model, convert.abstract_variables(model, info)


def _drawn(shapes):
  rng = np.random.default_rng(0)
  draw = lambda shape: 0.3 * rng.standard_normal(shape).astype(np.float32)
  params = {path: draw(leaf.shape) for path, leaf in tree.flatten(shapes['params']).items()}
  stats = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes['batch_stats'])
  return {'params': tree.unflatten(params), 'batch_stats': stats}


@pytest.mark.fast
def test_logits_are_those_of_the_class_and_half_of_the_best_token():
  model, shapes = _tiny()
  variables, images = _drawn(shapes), _normal(2, 32, 48, 3)

  @jax.jit
  def run(variables):
    features = model.apply(variables, images, method='features')
    named = model.apply(variables, images, method='named_logits')
    return features, named, model.apply(variables, images)

  features, named, logits = run(variables)
  assert [features[f'stage{i}'].shape for i in (1, 2)] == [(2, 4, 6, 8), (2, 2, 3, 16)]
  assert named['tokens'].shape == (2, 2, 3, 3)
  np.testing.assert_array_equal(named['share'], 1)
  best = named['tokens'].reshape(2, -1, 3).max(1)
  np.testing.assert_allclose(logits, named['classifier'] + 0.5 * best, atol=1e-5)
  head = variables['params']['head']
  expected = features['cls'] @ head['classifier']['kernel'] + head['classifier']['bias']
  np.testing.assert_allclose(named['classifier'], expected, atol=1e-5)


def test_class_blocks_change_the_class_token_alone():
  options = dict(dim=6, num_heads=2, norm=lambda name: lambda x, train: x)
  mlp = lambda name: lambda x, train: jnp.zeros_like(x)
  block = volo.ClassBlock(attn=class_attention.ClassAttention, mlp=mlp, **options)
  x = _normal(2, 5, 6)
  init = functools.partial(block.init_with_output, train=False)
  y, variables = jax.jit(init)(jax.random.key(0), x)
  np.testing.assert_array_equal(y[:, 1:], x[:, 1:])
  params = variables['params']['attn']
  heads = lambda x, name: (x @ params[name]['kernel']).reshape(2, -1, 2, 3)
  mixed = attention.dot_product_attention(
    heads(x[:, :1], 'query'), heads(x, 'key'), heads(x, 'value')
  )
  expected = x[:, 0] + mixed.reshape(2, 6) @ params['proj']['kernel'] + params['proj']['bias']
  np.testing.assert_allclose(y[:, 0], expected, atol=1e-5)


def test_boxes_lie_within_the_grid_and_have_its_proportions():
  draw = jax.jit(jax.vmap(lambda key: mix_token.box(key, (6, 9), 1.0)))
  boxes = draw(jax.random.split(jax.random.key(0), 200))
  shares = np.asarray(boxes.mean((1, 2)))
  assert shares.min() == 0  # a box without cells
  assert 0.15 < shares.mean() < 0.45  # a half of the cells, but for what is rounded and cut off
  for box in np.asarray(boxes):
    rows, columns = box.any(1), box.any(0)
    np.testing.assert_array_equal(box, rows[:, None] & columns)
    for axis in (rows, columns):
      assert np.abs(np.diff(axis.astype(int))).sum() <= 2  # one piece


def test_exchanged_tokens_come_from_the_partner_and_return():
  x = _normal(3, 5, 7, 2)
  cells = jnp.zeros((2, 3), bool).at[1, 1:].set(True)
  mixed = mix_token.exchange(x, cells)
  expected = np.array(x)
  expected[:, 2:4, 2:6] = x[::-1, 2:4, 2:6]
  np.testing.assert_array_equal(mixed, expected)
  np.testing.assert_array_equal(mix_token.exchange(mixed, cells), x)


@pytest.mark.fast
def test_mixed_tokens_go_back_to_their_image():
  """Without attention a token knows its own patch alone, whoever it is mixed with."""
  fields = dict(depths=(0, 0), class_depth=0, pool='gap', image_size=(64, 64), num_classes=3)
  model, info = va.create_model('volo_d1', **(TINY | fields), mix_token=1.0)
  plain, _ = va.create_model('volo_d1', **(TINY | fields))
  variables, images = _drawn(convert.abstract_variables(model, info)), _normal(4, 64, 64, 3)
  stats = {'mutable': ['batch_stats'], 'train': True, 'method': 'named_logits'}

  @jax.jit
  def run(variables, key):
    return [m.apply(variables, images, rngs={'dropout': key}, **stats)[0] for m in (model, plain)]

  shares = []
  for seed in range(6):
    mixed, expected = run(variables, jax.random.key(seed))
    np.testing.assert_allclose(mixed['tokens'], expected['tokens'], atol=1e-4)
    shares.append(float(mixed['share'][0]))
    np.testing.assert_array_equal(mixed['share'], shares[-1])
    changed = np.abs(mixed['classifier'] - expected['classifier']).max() > 1e-5
    assert changed == (shares[-1] < 1)
  assert min(shares) < 1
  plain_call = functools.partial(model.apply, train=True, rngs={'dropout': jax.random.key(0)})
  with pytest.raises(ValueError, match='mix_token mixes images, and so their labels'):
    jax.eval_shape(functools.partial(plain_call, mutable=True), variables, images)


def test_the_first_stage_is_never_dropped():
  rates = volo.drop_path_rates(0.5, (4, 4, 8, 2))
  assert [len(stage) for stage in rates] == [4, 4, 8, 2]
  flat = [rate for stage in rates for rate in stage]
  np.testing.assert_allclose(flat, [0] * 4 + [0.5 * i / 17 for i in range(4, 18)])


@pytest.mark.parametrize('size', [(16, 16), (33, 61), (239, 50)])
def test_sizes_that_patches_do_not_tile_lose_pixels_at_the_border(size):
  model, shapes = _tiny(size)
  images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
  features = jax.eval_shape(functools.partial(model.apply, method='features'), shapes, images)
  fine = tuple((side + 1) // 2 // 4 for side in size)
  assert features['stage1'].shape[1:3] == fine
  assert features['stage2'].shape[1:3] == tuple(side // 2 for side in fine)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(image_size=(14, 64)), 'images of 14x64 leave no pixel: the smallest side is 16'),
    (dict(pool='mean'), "pool 'mean' is unknown"),
    (dict(class_depth=0), "pool='cls' needs a class token: pass class_depth=2, or pool='gap'"),
    (dict(patch=5), 'patch 5 is not even: the nearest is 6'),
    (dict(num_heads=(5, 12)), r'num_heads \(5, 12\) do not divide the widths'),
  ],
)
def test_options_that_make_no_sense_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    va.create_model('volo_d1', **options)


def _state(grid=(2, 2), class_depth=2, aux=True, bias=False):
  """Returns a state dict of the tiny model under the official names."""
  rng = np.random.default_rng(0)
  state = {'pos_embed': rng.standard_normal((1, *grid, 16))}

  def add(name, *weight, bias=True):
    state[f'{name}.weight'] = rng.standard_normal(weight)
    if bias:
      state[f'{name}.bias'] = rng.standard_normal(weight[0])

  def block(name, dim, parts):
    for norm in ('norm1', 'norm2'):
      add(f'{name}.{norm}', dim)
    add(f'{name}.mlp.fc1', 3 * dim, dim)
    add(f'{name}.mlp.fc2', dim, 3 * dim)
    add(f'{name}.attn.proj', dim, dim)
    for part, times in parts.items():
      add(f'{name}.attn.{part}', times * dim, dim, bias=bias)

  for i, inputs in enumerate((3, 8, 8)):
    add(f'patch_embed.conv.{3 * i}', 8, inputs, *((3, 3) if i else (7, 7)), bias=False)
    add(f'patch_embed.conv.{3 * i + 1}', 8)
    for name in ('mean', 'var'):
      state[f'patch_embed.conv.{3 * i + 1}.running_{name}'] = rng.random(8)
    state[f'patch_embed.conv.{3 * i + 1}.num_batches_tracked'] = np.zeros(())
  add('patch_embed.proj', 8, 8, 4, 4)
  block('network.0.0', 8, {'v': 1})
  add('network.0.0.attn.attn', 81, 8)
  add('network.1.proj', 16, 8, 2, 2)
  block('network.2.0', 16, {'qkv': 3})
  for i in range(class_depth):
    block(f'post_network.{i}', 16, {'q': 1, 'kv': 2})
  if class_depth:
    state['cls_token'] = rng.standard_normal((1, 1, 16))
  add('norm', 16)
  add('head', 3, 16)
  if aux:
    add('aux_head', 3, 16)
  return state


@pytest.mark.parametrize('source', ['official', 'timm'])
def test_weights_load_and_positions_are_resized(source):
  state = _state()
  loaded, large = (
    va.load_reference('volo_d1', state, source=source, image_size=size, **TINY)
    for size in (None, (80, 48))
  )
  backbone = loaded['params']['backbone']
  qkv = state['network.2.0.attn.qkv.weight'].astype(np.float32)
  np.testing.assert_array_equal(
    backbone['stage2']['block00']['attn']['key']['kernel'], qkv[16:32].T
  )
  kv = state['post_network.1.attn.kv.weight'].astype(np.float32)
  value = backbone['class_stage']['block01']['attn']['value']['kernel']
  np.testing.assert_array_equal(value, kv[16:].T)
  table = np.asarray(state['pos_embed'][0], np.float32)
  np.testing.assert_array_equal(backbone['position'], table)
  position = large['params']['backbone']['position']
  assert position.shape == (5, 3, 16)
  for channel in (0, 7):
    expected = bicubic.matrix(2, 5) @ table[:, :, channel] @ bicubic.matrix(2, 3).T
    np.testing.assert_allclose(position[:, :, channel], expected, atol=1e-6)
  # Fine-tuning goes the same way.
  fresh = {'params': _tiny((80, 48))[1]['params'], 'batch_stats': loaded['batch_stats']}
  again, report = transfer.transfer('volo_d1', {k: loaded[k] for k in fresh}, fresh)
  np.testing.assert_array_equal(again['params']['backbone']['position'], position)
  assert report.resized == ('params/backbone/position',)
  assert not report.reinitialised


@pytest.mark.parametrize(
  ('fields', 'missing'),
  [
    (dict(aux=False), 'head/aux_classifier/kernel'),
    (dict(class_depth=0), 'backbone/cls'),
    (dict(bias=True), None),
  ],
)
def test_what_there_is_of_heads_and_biases_is_read_off_the_weights(fields, missing):
  state = _state(**fields)
  # A list of positions is that of a square map.
  state['pos_embed'] = state['pos_embed'].reshape(1, 4, 16)
  params = tree.flatten(va.load_reference('volo_d1', state, source='official', **TINY)['params'])
  assert params['backbone/position'].shape == (2, 2, 16)
  assert missing is None or missing not in params
  assert ('backbone/stage1/block00/attn/value/bias' in params) == ('bias' in fields)
  state['pos_embed'] = np.zeros((1, 5, 16))
  with pytest.raises(ValueError, match='pos_embed has 5 positions, which is no square grid'):
    va.load_reference('volo_d1', state, source='official', **TINY)


def test_multiply_adds():
  model, info = va.create_model('volo_d1')
  assert abstract.macs(model) == pytest.approx(info.flops, rel=0.02)


def test_recipes_are_those_of_the_code():
  config = volo_d1.get_config()
  assert (config.batch_size, config.optimizer.learning_rate) == (1024, 1.6e-3)
  assert (config.optimizer.weight_decay, config.model.options.mix_token) == (0.05, 1.0)
  assert (config.tokens.weight, config.mixing.mixup_alpha) == (0.5, 0.0)
  assert config.data.eval_ops == ('center_crop({size}, ratio=0.96)',)
  rates = [volo_d1.get_config(f'variant=volo_d{i}').model.options.drop_path for i in range(1, 6)]
  assert rates == [0.1, 0.2, 0.5, 0.5, 0.75]
  tuned = volo_d1.get_config('variant=volo_d3,init=run,size=448')
  assert (tuned.image_size, tuned.batch_size, tuned.total) == (448, 240, '40 epochs')
  assert (tuned.optimizer.learning_rate, tuned.optimizer.weight_decay) == (8e-6, 1e-8)
  assert (tuned.schedule.warmup, tuned.schedule.final) == ('5 epochs', 0.5)
