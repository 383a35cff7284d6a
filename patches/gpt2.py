"""GPT-2: pre-norm decoder layers with biases, whose projections are Conv1D modules."""

from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from stof_hf.fusion.layer import Attention, Layer, Operator

LAYERS = (GPT2Block,)


def layer(module: GPT2Block) -> Layer:
    own, mlp = module.attn, module.mlp
    packed, out, up, down = (own.c_attn,), (own.c_proj,), (mlp.c_fc,), (mlp.c_proj,)
    heads, size = own.num_heads, own.head_dim
    return Layer(
        (
            Operator("norm", (module.ln_1,)),
            Operator("gemm", packed), Operator("bias", packed),
            Operator("attention", attention=Attention(own, heads, heads, size, own.scaling)),
            Operator("gemm", out), Operator("bias", out), Operator("residual"),
            Operator("norm", (module.ln_2,)),
            Operator("gemm", up), Operator("bias", up), Operator("act", function=mlp.act),
            Operator("gemm", down), Operator("bias", down), Operator("residual"),
        ),
        norm_first=True,
    )  # fmt: skip
