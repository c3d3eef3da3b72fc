"""What is particular to ELSA: its map and its ghost head, and Swin and VOLO with it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vision_attention as va
from configs import elsa_swin_tiny, volo_d1
from tests import abstract, golden
from vision_attention import convert
from vision_attention.attention import elsa
from vision_attention.layers import mlp, norm
from vision_attention.models import elsa_swin, reference, tree, vit
from vision_attention.ops import ghost_attention

TINY = dict(depths=(1, 1), dim=8, num_heads=(1, 2), stages=(1,), kernel=3, window=4)


def _normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def _slow(weights, value, mul, add, *, stride=1, dilation=1):
  """Copies the map for every tap, and sums with a matrix per pixel and channel."""
  kernel = math.isqrt(weights.shape[-1])
  reach, (height, width) = kernel // 2 * dilation, value.shape[1:3]
  padded = jnp.pad(value, ((0, 0), (reach, reach), (reach, reach), (0, 0), (0, 0)))
  taps = jnp.stack(
    [
      padded[:, i * dilation : i * dilation + height, j * dilation : j * dilation + width]
      for i in range(kernel)
      for j in range(kernel)
    ],
    4,
  )[:, ::stride, ::stride]
  matrix = weights[..., None]
  if mul is not None:
    matrix = matrix * mul.reshape(kernel**2, *mul.shape[2:]).transpose(1, 0, 2)
  if add is not None:
    matrix = matrix + add.reshape(kernel**2, *add.shape[2:]).transpose(1, 0, 2)
  return (taps * matrix).sum(4)


@pytest.mark.parametrize(
  ('size', 'kernel', 'stride', 'dilation', 'ghosts'),
  [
    ((4, 5), 3, 1, 1, 'both'),
    ((5, 4), 3, 2, 1, 'add'),
    ((6, 3), 5, 1, 1, 'none'),
    ((5, 6), 3, 1, 2, 'mul'),
  ],
)
def test_the_ghost_head_is_its_definition(size, kernel, stride, dilation, ghosts):
  value = _normal(2, *size, 2, 3)
  grid = [-(-side // stride) for side in size]
  weights = jax.nn.softmax(_normal(2, *grid, 2, kernel**2, seed=1))
  mul = _normal(kernel, kernel, 2, 3, seed=2) if ghosts in ('both', 'mul') else None
  add = _normal(kernel, kernel, 2, 3, seed=3) if ghosts in ('both', 'add') else None
  options = {'stride': stride, 'dilation': dilation}

  @jax.jit
  def both(*args):
    out = []
    for form in (ghost_attention.ghost_attention, _slow):
      y, pull = jax.vjp(functools.partial(form, **options), *args)
      out.append((y, *jax.tree.leaves(pull(_normal(*y.shape, seed=4)))))
    return out

  ours, theirs = both(weights, value, mul, add)
  assert len(ours) == len(theirs) == 3 + (mul is not None) + (add is not None)
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_values_are_not_copied_for_every_tap():
  value, weights = _normal(1, 16, 16, 2, 32), jax.nn.softmax(_normal(1, 16, 16, 2, 49, seed=1))
  memory = []
  for form in (ghost_attention.ghost_attention, _slow):
    loss = lambda w, v, form=form: jnp.square(form(w, v, None, None)).sum()
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(weights, value).compile()
    memory.append(compiled.memory_analysis().temp_size_in_bytes)
  assert memory[0] < memory[1] / 3


def test_shapes_that_make_no_sense_are_refused():
  value = _normal(1, 4, 4, 1, 2)
  with pytest.raises(ValueError, match='8 taps are no square with a centre: pass 9, 25, 49'):
    ghost_attention.ghost_attention(_normal(1, 4, 4, 1, 8), value)
  with pytest.raises(ValueError, match=r'at stride 2 they begin with \(1, 2, 2, 1\)'):
    ghost_attention.ghost_attention(_normal(1, 4, 4, 1, 9), value, stride=2)
  for fields, message in (
    (dict(kernel=4), 'kernel 4 has no centre: pass 5'),
    (dict(mul_power=0.5), 'mul_power 0.5 .* must be a whole number: the nearest is 0'),
    (dict(num_heads=3), '3 heads do not divide width 4'),
  ):
    module = elsa.EnhancedLocalAttention(4, **{'num_heads': 2, **fields})
    with pytest.raises(ValueError, match=message):
      module.init(jax.random.key(0), _normal(1, 4, 4, 4), train=False)


def _layer(x, **fields):
  """Returns a layer's function of its parameters, and parameters that are drawn."""
  module = elsa.EnhancedLocalAttention(6, num_heads=2, kernel=3, group_width=2, **fields)
  shapes = jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), x)
  drawn = {p: _normal(*s.shape, seed=i) for i, (p, s) in enumerate(tree.flatten(shapes).items())}
  params = tree.unflatten(drawn)['params']
  # What the layer gives is seen without the projection that follows.
  params['proj'] = {'kernel': jnp.eye(6), 'bias': jnp.zeros(6)}
  return jax.jit(lambda params, x: module.apply({'params': params}, x, train=False)), params


