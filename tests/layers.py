"""Tiny models of the families that stof_hf.patches knows, whose layers tests replace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from stof_hf.fusion.install import Found, find

#: For tests of templates on tensors of the CPU.
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton kernels run on the GPU here, not on the CPU"
)


def sizes(width: int) -> dict[str, int]:
    """Of a configuration with two layers of four heads."""
    return {
        "vocab_size": 97, "hidden_size": width, "intermediate_size": width * 3 // 2,
        "num_hidden_layers": 2, "num_attention_heads": 4,
    }  # fmt: skip


def _gqa(width: int) -> dict[str, int]:
    return sizes(width) | {"num_key_value_heads": 2}


MODELS = {
    "bert": lambda width: transformers.BertModel(transformers.BertConfig(**sizes(width))),
    "roberta": lambda width: transformers.RobertaModel(transformers.RobertaConfig(**sizes(width))),
    "electra": lambda width: transformers.ElectraModel(
        transformers.ElectraConfig(**sizes(width), embedding_size=32)
    ),
    "distilbert": lambda width: transformers.DistilBertModel(
        transformers.DistilBertConfig(
            vocab_size=97, dim=width, hidden_dim=width * 3 // 2, n_layers=2, n_heads=4
        )
    ),
    "gpt2": lambda width: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=97, n_embd=width, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
        )
    ),
    "llama": lambda width: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_gqa(width))),
    "llama with biases": lambda width: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_gqa(width), attention_bias=True, mlp_bias=True)
    ),
    "mistral": lambda width: transformers.MistralForCausalLM(
        transformers.MistralConfig(**_gqa(width))
    ),
    "modernbert": lambda width: transformers.ModernBertModel(
        transformers.ModernBertConfig(**sizes(width), pad_token_id=0, local_attention=16)
    ),
    "t5": lambda width: transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=97, d_model=width, d_kv=width // 4, d_ff=width * 3 // 2, num_layers=2,
            num_heads=4, feed_forward_proj="gated-gelu",
        )
    ),
    "vit": lambda width: transformers.ViTModel(
        transformers.ViTConfig(
            **{k: v for k, v in sizes(width).items() if k != "vocab_size"},
            image_size=28, patch_size=4,
        )
    ),
    "qwen2": lambda width: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_gqa(width))),
    "qwen3": lambda width: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**_gqa(width), head_dim=width // 4)
    ),
}  # fmt: skip


def build(name: str, implementation: str = "stof", width: int = 64) -> Any:
    """A model of random weights, its biases included, in evaluation mode."""
    torch.manual_seed(0)
    made = MODELS[name](width).eval()
    made.set_attn_implementation(implementation)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return made


def blocks(model: Any) -> list[Found]:
    """The model's layers without its embeddings."""
    return [found for found in find(model) if "embeddings" not in found.name]


def inputs_of(model: Any, length: int = 50) -> dict[str, torch.Tensor]:
    """A batch of two, the second padded on the left."""
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 28, 28)}
    ids = torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(length) >= torch.tensor([[0], [7]])).long(),
    }


def first(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's first output."""
    with torch.no_grad():
        return model(**inputs)[0]
