"""Inputs for a tiny model, from the names of its forward's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

BATCH, LENGTH, DECODER_LENGTH, PADDED = 2, 20, 9, 7


def tokens(batch: int, length: int, seed: int = 1, below: int = 79) -> torch.Tensor:
    """int64 [batch, length] without special tokens."""
    return torch.randint(5, below, (batch, length), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int) -> torch.Tensor:
    """float32 of the given shape, the same every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def parameters(model: Any) -> set[str]:
    """Names of the arguments of the model's forward."""
    return set(inspect.signature(model.forward).parameters)


def attribute(config: Any, *names: str, default: Any = None) -> Any:
    """The first of the names that the configuration or a part of it has."""
    parts = [config]
    for key in getattr(config, "sub_configs", None) or ():
        if (part := getattr(config, key, None)) is not None:
            parts.append(part)
    for name in names:
        for part in parts:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return default


def candidates(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs that may fit the model; the first that its eager attention takes is the right one."""
    names, config = parameters(model), model.config
    below = attribute(config, "vocab_size", default=79)
    below = max(6, min(79, below)) if isinstance(below, int) else 79
    decoder = {}
    if "decoder_input_ids" in names:
        decoder = {"decoder_input_ids": tokens(BATCH, DECODER_LENGTH, 3, below)}
    text = {"input_ids": tokens(BATCH, LENGTH, 1, below)} if "input_ids" in names else {}
    if text:
        if "pixel_values" in names:
            # Models of two towers need both; those that read images into their text need none.
            for image in _images(config):
                if not any("token_id" in n or "token_index" in n for n in vars(config)):
                    yield {**text, **image}
        yield {**text, **decoder}
        boxes = torch.arange(LENGTH)[None, :, None].expand(BATCH, -1, 4)
        if "bbox" in names:
            yield {**text, "bbox": boxes}
    if "pixel_values" in names:
        for image in _images(config):
            yield {**text, **image, **decoder}
            yield {**image}
    if "pixel_values_videos" in names:
        size = _size(config)
        frames = attribute(config, "num_frames", "frames_per_clip", default=4)
        yield {"pixel_values_videos": noise(BATCH, frames, 3, size, size)}
    if "input_features" in names or "input_values" in names:
        key = "input_features" if "input_features" in names else "input_values"
        for sound in _sounds(config):
            yield {key: sound, **decoder}
            yield {key: sound, **text}
            length = sound.shape[1] if sound.shape[-1] == _bins(config) else sound.shape[-1]
            for mask in _SOUND_MASKS:
                if mask in names:
                    yield {key: sound, mask: torch.ones(BATCH, length, dtype=torch.bool)}
    if "past_values" in names:
        length = attribute(config, "context_length", default=32)
        channels = attribute(config, "num_input_channels", default=1)
        yield {"past_values": noise(BATCH, length, channels)}
    grid = next((n for n in ("grid_thw", "image_grid_thw") if n in names), None)
    if grid and (key := next((n for n in ("pixel_values", "hidden_states") if n in names), None)):
        for option in pictures(config):
            if "image_grid_thw" in option:
                yield {key: option["pixel_values"], grid: option["image_grid_thw"]}
    if "pixel_position_ids" in names:
        yield from (x for x in pictures(config) if "pixel_position_ids" in x)
    width = attribute(config, "hidden_size", "d_model", default=64)
    for key in ("inputs_embeds", "query_embeds", "hidden_states"):
        if key in names and isinstance(width, int):
            yield {key: noise(BATCH, LENGTH, width)}
            if "encoder_hidden_states" in names:
                other_width = attribute(config, "encoder_hidden_size", default=width)
                other = {"encoder_hidden_states": noise(BATCH, 9, other_width)}
                yield {key: noise(BATCH, LENGTH, width), **other}
    if "inputs" in names:
        yield {"inputs": tokens(BATCH, LENGTH)}
        yield {"inputs": noise(BATCH, LENGTH, attribute(config, "d_model", default=64))}


def _size(config: Any) -> int:
    size = attribute(config, "image_size", "img_size", "input_size", default=32)
    if isinstance(size, dict):
        size = size.get("height", 32)
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def _images(config: Any) -> Iterator[dict[str, torch.Tensor]]:
    channels = attribute(config, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels if isinstance(channels, int) else 3
    for size in dict.fromkeys((_size(config), 64, 224)):
        yield {"pixel_values": noise(BATCH, channels, size, size)}
    frames = attribute(config, "num_frames", default=4)
    yield {"pixel_values": noise(BATCH, frames, channels, _size(config), _size(config))}


def pictures(config: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Arguments of get_image_features: images, or patches with the grid that they form."""
    patch = attribute(config, "patch_size", default=8)
    channels = attribute(config, "in_channels", "in_chans", "num_channels", default=3)
    if isinstance(patch, int) and isinstance(channels, int):
        for frames in (attribute(config, "temporal_patch_size", default=1), 1):
            grid = torch.tensor([[1, 4, 4]])
            patches = noise(16, channels * frames * patch * patch)
            positions = torch.cartesian_prod(torch.arange(4), torch.arange(4))
            yield {
                "pixel_values": patches[None].expand(BATCH, -1, -1),
                "pixel_position_ids": positions[None].expand(BATCH, -1, -1),
            }
            yield {"pixel_values": patches, "image_grid_thw": grid}
    yield from _images(config)


def recordings(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Arguments of get_audio_features."""
    for sound in _sounds(model.config):
        yield {"input_features": sound}
        if sound.ndim == 3:
            ones = torch.ones(BATCH, sound.shape[-1], dtype=torch.int64)
            yield {"input_features": sound, "feature_attention_mask": ones}
            yield {"input_features": sound, "input_features_mask": ones.bool()}


_SOUND_MASKS = ("input_features_mask", "feature_attention_mask", "attention_mask")


def _bins(config: Any) -> int:
    return attribute(
        config, "num_mel_bins", "feature_size", "input_feat_per_channel", "input_dim", default=80
    )


def _sounds(config: Any) -> Iterator[torch.Tensor]:
    bins = _bins(config)
    positions = attribute(config, "max_source_positions", default=32)
    length = attribute(config, "max_length", default=64)
    yield noise(BATCH, bins, 2 * positions)
    yield noise(BATCH, 64, bins)
    yield noise(BATCH, length, bins)
    yield noise(BATCH, 6400)
    yield noise(BATCH, 1, 6400)


def padded(inputs: dict[str, torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    """Text inputs whose second sequence is padded on a side."""
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, slice(LENGTH - PADDED, None) if side == "right" else slice(0, PADDED)] = 0
    return {**inputs, "attention_mask": mask}


def mask_4d(causal: bool) -> torch.Tensor:
    """bool [BATCH, 1, LENGTH, LENGTH], random, with the diagonal."""
    generator = torch.Generator().manual_seed(4)
    allowed = torch.rand(BATCH, 1, LENGTH, LENGTH, generator=generator) < 0.5
    allowed |= torch.eye(LENGTH, dtype=torch.bool)
    return allowed.tril() if causal else allowed