INNER = (slice(None), slice(1, -1), slice(1, -1))


def test_without_a_ghost_head_outputs_are_means_of_values():
  x = _normal(1, 6, 5, 6)
  apply, params = _layer(x, mul_power=0, add_scale=0.0, qkv_bias=True)
  assert not [name for name in params if 'ghost' in name]
  params['value'] = {'kernel': jnp.zeros((1, 1, 6, 6)), 'bias': jnp.arange(6.0)}
  y = apply(params, x)
  np.testing.assert_allclose(y[INNER], jnp.broadcast_to(jnp.arange(6.0), y[INNER].shape), atol=1e-5)
  # At borders weight falls on zeros.
  assert (y[:, 0] <= jnp.arange(6.0) + 1e-5).all()
  assert y[:, 0, :, 5].min() < 4.9


def test_equal_logits_are_a_box_blur_beside_a_depthwise_convolution():
  x = _normal(1, 6, 5, 6)
  apply, params = _layer(x, mul_power=0)
  params['logits'] = jax.tree.map(jnp.zeros_like, params['logits'])
  params['value'] = {'kernel': jnp.eye(6)[None, None]}
  kernel = params['ghost_add'][:, :, None] + 1 / 9
  expected = jax.lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'), feature_group_count=6
  )
  np.testing.assert_allclose(apply(params, x), expected, atol=1e-5)
  # Without the attention's part a centre tap of one is the identity.
  apply, params = _layer(x)
  params['value'] = {'kernel': jnp.eye(6)[None, None]}
  params['ghost_mul'] = jnp.zeros((3, 3, 6))
  params['ghost_add'] = jnp.zeros((3, 3, 6)).at[1, 1].set(1.0)
  np.testing.assert_allclose(apply(params, x), x, atol=1e-6)


def test_the_layer_moves_with_the_map_but_at_borders():
  x = jnp.pad(_normal(1, 9, 9, 6), ((0, 0), (4, 4), (4, 4), (0, 0)))
  apply, params = _layer(x)
  moved = apply(params, jnp.roll(x, (2, 3), (1, 2)))
  rolled = jnp.roll(apply(params, x), (2, 3), (1, 2))
  np.testing.assert_allclose(moved[:, 3:-1, 4:-1], rolled[:, 3:-1, 4:-1], atol=1e-4)


def test_the_map_sums_to_one_and_factors_have_a_power():
  x = _normal(2, 4, 3, 6)
  module = elsa.EnhancedLocalAttention(6, num_heads=2, kernel=3)
  init = functools.partial(module.init_with_output, train=False, mutable=True)
  _, aux = jax.jit(init)(jax.random.key(0), x)
  [weights] = aux['intermediates']['attention']
  assert weights.shape == (2, 2, 4, 3, 9)
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
  square, params = _layer(x, mul_power=2, add_scale=0.5)
  plain, _ = _layer(x)
  other = {
    **params,
    'ghost_mul': params['ghost_mul'] ** 2,
    'ghost_add': params['ghost_add'] * 0.5,
  }
  np.testing.assert_allclose(square(params, x), plain(other, x), atol=1e-4)


_GOLDENS = {
  'elsa_lam1_gam1_k5': dict(kernel=5, qkv_bias=True, scale='rsqrt'),
  'elsablock_defaults_k5': dict(kernel=5),
}


