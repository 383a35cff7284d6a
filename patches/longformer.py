"""Longformer and LED's encoder: a sliding window, and global tokens with projections of their own.

A token sees the keys of its window and those of all global tokens, by its local projections; a
global token sees all keys, by `query_global`, `key_global` and `value_global`. Which tokens are
global is an input and may differ between the sequences of a batch. The global rows are computed
apart and take the place of what the local attention computed there.

Where all sequences have the same global tokens, their keys are columns of the local mask. Else
they are gathered in front of the keys, and the bits of valid keys say which of them a sequence has
and take them out of its windows: the mask then depends on their number alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from stof_hf.hf.own import PerForward, attend, leaves_to_own_code
from stof_hf.masks import bits
from stof_hf.masks.bits import TILE
from stof_hf.masks.cache import mask_for
from stof_hf.masks.device import keep
from stof_hf.masks.patterns import Full, GlobalKeys, SlidingWindow
from stof_hf.masks.sparse_mask import SparseMask

_PADDING, _LOCAL, _GLOBAL = -1, 0, 1


@dataclass(frozen=True)
class Global:
    """The global tokens of a batch.

    index: int64 [B * G], their rows among B * S, filled up with the sequence's first row where one
    has fewer than G. rows: int64 [N], without the fillings; slots: where in `index` those stand,
    None where nothing was filled up. columns: the tokens, where they are the same in all sequences.
    """

    index: torch.Tensor
    rows: torch.Tensor
    slots: torch.Tensor | None
    columns: tuple[int, ...] | None


@dataclass(frozen=True)
class Layout:
    """Which tokens are padding and which global, and the masks that follow.

    hidden: bool [B, S, 1], True at padding, or None. valid, in_front: the bits of valid keys (int64
    [B, words]), of the sequence itself and with the global keys gathered in front.
    """

    size: int
    device: torch.device
    tokens: Global | None
    hidden: torch.Tensor | None
    valid: torch.Tensor | None
    in_front: torch.Tensor | None
    gathered: int

    def local(self, window: int) -> SparseMask:
        """The mask of the local projections: a window on each side, and the global keys."""
        near = SlidingWindow(window, window)
        if self.gathered:
            seen = near | GlobalKeys(tuple(range(self.gathered)))
            keys = self.gathered + self.size
            mask = mask_for(seen, self.size, keys, self.gathered, device=self.device)
            return mask.with_words(self.in_front)
        seen = near if self.tokens is None else near | GlobalKeys(self.tokens.columns)
        return mask_for(seen, self.size, self.size, device=self.device).with_words(self.valid)

    def of_global_rows(self) -> SparseMask | None:
        """The mask of the global tokens' own projections: all keys but padding."""
        if self.valid is None:
            return None
        count = len(self.tokens.index) // len(self.valid)
        return mask_for(Full(), count, self.size, device=self.device).with_words(self.valid)


@PerForward
def _layout(attention_mask: torch.Tensor) -> Layout:
    """The layout that a float mask [B, S] says: negative at padding, positive at global tokens."""
    # The model's own code reads it for every layer, this once a forward.
    kinds = attention_mask.sign().to(torch.int8).cpu().numpy()
    return _layout_of(kinds.tobytes(), kinds.shape, attention_mask.device)


@lru_cache(maxsize=64)
def _layout_of(kinds: bytes, shape: tuple[int, int], device: torch.device) -> Layout:
    host = np.frombuffer(kinds, np.int8).reshape(shape)
    return keep(lambda: _make_layout(host, device), device)


