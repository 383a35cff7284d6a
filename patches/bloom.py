"""BLOOM: ALiBi, a bias of heads and keys; the attention layer adds the residual."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.bloom.modeling_bloom import dropout_add

from stof_hf.hf.attention import stof_attention
from stof_hf.hf.own import require_padding


def attention(
    self: nn.Module,
    original: Any,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    alibi: torch.Tensor,
    attention_mask: Any,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`BloomAttention.forward`: ([B, S, E], None)."""
    q, k, v = self._reshape(self.query_key_value(hidden_states))
    if layer_past is not None:
        k, v = layer_past.update(k, v, self.layer_idx)
    out, _ = stof_attention(
        self, q, k, v, attention_mask, self.attention_dropout.p, self.inv_norm_factor,
        position_bias=alibi.unflatten(0, (-1, self.num_heads)), output_attentions=output_attentions,
    )  # fmt: skip
    out = _project(self, out.flatten(2))
    return dropout_add(out, residual, self.hidden_dropout, self.training), None


def _project(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`dense`, or the sum of its slices where the configuration asks for the order of training."""
    if layer.pretraining_tp <= 1 or not layer.slow_but_exact:
        return layer.dense(x)
    width, weight = layer.hidden_size / layer.pretraining_tp, layer.dense.weight
    bounds = [int(i * width) for i in range(layer.pretraining_tp + 1)]
    return sum(F.linear(x[..., a:b], weight[:, a:b]) for a, b in pairwise(bounds))


def lend_configuration(self: nn.Module, original: Any, *args: Any, **kwargs: Any) -> Any:
    """`BloomModel.forward`; the attention layers do not know the configuration."""
    require_padding(self, kwargs.get("attention_mask"))
    for block in self.h:
        block.self_attention.__dict__["config"] = self.config
    return original(self, *args, **kwargs)


METHODS = {
    "bloom": {
        "BloomAttention.forward": attention,
        "BloomModel.forward": lend_configuration,
    },
}
