"""DistilBERT: post-norm encoder layers with biases."""

import torch
from transformers.models.distilbert.modeling_distilbert import (
    Embeddings,
    Transformer,
    TransformerBlock,
)

from stof_hf.fusion.embeddings import lookup
from stof_hf.fusion.layer import Attention, Context, Layer, Operator, product

LAYERS = (TransformerBlock,)
EMBEDDINGS = (Embeddings,)
STACKS = (Transformer,)


def layer(module: TransformerBlock) -> Layer:
    own, ffn = module.attention, module.ffn
    heads = own.n_heads
    to = Attention(own, heads, heads, own.attention_head_size, own.scaling)
    return Layer(
        (
            *product(own.q_lin, own.k_lin, own.v_lin), Operator("attention", attention=to),
            *product(own.out_lin), Operator("residual"),
            Operator("norm", (module.sa_layer_norm,)),
            *product(ffn.lin1), Operator("act", function=ffn.activation),
            *product(ffn.lin2), Operator("residual"),
            Operator("norm", (module.output_layer_norm,)),
        ),
        norm_first=False,
    )  # fmt: skip


def embeddings(module: Embeddings) -> Layer:
    def others(ids: torch.Tensor, context: Context) -> tuple[torch.Tensor, ...]:
        given = context.position_ids
        return (module.position_ids[:, : ids.shape[1]] if given is None else given,)

    tables = module.word_embeddings, module.position_embeddings
    return lookup(tables, module.LayerNorm, others)
