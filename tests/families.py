"""Tiny random models of many families, for parity between "stof" and the model's own attention.

Adding a family is adding a row to `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from packaging.version import Version

_TEXT = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GQA = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}
_WINDOW = {**_GQA, "sliding_window": 8}
_VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
_AUDIO = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "conv_dim": (16, 16), "conv_kernel": (4, 4), "conv_stride": (4, 4), "vocab_size": 20,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
_BART = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
_T5 = {
    "vocab_size": 99, "d_model": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "d_kv": 8, "d_ff": 48, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_T5GEMMA2 = {
    **_WINDOW, "max_position_embeddings": 64, "query_pre_attn_scalar": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@dataclass(frozen=True)
class Family:
    """A tiny model: class names of its configuration and itself, and the configuration's arguments.

    kind: "encoder" and "decoder" (text), "encdec", "vision", "audio", "whisper", "clip", "llava".
    skip: what the family cannot do with any attention implementation, and why.
    scale: factor on the initial weights, which are so small that a wrong mask would hardly show.
    """

    name: str
    kind: str
    config: str
    model: str
    arguments: dict[str, Any] = field(default_factory=dict)
    skip: dict[str, str] = field(default_factory=dict)
    scale: float = 3.0

    @property
    def exists(self) -> bool:
        return hasattr(transformers, self.config) and hasattr(transformers, self.model)

    def build(self, implementation: str = "eager") -> Any:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.arguments)
        model = getattr(transformers, self.model)._from_config(
            config, attn_implementation=implementation
        )
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(self.scale)
        return model.eval()


_NO_BLOCK_IDS = {}
if Version(transformers.__version__) < Version("5.18"):
    _NO_BLOCK_IDS = {"static": "it calls create_chunked_causal_mask with an argument that it lacks"}
_IMAGE_MASK = {}
if Version(transformers.__version__) < Version("5.23"):
    _IMAGE_MASK = {"compile": "it gives text queries a mask of as many rows as the image has"}
_NEEDS_2D = "computes with the 2D mask outside attention"


def _bert(
    name: str, prefix: str, *, skip: dict[str, str] | None = None, **arguments: Any
) -> Family:
    arguments = {**_TEXT, **arguments}
    return Family(name, "encoder", f"{prefix}Config", f"{prefix}Model", arguments, skip or {})


def _causal(
    name: str, prefix: str, base: dict[str, Any] = _GQA, *, config: str | None = None,
    model: str | None = None, skip: dict[str, str] | None = None, **arguments: Any,
) -> Family:  # fmt: skip
    return Family(
        name, "decoder", config or f"{prefix}Config", model or f"{prefix}ForCausalLM",
        {**base, "max_position_embeddings": 64, **arguments}, skip or {},
    )  # fmt: skip


def _seq2seq(name: str, prefix: str, base: dict[str, Any] = _BART, **arguments: Any) -> Family:
    model = f"{prefix}MTModel" if prefix == "Marian" else f"{prefix}ForConditionalGeneration"
    return Family(
        name,
        "encdec",
        f"{prefix}Config",
        model,
        {**base, **arguments},
        scale=1.0 if base is _T5 else 3.0,
    )


def _image(name: str, prefix: str, kind: str = "vision", **arguments: Any) -> Family:
    return Family(name, kind, f"{prefix}Config", f"{prefix}Model", {**_VISION, **arguments})


def _sound(name: str, prefix: str, **arguments: Any) -> Family:
    return Family(name, "audio", f"{prefix}Config", f"{prefix}Model", {**_AUDIO, **arguments})


FAMILIES = [
    _bert("bert", "Bert"),
    _bert("roberta", "Roberta", max_position_embeddings=70),
    _bert("xlm-roberta", "XLMRoberta", max_position_embeddings=70),
    _bert("electra", "Electra", embedding_size=32),
    _bert("albert", "Albert", embedding_size=32),
    _bert("ernie", "Ernie"),
    _bert("esm", "Esm", mask_token_id=3, position_embedding_type="rotary", skip={"4d": _NEEDS_2D}),
    _bert("modernbert", "ModernBert", local_attention=8, global_attn_every_n_layers=2,
          max_position_embeddings=64, cls_token_id=1, sep_token_id=2),
    _bert("splinter", "Splinter"),
    _bert("align-text", "AlignText"),
    _bert("clap-text", "ClapText", max_position_embeddings=70),
    _bert("layoutlm", "LayoutLM", skip={"4d": _NEEDS_2D}),
    _bert("markuplm", "MarkupLM", max_position_embeddings=70, max_depth=4, xpath_unit_hidden_size=8,
          skip={"4d": _NEEDS_2D}),
    Family("distilbert", "encoder", "DistilBertConfig", "DistilBertModel",
           {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48,
            "pad_token_id": 0}),
    Family("gpt2", "decoder", "GPT2Config", "GPT2LMHeadModel",
           {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    _causal("gpt-neox", "GPTNeoX", _TEXT),
    _causal("gpt-bigcode", "GPTBigCode", {}, vocab_size=99, n_embd=32, n_layer=2, n_head=4,
            n_positions=64),
    _causal("opt", "OPT", _TEXT, ffn_dim=48, word_embed_proj_dim=32, skip={"4d": _NEEDS_2D}),
    _causal("biogpt", "BioGpt", _TEXT),
    _causal("llama", "Llama"),
    _causal("mistral", "Mistral", _WINDOW),
    _causal("mixtral", "Mixtral", {**_WINDOW, **_MOE}),
    _causal("qwen2", "Qwen2"),
    _causal("qwen3", "Qwen3"),
    _causal("qwen3-moe", "Qwen3Moe", {**_GQA, **_EXPERTS}),
    _causal("gemma", "Gemma"),
    _causal("gemma2", "Gemma2", _WINDOW, query_pre_attn_scalar=8),
    _causal("gemma3", "Gemma3", _WINDOW, config="Gemma3TextConfig", query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention"]),
    _causal("phi", "Phi", _TEXT),
    _causal("phi3", "Phi3", _WINDOW),
    _causal("olmo2", "Olmo2"),
    _causal("cohere", "Cohere"),
    _causal("cohere2", "Cohere2", _WINDOW, layer_types=["sliding_attention", "full_attention"]),
    _causal("starcoder2", "Starcoder2", _WINDOW),
    _causal("stablelm", "StableLm"),
    _causal("granite", "Granite"),
    _causal("smollm3", "SmolLM3"),
    _causal("glm4", "Glm4"),
    _causal("nemotron", "Nemotron"),
    _causal("gpt-oss", "GptOss", {**_WINDOW, **_MOE},
            layer_types=["sliding_attention", "full_attention"]),
    _causal("llama4", "Llama4", _GQA, config="Llama4TextConfig", num_local_experts=2,
            attention_chunk_size=8, intermediate_size_mlp=48, skip=_NO_BLOCK_IDS,
            layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0]),
    _causal("deepseek-v3", "DeepseekV3", _TEXT, num_key_value_heads=4, q_lora_rank=16,
            kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
            n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
            moe_intermediate_size=16, first_k_dense_replace=1),
    _seq2seq("t5", "T5", _T5),
    _seq2seq("mt5", "MT5", _T5),
    _seq2seq("switch-transformers", "SwitchTransformers", {**_T5, "num_experts": 4}),
    _seq2seq("bart", "Bart"),
    _seq2seq("mbart", "MBart"),
    _seq2seq("pegasus", "Pegasus"),
    _seq2seq("marian", "Marian", decoder_vocab_size=99),
    _seq2seq("m2m100", "M2M100"),
    _seq2seq("blenderbot", "Blenderbot"),
    _seq2seq("bigbird-pegasus", "BigBirdPegasus", attention_type="original_full"),
    _seq2seq("t5gemma2", "T5Gemma2", {},
             encoder={"text_config": _T5GEMMA2, "vision_config": _VISION, "image_token_index": 98},
             decoder=_T5GEMMA2, image_token_index=98),
    Family("whisper", "whisper", "WhisperConfig", "WhisperForConditionalGeneration",
           {**_BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64,
            "begin_suppress_tokens": None, "suppress_tokens": None}),
    _image("vit", "ViT"),
    _image("deit", "DeiT"),
    _image("dinov2", "Dinov2"),
    _image("ijepa", "IJepa"),
    _image("siglip-vision", "SiglipVision"),
    _image("phi4-multimodal-vision", "Phi4MultimodalVision", crop_size=32),
    _image("videomae", "VideoMAE", "video", num_frames=4, tubelet_size=2),
    Family("clip", "clip", "CLIPConfig", "CLIPModel",
           {"text_config": {**_TEXT, "max_position_embeddings": 64, "projection_dim": 16},
            "vision_config": {**_VISION, "projection_dim": 16}, "projection_dim": 16}),
    Family("bridgetower", "clip", "BridgeTowerConfig", "BridgeTowerModel",
           {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 48,
            "text_config": {**_TEXT, "hidden_size": 64, "max_position_embeddings": 70},
            "vision_config": {**_VISION, "hidden_size": 64}}, skip=_IMAGE_MASK),
    _sound("wav2vec2", "Wav2Vec2"),
    _sound("hubert", "Hubert"),
    Family("ast", "spectrogram", "ASTConfig", "ASTModel",
           {**{k: v for k, v in _VISION.items() if k != "image_size"}, "patch_size": 4,
            "frequency_stride": 4, "time_stride": 4, "max_length": 24, "num_mel_bins": 16}),
    Family("llava", "llava", "LlavaConfig", "LlavaForConditionalGeneration",
           {"text_config": {"model_type": "llama", **_GQA, "max_position_embeddings": 64},
            "vision_config": {"model_type": "clip_vision_model", **_VISION, "projection_dim": 16},
            "image_token_index": 98, "image_token_id": 98, "image_seq_length": 16,
            "vision_feature_select_strategy": "default", "vision_feature_layer": -1}),
]  # fmt: skip

TEXT_KINDS = ("encoder", "decoder", "encdec")
GENERATIVE_KINDS = ("decoder", "encdec", "whisper", "llava")


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(5, 90, (batch, length), generator=torch.Generator().manual_seed(seed))


def inputs_of(family: Family, batch: int = 2, length: int = 21) -> dict[str, torch.Tensor]:
    """Inputs without padding."""
    noise: Callable[..., torch.Tensor] = torch.Generator().manual_seed(2)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=noise)

    image = {"pixel_values": randn(batch, 3, 32, 32)}
    match family.kind:
        case "encoder" | "decoder":
            return {"input_ids": tokens(batch, length)}
        case "encdec":
            return {
                "input_ids": tokens(batch, length),
                "decoder_input_ids": tokens(batch, 9, seed=3),
            }
        case "whisper":
            return {"input_features": randn(batch, 8, 32), "decoder_input_ids": tokens(batch, 9)}
        case "vision":
            return image
        case "video":
            return {"pixel_values": randn(batch, 4, 3, 32, 32)}
        case "audio":
            return {"input_values": randn(batch, 640)}
        case "spectrogram":
            return {"input_values": randn(batch, 24, 16)}
        case "clip":
            return {"input_ids": tokens(batch, length), **image}
        case "llava":
            ids = torch.cat([torch.full((batch, 16), 98), tokens(batch, length)], 1)
            return {"input_ids": ids, **image}
    raise AssertionError(family.kind)
