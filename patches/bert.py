"""BERT and RoBERTa: post-norm encoder layers with biases."""

from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.roberta.modeling_roberta import RobertaLayer

from stof_hf.fusion.layer import Attention, Layer, Operator

LAYERS = (BertLayer, RobertaLayer)


def layer(module: BertLayer) -> Layer:
    own, out = module.attention.self, module.attention.output
    packed = own.query, own.key, own.value
    heads, size = own.num_attention_heads, own.attention_head_size
    up, down = (module.intermediate.dense,), (module.output.dense,)
    return Layer(
        (
            Operator("gemm", packed), Operator("bias", packed),
            Operator("attention", attention=Attention(own, heads, heads, size, own.scaling)),
            Operator("gemm", (out.dense,)), Operator("bias", (out.dense,)), Operator("residual"),
            Operator("norm", (out.LayerNorm,)),
            Operator("gemm", up), Operator("bias", up),
            Operator("act", function=module.intermediate.intermediate_act_fn),
            Operator("gemm", down), Operator("bias", down), Operator("residual"),
            Operator("norm", (module.output.LayerNorm,)),
        ),
        norm_first=False,
    )  # fmt: skip