def _make_layout(kinds: np.ndarray, device: torch.device) -> Layout:
    padding = kinds == _PADDING
    hidden = torch.from_numpy(padding).to(device) if padding.any() else None
    valid = None if hidden is None else bits.pack(~hidden)
    hidden = None if hidden is None else hidden[:, :, None]
    chosen = kinds == _GLOBAL
    if not chosen.any():
        return Layout(kinds.shape[1], device, None, hidden, valid, None, 0)
    count = chosen.sum(1)
    held = np.arange(count.max()) < count[:, None]
    rows = np.flatnonzero(chosen)
    index = np.repeat(np.arange(len(kinds))[:, None] * kinds.shape[1], count.max(), axis=1)
    index[held] = rows
    columns = None
    if (chosen == chosen[0]).all():
        columns = tuple(np.flatnonzero(chosen[0]).tolist())
        # Scattered columns would make each tile that they touch a partial one.
        if len({t // TILE for t in columns}) > -(-len(columns) // TILE):
            columns = None
    in_front, gathered = None, 0
    if columns is None:
        # Whole tiles, so that the windows' tiles are the same whatever the number is.
        gathered = -(-int(count.max()) // TILE) * TILE
        keys = np.zeros((len(kinds), gathered + kinds.shape[1]), bool)
        keys[:, : count.max()] = held
        keys[:, gathered:] = kinds == _LOCAL
        in_front = bits.pack(torch.from_numpy(keys).to(device))
    index, rows, slots = (
        torch.from_numpy(x.reshape(-1)).to(device) for x in (index, rows, np.flatnonzero(held))
    )
    tokens = Global(index, rows, None if held.all() else slots, columns)
    return Layout(kinds.shape[1], device, tokens, hidden, valid, in_front, gathered)


@PerForward
def _masks(attention_mask: torch.Tensor, window: int) -> tuple[Layout, SparseMask, Any]:
    """The layout, and the masks of local and global rows in layers with that window."""
    layout = _layout(attention_mask)
    return layout, layout.local(window), layout.tokens and layout.of_global_rows()


def attention(
    self: nn.Module,
    original: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    is_index_masked: torch.Tensor | None = None,
    is_index_global_attn: torch.Tensor | None = None,
    is_global_attn: bool | None = None,
    output_attentions: bool = False,
) -> tuple[torch.Tensor, ...]:
    """`LongformerSelfAttention.forward` for sequences of any length: ([B, S, E],)."""
    if leaves_to_own_code(self, output_attentions):
        return _own_code(
            self, original, hidden_states, attention_mask, is_index_masked, is_index_global_attn,
            is_global_attn, output_attentions,
        )  # fmt: skip
    layout, near, everywhere = _masks(attention_mask, self.one_sided_attn_window_size)
    batch, size, _ = hidden_states.shape

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(batch, -1, self.num_heads, self.head_dim).transpose(1, 2)

    tokens, k, v = layout.tokens, self.key(hidden_states), self.value(hidden_states)
    if layout.gathered:
        k, v = (_with_global_keys(x, tokens, layout.gathered) for x in (k, v))
    q, dropout_p = self.query(hidden_states), self.dropout if self.training else 0.0
    out = attend(heads(q), heads(k), heads(v), near, dropout_p=dropout_p)
    if tokens is not None:
        flat = hidden_states.reshape(batch * size, -1)
        q = self.query_global(flat.index_select(0, tokens.index))
        k, v = self.key_global(hidden_states), self.value_global(hidden_states)
        found = attend(heads(q), heads(k), heads(v), everywhere, dropout_p=dropout_p).flatten(0, 1)
        if tokens.slots is not None:
            found = found.index_select(0, tokens.slots)
        # Backward needs what the op returned, so that it is written over in inference only.
        write = torch.Tensor.index_copy if out.requires_grad else torch.Tensor.index_copy_
        out = write(out.flatten(0, 1), 0, tokens.rows, found).view_as(out)
    if layout.hidden is not None:
        out = out.masked_fill(layout.hidden, 0)
    return (out,)


def _with_global_keys(x: torch.Tensor, tokens: Global, gathered: int) -> torch.Tensor:
    """[B, S, E] to [B, gathered + S, E]."""
    batch = x.shape[0]
    front = x.flatten(0, 1).index_select(0, tokens.index).view(batch, -1, x.shape[2])
    return torch.cat([front, x.new_zeros(batch, gathered - front.shape[1], x.shape[2]), x], dim=1)


def _own_code(
    self: nn.Module,
    original: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor,
    is_index_masked: torch.Tensor,
    is_index_global_attn: torch.Tensor,
    is_global_attn: bool,
    output_attentions: bool,
) -> tuple[torch.Tensor, ...]:
    """The model's own code, which takes multiples of its window only."""
    size = hidden_states.shape[1]
    pad = -size % (2 * self.one_sided_attn_window_size)
    out, *weights = original(
        self,
        F.pad(hidden_states, (0, 0, 0, pad)),
        F.pad(attention_mask, (0, pad), value=torch.finfo(attention_mask.dtype).min),
        F.pad(is_index_masked, (0, pad), value=True),
        F.pad(is_index_global_attn, (0, pad), value=False),
        is_global_attn,
        output_attentions,
    )
    if weights:
        weights = [weights[0][:, :size], *(w[..., :size] for w in weights[1:])]
    return out[:, :size], *weights


def _longformer_length(
    self: nn.Module, original: Any, input_ids: Any, attention_mask: Any, token_type_ids: Any,
    position_ids: Any, inputs_embeds: Any, pad_token_id: int,
) -> tuple[Any, ...]:  # fmt: skip
    return 0, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds


def _led_length(
    self: nn.Module, original: Any, input_ids: Any, attention_mask: Any, inputs_embeds: Any,
    pad_token_id: int,
) -> tuple[Any, ...]:  # fmt: skip
    return 0, input_ids, attention_mask, inputs_embeds


METHODS = {
    "longformer": {
        "LongformerSelfAttention.forward": attention,
        "LongformerModel._pad_to_window_size": _longformer_length,
    },
    "led": {
        "LEDEncoderSelfAttention.forward": attention,
        "LEDEncoder._pad_to_window_size": _led_length,
    },
}
