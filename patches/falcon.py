"""Falcon: rotary or ALiBi, and keys that query heads share.

With ALiBi, the model's "eager" attention adds the bias twice: once to the scores, and once more as
part of the mask. Its "sdpa", the default, adds it once, as the checkpoints were trained; so does
this. Dropout is as there: with ALiBi only.

Of the new decoder architecture, the own code repeats shared keys and values before it caches them.
Here each is cached once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

from stof_hf.hf.attention import stof_attention
from stof_hf.hf.own import Carried, require_padding


def attention(
    self: nn.Module,
    original: Any,
    hidden_states: torch.Tensor,
    alibi: torch.Tensor | None,
    attention_mask: Any,
    position_ids: torch.Tensor | None = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`FalconAttention.forward`: ([B, S, E], None)."""
    q, k, v = (x.transpose(1, 2) for x in _split(self, self.query_key_value(hidden_states)))
    bias, dropout = None, 0.0
    if alibi is None:
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    else:
        bias = alibi.unflatten(0, (-1, self.num_heads)) / math.sqrt(self.head_dim)
        dropout = self.attention_dropout.p
    if layer_past is not None:
        k, v = layer_past.update(k, v, self.layer_idx)
    mask = attention_mask.mask if isinstance(attention_mask, Carried) else attention_mask
    out, _ = stof_attention(
        self, q, k, v, mask, dropout, position_bias=bias, output_attentions=output_attentions
    )
    return self.dense(out.flatten(2)), None


def _split(
    layer: nn.Module, fused: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[B, S, heads, D] of query, key and value."""
    if not layer.new_decoder_architecture:
        return layer._split_heads(fused)
    shared = layer.num_heads // layer.num_kv_heads
    grouped = fused.unflatten(2, (-1, shared + 2, layer.head_dim))
    return grouped[:, :, :, :-2].flatten(2, 3), grouped[:, :, :, -2], grouped[:, :, :, -1]


def model(self: nn.Module, original: Any, *args: Any, **kwargs: Any) -> Any:
    """`FalconModel.forward`."""
    if self.use_alibi:
        require_padding(self, kwargs.get("attention_mask"))
    return original(self, *args, **kwargs)


METHODS = {
    "falcon": {
        "FalconAttention.forward": attention,
        "FalconFlashAttention2.forward": attention,
        "FalconModel.forward": model,
    },
}
