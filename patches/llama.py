"""LLaMA, Mistral, Qwen2, Qwen3: pre-norm decoder layers, rotary embeddings, a gated MLP."""

from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from stof_hf.fusion.layer import Attention, Layer, Operator, product

LAYERS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)


def layer(module: LlamaDecoderLayer) -> Layer:
    own, mlp = module.self_attn, module.mlp
    packed = own.q_proj, own.k_proj, own.v_proj
    size = own.head_dim
    heads, kv_heads = own.q_proj.out_features // size, own.k_proj.out_features // size
    to = Attention(own, heads, kv_heads, size, own.scaling)
    norms = getattr(own, "q_norm", None), getattr(own, "k_norm", None)
    return Layer(
        (
            Operator("norm", (module.input_layernorm,)), *product(*packed),
            *((Operator("head norm", norms, attention=to),) if all(norms) else ()),
            Operator("rotary", attention=to), Operator("attention", attention=to),
            *product(own.o_proj), Operator("residual"),
            Operator("norm", (module.post_attention_layernorm,)),
            *product(mlp.gate_proj, mlp.up_proj), Operator("gate", function=mlp.act_fn),
            *product(mlp.down_proj), Operator("residual"),
        ),
        norm_first=True,
    )  # fmt: skip
