"""GPT-2: pre-norm decoder layers with biases, whose projections are Conv1D modules."""

from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from stof_hf.errors import UnsupportedError
from stof_hf.fusion.layer import Attention, Layer, Operator, product

LAYERS = (GPT2Block,)


def layer(module: GPT2Block) -> Layer:
    own, mlp = module.attn, module.mlp
    if own.reorder_and_upcast_attn:
        raise UnsupportedError("it computes scores in float32 (reorder_and_upcast_attn)")
    heads, size = own.num_heads, own.head_dim
    return Layer(
        (
            Operator("norm", (module.ln_1,)),
            *product(own.c_attn),
            Operator("attention", attention=Attention(own, heads, heads, size, own.scaling)),
            *product(own.c_proj), Operator("residual"),
            Operator("norm", (module.ln_2,)),
            *product(mlp.c_fc), Operator("act", function=mlp.act),
            *product(mlp.c_proj), Operator("residual"),
        ),
        norm_first=True,
    )  # fmt: skip
