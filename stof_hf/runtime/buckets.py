"""Which calls may be padded to a rounder shape, and which part of their outputs is then real.

Both are facts about model classes, written down here and not tried out. A call of another class, or
with an argument that is not listed, runs in a graph of exactly its own shape.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

from .outputs import rebuild

__all__ = [
    "Facts", "Size", "Unknown", "bucket_of", "copy_out", "facts_of", "is_for_unpadding", "is_small",
    "padded_shape", "round_up",
]  # fmt: skip


class Size(NamedTuple):
    """Batch size and sequence length."""

    batch: int
    tokens: int


class Unknown(Exception):
    """An output of which nobody wrote down what in it is real, or how it is copied."""


#: What a head adds to a family's name -> leading axes of its logits that are (batch, sequence).
_ENCODER_HEADS = {
    "Model": 0, "ForMaskedLM": 2, "ForTokenClassification": 2, "ForSequenceClassification": 1,
    "ForQuestionAnswering": 0,
}  # fmt: skip
_CAUSAL_HEADS = {"Model": 0, "ForCausalLM": 2, "LMHeadModel": 2}
#: Encoders, in which a mask hides what is padded on the right, and whose pooled outputs are the
#: first token's or a mean under the mask; and decoders, in which no token sees what is behind it.
_ENCODERS = ("Bert", "Roberta", "DistilBert", "Electra", "ModernBert")
_DECODERS = ("GPT2", "Llama", "Mistral", "Qwen2", "Qwen3")
#: Axes of the other outputs.
_AXES = {
    "last_hidden_state": 2, "hidden_states": 2, "pooler_output": 1,
    "start_logits": 2, "end_logits": 2,
}  # fmt: skip
#: Tensors that begin with (batch, sequence), and may be followed by anything where they are padded.
_TENSORS = {"input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids"}
_PLAIN = {"use_cache", "output_hidden_states", "output_attentions", "return_dict", "logits_to_keep"}

#: The host launches a layer's kernels in about the time that 4,096 tokens take a GPU: beyond,
#: padded tokens would cost more than the host does, and shapes stay what they are.
_MOST_TOKENS = 4096
#: Beyond, the GPU is behind the host in any model, and a graph would only hold memory and copy what
#: is returned, such as logits.
_MOST_CAPTURED = 16_384


@dataclass(frozen=True)
class Facts:
    """What holds for a model class whose calls may be padded.

    Args:
        causal: no token sees what is behind it, so that padding needs no mask.
        axes: output -> how many leading axes of it are (batch, sequence).
        positions: the longest sequence that there are positions for.
    """

    causal: bool
    axes: Mapping[str, int]
    positions: int


def facts_of(model: nn.Module, cls: type[nn.Module]) -> Facts | None:
    """Facts about a model of class `cls`, None where there are none."""
    config, name = model.config, cls.__name__
    if not cls.__module__.startswith("transformers.models."):
        return None
    if getattr(config, "add_cross_attention", False) or not getattr(config, "is_causal", True):
        return None
    families = [(family, _ENCODER_HEADS, False) for family in _ENCODERS]
    families += [(family, _CAUSAL_HEADS, True) for family in _DECODERS]
    for family, heads, causal in families:
        head = name.removeprefix(family)
        if head == name or head not in heads:
            continue
        if not causal and getattr(config, "is_decoder", False):
            return None
        # RoBERTa counts positions from behind the padding token's.
        first = (config.pad_token_id or 0) + 1 if family == "Roberta" else 0
        axes = {**_AXES, "logits": heads[head]}
        return Facts(causal, axes, config.max_position_embeddings - first)
    return None


def round_up(size: Size) -> Size:
    """The bucket of a size.

    Sequences go up to the next multiple of 64, of which masks' tiles are made, which adds at most
    63 tokens and makes eight buckets up to 512; from there on to a power of two or half-way to the
    next, which adds at most half. Batches go up to a power of two: kernels fill a GPU in steps as
    coarse, and each size between would be a graph of its own.
    """
    batch, tokens = size
    rounded = -(-tokens // 64) * 64
    if tokens > 512:
        power = 1 << (tokens - 1).bit_length()
        rounded = power * 3 // 4 if tokens <= power * 3 // 4 else power
    return Size(1 << (batch - 1).bit_length(), rounded)


def is_small(tensors: Mapping[str, torch.Tensor], most: int = _MOST_CAPTURED) -> bool:
    """Whether the host may be what a call waits for."""
    main = tensors.get("input_ids", tensors.get("inputs_embeds"))
    return main is None or main.ndim < 2 or main.shape[0] * main.shape[1] <= most


def is_for_unpadding(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether an unpadded model computes a call faster than a graph, if it is padded."""
    return "attention_mask" in tensors and not is_small(tensors, _MOST_TOKENS)


