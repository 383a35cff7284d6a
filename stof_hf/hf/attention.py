"""The attention function "stof": what Transformers calls in every attention layer."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import nn
from transformers.utils.output_capturing import _active_collector

from ..attention.op import attention_by_rows
from ..attention.relative import RelativeBias
from ..errors import UnsupportedError, warn_once
from ..masks.sparse_mask import SparseMask
from .patching import fallback_of, pending, stamp_pending, stamp_pending_traced
from .resolve import resolve_mask

Output = tuple[torch.Tensor, None]

NO_WEIGHTS = (
    'attn_implementation="stof" never holds the attention weights that output_attentions=True asks '
    'for: call model.set_attn_implementation("eager") to get them'
)


def stof_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> Output:
    """Attention for one layer, as Transformers' `eager_attention_forward` computes it.

    Args:
        module: the attention layer; its pattern (see `set_pattern`) applies on top of the mask.
        query: [B, H, Sq, D]. key, value: [B, Hkv, Sk, D] and [B, Hkv, Sk, Dv], not expanded.
        attention_mask: a SparseMask or TracedMask as the mask function makes them; a Pattern; a
            FlexAttention BlockMask; a bool or additive float tensor [B or 1, H or 1, Sq or 1, Sk];
            or None, which means causal if `is_causal`, else all.
        dropout: of the attention weights, in training; see `stof_hf.attention`.
        scaling: factor on the scores, 1 / sqrt(D) by default.
        is_causal: what None as a mask means; by default all, as in eager attention, which knows no
            packed documents: these are causal where `module.is_causal` is.
        softcap: as in Gemma 2. s_aux: [H], sinks as in gpt-oss. position_bias: added to the scores.
        sliding_window: not used, the mask has the window: Transformers gives it to kernels without
            masks.
        cu_seq_lens_q, cu_seq_lens_k: int32 [documents + 1], bounds of packed documents, where no
            mask says them. max_length_q, max_length_k: implied by them.

    Returns:
        ([B, Sq, H, Dv] contiguous in query's dtype, None).

    Raises:
        UnsupportedError: attention weights asked for, an argument that changes the result and is
            not known, a dtype or head size that no kernel takes.
        MaskError: a mask that does not fit.
    """
    dropout = dropout if module.training else 0.0
    try:
        if kwargs:
            _check_kwargs(module, kwargs)
        if torch.compiler.is_compiling():
            stamp_pending_traced()
        else:
            output_attentions = output_attentions or _collects_weights()
            if pending:
                stamp_pending()
        if output_attentions:
            raise UnsupportedError(NO_WEIGHTS)
        stamp = module.__dict__.get("_stof_stamp")
        if key.shape[0] != query.shape[0]:
            query, key, value = _one_batch(query, key, value)
        if (
            stamp is not None
            or type(attention_mask) is not SparseMask
            or attention_mask.device != query.device
            or attention_mask.q_len != query.shape[2]
        ):
            attention_mask, position_bias, key, value = resolve_mask(
                module, stamp, query, key, value, attention_mask, is_causal, position_bias,
                cu_seq_lens_q, cu_seq_lens_k,
            )  # fmt: skip
        out = attention_by_rows(
            query, key, value, attention_mask, scaling,
            softcap=softcap or 0.0, bias=position_bias, sinks=s_aux,
            dropout_p=dropout,
        )  # fmt: skip
        return out, None
    except UnsupportedError as error:
        if torch.compiler.is_compiling() or fallback_of(module) != "sdpa":
            raise
        if _unsafe_arguments(module, kwargs):
            raise  # sdpa would ignore them
        arguments = {
            "dropout": dropout, "scaling": scaling, "is_causal": is_causal, "softcap": softcap,
            "s_aux": s_aux, "position_bias": position_bias, **kwargs,
        }  # fmt: skip
        packed = (cu_seq_lens_q, cu_seq_lens_k)
        return _sdpa(error, module, query, key, value, attention_mask, packed, arguments)


# Arguments that change what is computed although not every model's own attention names them.
_HARMFUL = {"cache", "head_mask", "layer_head_mask", "alibi", "indices", "block_indices", "sinks"}


def _check_kwargs(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise for an argument that the model's own attention reads and this one does not."""
    given = _unsafe_arguments(module, kwargs)
    if given:
        raise UnsupportedError(
            f"{type(module).__name__} passes {', '.join(given)} to its attention, which changes "
            "the result and is not supported: load the model with "
            'attn_implementation="sdpa" or "eager"'
        )


def _unsafe_arguments(module: nn.Module, kwargs: dict[str, Any]) -> list[str]:
    compiling = torch.compiler.is_compiling()
    names = (_unsafe_names_traced if compiling else _unsafe_names)(type(module), *kwargs)
    return [name for name in names if kwargs[name] is not None]


@functools.cache
def _unsafe_names(cls: type, *names: str) -> tuple[str, ...]:
    """Which of the arguments that a layer passes on may change the result."""
    read = _names_read_by_eager(cls)
    return tuple(name for name in names if name in _HARMFUL or name in read)


@torch.compiler.assume_constant_result
def _unsafe_names_traced(cls: type, *names: str) -> tuple[str, ...]:
    return _unsafe_names(cls, *names)


def _names_read_by_eager(cls: type) -> set[str]:
    """Names of the optional arguments that the eager attention of a module's class reads."""
    for base in cls.__mro__:
        eager = getattr(sys.modules.get(base.__module__), "eager_attention_forward", None)
        code = getattr(eager, "__code__", None)
        if code is not None:
            strings = {
                const for const in code.co_consts if isinstance(const, str) and const.isidentifier()
            }
            count = code.co_argcount + code.co_kwonlyargcount
            return strings | set(code.co_varnames[:count])
    return set()


def _collects_weights() -> bool:
    collected = _active_collector.get()
    return bool(collected) and any(name.endswith("attentions") for name in collected)


def _one_batch(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Learned queries come with batch 1."""
    batch = max(t.shape[0] for t in tensors)
    return [t.expand(batch, -1, -1, -1) if t.shape[0] == 1 else t for t in tensors]


def _sdpa(
    error: UnsupportedError,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    packed: tuple[torch.Tensor | None, torch.Tensor | None],
    arguments: dict[str, Any],
) -> Output:
    """Transformers' own sdpa with the same mask, and one warning a reason."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if arguments["s_aux"] is not None or arguments["softcap"]:
        raise error
    warn_once(f"falling back to sdpa. {type(module).__name__}: {error}", stacklevel=3)
    bias = arguments.pop("position_bias")
    stamp = module.__dict__.get("_stof_stamp")
    mask, bias, key, value = resolve_mask(
        module, stamp, query, key, value, mask, arguments["is_causal"], bias, *packed
    )
    if mask is not None:
        mask = mask.to_dense()
    if isinstance(bias, RelativeBias):
        bias = bias.dense()
    if bias is not None:
        lowest = torch.finfo(query.dtype).min
        mask = bias if mask is None else torch.where(mask, bias, lowest)
    # The mask says it all by now; None is full attention.
    arguments["is_causal"] = False
    arguments = {name: x for name, x in arguments.items() if name not in ("s_aux", "softcap")}
    return sdpa_attention_forward(module, query, key, value, mask, **arguments)
