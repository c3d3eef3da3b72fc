"""The tables of `volo.py`: variants with published numbers, and other names of their weights."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vision_attention.models import base, reference
from vision_attention.ops import bicubic


def resize_position(table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Resizes `[h, w, c]` bicubically, as the code does when it fine-tunes."""
  return bicubic.resize(table.transpose(2, 0, 1), (shape[2], *shape[:2])).transpose(1, 2, 0)


RESIZE = {'params/backbone/position': resize_position}


# Multiply-adds of the paper, unverified.
_SOURCE = 'github.com/sail-sg/volo, README; multiply-adds: arXiv 2106.13112'


def _variant(depths, dims, heads, params, gmacs, top1, **more) -> base.Variant:
  options = {'depths': depths, 'dims': dims, 'num_heads': heads, **more}
  return base.Variant(options, params=params, flops=gmacs * 1e9, top1=top1, source=_SOURCE)


VARIANTS = {
  'volo_d1': _variant((4, 4, 8, 2), (192, 384), (6, 12), 26_632_040, 6.8, 84.2),
  'volo_d2': _variant((6, 4, 10, 4), (256, 512), (8, 16), 58_678_336, 14.1, 85.2),
  'volo_d3': _variant((8, 8, 16, 4), (256, 512), (8, 16), 86_325_072, 20.6, 85.4),
  'volo_d4': _variant((8, 8, 16, 4), (384, 768), (12, 16), 192_961_520, 43.8, 85.7),
  # The paper's 69.0 G would be those of a stem of 64 channels.
  'volo_d5': _variant(
    (12, 12, 20, 4), (384, 768), (12, 16), 295_455_584, 72.3, 86.1, mlp_ratio=4, stem_dim=128
  ),
}


def _prepare(state: reference.State) -> reference.State:
  """Gives positions that are a list, `[1, h w, c]`, the form of a square map."""
  table = state.get('pos_embed')
  if table is None or table.ndim == 4:
    return state
  side = math.isqrt(table.shape[1])
  if side**2 != table.shape[1]:
    raise ValueError(f'pos_embed has {table.shape[1]} positions, which is no square grid')
  return {**state, 'pos_embed': table.reshape(1, side, side, -1)}


def _infer(state: reference.State, options: Mapping[str, Any]) -> dict[str, Any]:
  """Reads classes, resolution, patches and what there is of heads and class blocks."""
  del options
  bias = state.get('head.bias')
  blocks = {match[1] for key in state if (match := re.match(r'post_network\.(\d+)\.', key))}
  found: dict[str, Any] = {
    'num_classes': 0 if bias is None else len(bias),
    'aux_head': bias is None or 'aux_head.bias' in state,
    'class_depth': len(blocks),
    'qkv_bias': 'network.2.0.attn.qkv.bias' in state,
  }
  if not blocks:
    found['pool'] = 'gap'
  if 'patch_embed.proj.weight' in state and 'pos_embed' in state:
    found['patch'] = 2 * state['patch_embed.proj.weight'].shape[-1]
    _, height, width, _ = state['pos_embed'].shape
    found['image_size'] = (2 * height * found['patch'], 2 * width * found['patch'])
  return found


def _block_rules(theirs: str, ours: str) -> list[reference.Rule]:
  """Returns the renames of a kind of block, given patterns that end before its parts."""
  return [
    reference.Rule(theirs + part, f'{ours}/{path}', kind)
    for part, path, kind in (
      ('norm1', 'norm1', reference.NORM),
      ('norm2', 'norm2', reference.NORM),
      (r'mlp\.fc1', 'mlp/expand', reference.DENSE),
      (r'mlp\.fc2', 'mlp/project', reference.DENSE),
      (r'attn\.v', 'attn/value', reference.DENSE),
      (r'attn\.attn', 'attn/weights', reference.DENSE),
      (r'attn\.q', 'attn/query', reference.DENSE),
      (r'attn\.kv', 'attn', reference.fused('key', 'value')),
      (r'attn\.qkv', 'attn', reference.fused('query', 'key', 'value')),
      (r'attn\.proj', 'attn/proj', reference.DENSE),
    )
  ]


_RULES = (
  *(
    reference.Rule(rf'patch_embed\.conv\.{3 * i}', f'backbone/stem/conv{i + 1}', reference.CONV)
    for i in range(3)
  ),
  *(
    reference.Rule(rf'patch_embed\.conv\.{3 * i + 1}', f'backbone/stem/norm{i + 1}', reference.NORM)
    for i in range(3)
  ),
  reference.Rule(r'patch_embed\.proj', 'backbone/stem/proj', reference.CONV),
  # Their list of stages has the downsampling as its second entry.
  *_block_rules(r'network\.0\.(\d+)\.', 'backbone/stage1/block{0:02d}'),
  reference.Rule(r'network\.1\.proj', 'backbone/downsample2', reference.CONV),
  *_block_rules(r'network\.(\d+)\.(\d+)\.', 'backbone/stage{0}/block{1:02d}'),
  *_block_rules(r'post_network\.(\d+)\.', 'backbone/class_stage/block{0:02d}'),
  reference.Rule('pos_embed', 'backbone/position', reference.param('')),
  reference.Rule('cls_token', 'backbone/cls', reference.param('')),
  reference.Rule('norm', 'backbone/norm', reference.NORM),
  reference.Rule('head', 'head/classifier', reference.DENSE),
  reference.Rule('aux_head', 'head/aux_classifier', reference.DENSE),
)
REFERENCES = {
  source: reference.Reference(origin=origin, rules=_RULES, prepare=_prepare, infer=_infer)
  for source, origin in (
    ('official', 'github.com/sail-sg/volo, models/volo.py'),
    ('timm', 'github.com/huggingface/pytorch-image-models, timm/models/volo.py'),
  )
}
