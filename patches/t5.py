"""T5: self-attention and feed-forward halves of its blocks, each pre-norm, without biases.

Between halves a block clamps what overflows fp16, which stays its own; so does attention to the
encoder, and the first self-attention of a stack, which computes the position bias of all.
"""

from transformers.models.t5.modeling_t5 import T5LayerFF, T5LayerSelfAttention

from stof_hf.errors import UnsupportedError
from stof_hf.fusion.layer import Attention, Layer, Operator, product

LAYERS = (T5LayerFF, T5LayerSelfAttention)


def layer(module: T5LayerFF | T5LayerSelfAttention) -> Layer:
    norm = Operator("norm", (module.layer_norm,))
    if isinstance(module, T5LayerSelfAttention):
        own = module.SelfAttention
        if own.has_relative_attention_bias:
            raise UnsupportedError("it computes the position bias")
        to = Attention(own, own.n_heads, own.n_heads, own.key_value_proj_dim, own.scaling)
        attention = Operator("attention", attention=to)
        operators = norm, *product(own.q, own.k, own.v), attention, *product(own.o)
        return Layer((*operators, Operator("residual")), norm_first=True, returns_bias=True)
    mlp = module.DenseReluDense
    if hasattr(mlp, "wi"):
        front = *product(mlp.wi), Operator("act", function=mlp.act)
    else:
        front = *product(mlp.wi_0, mlp.wi_1), Operator("gate", function=mlp.act)
    return Layer((norm, *front, *product(mlp.wo), Operator("residual")), norm_first=True)
