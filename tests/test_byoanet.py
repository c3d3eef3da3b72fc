"""timm's networks of mixed attention: layouts, widths, weight names, and what they refuse."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vision_attention as va
from vision_attention import convert
from vision_attention.models import byoanet, byoanet_variants, registry, tree


def _shapes(name, **options: Any):
  model, info = va.create_model(name, **options)
  return model, info, convert.abstract_variables(model, info)


# Small networks with every kind of block: timm's names for their weights, by hand, and shapes.
def _norm(name, dim):
  leaves = ('weight', 'bias', 'running_mean', 'running_var')
  return {f'{name}.{leaf}': (dim,) for leaf in leaves} | {f'{name}.num_batches_tracked': ()}


def _conv(name, outputs, inputs, kernel=1):
  return {f'{name}.conv.weight': (outputs, inputs, kernel, kernel), **_norm(f'{name}.bn', outputs)}


def _block(name, inputs, inner, outputs, middle, shortcut=True):
  """`middle`: shapes of what is between the 1x1 convolutions, by timm's name."""
  return {
    **_conv(f'{name}.conv1_1x1', inner, inputs),
    **{f'{name}.{key}': shape for key, shape in middle.items()},
    **_conv(f'{name}.conv3_1x1', outputs, inner),
    **(_conv(f'{name}.shortcut', outputs, inputs) if shortcut else {}),
  }


_TIERED = {
  **_conv('stem.conv1', 24, 3, 3),
  **_conv('stem.conv2', 32, 24, 3),
  **_conv('stem.conv3', 64, 32, 3),
}
_POSITIONS = ('self_attn.pos_embed.height_rel', 'self_attn.pos_embed.width_rel')
_HEAD = {'head.fc.weight': (7, 64), 'head.fc.bias': (7,)}
_TINY: dict[str, Any] = dict(layout=('C', 'A'), dims=(32, 64), strides=(1, 2))
# By name: the registered network, options that make it small, and the weights that timm would have.
WEIGHTS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]], tuple[int, int]]] = {
  'bottleneck': (
    'botnet26t_256',
    dict(_TINY, attn=dict(name='bottleneck', num_heads=2, head_dim=6, scale_position=False)),
    {
      **_TIERED,
      **_block('stages.0.0', 64, 8, 32, _conv('conv2_kxk', 8, 8, 3)),
      **_block(
        'stages.1.0',
        32,
        16,
        64,
        {
          'self_attn.qkv.weight': (40, 16, 1, 1),
          _POSITIONS[0]: (15, 6),
          _POSITIONS[1]: (23, 6),
          **_norm('post_attn', 16),
        },
      ),
      **_HEAD,
    },
    (32, 48),
  ),
  'halo': (
    'sehalonet33ts',
    dict(_TINY, ratio=0.25, final_dim=64, attn=dict(name='halo', num_heads=4, index='subsampled')),
    {
      **_TIERED,
      **_block(
        'stages.0.0',
        64,
        8,
        32,
        {
          **_conv('conv2_kxk', 8, 8, 3),
          'attn.fc1.weight': (8, 8, 1, 1),
          'attn.fc1.bias': (8,),
          'attn.fc2.weight': (8, 8, 1, 1),
          'attn.fc2.bias': (8,),
        },
      ),
      **_block(
        'stages.1.0',
        32,
        16,
        64,
        {
          'self_attn.q.weight': (16, 16, 1, 1),
          'self_attn.kv.weight': (32, 16, 1, 1),
          **dict.fromkeys(_POSITIONS, (27, 4)),
          **_norm('post_attn', 16),
        },
      ),
      **_conv('final_conv', 64, 64),
      **_HEAD,
    },
    (256, 256),
  ),
  'lambda': (
    'lambda_resnet26t',
    dict(_TINY, gate='eca'),
    {
      **_TIERED,
      **_block(
        'stages.0.0', 64, 8, 32, {**_conv('conv2_kxk', 8, 8, 3), 'attn.conv.weight': (1, 1, 3)}
      ),
      **_block(
        'stages.1.0',
        32,
        16,
        64,
        {
          'self_attn.qkv.weight': (84, 16, 1, 1),
          **_norm('self_attn.norm_q', 64),
          **_norm('self_attn.norm_v', 4),
          'self_attn.conv_lambda.weight': (16, 1, 9, 9, 1),
          'self_attn.conv_lambda.bias': (16,),
          **_norm('post_attn', 16),
        },
      ),
      **_HEAD,
    },
    (256, 256),
  ),
  'lambda with a table': (
    'lambda_resnet26rpt_256',
    dict(layout=('A',), dims=(64,), strides=(2,)),
    {
      **_TIERED,
      **_block(
        'stages.0.0',
        64,
        16,
        64,
        {
          'self_attn.qkv.weight': (84, 16, 1, 1),
          **_norm('self_attn.norm_q', 64),
          **_norm('self_attn.norm_v', 4),
          'self_attn.pos_emb': (11, 15, 16),
          **_norm('post_attn', 16),
        },
      ),
      **_HEAD,
    },
    (24, 32),
  ),
  'without shortcuts': (
    'haloregnetz_b',
    dict(layout=('C',), dims=(64,), strides=(2,), attn=None, group_size=8, final_dim=0),
    {
      **_conv('stem', 32, 3, 3),
      **_block(
        'stages.0.0',
        32,
        96,
        64,
        {
          **_norm('conv2_kxk.bn', 96),
          'conv2_kxk.conv.weight': (96, 8, 3, 3),
          'attn.fc1.weight': (24, 96, 1, 1),
          'attn.fc1.bias': (24,),
          'attn.fc2.weight': (96, 24, 1, 1),
          'attn.fc2.bias': (96,),
        },
        shortcut=False,
      ),
      **_HEAD,
    },
    (224, 224),
  ),
  'global context': (
    'gcresnet50t',
    dict(layout=('CC',), dims=(64,), strides=(1,)),
    {
      **_TIERED,
      **{
        key: shape
        for j in range(2)
        for key, shape in _block(
          f'stages.0.{j}',
          64,
          16,
          64,
          {
            **_conv('conv2_kxk', 16, 16, 3),
            'attn.conv_attn.weight': (1, 16, 1, 1),
            'attn.conv_attn.bias': (1,),
            'attn.mlp_add.fc1.weight': (2, 16, 1, 1),
            'attn.mlp_add.fc1.bias': (2,),
            'attn.mlp_add.norm.weight': (2,),
            'attn.mlp_add.norm.bias': (2,),
            'attn.mlp_add.fc2.weight': (16, 2, 1, 1),
            'attn.mlp_add.fc2.bias': (16,),
          },
          shortcut=False,
        ).items()
      },
      **_HEAD,
    },
    (256, 256),
  ),
}


