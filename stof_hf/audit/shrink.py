"""Tiny configurations: the default configuration of a model type with all sizes cut down."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from typing import Any

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, POSITIONS, IMAGE, PATCH = 64, 4, 2, 16, 120, 128, 32, 8

# Which attributes are cut to which value, by name; the first that matches counts. A value that is
# smaller already stays.
_RULES: list[tuple[str, int]] = [
    (r"(.*_)?vocab_size(_.*)?|.*_vocab_size", VOCAB),
    (r"first_k_dense_replace|max_window_layers|.*shared_experts|n_group|topk_group|.*_n_group", 1),
    (r"num_nextn_predict_layers|num_kv_shared_layers|num_mtp.*", 0),
    (r"index_n_heads", 2),
    (r"mamba_n_heads|mamba_num_heads|ssm_num_heads", 8),
    (r"mamba_(d_head|head_dim|d_state|chunk_size)|ssm_state_size|state_size|chunk_size", 16),
    (r"qk_(rope|nope)_head_dim|rotary_dim|.*_rope_head_dim", 8),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"(.*_)?(head_dim|d_kv|kv_channels|attention_head_size|head_size|dim_head)", HEAD_DIM),
    (r"query_pre_attn_scalar", HEAD_DIM),
    (r"(q|kv|o|.*_)_?lora_rank", 32),
    (r"(.*_)?(num_experts_per_tok|moe_topk|moe_k|top_k_experts|num_selected_experts)", 2),
    (r"(.*_)?(num_experts|num_local_experts|n_routed_experts)", 4),
    (r"(.*_)?(num_key_value_heads|num_kv_heads|n_head_kv|num_key_value_groups|n_kv_heads)",
     KV_HEADS),
    (r"(.*_)?(num_attention_heads|num_heads|n_heads?|attention_heads|num_query_heads)", HEADS),
    (r"(.*_)?(hidden_layers|n_layers?|num_layers|depth|encoder_layers|decoder_layers|layers)", 2),
    (r"num_.*_layers|resampler_depth|num_blocks", 2),
    (r"moe_intermediate_size|expert_ffn.*|.*expert.*intermediate_size", 32),
    (r"(.*_)?(intermediate_size|ffn_dim|d_ff|mlp_dim|ffn_hidden_size|n_inner|intermediate_dim)",
     96),
    (r"sliding_window|attention_chunk_size|local_attention|window_length", 8),
    (r"(.*_)?(max_position_embeddings|n_positions|max_(source|target)_positions|n_ctx)", POSITIONS),
    (r"(max_seq_len|max_sequence_length|seq_length|context_length|max_length)", POSITIONS),
    (r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|hidden_dim|emb_dim|embedding_size|dim|d_embed)",
     HIDDEN),
    (r"(.*_)?(word_embed_proj_dim|projection_dim|pooler_output_size|embedding_dim|output_dim)",
     HIDDEN),
    (r"hidden_size_per_layer_input", 16),
    (r"upsample_groups", HIDDEN),
    (r"(.*_)?(image_size|input_size|img_size)", IMAGE),
    (r"num_frames|frames", 4),
    (r"(.*_)?patch_size", PATCH),
    (r"num_queries|num_latents|num_query_tokens|num_image_tokens", 8),
    (r"full_attention_interval|global_attn_every_n_layers|sliding_window_pattern|attn_layer_period",
     2),
]  # fmt: skip
RULES = [(re.compile(pattern), value) for pattern, value in _RULES]

# Models with rotary sections have them in their code, for their own head size.
_SECTIONS = {"small, one head size": [2, 3, 3], "small, one number of heads": [1, 1, 2]}

_TOKEN = re.compile(r".*(token_id|token_index|_token_ids?)")
_FIXED_TOKENS = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1, "cls": 1, "sep": 2, "mask": 3}
_ROPE_KEPT = ("partial_rotary_factor", "llama_4_scaling_beta", "original_max_position_embeddings")
_ROPE = ("rope_parameters", "rope_scaling")
_DROPPED = {
    "transformers_version", "architectures", "_name_or_path", "dtype", "torch_dtype", "id2label",
    "label2id", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "stof",
    "begin_suppress_tokens", "attn_implementation", "_attn_implementation", "num_labels",
    "out_indices", "_out_features", "_out_indices", "stage_names",
}  # fmt: skip

_KEPT = {"num_feat_extract_layers"}

# Which sizes follow from lists of stages, which stay as they are.
_FOLLOWS_LIST = {
    "depths": ("num_hidden_layers", "num_layers"),
    "embed_dim_per_stage": ("hidden_size", "embed_dim"),
}

# What a type needs besides the rules, by model type; dotted names reach nested configurations.
_RESNET = {
    "model_type": "resnet", "embedding_size": 32, "hidden_sizes": [32, 32, 32, 64],
    "depths": [1, 1, 1, 1], "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
_LAST_STAGE = {"backbone_config": {**_RESNET, "out_features": ["stage4"]}}
_MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1}
OVERRIDES: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 32},
    "bamba": {"attn_layer_indices": [1], **_MAMBA_HEADS},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], **_MAMBA_HEADS},
    "falcon_h1": {"mamba_d_ssm": 128, **_MAMBA_HEADS},
    "conditional_detr": _LAST_STAGE,
    "detr": _LAST_STAGE,
    "table-transformer": _LAST_STAGE,
    "dab-detr": _LAST_STAGE,
    "deformable_detr": {"backbone_config": _RESNET},
    "grounding-dino": {"backbone_config": _RESNET},
    "mm-grounding-dino": {"backbone_config": _RESNET},
    "omdet-turbo": {"backbone_config": _RESNET},
    "ernie4_5_moe": {"moe_layer_start_index": 0, "moe_layer_end_index": 1},
    "esm": {"mask_token_id": 3, "pad_token_id": 0, "position_embedding_type": "rotary"},
    "funnel": {"block_sizes": [1, 1], "block_repeats": [1, 1], "d_head": HEAD_DIM},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": HEAD_DIM},
    "owlv2": {"text_config.max_position_embeddings": 64},
    "owlvit": {"text_config.max_position_embeddings": 64},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": HIDDEN},
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [32, 32]},
}

_WITHOUT_DEFAULT = {
    "vocab_size": VOCAB, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip

# Ways to shrink, tried in this order until the model builds and runs with eager attention.
PROFILES = ("small", "small, one head size", "small, one number of heads", "few layers")


def shrunk(config: Any, profile: str = "small") -> Any:
    """A tiny configuration of the class of `config`.

    Args:
        config: a default configuration of Transformers.
        profile: one of `PROFILES`.

    Raises:
        whatever the configuration's class raises for the values.
    """
    arguments = _shrunk_arguments(config, profile)
    arguments.pop("model_type", None)
    for name, value in OVERRIDES.get(config.model_type, {}).items():
        *path, last = name.split(".")
        target = arguments
        for part in path:
            target = target[part]
        target[last] = value
    return type(config)(**arguments)


def _shrunk_arguments(config: Any, profile: str) -> dict[str, Any]:
    # A head size that is no field was derived from others, and is again.
    known = {field.name for field in fields(config)} if is_dataclass(config) else set()
    values = {
        name: v
        for name, v in config.to_dict().items()
        if name not in _DROPPED and (name in known or not name.endswith("head_dim"))
    }
    if "depths" not in values:
        values.pop("out_features", None)  # Stages are layers there, and most are gone.
    kept = {n for key, names in _FOLLOWS_LIST.items() if key in values for n in names}
    picks, count = _picked_layers(values)
    out: dict[str, Any] = {}
    for name, value in values.items():
        part = vars(config).get(name)
        if name in kept:
            out[name] = value
            continue
        if hasattr(part, "to_dict") and hasattr(part, "model_type"):
            out[name] = _shrunk_arguments(part, profile)
            out[name]["model_type"] = part.model_type
        elif name in _ROPE:
            if value:
                out[name] = _rope(value, _SECTIONS.get(profile))
        elif name == "per_layer_config" and value:
            out[name] = {
                picks.index(int(layer)): {n: _shrunk_value(n, v, profile) for n, v in own.items()}
                for layer, own in value.items()
                if int(layer) in picks
            }
        elif isinstance(value, (list, tuple)):
            out[name] = _shrunk_list(name, list(value), picks, count)
        elif _TOKEN.fullmatch(name) and isinstance(value, int):
            out[name] = _token(name)
        else:
            out[name] = _shrunk_value(name, value, profile)
    if "kv_lora_rank" in out and "num_key_value_heads" in out:
        out["num_key_value_heads"] = out.get("num_attention_heads", HEADS)
    if "qk_rope_head_dim" in out and "head_dim" in out and profile == PROFILES[0]:
        out["head_dim"] = out["qk_rope_head_dim"]  # What rotary embeddings are made for.
    layers = "num_hidden_layers"
    if count and isinstance(values.get(layers), int):
        out[layers] = len(picks)
    if profile == "small, one head size":
        for name in ("head_dim", "num_key_value_heads"):
            if name in out:
                out[name] = {"head_dim": HEAD_DIM, "num_key_value_heads": HEADS}[name]
    return out


def _shrunk_value(name: str, value: Any, profile: str) -> Any:
    if value is None and name in _WITHOUT_DEFAULT:
        return _WITHOUT_DEFAULT[name]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if name in _KEPT:
        return value
    for pattern, target in RULES:
        if not pattern.fullmatch(name):
            continue
        if profile == "few layers" and target not in (VOCAB, POSITIONS, 1, 2, 0):
            return value
        if profile == "small, one number of heads" and target == KV_HEADS and "head" in name:
            return min(value, HEADS)
        return min(value, target)
    return value


def _shrunk_list(name: str, value: list[Any], picks: list[int], count: int) -> list[Any]:
    if name in ("depths", "num_blocks", "layer_depths"):
        return [1] * len(value)
    if count and len(value) == count:
        return [value[i] for i in picks]
    if _TOKEN.fullmatch(name):
        return [_token(name)]
    if name in ("image_size", "img_size", "input_size"):
        return [min(n, IMAGE) for n in value]
    if name == "patch_size":
        return [min(n, PATCH) for n in value]
    if name == "conv_dim":
        return [32] * len(value)
    if re.search(r"(feature_layer|deepstack|fullatt|out_ind|global_attn|full_att)", name):
        return [min(n, 1) if isinstance(n, int) else n for n in value]
    return value


def _picked_layers(values: dict[str, Any]) -> tuple[list[int], int]:
    """Which layers to keep, so that each kind of layer is there, and how many there were."""
    kinds = values.get("layer_types") or values.get("layers_block_type")
    count = values.get("num_hidden_layers") or values.get("n_layer") or values.get("num_layers")
    if "depths" in values:
        return [], 0
    if not kinds:
        return [0, 1], count if isinstance(count, int) and count > 2 else 0
    first = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())
    return (first if len(first) > 1 else [0, min(1, len(kinds) - 1)]), len(kinds)


def _rope(value: dict[str, Any], sections: list[int] | None) -> dict[str, Any]:
    """Default rotary embeddings for a small head size."""
    if any(isinstance(part, dict) for part in value.values()):
        return {n: _rope(v, sections) if isinstance(v, dict) else v for n, v in value.items()}
    kept = {name: v for name, v in value.items() if name in _ROPE_KEPT}
    given = value.get("mrope_section")
    if given or sections:
        kept["mrope_section"] = sections or ([2, 3, 3] if len(given) == 3 else given)
        kept["mrope_interleaved"] = value.get("mrope_interleaved", False)
    return {"rope_type": "default", "rope_theta": 10000.0, **kept}


def _token(name: str) -> int:
    """An id below the vocabulary, the same wherever the name appears; inputs use 5 to 79."""
    for start, token in _FIXED_TOKENS.items():
        if name.startswith(f"{start}_token"):
            return token
    return 80 + sum(map(ord, name)) % 40
