"""`stof::attention`: softmax(Q K^T) V under a SparseMask, as a torch op and as a function."""

from __future__ import annotations

import json
import weakref
from functools import lru_cache
from typing import Any

import torch

from ..masks.cache import mask_for
from ..masks.pattern import Pattern
from ..masks.sparse_mask import PLANS, STRUCTURE, SparseMask
from . import select
from .dropout import Dropout, draw_seed, threshold_of
from .relative import Bias, RelativeBias, stored


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: torch.Tensor | RelativeBias | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Scaled dot-product attention under a sparse mask.

    Args:
        query: [B, H, Sq, D], float16, bfloat16 or float32, D at most 256, any strides.
        key, value: [B, Hkv, Sk, D] and [B, Hkv, Sk, Dv]; H must be a multiple of Hkv (grouped-query
            attention without expanding the keys).
        mask: a SparseMask for Sq x Sk, or None: every query may attend to every key.
        scale: factor on the scores, 1 / sqrt(D) by default.
        softcap: if positive, scores become softcap * tanh(score / softcap).
        bias: added to the scores after that, broadcastable to [B, H, Sq, Sk]; or a RelativeBias,
            whose table GPU kernels read.
        sinks: [H], a logit per head that takes part in the softmax and has no value.
        dropout_p: probability with which each element of the softmax is dropped, the others being
            multiplied by 1 / (1 - dropout_p); rounded to a multiple of 2**-16. Not for evaluation:
            as in PyTorch's own function, a model passes 0 there. Each call draws one number from
            torch's generator of the device.

    Returns:
        [B, H, Sq, Dv] in the query's dtype, stored as contiguous [B, Sq, H, Dv]. A query with no
        allowed key gives zeros. Differentiable in query, key, value, bias and sinks. Under autocast
        the tensors are cast to its dtype first.

    Raises:
        UnsupportedError: dtype, head size or device that no backend takes, or dropout_p outside
            [0, 1).
        MaskError: the mask does not fit the tensors.

    >>> import torch, stof_hf
    >>> q = k = v = torch.randn(1, 2, 256, 64)
    >>> mask = stof_hf.SparseMask.from_pattern(stof_hf.patterns.SlidingWindow(32, 0), 256)
    >>> stof_hf.attention(q, k, v, mask).shape
    torch.Size([1, 2, 256, 64])
    """
    return attention_by_rows(
        query, key, value, mask, scale,
        softcap=softcap, bias=bias, sinks=sinks, dropout_p=dropout_p,
    ).transpose(1, 2)  # fmt: skip


def attention_by_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scale: float | None,
    *, softcap: float, bias: Bias | None, sinks: torch.Tensor | None,
    dropout_p: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """`attention` as Transformers wants its result: [B, Sq, H, Dv]."""
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        # Autocast must not reach the products inside a backend, which are in fp32 on purpose.
        with torch.autocast(device_type, enabled=False):
            return attention_by_rows(
                query.to(dtype), key.to(dtype), value.to(dtype), mask, scale,
                softcap=softcap, bias=bias, sinks=sinks, dropout_p=dropout_p,
            )  # fmt: skip
    if scale is None:
        scale = query.shape[-1] ** -0.5
    threshold = threshold_of(dropout_p) if dropout_p else 0
    seed = draw_seed(query.device) if threshold else None
    plain = _plain(query, key, value, stored(bias), sinks)
    if isinstance(bias, RelativeBias) and not (plain and query.is_cuda):
        bias = bias.dense()
    if plain and (mask is None or type(mask) is SparseMask):
        out, _ = select.forward(
            query, key, value, mask,
            bias=bias, sinks=sinks, scale=scale, softcap=softcap, with_lse=False,
            dropout=None if seed is None else Dropout(seed, threshold),
        )  # fmt: skip
        return out
    out, _ = torch.ops.stof.attention(
        query, key, value, *op_arguments(query, key, mask), bias, sinks, seed, threshold, scale,
        softcap,
    )  # fmt: skip
    return out


def _plain(*tensors: torch.Tensor | None) -> bool:
    """Whether a backend may be called directly: no tracing, no gradient, no tensor subclass."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    grad = torch.is_grad_enabled()
    for t in tensors:  # a loop: all() of a generator takes three times as long
        if t is not None and (type(t) is not torch.Tensor or (grad and t.requires_grad)):
            return False
    return True


def op_arguments(q: torch.Tensor, k: torch.Tensor, mask: Any) -> tuple[Any, ...]:
    """The mask as the op takes it: (pattern, tensors, geometry, kv_valid, row_start, col_start)."""
    if mask is None:
        return "", [], [q.shape[2], k.shape[2], 0, 0], None, None, None
    if not isinstance(mask, SparseMask):
        return mask.op_arguments()
    tensors = [getattr(mask, name) for name in STRUCTURE]
    starts = (mask.row_start, mask.col_start)
    numbers = [s if isinstance(s, int) else 0 for s in starts]
    on_device = [None if isinstance(s, int) else s for s in starts]
    return "", tensors, [mask.q_len, mask.kv_len, *numbers], mask.kv_valid, *on_device


@lru_cache(maxsize=256)
def _pattern(text: str) -> Pattern:
    return Pattern.from_json(json.loads(text))


