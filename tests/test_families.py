"""A small model of every family: what learns, what moves, what remat and bfloat16 change."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vision_attention as va
from vision_attention.models import tree

# Small enough to run, with every kind of block of its family.
TINY = {
  'lesa_resnet_50': dict(
    depths=(1, 2), strides=(1, 2), stages=(2,), first_conv=(), width=8, num_heads=2, image_size=32
  ),
  'acmix_resnet_26': dict(depths=(1, 1), width=8, image_size=32),
  'san10_pairwise': dict(depths=(1, 1), dims=(32, 32), kernels=(3, 3), image_size=16),
  'acmix_san10': dict(depths=(1, 1), dims=(32, 32), kernels=(3, 3), image_size=16),
  'acmix_pvt_tiny': dict(
    depths=(1, 1),
    dims=(8, 16),
    num_heads=(1, 2),
    mlp_ratios=(2, 2),
    reductions=(2, 1),
    image_size=32,
    drop_path=0.0,
  ),
  'pvt_tiny': dict(
    depths=(1, 1),
    dims=(8, 16),
    num_heads=(1, 2),
    mlp_ratios=(2, 2),
    reductions=(2, 1),
    pool='gap',
    image_size=32,
  ),
  'resnet_50': dict(depths=(1, 1), width=8, image_size=32),
  'resnet_34': dict(depths=(1, 2), width=8, image_size=32),
  'resnetrs50': dict(depths=(1, 1), width=16, image_size=32),
  'skresnet18': dict(depths=(1, 1), width=16, image_size=32),
  'cbam_resnet_50': dict(depths=(1, 1), width=16, image_size=32),
  'vit_ti16': dict(dim=24, depth=2, mlp_dim=32, image_size=32, pre_logits=True),
  'vit_s16': dict(dim=24, depth=1, mlp_dim=32, num_heads=3, image_size=32, pool='map'),
  'vit_r26_s32': dict(
    stem_depths=(1, 1), dim=24, depth=1, mlp_dim=32, num_heads=3, image_size=64, pool='gap'
  ),
  'coatnet_0': dict(depths=(1, 1, 2, 1), dims=(8, 16, 32, 32), stem_dim=8, image_size=64),
  'sasa_resnet_50': dict(
    depths=(1, 1), width=0.25, num_heads=2, kernel=3, stem='attention', image_size=32
  ),
  'halonet_h4': dict(
    depths=(1, 1), width=8, num_heads=2, block=4, halo=1, final_dim=16, image_size=32
  ),
  'aa_resnet_50': dict(depths=(1, 1, 1), width=8, num_heads=2, image_size=32),
  'aa_mnasnet': dict(
    groups=((1, 3, 2, 1, 8), (1, 5, 2, 2, 8, 1.0), (1, 3, 2, 2, 16)),
    stem_dim=8,
    final_dim=16,
    num_heads=2,
    dropout=0.0,
    image_size=32,
  ),
  'ea_aa_resnet_50': dict(depths=(1, 2, 1), width=8, num_heads=2, image_size=32),
  'gc_resnet_50': dict(depths=(1, 1, 1), stages=(2, 3), width=8, image_size=32),
  'nl_resnet_50': dict(
    depths=(1, 1, 2), width=8, context={'name': 'nl', 'norm': False}, image_size=32
  ),
  'conv_attention_quadratic_general': dict(dim=16, depth=2, mlp_dim=16, num_heads=3, image_size=16),
  'conv_attention_learned_content': dict(
    dim=16, depth=1, mlp_dim=16, num_heads=2, dropout=0.1, attention_dropout=0.1, image_size=12
  ),
  'botnet_t3': dict(depths=(1, 2), attn_stages=(2,), width=8, num_heads=2, image_size=32),
  'lamhalobotnet50ts_256': dict(
    layout=('C', 'CA', 'A', 'A'),
    dims=(16, 24, 32, 32),
    gate={'name': 'gc', 'ratio': 0.5},
    final_dim=16,
    image_size=64,
  ),
  'levit_128s': dict(dims=(16, 24), depths=(1, 1), num_heads=(2, 3), head_dim=4, image_size=64),
  'mvitv2_tiny': dict(depths=(1, 1, 1), dim=8, num_heads=1, image_size=32),
  'nat_mini': dict(
    depths=(2, 1),
    dim=8,
    num_heads=(1, 2),
    kernel=3,
    dilations=((1, 2), (1,)),
    layer_scale=0.1,
    image_size=32,
  ),
  'qna_tiny': dict(
    dim=8,
    depths=(1, 0),
    window_depths=(0, 1),
    num_heads=(2, 4),
    window_heads=(1, 2),
    window=(4, 4),
    image_size=32,
  ),
  'swin_tiny': dict(depths=(2, 2), dim=8, num_heads=(1, 2), window=3, image_size=32),
  'convnext_tiny': dict(depths=(1, 1), dims=(8, 16), image_size=32),
  'hornet_tiny_gf': dict(depths=(1, 1), dim=8, orders=(1, 3), global_stages=(2,), image_size=32),
  'acmix_swin_tiny': dict(depths=(2, 1), dim=8, num_heads=(1, 2), window=3, image_size=32),
  'volo_d1': dict(
    depths=(1, 1), dims=(8, 16), num_heads=(1, 2), stem_dim=8, class_depth=1, image_size=32
  ),
  'elsa_swin_tiny': dict(
    depths=(1, 1), dim=8, num_heads=(1, 2), stages=(1,), kernel=3, window=4, image_size=32
  ),
  'elsa_volo_d1': dict(
    depths=(1, 1), dims=(8, 16), num_heads=(1, 2), stem_dim=8, class_depth=1, image_size=32
  ),
  'maxvit_tiny': dict(
    depths=(1, 1),
    dims=(8, 16),
    stem_dim=8,
    head_dim=4,
    window=3,
    window_policy='fixed',
    table_window=2,
    image_size=32,
  ),
  # With a class token, the queries of the last block's map would have no gradient.
  'cvt_13': dict(depths=(1, 1, 1), dims=(8, 8, 16), num_heads=(1, 2, 2), pool='gap', image_size=32),
  'coatnet_7': dict(
    depths=(1, 1, 1, 1, 1), dims=(8, 8, 16, 32, 64), stem_dim=8, head_dim=32, image_size=64
  ),
}

# What shifts every logit of a query alike: softmax cannot see it.
UNSEEN = ('key/bias', 'key_norm/bias', 'position/bias', 'logits_norm/bias')


@functools.cache
def _tiny(name):
  model, info = va.create_model(name, num_classes=5, **TINY[name])
  images = jax.random.normal(jax.random.key(1), (8, *info.image_size, 3))
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)
  assert set(shapes) <= {'params', 'batch_stats'}
  # Drawn, not initialised: zero-initialised branches and heads would hide what lies behind them.
  rng = np.random.default_rng(0)
  drawn = {
    path: (path.endswith('scale') + rng.standard_normal(leaf.shape) / _spread(leaf.shape)).astype(
      np.float32
    )
    for path, leaf in tree.flatten(shapes['params']).items()
  }
  variables = {'params': tree.unflatten(drawn)}
  if 'batch_stats' in shapes:
    variables['batch_stats'] = jax.tree.map(lambda x: np.ones(x.shape), shapes['batch_stats'])
  return model, variables, images


def _spread(shape):
  """Keeps activations near one through kernels, and other parameters small."""
  return max(4, math.prod(shape[:-1]) ** 0.5)


@pytest.mark.parametrize('name', TINY)
def test_every_parameter_learns_and_every_statistic_moves(name):
  model, variables, images = _tiny(name)
  stats = variables.get('batch_stats', {})

  @jax.jit
  def gradients(params):
    def loss(params):
      logits, moved = model.apply(
        {'params': params, 'batch_stats': stats},
        images,
        train=True,
        rngs={'dropout': jax.random.key(3)},
        mutable=['batch_stats'],
      )
      return jnp.square(logits - jnp.arange(5)).sum(), moved.get('batch_stats', {})

    return jax.grad(loss, has_aux=True)(params)

  grads, moved = gradients(variables['params'])
  for path, grad in tree.flatten(grads).items():
    if not path.endswith(UNSEEN):
      assert jnp.abs(grad).max() > 0, path
    assert jnp.isfinite(grad).all(), path
  assert jax.tree.structure(moved) == jax.tree.structure(stats)
  for path, value in tree.flatten(moved).items():
    assert (value != tree.flatten(stats)[path]).any(), path


@pytest.mark.usefixtures('unchecked')
@pytest.mark.parametrize('name', TINY)
def test_evaluation_leaves_the_statistics(name):
  model, variables, images = _tiny(name)
  evaluate = lambda variables: model.apply(variables, images, mutable=['batch_stats'])[1]
  program = jax.make_jaxpr(evaluate)(variables).jaxpr
  assert len(program.outvars) == len(jax.tree.leaves(variables.get('batch_stats', {})))
  assert set(program.outvars) <= set(program.invars)


@pytest.mark.usefixtures('unchecked')
@pytest.mark.parametrize('name', TINY)
def test_bfloat16_computes_nearly_the_same(name):
  model, variables, images = _tiny(name)
  half, _ = va.create_model(name, num_classes=5, **(TINY[name] | dict(dtype=jnp.bfloat16)))

  @jax.jit
  def both(variables):
    return model.apply(variables, images), half.apply(variables, images)

  expected, logits = both(variables)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, expected, atol=0.15 * jnp.abs(expected).max())


# Where the values are compared too: a block of convolutions, of tokens, of either.
REMAT = {'resnet_50', 'vit_s16', 'coatnet_0'}


@pytest.mark.usefixtures('unchecked')
@pytest.mark.parametrize('name', TINY)
def test_remat_computes_the_same(name):
  model, variables, images = _tiny(name)
  other, _ = va.create_model(name, num_classes=5, **(TINY[name] | dict(remat=True)))
  key = jax.random.key(0)
  plain, again = (jax.eval_shape(m.init, key, images) for m in (model, other))
  assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, again)
  train = lambda params: other.apply(
    variables | {'params': params},
    images,
    train=True,
    rngs={'dropout': key},
    mutable=['batch_stats'],
  )[0]
  assert re.search('checkpoint|remat', str(jax.make_jaxpr(train)(variables['params'])))
  if name in REMAT:
    np.testing.assert_allclose(
      jax.jit(other.apply)(variables, images), jax.jit(model.apply)(variables, images), atol=1e-5
    )