def _state(shapes):
  random = np.random.default_rng(0)
  return {key: random.standard_normal(shape, np.float32) for key, shape in shapes.items()}


@pytest.mark.parametrize('kind', WEIGHTS)
def test_timm_s_weights_load_whatever_the_layout(kind):
  """A name too many or too few, or a shape that does not fit, is refused by the conversion."""
  name, options, shapes, size = WEIGHTS[kind]
  state = _state(shapes)
  inferred = registry.references_of(name)['timm'].infer(state, registry.variant_of(name).options)
  assert inferred['num_classes'] == 7
  assert inferred.get('image_size', size) == size
  variables = va.load_reference(name, state, source='timm', **options)
  loaded = sum(array.size for array in jax.tree.leaves(variables['params']))
  counted = ('num_batches_tracked', 'running_mean', 'running_var')
  assert loaded == sum(array.size for key, array in state.items() if not key.endswith(counted))


def test_query_key_and_value_are_cut_where_timm_joins_them():
  attn = {}
  for kind in ('bottleneck', 'halo'):
    name, options, shapes, _ = WEIGHTS[kind]
    state = _state(shapes)
    variables = va.load_reference(name, state, source='timm', **options)
    attn[kind] = variables['params']['backbone']['stage2']['block00']['attn'], state
  ours, state = attn['bottleneck']
  joined = state['stages.1.0.self_attn.qkv.weight'][:, :, 0, 0].T
  parts = [ours[part]['kernel'] for part in ('query', 'key', 'value')]
  np.testing.assert_array_equal(np.concatenate(parts, 1), joined)
  # Head by head: 4 channels of a key, then 4 of a value.
  ours, state = attn['halo']
  joined = state['stages.1.0.self_attn.kv.weight'][:, :, 0, 0].T.reshape(16, 4, 2, 4)
  for i, part in enumerate(('key', 'value')):
    np.testing.assert_array_equal(ours[part]['kernel'].reshape(16, 4, 4), joined[:, :, i])


@pytest.mark.parametrize(
  ('name', 'kind', 'block', 'expected'),
  [
    # In the first block of the last stage attention still sees 1/16.
    ('botnet26t_256', 'qkv', '3.0', (192, 320)),
    ('botnet26t_256', 'qkv', '2.1', (192, 320)),
    ('lamhalobotnet50ts_256', 'qkv', '3.1', (384, 640)),
    # The tables of halo attention are made for a block.
    ('halonet26t', 'q', '3.1', None),
  ],
)
def test_the_resolution_is_read_off_the_first_table(name, kind, block, expected):
  prefix = f'stages.{block}.self_attn'
  state = {
    f'{prefix}.{kind}.weight': np.zeros((12, 4, 1, 1)),
    f'{prefix}.pos_embed.height_rel': np.zeros((23, 4)),
    f'{prefix}.pos_embed.width_rel': np.zeros((39, 4)),
  }
  inferred = registry.references_of(name)['timm'].infer(state, registry.variant_of(name).options)
  assert inferred['num_classes'] == 0
  assert inferred.get('image_size') == expected


