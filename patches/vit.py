"""ViT: pre-norm encoder layers with biases."""

from transformers.models.vit.modeling_vit import ViTLayer, ViTPatchEmbeddings

from stof_hf.fusion.embeddings import patches
from stof_hf.fusion.layer import Attention, Layer, Operator, product

LAYERS = (ViTLayer,)
EMBEDDINGS = (ViTPatchEmbeddings,)


def layer(module: ViTLayer) -> Layer:
    own, mlp = module.attention, module.mlp
    heads = own.num_attention_heads
    to = Attention(own, heads, heads, own.head_dim, own.scaling)
    return Layer(
        (
            Operator("norm", (module.layernorm_before,)),
            *product(own.q_proj, own.k_proj, own.v_proj),
            Operator("attention", attention=to),
            *product(own.o_proj), Operator("residual"),
            Operator("norm", (module.layernorm_after,)),
            *product(mlp.fc1), Operator("act", function=mlp.activation_fn),
            *product(mlp.fc2), Operator("residual"),
        ),
        norm_first=True,
    )  # fmt: skip


def embeddings(module: ViTPatchEmbeddings) -> Layer:
    return patches(module.projection)