@pytest.mark.parametrize('name', _GOLDENS)
def test_layers_give_what_the_official_ones_give(name):
  case = golden.load(golden.FOLDER / 'layers' / f'elsa_block__{name}.npz')
  block = name == 'elsablock_defaults_k5'
  prefix = 'layer.' if block else 'layer.attn.'
  state = elsa_swin._prepare({prefix + key: value for key, value in case.state().items()})
  rule, kinds = reference.Rule, reference
  rules = [
    *elsa_swin.attention_rules(r'layer\.attn\.', 'attn', {'mul_power': 1}),
    rule(r'layer\.attn\.proj', 'attn/proj', kinds.DENSE),
    rule(r'layer\.(norm\d)', '{0}', kinds.NORM),
    rule(r'layer\.mlp\.fc1', 'mlp/expand', kinds.DENSE),
    rule(r'layer\.mlp\.fc2', 'mlp/project', kinds.DENSE),
  ]
  make = functools.partial(elsa.EnhancedLocalAttention, dim=48, num_heads=3, **_GOLDENS[name])
  module = make()
  if block:
    perceptron = functools.partial(mlp.Mlp, 144, 'gelu_exact')
    layer_norm = functools.partial(norm.LayerNorm, 1e-5)
    module = vit.EncoderBlock(48, 3, make, perceptron, layer_norm, drop_path=0.0)
  x = jnp.asarray(case.images())
  shapes = jax.eval_shape(functools.partial(module.init, train=False), jax.random.key(0), x)
  target = shapes if block else {'params': {'attn': shapes['params']}}
  params = convert._convert('layer', state, rules, target)['params']
  variables = {'params': params if block else params['attn']}
  y = np.asarray(jax.jit(functools.partial(module.apply, train=False))(variables, x))
  expected = case.outputs['output']
  error = np.abs(y.ravel()[:: case.meta['output_stride']] - expected).max()
  assert error <= 2e-3 * np.abs(expected).mean()


@pytest.mark.parametrize(
  ('name', 'options', 'expected'),
  [
    ('elsa_volo_d1', dict(kernel=3), 26_532_520),
    ('elsa_volo_d1', dict(kernel=7), 26_881_640),
  ],
)
def test_parameters_with_other_kernels(name, options, expected):
  model, info = va.create_model(name, **options)
  params = convert.abstract_variables(model, info)['params']
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == expected


def test_multiply_adds():
  model, info = va.create_model('elsa_swin_tiny')
  macs = abstract.macs(model) / 1e9
  # The layers' as PyTorch counts them, and the depthwise convolutions of the ghost heads.
  assert macs == pytest.approx(4.656, rel=0.02)
  assert macs == pytest.approx(info.flops / 1e9, rel=0.005)


def _state(ghost=(1, 8, 3, 3)):
  """Returns a state dict of the tiny model under the official names."""
  rng = np.random.default_rng(0)
  state = {}

  def add(name, *weight, bias=True):
    state[f'{name}.weight'] = rng.standard_normal(weight)
    if bias:
      state[f'{name}.bias'] = rng.standard_normal(weight[0])

  add('patch_embed.proj', 8, 3, 4, 4)
  add('patch_embed.norm', 8)
  for i, dim in enumerate((8, 16)):
    block = f'layers.{i}.blocks.0.'
    for part in ('norm1', 'norm2'):
      add(block + part, dim)
    add(block + 'attn.post_proj', dim, dim)
    add(block + 'mlp.fc1', 4 * dim, dim)
    add(block + 'mlp.fc2', dim, 4 * dim)
  add('layers.0.blocks.0.attn.pre_proj', 16, 8, 1, 1)
  add('layers.0.blocks.0.attn.attn.0', 4, 4, 3, 3)
  add('layers.0.blocks.0.attn.attn.2', 9, 4, 1, 1)
  if ghost:
    state['layers.0.blocks.0.attn.ghost_head'] = rng.standard_normal(ghost)
  add('layers.1.blocks.0.attn.pre_proj', 48, 16)
  state['layers.1.blocks.0.attn.rb'] = rng.standard_normal((2, 49))
  state['layers.1.blocks.0.attn.relative_id'] = np.zeros(256)
  add('layers.0.downsample.norm', 32)
  add('layers.0.downsample.reduction', 16, 32, bias=False)
  add('norm', 16)
  add('head', 5, 16)
  return state


