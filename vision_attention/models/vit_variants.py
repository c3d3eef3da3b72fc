"""The tables of `vit.py`: variants with published numbers, and other names of their weights."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vision_attention.models import base, reference, vit_hybrid

# Width, depth, MLP width, heads: arXiv 2010.11929 Table 1, 2106.10270 Table 2, 2106.04560 Table 2,
# and big_vision's table. `gigantic` is the papers' G; names here are lower case and `g` is their g.
SIZES = {
  'mu': (32, 1, 128, 2),
  'ti': (192, 12, 768, 3),
  's': (384, 12, 1536, 6),
  'm': (512, 12, 2048, 8),
  'b': (768, 12, 3072, 12),
  'l': (1024, 24, 4096, 16),
  'so400m': (1152, 27, 4304, 16),
  'h': (1280, 32, 5120, 16),
  'g': (1408, 40, 6144, 16),
  'g_opt': (1536, 40, 6144, 16),
  'gigantic': (1664, 48, 8192, 16),
  'gigantic_opt': (1536, 48, 8192, 16),
  'e': (1792, 56, 15360, 16),
}
# Sizes that exist with one patch only.
_PATCHES = {'mu': (16,), 'g_opt': (16,), 'gigantic_opt': (14,), 'e': (14,)}
_AUGREG = 'arXiv 2106.10270, Table 3 (ImageNet-21k 300 epochs, 224 pixels)'
_VIT = 'arXiv 2010.11929, Table 1'
_SCALED = 'arXiv 2106.04560, Table 2'
_PLAIN = 'github.com/google-research/big_vision'
_JFT_HYBRIDS = 'arXiv 2010.11929, Table 6 (JFT-300M), which counts nothing'
_MIXED = 'github.com/google-research/vision_transformer'
# Parameters with a class token and 1000 classes at 224 pixels, GMACs, top-1.
_PUBLISHED = {
  'vit_ti16': (5_717_416, 1.25, 73.75, _AUGREG),
  'vit_s32': (22_878_952, 1.14, 73.47, _AUGREG),
  'vit_s16': (22_050_664, 4.60, 80.46, _AUGREG),
  'vit_b32': (88_224_232, 4.41, 79.13, _AUGREG),
  'vit_b16': (86_567_656, 17.56, 83.96, _AUGREG),
  'vit_b8': (86_576_872, 78.15, None, _VIT),
  'vit_l32': (306_535_400, 15.38, None, _VIT),
  'vit_l16': (304_326_632, 61.55, 83.98, _AUGREG),
  'vit_l14': (304_203_752, 81.01, None, _VIT),
  'vit_h14': (632_045_800, 167.3, None, _VIT),
  'vit_g14': (1_012_611_432, 267.0, None, _SCALED),
  'vit_gigantic14': (1_844_440_680, 483.7, None, _SCALED),
  'vit_e14': (3_807_214_312, None, None, _PLAIN),
}
_HYBRIDS = {
  'vit_r_ti16': ('ti', 8, (), 6_337_704, 0.434, 69.69),
  'vit_r26_s32': ('s', 1, (2, 2, 2, 2), 36_431_912, 3.46, 80.81),
  'vit_r26_b32': ('b', 1, (2, 2, 2, 2), 101_383_976, 6.71, None),
  'vit_r50_b32': ('b', 1, (3, 4, 6, 3), None, None, None),
  'vit_r50_b16': ('b', 1, (3, 4, 9), 98_659_112, 21.5, None),
  'vit_r50_l32': ('l', 1, (3, 4, 6, 3), 328_994_856, 19.4, 82.74),
  'vit_r50_l16': ('l', 1, (3, 4, 9), None, None, None),
}


def _options(size: str, patch: int, **more: Any) -> dict[str, Any]:
  dim, depth, mlp_dim, num_heads = SIZES[size]
  sizes = {'dim': dim, 'depth': depth, 'mlp_dim': mlp_dim, 'num_heads': num_heads}
  return {**sizes, 'patch': patch, **more}


def _plain(name: str, size: str, patch: int) -> base.Variant:
  params, gmacs, top1, source = _PUBLISHED.get(name, (None, None, None, _PLAIN))
  return base.Variant(
    _options(size, patch),
    params=params,
    flops=gmacs and gmacs * 1e9,
    top1=top1,
    source=source,
  )


VARIANTS = {
  f'vit_{size}{patch}': _plain(f'vit_{size}{patch}', size, patch)
  for size in SIZES
  for patch in _PATCHES.get(size, (8, 14, 16, 32))
}
VARIANTS |= {
  name: base.Variant(
    _options(size, patch, stem_depths=depths),
    params=params,
    flops=gmacs and gmacs * 1e9,
    top1=top1,
    source=_AUGREG if top1 else _MIXED if params else _JFT_HYBRIDS,
  )
  for name, (size, patch, depths, params, gmacs, top1) in _HYBRIDS.items()
}


def _split_position(state: reference.State, key: str, has_cls: bool) -> reference.State:
  """Splits a position table `[1, n, c]` into that of the class token and a square grid."""
  if key not in state:
    return state
  state = dict(state)
  table = state.pop(key)
  table = table.reshape(-1, table.shape[-1])
  if has_cls:
    state['cls_position'], table = table[0], table[1:]
  side = round(len(table) ** 0.5)
  if side * side != len(table):
    raise ValueError(f'{key} has {len(table)} positions, which is no square grid')
  return {**state, 'position': table.reshape(side, side, -1)}


def _flax_prepare(state: reference.State) -> reference.State:
  """Brings vit_jax's and big_vision's files, old and new, to one set of names."""
  prefix = re.compile(r'^(opt/target/|params/)+')
  # Beside prefixed parameters, a file may hold the state of the optimizer.
  prefixed = [key for key in state if prefix.match(key)]
  state = {prefix.sub('', key): state[key] for key in prefixed or state}
  stacked = 'Transformer/encoderblock/'
  for key in [key for key in state if key.startswith(stacked)]:
    for i, value in enumerate(state.pop(key)):
      state[f'Transformer/encoderblock_{i}/{key.removeprefix(stacked)}'] = value
  has_cls = 'cls' in state
  if 'pos_embedding' in state and has_cls:
    # big_vision adds positions before it appends the class token, which then has none.
    state['cls_position'] = np.zeros_like(state['cls'])
  state = _split_position(state, 'pos_embedding', has_cls=False)
  return _split_position(state, 'Transformer/posembed_input/pos_embedding', has_cls)


def _timm_prepare(state: reference.State) -> reference.State:
  return _split_position(state, 'pos_embed', 'cls_token' in state)


def _infer(head: str, cls: str, probe: str, late_norm: str):
  """Returns what reads the head, the pooling and the resolution off prepared weights.

  Args:
    head: key whose length is the number of classes.
    cls: key that only a class token has.
    probe: key that only attention pooling has.
    late_norm: key that only a norm behind the pooling has.
  """

  def infer(state: reference.State, options: Mapping[str, Any]) -> dict[str, Any]:
    stem = options.get('stem_depths')
    stride = options['patch'] * (1 if stem is None else vit_hybrid.stride_of(stem))
    found: dict[str, Any] = {
      'num_classes': len(state[head]) if head in state else 0,
      'pool': 'cls' if cls in state else 'map' if probe in state else 'gap',
      'position': 'learned' if 'position' in state else 'sincos2d',
      'pre_logits': any(key.startswith('pre_logits') for key in state),
      'norm_after_pool': late_norm in state,
    }
    if 'position' in state:
      height, width, _ = state['position'].shape
      found['image_size'] = (height * stride, width * stride)
    return found

  return infer


_rule, _FLAX = reference.Rule, reference.FLAX
_BLOCK = r'Transformer/encoderblock_(\d+)/'
_OURS = 'backbone/stage1/block{0:02d}/'
_ATTENTION = r'MultiHeadDotProductAttention_[01]/'
_MAP = r'MAPHead_0/'
# Numbers: 0, 1, 2, 3 before Linen, counted by class since.
_FLAX_RULES = (
  _rule('position', 'backbone/position', reference.param('')),
  _rule('cls', 'backbone/cls', reference.param('')),
  _rule('cls_position', 'backbone/cls_position', reference.param('')),
  _rule('embedding', 'backbone/embed', _FLAX),
  _rule(_BLOCK + 'LayerNorm_0', _OURS + 'norm1', _FLAX),
  _rule(_BLOCK + 'LayerNorm_[12]', _OURS + 'norm2', _FLAX),
  _rule(_BLOCK + _ATTENTION + '(query|key|value)', _OURS + 'attn/{1}', _FLAX),
  _rule(_BLOCK + _ATTENTION + 'out', _OURS + 'attn/proj', _FLAX),
  _rule(_BLOCK + 'MlpBlock_[03]/Dense_0', _OURS + 'mlp/expand', _FLAX),
  _rule(_BLOCK + 'MlpBlock_[03]/Dense_1', _OURS + 'mlp/project', _FLAX),
  _rule('Transformer/encoder_norm', 'backbone/norm', _FLAX),
  _rule('pre_logits', 'head/pre_logits', _FLAX),
  _rule('head', 'head/classifier', _FLAX),
  _rule('conv_root', 'backbone/stem/conv_root', _FLAX),
  _rule('gn_root', 'backbone/stem/norm_root', _FLAX),
  *(
    _rule(
      rf'block(\d+)/unit(\d+)/{theirs}', f'backbone/stem/stage{{0}}/block{{1:-1:02d}}/{ours}', _FLAX
    )
    for theirs, ours in (
      (r'conv(\d)', 'conv{2}'),
      (r'gn(\d)', 'norm{2}'),
      ('conv_proj', 'conv_proj'),
      ('gn_proj', 'norm_proj'),
    )
  ),
  _rule(_MAP + 'probe', 'head/pool/probe', reference.param('')),
  _rule(_MAP + _ATTENTION + '(query|key|value)', 'head/pool/{0}', _FLAX),
  _rule(_MAP + _ATTENTION + 'out', 'head/pool/proj', _FLAX),
  _rule(_MAP + 'LayerNorm_0', 'head/pool/norm', _FLAX),
  _rule(_MAP + 'MlpBlock_0/Dense_0', 'head/pool/mlp/expand', _FLAX),
  _rule(_MAP + 'MlpBlock_0/Dense_1', 'head/pool/mlp/project', _FLAX),
)
_UNIT = r'patch_embed\.backbone\.stages\.(\d+)\.blocks\.(\d+)\.'
_STEM = 'backbone/stem/stage{0:+1}/block{1:02d}/'
_CONV, _NORM, _DENSE = reference.CONV, reference.NORM, reference.DENSE
_TIMM_RULES = (
  _rule('position', 'backbone/position', reference.param('')),
  _rule('cls_token', 'backbone/cls', reference.param('')),
  _rule('cls_position', 'backbone/cls_position', reference.param('')),
  _rule(r'patch_embed\.proj', 'backbone/embed', _CONV),
  _rule(r'blocks\.(\d+)\.norm(\d)', _OURS + 'norm{1}', _NORM),
  _rule(r'blocks\.(\d+)\.attn\.qkv', _OURS + 'attn', reference.fused('query', 'key', 'value')),
  _rule(r'blocks\.(\d+)\.attn\.proj', _OURS + 'attn/proj', _DENSE),
  _rule(r'blocks\.(\d+)\.mlp\.fc1', _OURS + 'mlp/expand', _DENSE),
  _rule(r'blocks\.(\d+)\.mlp\.fc2', _OURS + 'mlp/project', _DENSE),
  _rule('norm', 'backbone/norm', _NORM),
  _rule('fc_norm', 'head/norm', _NORM),
  _rule(r'attn_pool\.latent', 'head/pool/probe', reference.param('')),
  _rule(r'attn_pool\.q', 'head/pool/query', _DENSE),
  _rule(r'attn_pool\.kv', 'head/pool', reference.fused('key', 'value')),
  _rule(r'attn_pool\.proj', 'head/pool/proj', _DENSE),
  _rule(r'attn_pool\.norm', 'head/pool/norm', _NORM),
  _rule(r'attn_pool\.mlp\.fc1', 'head/pool/mlp/expand', _DENSE),
  _rule(r'attn_pool\.mlp\.fc2', 'head/pool/mlp/project', _DENSE),
  _rule(r'pre_logits\.fc', 'head/pre_logits', _DENSE),
  _rule('head', 'head/classifier', _DENSE),
  # A hybrid of the root alone has no `stem`.
  _rule(r'patch_embed\.backbone\.(?:stem\.)?conv', 'backbone/stem/conv_root', _CONV),
  _rule(r'patch_embed\.backbone\.(?:stem\.)?norm', 'backbone/stem/norm_root', _NORM),
  _rule(_UNIT + r'conv(\d)', _STEM + 'conv{2}', _CONV),
  _rule(_UNIT + r'norm(\d)', _STEM + 'norm{2}', _NORM),
  _rule(_UNIT + r'downsample\.conv', _STEM + 'conv_proj', _CONV),
  _rule(_UNIT + r'downsample\.norm', _STEM + 'norm_proj', _NORM),
)

_HF = r'vit\.(?:encoder\.layer|layers)\.(\d+)\.'
# Two names of each layer: those of files, and those of release 5 in memory.
_HF_RULES = (
  _rule('position', 'backbone/position', reference.param('')),
  _rule('cls_position', 'backbone/cls_position', reference.param('')),
  _rule(r'vit\.embeddings\.cls_token', 'backbone/cls', reference.param('')),
  _rule(r'vit\.embeddings\.patch_embeddings\.projection', 'backbone/embed', _CONV),
  _rule(_HF + 'layernorm_before', _OURS + 'norm1', _NORM),
  _rule(_HF + 'layernorm_after', _OURS + 'norm2', _NORM),
  *(
    _rule(_HF + rf'attention\.(?:attention\.{name}|{name[0]}_proj)', _OURS + f'attn/{name}', _DENSE)
    for name in ('query', 'key', 'value')
  ),
  _rule(_HF + r'attention\.(?:output\.dense|o_proj)', _OURS + 'attn/proj', _DENSE),
  _rule(_HF + r'(?:intermediate\.dense|mlp\.fc1)', _OURS + 'mlp/expand', _DENSE),
  _rule(_HF + r'(?:output\.dense|mlp\.fc2)', _OURS + 'mlp/project', _DENSE),
  _rule(r'vit\.layernorm', 'backbone/norm', _NORM),
  _rule('classifier', 'head/classifier', _DENSE),
)

# No flax file has its last norm behind the pooling.
_FLAX_INFER = _infer('head/bias', 'cls', 'MAPHead_0/probe', '')
REFERENCES = {
  'official': reference.Reference(
    origin='github.com/google-research/vision_transformer, vit_jax/models_vit.py',
    rules=_FLAX_RULES,
    prepare=_flax_prepare,
    infer=_FLAX_INFER,
  ),
  'big_vision': reference.Reference(
    origin='github.com/google-research/big_vision, big_vision/models/vit.py',
    rules=_FLAX_RULES,
    prepare=_flax_prepare,
    infer=_FLAX_INFER,
  ),
  'timm': reference.Reference(
    origin='github.com/huggingface/pytorch-image-models, timm/models/vision_transformer*.py',
    rules=_TIMM_RULES,
    options={'activation': 'gelu_exact', 'std_epsilon_in': 'var', 'stem_norm_epsilon': 1e-5},
    prepare=_timm_prepare,
    infer=_infer('head.bias', 'cls_token', 'attn_pool.latent', 'fc_norm.weight'),
  ),
  'hf': reference.Reference(
    origin='github.com/huggingface/transformers, models/vit/modeling_vit.py',
    rules=_HF_RULES,
    options={'activation': 'gelu_exact', 'norm_epsilon': 1e-12},
    prepare=lambda state: _split_position(state, 'vit.embeddings.position_embeddings', True),
    infer=_infer('classifier.bias', 'vit.embeddings.cls_token', '', ''),
  ),
}
