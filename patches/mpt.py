"""MPT: ALiBi, a bias of heads and keys, in fp32 as the model builds it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stof_hf.errors import UnsupportedError
from stof_hf.hf.attention import NO_WEIGHTS, stof_attention
from stof_hf.hf.own import Carried
from stof_hf.hf.resolve import converted


def attention(
    self: nn.Module,
    original: Any,
    hidden_states: torch.Tensor,
    position_bias: torch.Tensor | None,
    past_key_values: Any = None,
    attention_mask: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`MptAttention.forward`: ([B, S, E], None)."""
    fused = self.Wqkv(hidden_states)
    if self.clip_qkv:
        fused = fused.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    heads = fused.unflatten(2, (3, self.n_heads, self.head_dim)).transpose(1, 3)
    q, k, v = heads.unbind(2)
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, self.layer_idx)
    if position_bias is not None:
        position_bias = position_bias[None, ..., -k.shape[2] :]
    out, _ = stof_attention(
        self, q, k, v, _seen(attention_mask), self.attn_dropout_p, self.softmax_scale,
        position_bias=position_bias,
    )  # fmt: skip
    return self.out_proj(out.flatten(2)), None


def _seen(mask: Carried | torch.Tensor | None) -> Any:
    """The mask of what may be seen, of one that says what may not where it is a tensor."""
    if not isinstance(mask, torch.Tensor):
        return mask and mask.mask
    return ~mask if torch.compiler.is_compiling() else converted(mask, torch.logical_not)


def model(
    self: nn.Module,
    original: Any,
    input_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    attention_mask: Any = None,
    inputs_embeds: torch.Tensor | None = None,
    use_cache: bool | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    return_dict: bool | None = None,
    **kwargs: Any,
) -> Any:
    """`MptModel.forward`; the attention layers know neither the configuration nor whether their
    weights are wanted."""
    wanted = self.config.output_attentions if output_attentions is None else output_attentions
    if wanted:
        raise UnsupportedError(NO_WEIGHTS)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:
        # The own code takes every value but 0 for hidden, also the True that elsewhere allows.
        hidden = attention_mask != 0
        attention_mask = ~hidden if attention_mask.dtype == torch.bool else hidden
    for block in self.blocks:
        block.attn.__dict__["config"] = self.config
    return original(
        self, input_ids, past_key_values, attention_mask, inputs_embeds, use_cache,
        output_attentions, output_hidden_states, return_dict, **kwargs,
    )  # fmt: skip


METHODS = {
    "mpt": {
        "MptAttention.forward": attention,
        "MptModel.forward": model,
    },
}
