"""A layer of a model, told as operators, and how PyTorch computes them one by one.

What fused templates compute is defined by this: the same operators on the same rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = [
    "Attention", "Context", "Layer", "Operator", "Rows", "attention_of", "implementation",
    "product",
]  # fmt: skip

#: New tokens of a sequence, at most, whose way into a cache counts.
_FEW = 16


@dataclass(frozen=True)
class Operator:
    """One of `layer_ops.OPERATORS`.

    Args:
        modules: of a product and its bias, the projections whose results stand side by side; of
            cross attention, those of keys and values; of a norm, the module; of a head norm, those
            of queries and keys; of an embedding, its tables.
        function: the activation of "act" and "gate".
        attention: of "attention", "cross attention", "rotary" and "head norm".
    """

    name: str
    modules: tuple[nn.Module, ...] = ()
    function: Callable[[torch.Tensor], torch.Tensor] | None = None
    attention: Attention | None = None

    @property
    def weighs(self) -> bool:
        """Whether its modules hold matrices."""
        return self.projects or self.name == "embed"

    @property
    def projects(self) -> bool:
        """Whether its modules are projections, of which several are packed into one."""
        return self.name in ("gemm", "cross attention")


@dataclass(frozen=True)
class Attention:
    """Heads of the packed rows [B, S, (H + 2 Hkv) * D], and the module that Transformers' attention
    functions are called with."""

    module: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float


def product(*modules: nn.Module) -> tuple[Operator, ...]:
    """A product of projections side by side, and their bias where they have one."""
    bias = (Operator("bias", modules),) if modules[0].bias is not None else ()
    return Operator("gemm", modules), *bias


@dataclass
class Context:
    """What a layer is called with besides its rows.

    Args:
        encoder: [B, Sk, N], the encoder's rows, and cross_*: what belongs to the attention to them.
        position_ids, token_type_ids, past: what embeddings are given, and the tokens before them;
            ids: of all tables but the first, [1 or B, 1 or S].
        caches: where there are two in one, of which `cache` is that of self-attention.
    """

    mask: Any = None
    cache: Any = None
    caches: Any = None
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None
    position_bias: torch.Tensor | None = None
    encoder: torch.Tensor | None = None
    cross_mask: Any = None
    cross_bias: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    token_type_ids: torch.Tensor | None = None
    past: Any = None
    ids: tuple[torch.Tensor, ...] = ()


@dataclass
class Rows:
    """Rows [B, S, N] between two operators, and those that the next residual adds."""

    rows: torch.Tensor
    residual: torch.Tensor


@dataclass(frozen=True)
class Layer:
    """What a layer computes.

    Args:
        operators: in the order in which they run.
        norm_first: whether a norm begins a block (GPT-2, LLaMA), so that what stands in front of it
            is the residual, or ends one (BERT).
        returns_biases: whether the layer is given a position bias, and returns (rows, the position
            bias, that of cross attention) as T5's do.
        position_bias: (rows, context) -> the position bias, where the layer is to compute it and
            none is given; None where it cannot.
        enter: (what the layer is called with, context) -> rows, where these are not the same; None
            where the operators do not compute the call.
    """

    operators: tuple[Operator, ...]
    norm_first: bool
    returns_biases: bool = False
    position_bias: Callable[[torch.Tensor, Context], torch.Tensor | None] | None = None
    enter: Callable[[torch.Tensor, Context], torch.Tensor | None] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(operator.name for operator in self.operators)

    def begin(self, given: torch.Tensor, context: Context) -> torch.Tensor | None:
        """Rows [B, S, N] of what the layer is called with; the context has its position bias then.

        None where the operators do not compute the call.
        """
        if self.enter is not None:
            return self.enter(given, context)
        if given.ndim != 3 or context.token_type_ids is not None or context.past is not None:
            return None
        return given if self._attends(given, context) else None

    def _attends(self, rows: torch.Tensor, context: Context) -> bool:
        crosses = "cross attention" in self.names
        if crosses != (context.encoder is not None):
            return False
        if crosses and context.caches is None and context.cache is not None:
            return False
        if self.returns_biases and context.position_bias is None and self.position_bias is not None:
            context.position_bias = self.position_bias(rows, context)
        return not self.returns_biases or context.position_bias is not None

    def compute(self, operator: Operator, state: Rows, context: Context) -> Rows:
        """One operator, as PyTorch has it."""
        rows, residual = state.rows, state.residual
        match operator.name:
            case "embed":
                rows = residual = look_up(rows.squeeze(-1), operator, context)
            case "gemm":
                rows = F.linear(rows, packed_weight(operator.modules))
            case "bias":
                rows = rows + packed_bias(operator.modules)
            case "act":
                rows = operator.function(rows)
            case "gate":
                gate, up = rows.chunk(2, -1)
                rows = operator.function(gate) * up
            case "residual":
                rows = rows + residual
            case "norm":
                before, rows = rows, operator.modules[0](rows)
                residual = before if self.norm_first else rows
            case "head norm":
                rows = norm_heads(rows, operator)
            case "rotary":
                rows = rotate(rows, operator.attention, context)
            case "attention":
                rows = attend(rows, operator.attention, context)
            case "cross attention":
                weight, bias = packed_weight(operator.modules), packed_bias(operator.modules)
                rows = attend_encoder(rows, operator.attention, context, weight, bias)
            case "clamp":
                rows = clamp(rows)
        return Rows(rows, residual)


def matrix(projection: nn.Module) -> torch.Tensor:
    """[N, K] of a projection, a view."""
    weight = projection.weight
    if isinstance(projection, nn.Conv2d):
        return weight.view(len(weight), -1)
    # Conv1D keeps [K, N].
    return weight if isinstance(projection, nn.Linear) else weight.mT


def look_up(ids: torch.Tensor, operator: Operator, context: Context) -> torch.Tensor:
    """[B, S, N]: rows of tables, added up."""
    out, *others = (
        F.embedding(at, table.weight)
        for at, table in zip((ids, *context.ids), operator.modules, strict=True)
    )
    for other in others:
        out = out + other
    return out


def packed_weight(modules: tuple[nn.Module, ...]) -> torch.Tensor:
    """[N, K] of projections side by side."""
    weights = [matrix(m) for m in modules]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def packed_bias(modules: tuple[nn.Module, ...]) -> torch.Tensor | None:
    """[N], likewise; None without biases."""
    if modules[0].bias is None:
        return None
    biases = [m.bias for m in modules]
    return biases[0] if len(biases) == 1 else torch.cat(biases)


def implementation(config: Any) -> str:
    """The attention function that a model is set to now.

    Configurations take microseconds to look an attribute up, so this looks where it is kept.
    """
    kept = vars(config).get("_attn_implementation_internal")
    return kept or config._attn_implementation


def attention_of(layer: Layer) -> Attention | None:
    """A layer's attention, if it has one."""
    return next((op.attention for op in layer.operators if op.name == "attention"), None)


