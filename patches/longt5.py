"""LongT5's encoder: blocks of tokens that see themselves and their neighbours, and block sums.

A token sees the tokens less than `block_len` away. In a transient-global encoder it also sees side
keys: the sums of the layer's inputs over blocks of `global_block_size` tokens, normalised, by the
same projections. A bias by T5's buckets of the distance is added to the scores, which have no
scale; the first layer computes it for all.

Blocks of queries become the op's batch. Keys and values are the three blocks around, copied, and
the side keys; so the local bias is one for all blocks, [H, block_len, 3 * block_len]. That of side
keys depends on where the query is, and is held for all queries, as by the family's own code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.longt5 import modeling_longt5

from stof_hf.hf.own import PerForward, attend, leaves_to_own_code
from stof_hf.masks import bits
from stof_hf.masks.cache import mask_for
from stof_hf.masks.patterns import GlobalKeys, SlidingWindow
from stof_hf.masks.sparse_mask import SparseMask

_MASKED = -1e10  # what the family's own code adds to forbidden scores


@dataclass(frozen=True)
class Layout:
    """What the layers of a forward share.

    near: the mask of a block of queries, with the valid keys of each [B * blocks, 3 * block_len +
    side keys]. padding: bool [B * blocks, block_len, 1], or None. members: which tokens a side key
    sums, [B, S, side keys], or None. full: bool [B * blocks, 1, 1], where all side keys sum tokens.
    """

    near: SparseMask
    padding: torch.Tensor | None
    members: torch.Tensor | None
    full: torch.Tensor | None


@PerForward
def _layout(
    position_bias: torch.Tensor, mask: torch.Tensor, size: int, length: int, span: int | None,
    dtype: torch.dtype,
) -> Layout:  # fmt: skip
    """The layout of one forward, which its own `position_bias` stands for: a user's `mask` may be
    changed in place before the next.

    Args:
        mask: as the layers get it: [B, S] with side keys, else [B, 1, blocks, length, 3 * length].
        size: of the sequences, S. length: of a block. span: tokens of a side key, or None.
        dtype: of `members`.
    """
    if span is None:
        # A token sees itself unless it is padding.
        valid = mask[:, 0].diagonal(length, -2, -1).flatten(1)[:, :size]
        members = full = segments = None
    else:
        valid = mask != 0
        ids, segments = modeling_longt5._make_global_fixed_block_ids(mask, span)
        count = segments.shape[1]
        ids = ids.where(ids >= 0, count).long()
        members = F.one_hot(ids, count + 1)[..., :count].to(dtype)
        segments = segments.bool()[..., None]
    keys = _windows(valid[..., None], length, segments)
    blocks, width = keys.shape[1:3]
    keys = keys.flatten(0, 1).squeeze(2)
    if span is not None:
        full = segments.all(1, keepdim=True).repeat_interleave(blocks, 0)
    seen = SlidingWindow(length - 1, length - 1)
    if width > 3 * length:
        seen = seen | GlobalKeys(tuple(range(3 * length, width)))
    near = mask_for(seen, length, width, length, device=keys.device).with_words(bits.pack(keys))
    padding = None if valid.all() else ~keys[:, length : 2 * length, None]
    return Layout(near, padding, members, full)


def _windows(x: torch.Tensor, length: int, side: torch.Tensor | None) -> torch.Tensor:
    """[B, S, E] to [B, blocks, 3 * length, E]: each block and its neighbours, zero outside; and
    side [B, G, E] behind each."""
    blocks = -(-x.shape[1] // length)
    x = F.pad(x, (0, 0, length, (blocks + 1) * length - x.shape[1]))
    x = x.unflatten(1, (blocks + 2, length))
    parts = [x[:, :-2], x[:, 1:-1], x[:, 2:]]
    if side is not None:
        parts.append(side[:, None].expand(-1, blocks, -1, -1))
    return torch.cat(parts, 2)


def attention(
    self: nn.Module,
    original: Any,
    hidden_states: torch.Tensor,
    mask: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[torch.Tensor, ...]:
    """`forward` of both kinds of layers: ([B, S, E], position bias)."""
    alone = mask is None or (position_bias is None and not self.has_relative_attention_bias)
    if leaves_to_own_code(self, output_attentions) or alone:
        return original(self, hidden_states, mask, position_bias, output_attentions)

    (batch, size, _), length = hidden_states.shape, self.block_len
    span = getattr(self, "global_block_size", None)
    q = self.q(hidden_states)
    if position_bias is None:
        position_bias = _position_bias(self, mask, q.dtype)
    layout = _layout(position_bias, mask, size, length, span, hidden_states.dtype)
    sums = None
    if span is not None:
        sums = self.global_input_layer_norm(layout.members.transpose(1, 2) @ hidden_states)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (self.n_heads, -1)).transpose(1, 2)

    def seen(projection: nn.Module) -> torch.Tensor:
        more = None if sums is None else projection(sums)
        return _windows(projection(hidden_states), length, more).flatten(0, 1)

    k, v = seen(self.k), seen(self.v)
    q = F.pad(q, (0, 0, 0, -size % length)).reshape(-1, length, self.inner_dim)
    bias = position_bias[None] if position_bias.ndim == 3 else position_bias.flatten(0, 1)
    out = attend(
        heads(q), heads(k), heads(v), layout.near,
        scale=1.0, bias=bias, dropout_p=self.dropout if self.training else 0.0,
    )  # fmt: skip
    if layout.padding is not None:
        # To padding all keys look alike, or it sees only those side keys that sum no token.
        mean = v.mean(1, keepdim=True)
        mean = mean if layout.full is None else mean * layout.full
        out = torch.where(layout.padding, mean, out)
    out = out.reshape(batch, -1, self.inner_dim)[:, :size]
    return self.o(out), position_bias


def _additive(local_mask: torch.Tensor) -> torch.Tensor:
    """[B, 1, blocks, length, 3 * length] to [B, blocks, 1, length, 3 * length]."""
    return torch.where(local_mask, 0.0, _MASKED).transpose(1, 2)


def _position_bias(layer: nn.Module, mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[H, length, 3 * length]; with side keys [B, blocks, H, length, 3 * length + G] with masked
    scores at -1e10, as in the family's own code."""
    near, length = layer.compute_bias(layer.block_len), layer.block_len
    if not hasattr(layer, "global_block_size"):
        return near[0, 0].to(dtype).contiguous()
    seen = modeling_longt5._get_local_attention_mask(mask, length, mask.device)
    near = near + _additive(seen)
    _, segments = modeling_longt5._make_global_fixed_block_ids(mask, layer.global_block_size)
    side = layer.compute_side_bias(mask, segments)
    side = F.pad(side, (0, 0, 0, -side.shape[2] % length)).unflatten(2, (-1, length))
    # A row of fp16 must not be infinite throughout.
    both = torch.cat([near, side.transpose(1, 2)], -1).clamp(min=torch.finfo(dtype).min)
    return both.to(dtype)


def lend_configuration(self: nn.Module, original: Any, *args: Any, **kwargs: Any) -> Any:
    """The two kinds of layers do not know the configuration."""
    if not self.is_decoder:
        for block in self.block:
            layer = next(block.layer[0].children())
            layer.__dict__["config"] = self.config
    return original(self, *args, **kwargs)


METHODS = {
    "longt5": {
        "LongT5LocalAttention.forward": attention,
        "LongT5TransientGlobalAttention.forward": attention,
        "LongT5Stack.forward": lend_configuration,
    },
}
