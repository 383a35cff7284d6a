"""What a model is called with while it is tuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError

__all__ = ["Inputs", "make_inputs", "most_tokens", "run"]

Inputs = Mapping[str, Any]


def make_inputs(
    model: nn.Module, batch_size: int, seq_len: int | None, phase: str, seed: int
) -> Inputs:
    """Random inputs without padding.

    Raises:
        UnsupportedError: the model takes neither tokens nor images, or fewer tokens.
    """
    config, device = model.config, next(model.parameters()).device
    noise = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        pixels = torch.randn(batch_size, config.num_channels, height, width, generator=noise)
        return {"pixel_values": pixels.to(device, next(model.parameters()).dtype)}
    if model.main_input_name != "input_ids":
        raise UnsupportedError(
            f"{type(model).__name__} takes {model.main_input_name}, which only you know how to "
            "make: pass example_inputs"
        )
    most = most_tokens(model) or 512
    seq_len = seq_len or min(512, most)
    if seq_len > most:
        raise UnsupportedError(f"the model takes {most} tokens, not {seq_len}: pass less")
    if phase == "decode":
        # The last one is the step that is tuned.
        seq_len = max(2, seq_len)
    first = min(3, config.vocab_size - 1)
    ids = torch.randint(first, config.vocab_size, (batch_size, seq_len), generator=noise)
    # Padding in the middle would confuse positions.
    pad = getattr(config, "pad_token_id", None)
    if pad is not None:
        ids[ids == pad] = (pad + 1) % config.vocab_size
    inputs = {"input_ids": ids.to(device)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs


def most_tokens(model: nn.Module) -> int | None:
    """How many tokens a model takes; None where its configuration names no limit.

    >>> from transformers import RobertaConfig, RobertaModel
    >>> config = RobertaConfig(hidden_size=12, num_hidden_layers=1, max_position_embeddings=514)
    >>> most_tokens(RobertaModel(config))
    512
    """
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        # Positions of RoBERTa and its kin begin behind the padding token's.
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return table.num_embeddings - table.padding_idx - 1
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def run(model: nn.Module, inputs: Inputs, phase: str) -> tuple[Callable[[], Any], bool]:
    """What calls the model, and whether its last call of each layer is the one to tune.

    Raises:
        UnsupportedError: decoding with a model that keeps no cache.
    """
    body = model
    if set(inputs) <= {"input_ids", "decoder_input_ids", "attention_mask", "pixel_values"}:
        # Neither logits nor other heads.
        body = getattr(model, "base_model", model)
    if not hasattr(model.config, "use_cache"):
        if phase != "forward":
            raise UnsupportedError(f"{type(model).__name__} keeps no cache: tune it as a forward")
        return lambda: body(**inputs), False
    if phase == "forward":
        return lambda: body(**inputs, use_cache=False), False
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{type(model).__name__} has an encoder: tune it as a forward")
    if phase == "prefill":
        return lambda: body(**inputs, use_cache=True), False
    if set(inputs) - {"input_ids", "attention_mask"}:
        raise UnsupportedError("decoding is tuned with input_ids and attention_mask alone")

    def step() -> Any:
        ids = inputs["input_ids"]
        mask = {k: v for k, v in inputs.items() if k == "attention_mask"}
        prompt = {"input_ids": ids[:, :-1]} | {k: v[:, :-1] for k, v in mask.items()}
        past = body(**prompt, use_cache=True).past_key_values
        if past is None:
            raise UnsupportedError(f"{type(model).__name__} gives no cache: tune it as a forward")
        return body(input_ids=ids[:, -1:], past_key_values=past, use_cache=True, **mask)

    return step, True
