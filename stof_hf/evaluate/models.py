"""Models, the metric that follows from their class, and how many tokens they take."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import StofError, UnsupportedError
from ..hf.patching import set_pattern
from ..masks.pattern import Pattern
from ..tuning.inputs import most_tokens

__all__ = ["is_causal", "length_for", "load", "metric_of", "use_pattern"]

#: Tokens of a window where the user names no number.
_TOKENS = 1024


def load(name: str, device: torch.device, dtype: torch.dtype | None = None) -> tuple[Any, Any, str]:
    """A pretrained model that computes attention by "stof", its tokenizer, and its metric's name.

    Args:
        name: a folder, or a name on the Hugging Face hub.
        dtype: by default float32 on a CPU; on a GPU that of the checkpoint, float16 for float32.

    Raises:
        StofError: it cannot be loaded, or lacks weights, which would be random.
        UnsupportedError: there is no metric for models of its class.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
        metric = metric_of(config, _is_sentence_transformer(name))
        if dtype is None:
            saved = config.dtype if config.dtype in (torch.float16, torch.bfloat16) else None
            dtype = torch.float32 if device.type == "cpu" else saved or torch.float16
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model, found = _class(config, metric).from_pretrained(
            name, attn_implementation="stof", dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise StofError(f"cannot load {name}: {error}") from error
    # What a pooler adds is not read.
    missing = [key for key in found["missing_keys"] if "pooler" not in key]
    if missing:
        raise StofError(
            f"{name} holds no weights for {', '.join(sorted(missing)[:3])} of "
            f"{type(model).__name__}, so that its figures would mean nothing: name a model that "
            "was saved with them"
        )
    model.config.get_text_config().use_cache = False
    return model.to(device).eval(), tokenizer, metric


def metric_of(config: Any, embeds: bool = False) -> str:
    """ "perplexity", "pseudo-perplexity" or "similarity", by the class that a model was saved from.

    Args:
        config: its configuration.
        embeds: whether the model is known to be for embeddings, whatever head it was saved with.

    Raises UnsupportedError for other classes.

    >>> from transformers import BertConfig
    >>> metric_of(BertConfig(architectures=["BertForMaskedLM"]))
    'pseudo-perplexity'
    """
    from transformers.models.auto import modeling_auto as auto

    name = (getattr(config, "architectures", None) or ["a model of no named class"])[0]
    if name in auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.values():
        return "similarity"
    if not getattr(config, "is_encoder_decoder", False):
        if hasattr(config, "vocab_size") and (embeds or name in auto.MODEL_MAPPING_NAMES.values()):
            return "similarity"
        if name in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
            return "pseudo-perplexity"
        if name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            return "perplexity"
    raise UnsupportedError(
        f"there is no metric for {name}: name a causal language model (perplexity), a masked one "
        "(pseudo-perplexity) or a text encoder without a head (similarity of embeddings); the body "
        "of a model with another head is saved by model.base_model.save_pretrained(folder)"
    )


def _class(config: Any, metric: str) -> type:
    import transformers
    from transformers.models.auto import modeling_auto as auto

    name = config.architectures[0]
    encoder = name in auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.values()
    if metric == "similarity" and not encoder:
        return transformers.AutoModel
    return getattr(transformers, name)


def _is_sentence_transformer(name: str) -> bool:
    """Whether a folder or a name on the hub is laid out as sentence-transformers saves models."""
    from transformers.utils import cached_file

    found = cached_file(
        name,
        "modules.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found is not None


def length_for(model: nn.Module, seq_len: int | None) -> int:
    """The number of tokens asked for, by default as many as the model takes, at most 1,024.

    Raises:
        UnsupportedError: the model takes fewer.
    """
    most = most_tokens(model)
    if seq_len is None:
        return min(most or _TOKENS, _TOKENS)
    if most is not None and seq_len > most:
        raise UnsupportedError(
            f"{type(model).__name__} takes {most} tokens, not {seq_len}: pass --seq-len {most} or "
            "less"
        )
    return seq_len


def is_causal(model: nn.Module, ids: torch.Tensor) -> bool:
    """Whether no token sees those behind it: another last one leaves the others' outputs alone.

    Args:
        ids: int64 [1, S], S at least 2.
    """
    ids = ids[:, :16].to(model.device)
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % model.config.get_text_config().vocab_size
    with torch.no_grad():
        a, b = (model(input_ids=x)[0][:, :-1].float() for x in (ids, other))
    # Experts may round otherwise among other tokens.
    least = 4 * torch.finfo(model.dtype).eps * float(a.abs().max())
    # What is not a number tells nothing.
    return not float((a - b).abs().max()) > least


def use_pattern(model: nn.Module, pattern: Pattern | None) -> None:
    """Let a model attend by this pattern alone; None is its own attention."""
    set_pattern(model, None)
    if pattern is not None:
        set_pattern(model, pattern, persist=False)
