"""The mask function "stof": what Transformers calls once a forward for each kind of mask."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import (
    TransformGetItemToIndex,
    _non_vmap_expansion_sdpa,
    _vmap_expansion_sdpa,
    causal_mask_function,
    prepare_padding_mask,
)

from ..errors import MaskError, UnsupportedError
from ..masks import bits
from ..masks.cache import mask_for
from ..masks.pattern import Pattern
from ..masks.sparse_mask import SparseMask
from ..masks.traced import TracedMask, structure_of
from .combine import derive
from .own import carried, mask_for_own_code
from .patching import active
from .recognise import chunks_from_zero, closed_form_text, pattern_of
from .symbolic import is_opaque, names_tensor, recognise

MaskFunction = Callable[..., torch.Tensor]


@carried
def stof_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Any = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> SparseMask | TracedMask | torch.Tensor | None:
    """The mask of one forward, as Transformers' `sdpa_mask` computes it, but sparse and cached.

    Args:
        batch_size, q_length, kv_length: sizes of queries and keys.
        q_offset, kv_offset: absolute position of the first query and key. A tensor q_offset (static
            caches) is never read for steps of at most 16 tokens under a closed-form mask function.
        mask_function: f(b, h, q, k) -> bool on absolute positions.
        attention_mask: bool [B, positions], padding; a Pattern, which replaces the mask function;
            or a mask made earlier, which is returned unchanged.
        local_size: window or chunk size, where the mask function has one.
        allow_is_causal_skip, allow_is_bidirectional_skip: whether None may say causal, or all.
        use_vmap: the mask function takes single indices, not index tensors.
        device: where the mask will be used.

    Returns None where all keys are allowed: for a bidirectional mask, and for a single query.
    Unlike `sdpa_mask`, it does not leave causality to a flag of the layer, which not all layers set
    right, and does not read padding on a GPU to find out whether it is all ones.
    """
    device = torch.device(device)
    dense = mask_for_own_code(
        kwargs.get("config"), batch_size=batch_size, q_length=q_length, kv_length=kv_length,
        q_offset=q_offset, kv_offset=kv_offset, mask_function=mask_function,
        attention_mask=attention_mask, dtype=kwargs.get("dtype", torch.float32),
        allow_is_bidirectional_skip=allow_is_bidirectional_skip, use_vmap=use_vmap, device=device,
    )  # fmt: skip
    if dense is not None:
        return dense
    if isinstance(attention_mask, Pattern):
        if torch.compiler.is_compiling():
            raise UnsupportedError(
                "a Pattern given as attention_mask cannot be compiled: use stof_hf.set_pattern"
            )
        # Without a cache, Transformers takes the number of keys from the mask, which has none.
        kv_length = kv_length or q_length
        return mask_for(attention_mask, q_length, kv_length, q_offset, kv_offset, device=device)
    if attention_mask is not None and attention_mask.ndim != 2:
        return attention_mask
    padding = _padding(attention_mask, batch_size, kv_length, kv_offset)
    everything = allow_is_bidirectional_skip or (allow_is_causal_skip and q_length == 1)
    if padding is None and everything and (local_size is None or kv_length < local_size):
        return None
    if isinstance(q_offset, torch.Tensor):
        # The cache adds to its length in place once the mask is made.
        q_offset = q_offset.reshape(1).clone()
    geometry = (q_length, kv_length, q_offset, kv_offset)
    if torch.compiler.is_compiling():
        return _traced(
            mask_function, batch_size, geometry, padding, attention_mask, use_vmap, device
        )
    pattern, cacheable = pattern_of(
        mask_function, kv_offset + kv_length, use_vmap, attention_mask is not None, batch_size
    )
    if cacheable and pattern.serializable:
        # Transformers allows no skip for single tokens where it is going to compile the step.
        on_device = not allow_is_causal_skip and not allow_is_bidirectional_skip and q_length == 1
        mask = mask_for(
            pattern, q_length, kv_length, q_offset, kv_offset, device=device, on_device=on_device
        )
    elif isinstance(q_offset, torch.Tensor):
        allowed = _evaluate(mask_function, batch_size, geometry, use_vmap, device)
        mask = SparseMask(q_length, kv_length, *structure_of(allowed))
    elif cacheable:
        mask = mask_for(pattern, q_length, kv_length, q_offset, kv_offset, device=device)
    else:
        mask = SparseMask.from_pattern(
            pattern, q_length, kv_length, q_offset=q_offset, kv_offset=kv_offset, device=device
        )
    mask = mask if padding is None else mask.with_padding(padding)
    if mask.is_view:
        # The step may be compiled, and a graph cannot derive these itself.
        for key, extra in active.get(type(kwargs.get("config")), {}).items():
            with contextlib.suppress(MaskError):  # raised again by the layers that it concerns
                derive(mask, extra, key)
    return mask


def _padding(
    attention_mask: torch.Tensor | None, batch_size: int, kv_length: int, kv_offset: int
) -> torch.Tensor | None:
    """bool [B, kv_length], or None for no padding."""
    if attention_mask is None:
        return None
    if attention_mask.shape[0] not in (1, batch_size):
        raise MaskError(
            f"the attention mask is for a batch of {attention_mask.shape[0]}, the inputs are "
            f"{batch_size}"
        )
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    padding = padding[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    return None if _all_ones_for_free(padding) else padding


def _all_ones_for_free(padding: torch.Tensor) -> bool:
    if padding.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool(padding.all())


def _evaluate(
    mask_function: MaskFunction,
    batch_size: int,
    geometry: tuple[int, int, int | torch.Tensor, int],
    use_vmap: bool,
    device: torch.device,
) -> torch.Tensor:
    """The mask function's values as a bool tensor [B or 1, 1, Sq, Sk]; reads nothing."""
    q_length, kv_length, q_offset, kv_offset = geometry
    batch, head = torch.arange(batch_size, device=device), torch.arange(1, device=device)
    q = torch.arange(q_length, device=device) + q_offset
    k = torch.arange(kv_length, device=device) + kv_offset
    if use_vmap:
        with TransformGetItemToIndex():
            return _vmap_expansion_sdpa(mask_function)(batch, head, q, k)
    allowed = mask_function(*_non_vmap_expansion_sdpa(batch, head, q, k))
    return allowed.expand(-1, -1, q_length, kv_length)


def _traced(
    mask_function: MaskFunction,
    batch_size: int,
    geometry: tuple[int, int, int | torch.Tensor, int],
    padding: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    use_vmap: bool,
    device: torch.device,
) -> TracedMask:
    q_length, kv_length, q_offset, kv_offset = geometry
    text = None
    # A function that a user passed may do with symbols what cannot be traced.
    if not use_vmap:
        expression, _ = recognise(mask_function)
        expression = chunks_from_zero(expression) if attention_mask is None else expression
        if not is_opaque(expression) and not names_tensor(expression):
            text = closed_form_text(expression)
    allowed = None
    if text is None:
        allowed = _evaluate(mask_function, batch_size, geometry, use_vmap, device)
    kv_valid = None if padding is None else bits.pack(padding)
    shape = (batch_size, 1, q_length, kv_length)
    return TracedMask(shape, text, allowed, kv_valid, q_offset, kv_offset)
