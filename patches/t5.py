"""T5: its blocks, pre-norm and without biases: self-attention, in a decoder attention to the
encoder, and the feed-forward part. Behind each, what overflows fp16 is clamped.

The first block of a stack computes the position bias of all.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers.models.t5.modeling_t5 import T5Attention, T5Block

from stof_hf.attention.relative import RelativeBias
from stof_hf.fusion.layer import Attention, Context, Layer, Operator, implementation, product

LAYERS = (T5Block,)


def layer(module: T5Block) -> Layer:
    own, *crossed, last = module.layer
    attention = own.SelfAttention
    operators = [
        Operator("norm", (own.layer_norm,)), *product(attention.q, attention.k, attention.v),
        Operator("attention", attention=_heads(attention)), *_end(own, attention.o),
    ]  # fmt: skip
    for cross in crossed:
        to = cross.EncDecAttention
        operators += [
            Operator("norm", (cross.layer_norm,)), *product(to.q),
            Operator("cross attention", (to.k, to.v), attention=_heads(to)), *_end(cross, to.o),
        ]  # fmt: skip
    mlp = last.DenseReluDense
    if hasattr(mlp, "wi"):
        front = *product(mlp.wi), Operator("act", function=mlp.act)
    else:
        front = *product(mlp.wi_0, mlp.wi_1), Operator("gate", function=mlp.act)
    operators += [Operator("norm", (last.layer_norm,)), *front, *_end(last, mlp.wo)]
    return Layer(
        tuple(operators), True, returns_biases=True, position_bias=_position_bias(attention)
    )


def _heads(own: T5Attention) -> Attention:
    return Attention(own, own.n_heads, own.n_heads, own.key_value_proj_dim, own.scaling)


def _end(part: torch.nn.Module, projection: torch.nn.Linear) -> tuple[Operator, ...]:
    half = part.layer_norm.weight.dtype == torch.float16
    return *product(projection), Operator("residual"), *((Operator("clamp"),) if half else ())


def _position_bias(own: T5Attention):
    """What computes the bias [1, H, S, S] of a stack: a function of the distance alone, which ends
    in one bucket beyond `relative_attention_max_distance`."""
    if not own.has_relative_attention_bias:
        return None
    weight, most = own.relative_attention_bias.weight, own.relative_attention_max_distance
    buckets = own._relative_position_bucket(
        torch.arange(-most, most + 1, device=weight.device),
        bidirectional=not own.is_decoder, num_buckets=own.relative_attention_num_buckets,
        max_distance=most,
    )  # fmt: skip

    def by_distance(distances: torch.Tensor) -> torch.Tensor:
        return F.embedding(
            buckets[distances.clamp(-most, most) + most], own.relative_attention_bias.weight
        )

    def position_bias(rows: torch.Tensor, context: Context) -> Any:
        if context.cache is not None:
            return None
        tokens = rows.shape[1]
        bias = RelativeBias.of_distances(by_distance, tokens, tokens, rows.device)
        # Other attention functions add tensors.
        return bias if implementation(own.config) == "stof" else bias.dense()

    return position_bias
