"""Any operator in any backbone: every pair that makes sense runs and learns, the others say why."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import vision_attention as va
from vision_attention.attention import operators
from vision_attention.models import transfer, tree

SIZE = 32
# Every backbone with maps of at least 4x4 positions, and both kinds of residual block.
HOSTS = {
  'bottleneck': ('resnet_50', dict(depths=(1, 1), width=16, stem='small', attn_stages=(2,))),
  'basic': ('resnet_18', dict(depths=(1, 1), width=16, stem='small', attn_stages=(2,))),
  'vit': ('vit_ti8', dict(dim=32, depth=1, mlp_dim=32, num_heads=4, pool='gap')),
  'coatnet': (
    'coatnet_0',
    dict(depths=(1, 1), dims=(16, 32), stem_dim=8, head_dim=8, layout='CT', strides=(2, 2)),
  ),
}
# Softmax cannot see what shifts all logits of a query alike.
BLIND = ('key/bias', 'key_norm/bias', 'position/bias', 'logits_norm/bias')


def _create(host: str, attn, **more):
  name, options = HOSTS[host]
  return va.create_model(name, num_classes=3, image_size=SIZE, attn=attn, **(options | more))[0]


# Every pair is traced in the plain suite; those of one host are run, the others exhaustively.
PAIRS = [(name, host) for name in operators.list_operators() for host in HOSTS]


@pytest.mark.parametrize(('name', 'host'), [pair for pair in PAIRS if pair[1] != 'vit'])
def test_every_operator_has_a_gradient_in_every_backbone(name, host):
  model = _create(host, name)
  images = jnp.zeros((4, SIZE, SIZE, 3))
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  assert [path for path in tree.flatten(shapes['params']) if '/attn/' in path]

  def loss(variables):
    rngs = {'dropout': jax.random.key(3)}
    logits, _ = model.apply(variables, images, train=True, rngs=rngs, mutable=['batch_stats'])
    return logits.sum()

  grads = jax.eval_shape(jax.grad(loss), shapes)
  assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, shapes)


@pytest.mark.parametrize(
  ('name', 'host'),
  [
    pytest.param(*pair, marks=[] if pair[1] == 'vit' else [pytest.mark.exhaustive])
    for pair in PAIRS
  ],
)
def test_every_operator_learns_in_every_backbone(name, host):
  model = _create(host, name)
  images = jax.random.normal(jax.random.key(1), (4, SIZE, SIZE, 3))
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  paths = tree.flatten(shapes['params'])
  assert [path for path in paths if '/attn/' in path]
  # Drawn, not initialised: zero-initialised branches would hide what lies behind them.
  rng = np.random.default_rng(0)
  params = tree.unflatten(
    {
      path: (path.endswith('scale') + 0.2 * rng.standard_normal(leaf.shape)).astype(np.float32)
      for path, leaf in paths.items()
    }
  )
  stats = {'batch_stats': jax.tree.map(lambda x: jnp.ones(x.shape), shapes.get('batch_stats', {}))}

  @jax.jit
  def gradients(params):
    def loss(params):
      logits, _ = model.apply(
        {'params': params, **stats},
        images,
        train=True,
        rngs={'dropout': jax.random.key(3)},
        mutable=['batch_stats'],
      )
      return jnp.square(logits - jnp.arange(3)).sum()

    return jax.value_and_grad(loss)(params)

  value, grads = gradients(params)
  assert np.isfinite(value)
  for path, grad in tree.flatten(grads).items():
    assert np.isfinite(grad).all(), path
    if '/attn/' in path and not path.endswith(BLIND):
      assert np.abs(grad).max() > 0, path


# Channels compete in these, or nothing does, and not positions.
WITHOUT_MAPS = {'gnconv', 'sk', 'splat'}


@pytest.mark.parametrize('name', sorted({*operators.list_operators()} - WITHOUT_MAPS))
def test_attention_maps_can_be_taken_out(name):
  model = _create('vit', name)
  images = jax.random.normal(jax.random.key(1), (2, SIZE, SIZE, 3))
  variables = jax.jit(model.init)(jax.random.key(0), images)
  apply = jax.jit(functools.partial(model.apply, mutable=['intermediates']))
  _, state = apply(variables, images)
  [(path, [weights])] = tree.flatten(state['intermediates']).items()
  assert path.endswith('attn/attention')
  # [b, heads, queries, keys], or [b, heads, h, w, taps] of local attention; 4x4 positions.
  assert weights.ndim in (4, 5)
  assert weights.shape[0] == 2
  assert weights.dtype == jnp.float32
  if weights.ndim == 5:
    assert weights.shape[2:4] == (4, 4)
  if name != 'san_patchwise':  # whose weights are no softmax
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


def test_a_name_a_mapping_and_a_class_are_the_same_operator():
  images = jnp.zeros((1, SIZE, SIZE, 3))
  bound = functools.partial(operators.operator('halo'), block=2, halo=1)
  shapes = [
    jax.eval_shape(_create('vit', attn).init, jax.random.key(0), images)
    for attn in ({'name': 'halo', 'block': 2, 'halo': 1}, bound)
  ]
  assert jax.tree.map(jnp.shape, shapes[0]) == jax.tree.map(jnp.shape, shapes[1])


def test_pairs_that_make_no_sense_are_refused_with_the_reason():
  for name in operators.list_operators():
    if operators.trait(operators.operator(name), 'needs_map', False):
      with pytest.raises(ValueError, match='class token has no place in one'):
        va.create_model('vit_ti16', attn=name)
  with pytest.raises(ValueError, match="operator 'hallo' is unknown: did you mean 'halo'"):
    va.create_model('resnet_50', attn='hallo')
  with pytest.raises(ValueError, match="operator 'cbam' is unknown"):
    va.create_model('resnet_50', attn='cbam')


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ({'name': 'halo', 'stride': 3}, 'stride 3 of halo attention must be 1 or 2'),
    ({'name': 'pooling', 'kernel_size': 2}, 'kernel_size 2 has no centre: pass 3 or 1'),
    (
      {'name': 'convolutional_projection', 'kernel': 4},
      'kernel 4 has no centre: pass 5 or 3',
    ),
  ],
)
def test_fields_that_an_operator_cannot_take_are_refused(spec, message):
  operator = operators.operator(spec)(dim=16, num_heads=2)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(
      lambda x: operator.init(jax.random.key(0), x, train=False), jnp.zeros((1, 24, 24, 16))
    )


@pytest.mark.parametrize(
  ('name', 'options', 'spec', 'side'),
  [
    ('nat_mini', {'kernel': 5}, {'name': 'neighborhood', 'dilation': 1}, 9),
    ('swin_tiny', {'window': 4}, {'name': 'window', 'shift': (0, 0)}, 7),
  ],
)
def test_a_field_that_is_given_leaves_the_others_to_the_backbone(name, options, spec, side):
  """The side of a table tells the kernel, or window, that a backbone has bound."""
  model, info = va.create_model(name, image_size=128, attn=spec, **options)
  images = jnp.zeros((1, *info.image_size, 3))
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)['params']
  found = tree.flatten(shapes).items()
  tables = [x.shape for path, x in found if '/attn/' in path and len(x.shape) == 3]
  assert tables
  assert all(side in shape for shape in tables), tables


@pytest.mark.parametrize('name', ['relative', 'bottleneck', 'augmented'])
def test_tables_of_operators_are_resized_in_any_backbone(name):
  large, small = (
    jax.eval_shape(
      va.create_model('vit_ti8', pool='gap', attn=name, image_size=size, depth=1, dim=96)[0].init,
      jax.random.key(0),
      jnp.zeros((1, size, size, 3)),
    )
    for size in (48, 32)
  )
  loaded = jax.tree.map(lambda x: np.ones(x.shape, np.float32), small)
  variables, report = transfer.transfer('vit_ti8', loaded, large)
  assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, large)
  assert any('/attn/' in path for path in report.resized)


def test_traits_are_declared_by_the_class_alone():
  """A misspelt trait would be ignored: those of every class are the known ones."""
  known = {'needs_map', 'norm_after', 'act_after', 'stages', 'placement'}
  listed = [*operators.list_operators(), *operators.list_modules()]
  for name in listed:
    cls = operators.module(name)
    assert issubclass(cls, nn.Module)
    hints = getattr(cls, '__annotations__', {})
    traits = {key for key, hint in hints.items() if 'ClassVar' in str(hint)}
    assert traits <= known, (name, traits - known)
