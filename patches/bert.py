"""BERT, RoBERTa and ELECTRA: post-norm encoder layers with biases."""

from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.electra.modeling_electra import ElectraLayer
from transformers.models.roberta.modeling_roberta import RobertaLayer

from stof_hf.fusion.layer import Attention, Layer, Operator, product

LAYERS = (BertLayer, RobertaLayer, ElectraLayer)


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
