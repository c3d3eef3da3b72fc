"""Attention as convolution: the construction is exact, and scores are functions of offsets."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax import lax

import vision_attention as va
from configs import conv_attention_quadratic
from tests import abstract, golden
from vision_attention import convert
from vision_attention.attention import conv_attention
from vision_attention.models import registry, tree
from vision_attention.ops import patches, quadratic_attention
from vision_attention.training import optimizer

# Every shape is compiled.
FEW = hypothesis.settings(max_examples=5)


def _random(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def _conv(x, kernel, *, dilation, groups, padding, stride=1):
  """`lax`'s convolution of an image that zeros or repeated borders surround."""
  pads = [((k - 1) // 2 * dilation, k // 2 * dilation) for k in kernel.shape[:2]]
  mode = {'zeros': 'constant', 'replicate': 'edge'}[padding]
  return lax.conv_general_dilated(
    jnp.pad(x, ((0, 0), *pads, (0, 0)), mode=mode),
    kernel,
    (stride, stride),
    'VALID',
    rhs_dilation=(dilation, dilation),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
  )


def _attend(x, kernel, *, padding, stride=1, bias=0.0, **options):
  """The attention layer that the construction makes of a kernel."""
  made = quadratic_attention.conv_to_attention(kernel, **options)
  outputs = kernel.shape[-1]
  layer = conv_attention.QuadraticAttention(
    outputs,
    len(made.spreads),
    stride=stride,
    margin=made.margin if padding == 'zeros' else 0,
  )
  proj = {'kernel': made.kernel, 'bias': jnp.full(outputs, bias)}
  params = {'centers': made.centers, 'spreads': made.spreads, 'proj': proj}
  shapes = jax.eval_shape(functools.partial(layer.init, train=False), jax.random.key(0), x)
  assert jax.tree.map(jnp.shape, shapes['params']) == jax.tree.map(jnp.shape, params)
  return jax.jit(functools.partial(layer.apply, train=False))({'params': params}, x)


@FEW
@hypothesis.given(
  st.sampled_from([1, 3, 5]),
  st.sampled_from([1, 2]),
  st.sampled_from(['zeros', 'replicate']),
  st.integers(0, 99),
)
def test_any_convolution_is_attention(size, dilation, padding, seed):
  x, kernel = _random(2, 7, 9, 3, seed=seed), _random(size, size, 3, 4, seed=seed + 1)
  y = _attend(x, kernel, padding=padding, dilation=dilation)
  expected = _conv(x, kernel, dilation=dilation, groups=1, padding=padding)
  np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize('padding', ['zeros', 'replicate'])
@pytest.mark.parametrize(
  ('shape', 'options'),
  [
    ((3, 1, 4, 2), {}),
    ((2, 4, 4, 2), {}),
    ((3, 3, 2, 6), dict(groups=2)),
    ((3, 3, 1, 4), dict(groups=4)),
    ((3, 3, 4, 4), dict(stride=2)),
    ((3, 2, 4, 4), dict(stride=2, dilation=2)),
  ],
)
def test_kernels_of_all_shapes_groups_and_strides_are_attention(shape, options, padding):
  x, kernel = _random(2, 6, 7, 4), _random(*shape, seed=1)
  y = _attend(x, kernel, padding=padding, bias=0.5, **options)
  expected = _conv(x, kernel, padding=padding, **dict(dilation=1, groups=1) | options)
  np.testing.assert_allclose(y, expected + 0.5, atol=1e-5)


def test_the_error_falls_like_the_exponential_of_alpha():
  """The other of two neighbours weighs `exp(-alpha)`, and a tap has two on either axis."""
  x, kernel = _random(1, 9, 9, 2), _random(3, 3, 2, 2, seed=1)
  expected = _conv(x, kernel, dilation=1, groups=1, padding='replicate')
  errors = [
    float(jnp.abs(_attend(x, kernel, padding='replicate', alpha=alpha) - expected).max())
    for alpha in (2.0, 4.0, 6.0)
  ]
  for near, far in zip(errors[1:], errors, strict=False):
    assert math.log(far / near) == pytest.approx(2.0, abs=0.35)
  with pytest.raises(ValueError, match=r'alpha 0\.0 must be positive'):
    quadratic_attention.conv_to_attention(kernel, alpha=0.0)
  with pytest.raises(ValueError, match='3 groups do not divide 2 outputs'):
    quadratic_attention.conv_to_attention(kernel, groups=3)


@pytest.mark.parametrize('name', ['gaussian_isotropic', 'learned2d_position'])
def test_layers_are_those_of_the_authors(name):
  case = golden.load(golden.FOLDER / f'layers/conv_attention__{name}.npz')
  state, x = case.state(), jnp.asarray(case.images())
  params = {'proj': {'kernel': state['value.weight'].T, 'bias': state['value.bias']}}
  if name == 'gaussian_isotropic':
    params |= {kind: state[f'attention_{kind}'] for kind in ('centers', 'spreads')}
    layer = conv_attention.QuadraticAttention(32, 9)
  else:
    # The authors' rows are the second axis of a map.
    for ours, theirs in (('height', 'col'), ('width', 'row')):
      params[f'{ours}_table'] = state[f'{theirs}_embeddings.weight']
      params[f'{ours}_key'] = state[f'head_keys_{theirs}.weight'].T
    layer = conv_attention.LearnedPositionAttention(32, 9)
  y = layer.apply({'params': params}, x, train=False)
  thin = np.asarray(y).ravel()[:: case.meta['output_stride']]
  np.testing.assert_allclose(thin, case.outputs['output'], atol=2e-5)


def test_the_paper_s_encoding_gives_the_same_scores_but_for_a_constant():
  centers = _random(4, 2)
  vectors = quadratic_attention.encoding_vectors(centers, alpha=0.7)
  theirs = jnp.einsum('yxe,ne->nyx', quadratic_attention.encoding(3, 4), vectors)
  spreads = jnp.full(4, 1.4**0.5)
  rows, columns = (
    quadratic_attention.axis_scores(centers[:, i], spreads, n) for i, n in ((0, 3), (1, 4))
  )
  constant = theirs - (rows[:, :, None] + columns[:, None])
  np.testing.assert_allclose(constant, constant[:, :1, :1] * jnp.ones_like(constant), atol=1e-4)


LAYERS = {
  'quadratic': conv_attention.QuadraticAttention(6, 3),
  'general': conv_attention.QuadraticAttention(6, 3, isotropic=False),
  'learned': conv_attention.LearnedPositionAttention(6, 3),
  'content': conv_attention.LearnedPositionAttention(6, 3, content=True),
}


def _run(layer, x, params=None, **options):
  """Returns the parameters, the output and the map of attention."""
  if params is None:
    init = jax.jit(functools.partial(layer.init, train=False))
    params = init(jax.random.key(1), x)['params']
  apply = functools.partial(layer.apply, mutable=['intermediates'], **{'train': False} | options)
  y, state = jax.jit(apply)({'params': params}, x)
  return params, y, state['intermediates']['attention'][0]


@pytest.mark.parametrize('name', LAYERS)
def test_maps_are_distributions_of_the_offset_and_give_the_output(name):
  x = _random(2, 4, 5, 4)
  params, y, weights = _run(LAYERS[name], x)
  assert weights.shape == (2, 3, 20, 20)
  np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
  means = jnp.einsum('bnqk,bkc->bqnc', weights, x.reshape(2, 20, 4)).reshape(2, 20, 12)
  expected = means @ params['proj']['kernel'] + params['proj']['bias']
  np.testing.assert_allclose(y.reshape(2, 20, 6), expected, atol=1e-5)
  # Nothing is sown, and no joint weights are formed, unless they are asked for.
  plain = LAYERS[name].apply({'params': params}, x, train=False)
  np.testing.assert_allclose(plain, y, atol=1e-5)
  # Ratios of two weights depend on the two offsets alone: move query and keys together.
  logits = jnp.log(weights).reshape(2, 3, 4, 5, 4, 5)
  one = logits[:, :, 0, 0, :3, :4] - logits[:, :, 0, 0, :1, :1]
  two = logits[:, :, 1, 1, 1:, 1:] - logits[:, :, 1, 1, 1:2, 1:2]
  assert bool(jnp.allclose(one, two, atol=1e-3)) == (name != 'content')


@pytest.mark.parametrize('name', LAYERS)
def test_a_constant_image_gives_a_constant_map(name):
  _, y, _ = _run(LAYERS[name], jnp.broadcast_to(_random(2, 1, 1, 4), (2, 3, 4, 4)))
  np.testing.assert_allclose(y, y[:, :1, :1] * jnp.ones_like(y), atol=1e-5)


def test_wide_gaussians_average_and_general_ones_can_be_isotropic():
  x = _random(2, 4, 5, 4)
  isotropic, general = LAYERS['quadratic'], LAYERS['general']
  params, y, weights = _run(isotropic, x)
  factors = params['spreads'][:, None, None] * jnp.eye(2)
  rotated = factors @ jnp.asarray([[0.6, -0.8], [0.8, 0.6]])  # G G^T does not see a rotation
  for same in (factors, rotated):
    _, z, other = _run(general, x, params | {'spreads': same})
    np.testing.assert_allclose(z, y, atol=1e-5)
    np.testing.assert_allclose(other, weights, atol=1e-5)
  _, _, flat = _run(isotropic, x, params | {'spreads': jnp.zeros(3)})
  np.testing.assert_allclose(flat, 1 / 20, rtol=1e-5)


@pytest.mark.parametrize('name', ['quadratic', 'general'])
def test_windows_leave_out_what_is_far(name):
  x = _random(1, 5, 6, 4)
  params, _, full = _run(LAYERS[name], x)
  _, _, near = _run(LAYERS[name].clone(window=3), x, params)
  rows, columns = np.divmod(np.arange(30), 6)
  inside = (abs(rows[:, None] - rows) <= 1) & (abs(columns[:, None] - columns) <= 1)
  expected = np.where(inside, full, 0)
  np.testing.assert_allclose(near, expected / expected.sum(-1, keepdims=True), atol=1e-5)
  with pytest.raises(ValueError, match='window 4 has no centre: pass 5'):
    _run(LAYERS[name].clone(window=4), x, params)


@pytest.mark.parametrize('name', LAYERS)
def test_strides_take_some_of_the_queries(name):
  x = _random(2, 5, 4, 4)
  params, y, weights = _run(LAYERS[name], x)
  _, z, fewer = _run(LAYERS[name].clone(stride=2), x, params)
  np.testing.assert_allclose(z, y[:, ::2, ::2], atol=1e-5)
  rows = weights.reshape(2, 3, 5, 4, 20)[:, :, ::2, ::2].reshape(2, 3, 6, 20)
  np.testing.assert_allclose(fewer, rows, atol=1e-6)


def test_dropout_of_weights_is_one_for_the_batch():
  x = jnp.broadcast_to(_random(1, 3, 3, 4), (2, 3, 3, 4))
  layer = LAYERS['quadratic'].clone(attention_dropout=0.5)
  params, still, _ = _run(layer, x)
  _, y, _ = _run(layer, x, params, train=True, rngs={'dropout': jax.random.key(3)})
  assert jnp.abs(y - still).max() > 1e-2
  np.testing.assert_allclose(y[0], y[1], atol=1e-6)


def test_vectors_of_a_large_map_serve_a_small_one():
  layer = conv_attention.LearnedPositionAttention(6, 3, max_size=6)
  params, _, weights = _run(layer, _random(1, 6, 6, 4))
  _, _, small = _run(layer, _random(1, 4, 3, 4), params)
  _, _, again = _run(layer.clone(max_size=None), _random(1, 4, 3, 4), params)
  np.testing.assert_array_equal(small, again)
  part = weights.reshape(1, 3, 6, 6, 6, 6)[:, :, :4, :3, :4, :3].reshape(small.shape)
  np.testing.assert_allclose(small, part / part.sum(-1, keepdims=True), atol=1e-5)
  with pytest.raises(ValueError, match='height 7 has offsets beyond max_size=6: pass max_size=7'):
    _run(layer, _random(1, 7, 3, 4), params)


@FEW
@hypothesis.given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_blocks_of_pixels_come_back(patch, height, width, dim):
  x = _random(2, height * patch, width * patch, dim)
  y = patches.space_to_depth(x, patch)
  assert y.shape == (2, height, width, patch * patch * dim)
  np.testing.assert_array_equal(y[0, 0, 0, -dim:], x[0, patch - 1, patch - 1])
  np.testing.assert_array_equal(patches.depth_to_space(y, patch), x)


def test_degenerate_heads():
  isotropic = quadratic_attention.degenerate_heads(jnp.asarray([1.0, 1e-3, -0.5]))
  np.testing.assert_array_equal(isotropic, [0, 1, 0])
  matrices = jnp.stack([jnp.eye(2), jnp.diag(jnp.asarray([1.0, 0.02])), 1e-3 * jnp.eye(2)])
  np.testing.assert_array_equal(quadratic_attention.degenerate_heads(matrices), [0, 1, 1])


def test_the_baseline_is_a_resnet_18_with_a_small_stem():
  assert abstract.count('resnet_18', stem='small', num_classes=10, image_size=32) == 11_173_962


def test_multiply_adds_of_linear_layers_are_the_published_ones():
  """The profiler of the paper does not see the means, which cost `N (h + w) heads dim` here."""
  tokens, dim = 256, 400
  for name, means, published in (
    ('conv_attention_quadratic', 9 * tokens * 32 * dim, 3.09e9),
    ('conv_attention_quadratic_general', 9 * tokens**2 * dim, 3.09e9),
    # Queries and keys are linear layers, the product of the two is not.
    ('conv_attention_learned_content', 2 * 9 * tokens**2 * dim, 7.5e9),
  ):
    model, _ = va.create_model(name, depth=1)
    whole = abstract.macs(model, image_size=32)
    embed, classifier = tokens * 12 * dim, dim * 10
    linear = 6 * (whole - means - embed - classifier) + embed + classifier
    assert linear == pytest.approx(published, rel=0.005), name
    assert 2 * linear == pytest.approx(2 * registry.variant_of(name).flops, rel=0.005), name


def test_weights_say_how_many_heads_each_layer_has_left():
  variant = registry.variant_of('conv_attention_learned')
  infer = registry.references_of('conv_attention_learned')['official'].infer
  layer = 'encoder.layer.{}.attention.self.'
  state = {
    'features_upscale.weight': np.zeros((8, 48)),
    'encoder.layer.0.intermediate.dense.bias': np.zeros(5),
    layer.format(0) + 'value.weight': np.zeros((8, 24)),
    layer.format(1) + 'value.weight': np.zeros((8, 16)),
    layer.format(0) + 'row_embeddings.weight': np.zeros((15, 6)),
  }
  assert infer(state, variant.options) == {
    'num_classes': 0,
    'dim': 8,
    'depth': 2,
    'num_heads': [3, 2],
    'mlp_dim': 5,
    'patch': 4,
    'attn': {'name': 'learned_position', 'max_size': 8, 'position_dim': 6},
  }
  options = dict(dim=8, depth=2, num_heads=[3, 2], image_size=8)
  model, info = va.create_model('conv_attention_quadratic', **options)
  shapes = tree.flatten(convert.abstract_variables(model, info)['params']['backbone'])
  assert shapes['stage1/block00/attn/centers'].shape == (3, 2)
  assert shapes['stage1/block01/attn/proj/kernel'].shape == (16, 8)


def test_impossible_options_are_refused():
  create = functools.partial(va.create_model, 'conv_attention_quadratic')
  with pytest.raises(ValueError, match='side 33: the nearest sizes are 32 and 34'):
    create(image_size=33)
  with pytest.raises(ValueError, match='one per layer, of which there are 6'):
    create(num_heads=(9, 9))
  with pytest.raises(ValueError, match='patch 2 does not divide a map of 3x4'):
    patches.space_to_depth(jnp.zeros((1, 3, 4, 1)), 2)
  with pytest.raises(ValueError, match='6 channels are not those of 2x2 pixels'):
    patches.depth_to_space(jnp.zeros((1, 3, 4, 6)), 2)


def test_the_recipe_spares_gaussians_the_decay_and_the_baseline_nothing():
  config = conv_attention_quadratic.get_config()
  model, info = va.create_model(config.model.name, dim=8, depth=1)
  params = convert.abstract_variables(model, info)['params']
  decays = tree.flatten(optimizer.matches(params, config.optimizer.weight_decay_mask))
  spared = {path.split('/')[-1] for path, decay in decays.items() if not decay}
  assert spared == {'centers', 'spreads'}
  assert (config.total, config.schedule.warmup) == ('300 epochs', '15 epochs')
  assert config.optimizer.learning_rate == 0.1
  baseline = conv_attention_quadratic.get_config('variant=resnet_18')
  assert baseline.model.options.stem == 'small'
  assert baseline.optimizer.weight_decay_mask == ('.*',)
  tuned = conv_attention_quadratic.get_config('init=runs/pruned')
  assert (tuned.total, tuned.optimizer.learning_rate) == ('100 epochs', 0.01)
  with pytest.raises(ValueError, match="variant='vit_s16' is not of this recipe"):
    conv_attention_quadratic.get_config('variant=vit_s16')
