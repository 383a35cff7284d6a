"""Padded batches of encoders computed on their real tokens alone: `unpad`."""

from __future__ import annotations

from torch import nn

from ..errors import UnsupportedError
from ..fusion.layer import implementation
from .graphs import class_of, set_class
from .unpadded import Unpadded, routes, subclass

__all__ = ["take_off", "unpad"]


def unpad(model: nn.Module) -> None:
    """Let an encoder compute padded batches on their real tokens alone.

    Args:
        model: a Transformers model of the families BERT, RoBERTa, ELECTRA, DistilBERT or
            ModernBERT, or one that holds such an encoder, with attn_implementation="stof".

    A forward with an attention mask [B, S] that hides a token gathers the real ones, wherever they
    lie, into one row, in which each sequence attends to itself alone; behind the last layer they go
    back to their places. At real tokens, outputs and gradients are those of the padded batch within
    rounding. At padding, `last_hidden_state` and `hidden_states` are zeros, and heads compute what
    follows from that. Patterns of `set_pattern` keep their positions, in which padding counts.

    A forward with such a mask waits for the device once, to learn where the padding is. It pays
    where the device is what takes time: from some thousand tokens on. With `use_graphs`, calls of
    up to 4,096 tokens are left to graphs.

    The batch is computed padded, as without `unpad`: under torch.compile, tracing or a capture of a
    CUDA graph; with caches, cross-attention, packed sequences or another mask than [B, S]; with
    another implementation than "stof"; and, after one warning, where the configuration's fallback
    is "sdpa", and with a pattern that cannot be packed: one that draws (BigBird), holds a tensor or
    function, or goes by distances where padding lies in the middle of a sequence.
    `stof_hf.restore(model)` takes it back.

    Raises:
        UnsupportedError: the model has no such encoder, or another attention implementation.

    >>> import torch, stof_hf
    >>> from transformers import BertConfig, BertModel
    >>> config = BertConfig(num_hidden_layers=1)
    >>> model = BertModel._from_config(config, attn_implementation="stof").eval()
    >>> stof_hf.unpad(model)
    >>> ids = torch.ones(2, 8, dtype=torch.int64)
    >>> mask = torch.tensor([[1] * 8, [1] * 3 + [0] * 5])
    >>> bool(model(ids, attention_mask=mask).last_hidden_state[1, 3:].any())
    False
    """
    found = [module for module in model.modules() if _original(module) in routes()]
    if not found:
        raise UnsupportedError(
            f"{type(model).__name__} has no encoder that can be unpadded: that is for BERT, "
            "RoBERTa, ELECTRA, DistilBERT and ModernBERT"
        )
    for module in found:
        if reason := _refusal(module):
            raise UnsupportedError(f"{type(module).__name__} cannot be unpadded: {reason}")
    for module in found:
        set_class(module, subclass(_original(module)))


def take_off(model: nn.Module) -> None:
    """Put back what `unpad` changed."""
    for module in model.modules():
        if isinstance(module, Unpadded):
            set_class(module, _original(module))


def _original(module: nn.Module) -> type[nn.Module]:
    cls = class_of(module)
    return cls.replaced if issubclass(cls, Unpadded) else cls


def _refusal(module: nn.Module) -> str | None:
    configs = [inner.config for inner in module.modules() if hasattr(inner, "config")]
    if any(getattr(config, "is_decoder", False) for config in configs):
        return "it is a decoder"
    if any(getattr(inner, "chunk_size_feed_forward", 0) for inner in module.modules()):
        return "chunk_size_feed_forward cuts sequences, set it to 0"
    if any(implementation(config) != "stof" for config in configs):
        return 'packed sequences need model.set_attn_implementation("stof")'
    return None