@pytest.mark.parametrize(
  ('name', 'size', 'strides'),
  [
    ('halo2botnet50ts_256', 256, (4, 8, 16, 32)),
    ('gcresnet50t', 224, (4, 8, 16, 32)),
    ('haloregnetz_b', 224, (4, 8, 16, 32)),
    ('lambda_resnet26t', 192, (4, 8, 16, 32)),
    ('halonet26t', 200, (4, 8, 16, 32)),
  ],
)
def test_features_are_maps_of_falling_resolution(name, size, strides):
  model, _, shapes = _shapes(name, image_size=size)
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  features = jax.eval_shape(functools.partial(model.apply, method='features'), shapes, images)
  for i, stride in enumerate(strides, 1):
    assert features[f'stage{i}'].shape[1:3] == (-(-size // stride),) * 2


def test_another_operator_takes_the_places_of_attention():
  paths = {}
  for attn in ('halo', {'name': 'lambda', 'kernel': 5}, 'mhsa'):
    _, _, shapes = _shapes('botnet26t_256', attn=attn)
    found = tree.flatten(shapes['params']['backbone'])
    paths[str(attn)] = {path.split('/attn/')[0] for path in found if '/attn/' in path}
  places = {'stage3/block01', 'stage4/block00', 'stage4/block01'}
  assert all(found == places for found in paths.values())


def test_widths_inside_are_multiples_of_eight():
  inner = functools.partial(byoanet_variants.inner_dims, stem_dim=64)
  assert inner(('C', 'C'), (1536, 48), (0.333, 0.25), of_input=False) == [[512], [16]]
  assert inner(('CC', 'C'), (192, 288), 3, of_input=True) == [[192, 576], [576]]


def test_blocks_without_a_shortcut_pass_their_branch_on():
  options: dict[str, Any] = dict(
    layout=('CC',), dims=(16,), strides=(2,), attn=None, group_size=8, image_size=16, num_classes=3
  )
  model, info = va.create_model('regnetz_b16', **options)
  images = jax.random.normal(jax.random.key(0), (2, *info.image_size, 3))
  variables = jax.jit(model.init)(jax.random.key(1), images)
  blocks = variables['params']['backbone']['stage1']
  assert blocks['block00']['norm3']['scale'].all()
  assert not blocks['block01']['norm3']['scale'].any()
  assert 'shortcut' not in blocks['block00']
  features: Any = model.apply(variables, images, method='features')
  assert features['stage1'].min() < 0  # nothing follows the addition
  assert jnp.abs(features['final']).max() > 0


def test_channel_gates_are_beside_convolutions_only():
  _, _, shapes = _shapes('sebotnet33ts_256')
  gated = {path.split('/gate/')[0] for path in tree.flatten(shapes['params']) if '/gate/' in path}
  layout = registry.variant_of('sebotnet33ts_256').options['layout']
  assert gated == {
    f'backbone/stage{i}/block{j:02d}'
    for i, row in enumerate(layout, 1)
    for j, letter in enumerate(row)
    if letter == 'C'
  }


def test_tables_for_another_resolution_are_resized_or_refused():
  model, _, shapes = _shapes('botnet26t_256', image_size=(64, 96))
  with pytest.raises(ValueError, match='images are 96x64 but the model was created for 64x96'):
    jax.eval_shape(model.apply, shapes, jax.ShapeDtypeStruct((1, 96, 64, 3), jnp.float32))
  for kind, name, table, shape in (
    ('bottleneck', 'stage2', 'relative_width', (31, 6)),
    ('lambda with a table', 'stage1', 'relative_position', (16, 31, 31)),
  ):
    registered, options, weights, _ = WEIGHTS[kind]
    variables = va.load_reference(
      registered, _state(weights), source='timm', **{**options, 'image_size': 64}
    )
    attn = variables['params']['backbone'][name]['block00']['attn']
    assert attn[table].shape == shape
  # Networks without such tables take any size.
  model, _, shapes = _shapes('halonet26t', image_size=64)
  jax.eval_shape(model.apply, shapes, jax.ShapeDtypeStruct((1, 72, 80, 3), jnp.float32))


def test_impossible_options_are_refused():
  refused: list[tuple[dict[str, Any], str]] = [
    (dict(layout=('CC', 'CB')), "block in layout 'B' is unknown"),
    (dict(attn=None), 'blocks CA of stage 3 attend, but attn gives no operator'),
    (dict(attn=('halo', 'halo')), 'attn has 2 entries for the 4 stages'),
    (dict(attn=(None, None, ('halo',), 'halo')), 'attn has 1 entries for the blocks CA of stage 3'),
    (dict(dims=(64, 128)), 'must have one entry per stage'),
    (dict(stem='tierd'), "stem 'tierd' is unknown: did you mean 'tiered'"),
    (dict(gate='sse'), "module 'sse' is unknown: did you mean"),
  ]
  for options, message in refused:
    with pytest.raises(ValueError, match=message):
      va.create_model('botnet26t_256', **options)
  with pytest.raises(ValueError, match="timm has no weights with attn='mhsa'"):
    va.load_reference('botnet26t_256', {}, source='timm', attn='mhsa')
  assert set(byoanet.VARIANTS) <= set(va.list_models())