def split(rows: torch.Tensor, to: Attention) -> tuple[torch.Tensor, ...]:
    """q [B, H, S, D], k and v [B, Hkv, S, D] as views of packed rows."""
    heads = rows.unflatten(-1, (to.heads + 2 * to.kv_heads, to.head_dim)).transpose(1, 2)
    return heads.split((to.heads, to.kv_heads, to.kv_heads), dim=1)


def norm_heads(rows: torch.Tensor, operator: Operator) -> torch.Tensor:
    """The heads of queries and keys, each normalised by the first and second module."""
    to = operator.attention
    heads = rows.unflatten(-1, (-1, to.head_dim))
    q, k, v = heads.split((to.heads, to.kv_heads, to.kv_heads), dim=-2)
    of_q, of_k = operator.modules
    return torch.cat((of_q(q), of_k(k), v), -2).flatten(-2)


def rotate(rows: torch.Tensor, to: Attention, context: Context) -> torch.Tensor:
    """Rotary embedding of queries and keys, as Transformers' apply_rotary_pos_emb."""
    cos, sin = (x.unsqueeze(2) for x in context.position_embeddings)
    heads = rows.unflatten(-1, (to.heads + 2 * to.kv_heads, to.head_dim))
    turned, values = heads.split((to.heads + to.kv_heads, to.kv_heads), dim=2)
    low, high = turned.chunk(2, -1)
    turned = turned * cos + torch.cat((-high, low), -1) * sin
    return torch.cat((turned, values), 2).flatten(2)


def clamp(rows: torch.Tensor) -> torch.Tensor:
    """As T5's blocks do behind each of their parts in fp16."""
    most = torch.finfo(rows.dtype).max
    limit = torch.where(rows.isinf().any(), most - 1000, most)
    return torch.clamp(rows, -limit, limit)


def attend(rows: torch.Tensor, to: Attention, context: Context) -> torch.Tensor:
    """[B, S, H * D] by the attention function that the model is set to."""
    q, k, v = split(rows, to)
    if context.cache is not None:
        k, v = _cached(context.cache, k, v, to.module.layer_idx)
    return _attend(to, q, k, v, context.mask, context.position_bias)


def _cached(
    cache: Any, k: torch.Tensor, v: torch.Tensor, index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """All of a layer's keys and values, with these behind them."""
    if k.is_cuda and k.shape[2] <= _FEW:
        from .static_cache import append

        if (kept := append(cache, k, v, index)) is not None:
            return kept
    return cache.update(k, v, index)


def attend_encoder(
    rows: torch.Tensor, to: Attention, context: Context, weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """The same of queries [B, S, H * D] to the encoder's rows.

    Args:
        weight, bias: of keys and values side by side, which are computed where no cache has them.
    """
    q = rows.unflatten(-1, (to.heads, to.head_dim)).transpose(1, 2)
    caches, index = context.caches, to.module.layer_idx
    if caches is not None and caches.is_updated.get(index):
        kept = caches.cross_attention_cache.layers[index]
        k, v = kept.keys, kept.values
    else:
        both = F.linear(context.encoder, weight, bias).unflatten(-1, (-1, to.head_dim))
        k, v = both.transpose(1, 2).chunk(2, dim=1)
        if caches is not None:
            k, v = caches.cross_attention_cache.update(k, v, index)
            caches.is_updated[index] = True
    return _attend(to, q, k, v, context.cross_mask, context.cross_bias)


def _attend(
    to: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any,
    position_bias: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[type(to.module).__module__], "eager_attention_forward", None)
    function = ALL_ATTENTION_FUNCTIONS.get(implementation(to.module.config), eager)
    bias = {} if position_bias is None else {"position_bias": position_bias}
    out, _ = function(to.module, q, k, v, mask, dropout=0.0, scaling=to.scaling, **bias)
    return out.flatten(2)
