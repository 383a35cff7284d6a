"""BigBird and BigBird-Pegasus' encoder: blocks of tokens that see a few other blocks.

The first and the last block see all and are seen by all; each other block sees itself, its two
neighbours and a few blocks that are drawn, in training by NumPy from the layer's number, and in
inference block 0 each time. A drawn block that a query sees already counts once more in its
softmax. To give it that weight, such blocks are appended to the keys, once for each time more.

Sequences too short for that, decoders and cross-attention use full attention.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from stof_hf.hf.attention import stof_attention
from stof_hf.hf.own import PerForward, attend, leaves_to_own_code
from stof_hf.masks import bits
from stof_hf.masks.cache import mask_for
from stof_hf.masks.given import BlockTable
from stof_hf.masks.sparse_mask import SparseMask


def drawn_blocks(
    cls: type, seed: int | None, size: int, block: int, drawn: int, heads: int, longest: int
) -> np.ndarray:
    """int [H, blocks - 2, drawn]: what the family's own code draws for all blocks but two.

    Its generator is NumPy's global one, which is left as it was. seed None is inference.
    """
    layer = cls.__new__(cls)
    nn.Module.__init__(layer)
    layer.train(seed is not None)
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        # Lengths for which the checkpoints were trained have a plan of their own.
        if size in (1024, 3072, 4096):
            out = [
                layer._bigbird_block_rand_mask(longest, longest, block, block, drawn, last_idx=1024)
                for _ in range(heads)
            ]
            return np.stack(out)[:, : size // block - 2]
        lengths, counts = layer._get_rand_attn_plan(size, block, drawn)
        return np.stack(
            layer._bigbird_block_rand_mask_with_head(
                from_seq_length=size,
                to_seq_length=size,
                from_block_size=block,
                to_block_size=block,
                num_heads=heads,
                plan_from_length=lengths,
                plan_num_rand_blocks=counts,
            )  # fmt: skip
        )
    finally:
        np.random.set_state(state)


@lru_cache(maxsize=128)
def pattern(
    cls: type, seed: int | None, size: int, block: int, drawn: int, heads: int, longest: int
) -> tuple[BlockTable, tuple[int, ...]]:
    """(which blocks see which, the blocks appended to the keys)."""
    picks = drawn_blocks(cls, seed, size, block, drawn, heads, longest)
    picks = picks[:1] if seed is None else picks
    n = size // block
    times = np.zeros((len(picks), n, n), np.int64)
    times[:, :, [0, -1]] = 1
    at = np.arange(n)
    times[:, (abs(at[:, None] - at) <= 1)] = 1
    head, row = np.indices(picks.shape[:2])
    np.add.at(times, (head[..., None], row[..., None] + 1, picks), 1)
    times[:, [0, -1]] = 1
    most = times.max((0, 1))
    extra = [(k, time) for k in range(n) for time in range(2, most[k] + 1)]
    again = [times[:, :, k] >= time for k, time in extra]
    table = np.concatenate([times >= 1, *(x[:, :, None] for x in again)], axis=2)
    return BlockTable(table, block), tuple(k for k, _ in extra)


def _with_extra(x: torch.Tensor, block: int, extra: tuple[int, ...]) -> torch.Tensor:
    """[B, S, ...] with the blocks `extra` appended."""
    return torch.cat([x, *(x[:, k * block : (k + 1) * block] for k in extra)], 1) if extra else x


@PerForward
def _mask(blocked_mask: torch.Tensor, *drawn_by: Any) -> tuple[SparseMask, tuple[int, ...]]:
    """`pattern(*drawn_by)` as a mask, for padding that is 0 in [B, blocks, block size]."""
    seen, extra = pattern(*drawn_by)
    valid = _with_extra(blocked_mask.flatten(1) > 0, seen.block_size, extra)
    size = blocked_mask[0].numel()
    mask = mask_for(seen, size, valid.shape[1], device=valid.device)
    return mask.with_words(bits.pack(valid)), extra


def _heads(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """[B, S, E] to [B, H, S, D]."""
    return x.view(*x.shape[:2], layer.num_attention_heads, -1).transpose(1, 2)


def block_sparse(
    self: nn.Module,
    original: Any,
    hidden_states: torch.Tensor,
    band_mask: torch.Tensor | None = None,
    from_mask: torch.Tensor | None = None,
    to_mask: torch.Tensor | None = None,
    from_blocked_mask: torch.Tensor | None = None,
    to_blocked_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`BigBirdBlockSparseAttention.forward`: ([B, S, E], None)."""
    if leaves_to_own_code(self):
        return original(
            self, hidden_states, band_mask, from_mask, to_mask, from_blocked_mask, to_blocked_mask,
            **kwargs,
        )  # fmt: skip
    size = hidden_states.shape[1]
    mask, extra = _mask(
        to_blocked_mask, type(self), self.seed if self.training else None, size, self.block_size,
        self.num_random_blocks, self.num_attention_heads, self.max_seqlen,
    )  # fmt: skip
    k, v = (_with_extra(p(hidden_states), self.block_size, extra) for p in (self.key, self.value))
    q = self.query(hidden_states)
    out = attend(_heads(self, q), _heads(self, k), _heads(self, v), mask)
    return out * from_mask.view(-1, size, 1).to(out.dtype), None


def full(
    self: nn.Module,
    original: Any,
    hidden_states: torch.Tensor,
    attention_mask: Any = None,
    encoder_hidden_states: torch.Tensor | None = None,
    encoder_attention_mask: Any = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`BigBirdSelfAttention.forward`: ([B, S, E], None)."""
    cross = encoder_hidden_states is not None
    mask = encoder_attention_mask if cross else attention_mask
    if leaves_to_own_code(self):
        mask = _additive(mask, hidden_states.dtype)
        masks = (None, encoder_hidden_states, mask) if cross else (mask, None, None)
        return original(self, hidden_states, *masks, past_key_values, **kwargs)

    cache = past_key_values
    if cross and cache is not None and cache.get_seq_length(self.layer_idx) > 0:
        k, v = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
    else:
        states = encoder_hidden_states if cross else hidden_states
        k, v = _heads(self, self.key(states)), _heads(self, self.value(states))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
    q = _heads(self, self.query(hidden_states))
    # The model's masks say it all; None is all.
    out, _ = stof_attention(self, q, k, v, mask, self.dropout.p, is_causal=False)
    return out.flatten(2), None


def _additive(mask: Any, dtype: torch.dtype) -> torch.Tensor | None:
    if mask is None or isinstance(mask, torch.Tensor):
        return mask
    return mask.to_additive(dtype)


def lend_configuration(self: nn.Module, original: Any, *args: Any, **kwargs: Any) -> Any:
    """The two above are methods of modules that do not know the configuration."""
    self.self.__dict__["config"] = self.config
    return original(self, *args, **kwargs)


METHODS = {
    "big_bird": {
        "BigBirdBlockSparseAttention.forward": block_sparse,
        "BigBirdSelfAttention.forward": full,
        "BigBirdAttention.forward": lend_configuration,
    },
    "bigbird_pegasus": {
        "BigBirdPegasusBlockSparseAttention.forward": block_sparse,
        "BigBirdPegasusSelfAttention.forward": full,
        "BigBirdPegasusEncoderAttention.forward": lend_configuration,
    },
}