def _mask_of(
    pattern: str,
    tensors: list[torch.Tensor],
    geometry: list[int],
    kv_valid: torch.Tensor | None,
    row_start: torch.Tensor | None,
    col_start: torch.Tensor | None,
    device: torch.device,
) -> SparseMask | None:
    """Inverse of `op_arguments`; a pattern is built here, at run time, or found in the cache."""
    q_len, kv_len, row, col = geometry
    if pattern:
        q_offset = row if row_start is None else row_start
        mask = mask_for(_pattern(pattern), q_len, kv_len, q_offset, col, device=device)
    elif tensors:
        # Of masks that the graph computes, nothing can be kept for the next call.
        plans = _plans_of(tensors[5], tensors[1])
        mask = SparseMask(
            q_len, kv_len, *tensors, plans=plans,
            row_start=row if row_start is None else row_start,
            col_start=col if col_start is None else col_start,
        )  # fmt: skip
    elif kv_valid is not None:
        mask = mask_for(_pattern('{"type": "Full"}'), q_len, kv_len, device=device)
    else:
        return None
    return mask.with_words(kv_valid)


def _plans_of(tile_bits: torch.Tensor, row_ptr: torch.Tensor) -> dict[Any, Any]:
    """What kernels derived from the mask that these tensors belong to; empty if that is unknown."""
    place = tile_bits.data_ptr(), row_ptr.data_ptr()
    plans = PLANS.get(tile_bits)
    if plans is None:
        alive, plans = _PLACES.get(place, (None, {}))
        return plans if alive is not None and alive() is not None else {}
    if place not in _PLACES:
        _PLACES[place] = weakref.ref(tile_bits, lambda _: _PLACES.pop(place, None)), plans
    return plans


#: Plans by where tensors lie, as long as they do: what compiled code saves for its backward are
#: other objects than those that `PLANS` knows.
_PLACES: dict[tuple[int, int], tuple[weakref.ref, dict[Any, Any]]] = {}


@torch.library.custom_op(
    "stof::attention",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor v, str pattern, Tensor[] mask, SymInt[] geometry, "
        "Tensor? kv_valid, Tensor? row_start, Tensor? col_start, Tensor? bias, Tensor? sinks, "
        "Tensor? seed, int threshold, float scale, float softcap) -> (Tensor, Tensor)"
    ),
)
def _attention(
    q, k, v, pattern, mask, geometry, kv_valid, row_start, col_start, bias, sinks, seed, threshold,
    scale, softcap,
):  # fmt: skip
    full = _mask_of(pattern, mask, geometry, kv_valid, row_start, col_start, q.device)
    dropout = None if seed is None else Dropout(seed, threshold)
    out, lse = select.forward(
        q, k, v, full, bias=bias, sinks=sinks, scale=scale, softcap=softcap, dropout=dropout
    )
    return out.contiguous(), lse


@_attention.register_fake
def _(
    q, k, v, pattern, mask, geometry, kv_valid, row_start, col_start, bias, sinks, seed, threshold,
    scale, softcap,
):  # fmt: skip
    batch, heads, q_len, _ = q.shape
    out = q.new_empty(batch, q_len, heads, v.shape[-1])
    return out, q.new_empty(batch, heads, q_len, dtype=torch.float32)


@torch.library.custom_op(
    "stof::attention_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, str pattern, "
        "Tensor[] mask, SymInt[] geometry, Tensor? kv_valid, Tensor? row_start, Tensor? col_start, "
        "Tensor? bias, Tensor? sinks, Tensor? seed, int threshold, float scale, float softcap) "
        "-> Tensor[]"
    ),
)
def _attention_backward(
    grad, q, k, v, out, lse, pattern, mask, geometry, kv_valid, row_start, col_start, bias, sinks,
    seed, threshold, scale, softcap,
):  # fmt: skip
    from .gradients import backward

    full = _mask_of(pattern, mask, geometry, kv_valid, row_start, col_start, q.device)
    dropout = None if seed is None else Dropout(seed, threshold)
    with torch.autocast(q.device.type, enabled=False):
        grads = backward(grad, q, k, v, out, lse, full, bias, sinks, scale, softcap, dropout)
    return [g for g in grads if g is not None]


@_attention_backward.register_fake
def _(
    grad, q, k, v, out, lse, pattern, mask, geometry, kv_valid, row_start, col_start, bias, sinks,
    seed, threshold, scale, softcap,
):  # fmt: skip
    from .backward import gradient_like

    rest = [x.new_empty(x.shape) for x in (bias, sinks) if x is not None]
    return [*(gradient_like(x) for x in (q, k, v)), *rest]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    (
        q,
        k,
        v,
        pattern,
        mask,
        geometry,
        kv_valid,
        row_start,
        col_start,
        bias,
        sinks,
        seed,
        threshold,
        scale,
        softcap,
    ) = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(
        q, k, v, out, lse, kv_valid, row_start, col_start, bias, sinks, seed, *mask
    )
    ctx.rest = pattern, geometry, threshold, scale, softcap


def _backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
    q, k, v, out, lse, kv_valid, row_start, col_start, bias, sinks, seed, *mask = ctx.saved_tensors
    pattern, geometry, threshold, scale, softcap = ctx.rest
    grads = torch.ops.stof.attention_backward(
        grad, q, k, v, out, lse, pattern, mask, geometry, kv_valid, row_start, col_start, bias,
        sinks, seed, threshold, scale, softcap,
    )  # fmt: skip
    dq, dk, dv, *more = grads
    dbias = more.pop(0) if bias is not None else None
    dsinks = more.pop(0) if sinks is not None else None
    none = [None] * len(mask)
    return dq, dk, dv, None, none, *(4 * [None]), dbias, dsinks, *(4 * [None])


torch.library.register_autograd("stof::attention", _backward, setup_context=_setup)
