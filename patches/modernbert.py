"""ModernBERT: pre-norm encoder layers with rotary embeddings and a gated MLP."""

from typing import Any

import torch
from torch import nn
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
)
from transformers.models.modernbert.modeling_modernbert import (
    ModernBertEmbeddings,
    ModernBertEncoderLayer,
    ModernBertModel,
)

from stof_hf.fusion.embeddings import lookup
from stof_hf.fusion.layer import Attention, Layer, Operator, product

LAYERS = (ModernBertEncoderLayer,)
EMBEDDINGS = (ModernBertEmbeddings,)
BODIES = (ModernBertModel,)


def layer(module: ModernBertEncoderLayer) -> Layer:
    own, mlp = module.attn, module.mlp
    heads = module.config.num_attention_heads
    to = Attention(own, heads, heads, own.head_dim, own.head_dim**-0.5)
    # The first layer has none: the embeddings are normalised already.
    first = module.attn_norm
    return Layer(
        (
            *(() if isinstance(first, nn.Identity) else (Operator("norm", (first,)),)),
            *product(own.Wqkv), Operator("rotary", attention=to),
            Operator("attention", attention=to),
            *product(own.Wo), Operator("residual"),
            Operator("norm", (module.mlp_norm,)),
            *product(mlp.Wi), Operator("gate", function=mlp.act),
            *product(mlp.Wo), Operator("residual"),
        ),
        norm_first=True,
    )  # fmt: skip


def embeddings(module: ModernBertEmbeddings) -> Layer:
    return lookup((module.tok_embeddings,), module.norm)


def masks(
    module: ModernBertModel, shape: tuple[int, int], attention_mask: torch.Tensor
) -> dict[str, Any]:
    """Those that its forward makes for tokens [B, S], in the form in which it takes them."""
    rows = module.embeddings.tok_embeddings.weight[0, :1].expand(*shape, 1)
    given = {"config": module.config, "inputs_embeds": rows, "attention_mask": attention_mask}
    return {
        "full_attention": create_bidirectional_mask(**given),
        "sliding_attention": create_bidirectional_sliding_window_mask(**given),
    }
