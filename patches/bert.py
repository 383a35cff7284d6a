"""BERT, RoBERTa and ELECTRA: post-norm encoder layers with biases."""

import torch
from transformers.models.bert.modeling_bert import BertEmbeddings, BertEncoder, BertLayer
from transformers.models.electra.modeling_electra import (
    ElectraEmbeddings,
    ElectraEncoder,
    ElectraLayer,
)
from transformers.models.roberta.modeling_roberta import (
    RobertaEmbeddings,
    RobertaEncoder,
    RobertaLayer,
)

from stof_hf.fusion.embeddings import lookup
from stof_hf.fusion.layer import Attention, Context, Layer, Operator, product

LAYERS = (BertLayer, RobertaLayer, ElectraLayer)
EMBEDDINGS = (BertEmbeddings, RobertaEmbeddings, ElectraEmbeddings)
STACKS = (BertEncoder, RobertaEncoder, ElectraEncoder)


def layer(module: BertLayer) -> Layer:
    own, out = module.attention.self, module.attention.output
    heads, size = own.num_attention_heads, own.attention_head_size
    return Layer(
        (
            *product(own.query, own.key, own.value),
            Operator("attention", attention=Attention(own, heads, heads, size, own.scaling)),
            *product(out.dense), Operator("residual"),
            Operator("norm", (out.LayerNorm,)),
            *product(module.intermediate.dense),
            Operator("act", function=module.intermediate.intermediate_act_fn),
            *product(module.output.dense), Operator("residual"),
            Operator("norm", (module.output.LayerNorm,)),
        ),
        norm_first=False,
    )  # fmt: skip


def embeddings(module: BertEmbeddings) -> Layer:
    def others(ids: torch.Tensor, context: Context) -> tuple[torch.Tensor, ...]:
        positions, types = context.position_ids, context.token_type_ids
        past = 0 if context.past is None else context.past
        if positions is None and isinstance(module, RobertaEmbeddings):
            # They depend on where padding is.
            positions = module.create_position_ids_from_input_ids(ids, module.padding_idx, past)
        elif positions is None:
            positions = module.position_ids[:, past : past + ids.shape[1]]
        # Where none are given, the module has a buffer of zeros.
        return module.token_type_ids[:, :1] if types is None else types, positions

    tables = module.word_embeddings, module.token_type_embeddings, module.position_embeddings
    return lookup(tables, module.LayerNorm, others)