def bucket_of(
    facts: Facts | None, tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]
) -> tuple[Size, Size] | None:
    """A call's own size and its bucket's; None where it may not be padded."""
    main = tensors.get("input_ids", tensors.get("inputs_embeds"))
    if facts is None or main is None or not tensors.keys() <= _TENSORS or main.ndim < 2:
        return None
    # Of logits_to_keep, the last tokens count, which padding is behind.
    if not plain.keys() <= _PLAIN or plain.get("logits_to_keep"):
        return None
    size = Size(*main.shape[:2])
    for name, tensor in tensors.items():
        if tensor.shape[:2] != size and (name != "position_ids" or tensor.shape != (1, size[1])):
            return None
    bucket = round_up(size)
    if bucket.tokens > facts.positions or bucket.batch * bucket.tokens > _MOST_TOKENS:
        return None
    return size, bucket


def padded_shape(shape: torch.Size, size: Size, bucket: Size) -> tuple[int, ...]:
    """Of a tensor in a bucket; an axis of length 1 that is broadcast stays."""
    return (bucket.batch if shape[0] == size.batch else 1, bucket.tokens, *shape[2:])


def copy_out(
    output: Any, dropped: Any = None, facts: Facts | None = None,
    size: Size | None = None, bucket: Size | None = None, *, instead: Any = None,
) -> Any:  # fmt: skip
    """A copy of what a forward returned, of what is real in it where it was padded.

    One clone a tensor: most forwards return one or two, for which a list for `_foreach_copy_` takes
    the host as long, and slices of padded tensors are none of the dense ones that it is fast for.

    Args:
        dropped: an object that the caller does not get, but `instead`.
        size, bucket: as `bucket_of` gives them, with facts, or None for all.

    Raises:
        Unknown: it cannot be copied or cut.
    """
    return rebuild(output, _Copies(dropped, instead, facts, size, bucket).of)


@dataclass(frozen=True)
class _Copies:
    """See `copy_out`."""

    dropped: Any
    instead: Any
    facts: Facts | None
    size: Size | None
    bucket: Size | None

    def of(self, x: Any, name: str | None) -> Any:
        """A copy of what a field holds."""
        if x is None:
            return None
        if x is self.dropped:
            return self.instead
        if isinstance(x, torch.Tensor):
            return self._cut(x, name).clone()
        if type(x) is DynamicCache:
            return self._cache(x)
        if type(x) is EncoderDecoderCache:
            made = EncoderDecoderCache(
                self.of(x.self_attention_cache, name), self.of(x.cross_attention_cache, name)
            )
            made.is_updated = dict(x.is_updated)
            return made
        raise Unknown(f"a {type(x).__name__}")

    def _cut(self, x: torch.Tensor, name: str | None) -> torch.Tensor:
        if self.size is None:
            return x
        axes = self.facts.axes.get(name, 0) if name is not None else 0
        if not axes or x.shape[:axes] != self.bucket[:axes]:
            raise Unknown(f"{name or 'a tensor'} {list(x.shape)}")
        batch, tokens = self.size
        return x[:batch] if axes == 1 else x[:batch, :tokens]

    def _cache(self, x: DynamicCache) -> DynamicCache:
        made = copy.copy(x)
        made.layers = [copy.copy(layer) for layer in x.layers]
        for layer in made.layers:
            for name in ("keys", "values"):
                states = getattr(layer, name)
                if type(layer) is not DynamicLayer or states is None:
                    raise Unknown(f"a cache of {type(layer).__name__}")
                if self.size is not None:
                    if (states.shape[0], states.shape[2]) != self.bucket:
                        raise Unknown(f"a cache of {list(states.shape)}")
                    states = states[: self.size.batch, :, : self.size.tokens]
                setattr(layer, name, states.clone())
        return made