def _load(state, **options):
  return va.load_reference('elsa_swin_tiny', state, source='official', **(TINY | options))


def test_weights_load_with_window_attention_in_another_order():
  state = _state()
  params = _load(state)['params']['backbone']
  local, windows = (params[f'stage{i}']['block00']['attn'] for i in (1, 2))
  single = {key: value.astype(np.float32) for key, value in state.items()}
  fused = single['layers.0.blocks.0.attn.pre_proj.weight'][:, :, 0, 0]
  for name, part in (('query', fused[:4]), ('key', fused[4:8]), ('value', fused[8:])):
    np.testing.assert_array_equal(local[name]['kernel'][0, 0], part.T)
  ghost = single['layers.0.blocks.0.attn.ghost_head'][0]
  np.testing.assert_array_equal(local['ghost_add'], ghost.transpose(1, 2, 0))
  fused = single['layers.1.blocks.0.attn.pre_proj.weight']
  for name, part in (('value', fused[:16]), ('query', fused[16:32]), ('key', fused[32:])):
    np.testing.assert_array_equal(windows[name]['kernel'], part.T)
  # Query two rows below and one column left of the key; theirs is key minus query.
  theirs = single['layers.1.blocks.0.attn.rb'][1, (-2 + 3) * 7 + (1 + 3)]
  assert windows['relative_position'][1, 2 + 3, -1 + 3] == theirs


@pytest.mark.parametrize(
  ('ghost', 'options', 'names'),
  [
    ((2, 1, 8, 3, 3), {}, {'ghost_mul', 'ghost_add'}),
    ((1, 8, 3, 3), dict(mul_power=1, add_scale=0.0), {'ghost_mul'}),
    ((1, 8, 3, 3), {}, {'ghost_add'}),
    (None, {}, set()),
  ],
)
def test_what_there_is_of_ghost_heads_is_read_off_the_weights(ghost, options, names):
  params = tree.flatten(_load(_state(ghost), **options)['params'])
  assert {path.split('/')[-1] for path in params if 'ghost' in path} == names


def test_only_the_tables_of_windows_depend_on_the_resolution():
  small, large = (_load(_state(), window_policy='scale', image_size=size) for size in (32, 56))
  shapes = [jax.tree.map(np.shape, v['params']) for v in (small, large)]
  first, second = (tree.flatten(s) for s in shapes)
  assert [path for path in first if first[path] != second[path]] == [
    'backbone/stage2/block00/attn/relative_position'
  ]


@pytest.mark.parametrize(
  ('name', 'size'),
  [('elsa_swin_tiny', (33, 61)), ('elsa_swin_tiny', (3, 7)), ('elsa_volo_d1', (40, 23))],
)
def test_any_image_size_is_taken(name, size):
  options = TINY
  if name == 'elsa_volo_d1':
    options = dict(depths=(1, 1), dims=(8, 16), num_heads=(1, 2), stem_dim=8)
  model, info = va.create_model(name, image_size=size, num_classes=3, **options)
  images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
  shapes = convert.abstract_variables(model, info)
  assert jax.eval_shape(model.apply, shapes, images).shape == (2, 3)


def test_recipes_are_those_of_the_code():
  config = elsa_swin_tiny.get_config('variant=elsa_swin_base')
  assert (config.batch_size, config.optimizer.learning_rate, config.total) == (
    1024,
    1e-3,
    '310 epochs',
  )
  assert (config.model.options.drop_path, config.ema.decay) == (0.5, 0.99992)
  assert (config.mixing.mixup_alpha, config.erasing.prob, config.optimizer.clip_norm) == (
    0.8,
    0.25,
    5.0,
  )
  assert config.data.eval_ops == ('center_crop({size}, ratio=0.9)',)
  assert elsa_swin_tiny.get_config().ema.decay == 0
  volo = volo_d1.get_config('variant=elsa_volo_d2')
  assert (volo.model.name, volo.model.options.drop_path) == ('elsa_volo_d2', 0.2)
