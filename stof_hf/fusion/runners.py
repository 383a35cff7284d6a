"""What computes a segment: Triton templates with parameters, PyTorch, and the attention function.

A template makes of a part, parameters and a shape a step (rows, residual, context) -> (rows,
residual) on rows [B * S, N], which launches and does nothing else.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import UnsupportedError
from .layer import Context, attend, attend_encoder, clamp, look_up, norm_heads, rotate
from .parts import Part

__all__ = ["IMPLEMENTATIONS", "TEMPLATES", "Params", "Step", "Template"]

Params = Mapping[str, int]
Step = Callable[[torch.Tensor, torch.Tensor, Context], tuple[torch.Tensor, torch.Tensor]]
#: (batch size, tokens) of a call.
Shape = tuple[int, int]

#: Rows from which on large tiles keep the multiprocessors of a GPU busy.
_MANY = 512
#: Rows whose norm may be computed by each tile of the product behind it (docs/performance.md).
_FEW = 4096
#: Attention implementations whose masks say all that a layer's window and causality do.
IMPLEMENTATIONS = ("stof", "sdpa", "eager")


@dataclass(frozen=True)
class Template:
    """A row of TEMPLATES.

    Args:
        build: (part, params, shape) -> step.
        takes: whether it computes a part, beyond what `layer_ops.SEGMENTS` says.
        module: of stof_hf.fusion.templates, for what has parameters.
        default: (module, part, rows, device) -> parameters.
        fits: (module, params, part, bytes of shared memory) -> whether it compiles and fits.
        rows: the most that it computes, where there is a limit.
    """

    build: Callable[[Part, Params, Shape], Step]
    takes: Callable[[Part], bool] = lambda part: True
    module: str | None = None
    default: Callable[[Any, Part, int, torch.device], Params] | None = None
    fits: Callable[[Any, Params, Part, int], bool] | None = None
    rows: int | None = None

    @property
    def code(self) -> Any:
        return importlib.import_module(f"stof_hf.fusion.templates.{self.module}")

    @property
    def space(self) -> Mapping[str, tuple[int, ...]]:
        """Parameters that a search samples; empty where there are none."""
        return self.code.SPACE if self.module else {}

    def start(self, part: Part, rows: int, device: torch.device) -> Params:
        """Parameters that nobody tuned; raises UnsupportedError for too many rows."""
        if not self.serves(rows):
            raise UnsupportedError(f"{rows} rows are more than {self.rows}")
        return self.default(self.code, part, rows, device) if self.module else {}

    def serves(self, rows: int) -> bool:
        """Whether it computes so many rows."""
        return self.rows is None or rows <= self.rows

    def allows(self, params: Params, part: Part, shared_memory: int) -> bool:
        if not self.module:
            return not params
        known = params.keys() == self.space.keys()
        return known and self.fits(self.code, params, part, shared_memory)


def _gemm(part: Part, params: Params, shape: Shape) -> Step:
    from .templates.gemm import gemm

    weight, bias = part.weight, part.bias
    options = {"activation": part.activation, "norm": part.norm, "params": params}
    options["clamp"] = "clamp" in part.names
    return _producing(
        part, _prepared(lambda rows, *rest: gemm(rows, weight, bias, *rest, **options))
    )


def _gemm_hopper(part: Part, params: Params, shape: Shape) -> Step:
    from .templates.gemm_hopper import Gemm

    return _by_cuda(Gemm, part, params)


def _gemm_split_k(part: Part, params: Params, shape: Shape) -> Step:
    from .templates.gemm_split_k import ClampedGemm, Gemm

    return _by_cuda(ClampedGemm if "clamp" in part.names else Gemm, part, params)


def _by_cuda(kernel: Any, part: Part, params: Params) -> Step:
    call = kernel(
        part.weight, part.bias, activation=part.activation, gated="gate" in part.names,
        params=params,
    )  # fmt: skip
    return _producing(part, call)


def _gated(part: Part, params: Params, shape: Shape) -> Step:
    from .templates.gated import gated

    gate, up = part.weight.chunk(2)
    options = {"activation": part.activation, "norm": part.norm, "params": params}
    return _producing(part, _prepared(lambda rows: gated(rows, gate, up, **options)))


def _gemv(part: Part, params: Params, shape: Shape) -> Step:
    from .templates.gemv import gemv

    weight, bias, to = part.weight, part.bias, part.attention
    options = {"norm": part.norm, "params": params}
    if "rotary" in part.names:
        turned = to.heads + to.kv_heads
        options |= {"heads": turned + to.kv_heads, "rotated_heads": turned}
        return _rotating(
            part, lambda row, cos, sin: gemv(row, weight, bias, cos=cos, sin=sin, **options)
        )
    options |= {"activation": part.activation, "gated": "gate" in part.names}
    return _producing(part, _prepared(lambda row, *rest: gemv(row, weight, bias, *rest, **options)))


def _producing(part: Part, call: Callable[..., torch.Tensor]) -> Step:
    """A product, or a sum, which takes the residual too where it adds it."""
    if "residual" in part.names:
        return lambda rows, residual, _: (call(rows, residual), residual)
    if part.norm is not None:
        # The norm begins a block, whose residual stands in front of it.
        return lambda rows, residual, _: (call(rows), rows)
    return lambda rows, residual, _: (call(rows), residual)


def _qkv(part: Part, params: Params, shape: Shape) -> Step:
    from .templates.qkv import qkv

    weight, bias, to, norm = part.weight, part.bias, part.attention, part.norm

    return _rotating(
        part,
        lambda rows, cos, sin: qkv(
            rows, weight, bias, heads=to.heads, kv_heads=to.kv_heads, cos=cos, sin=sin,
            norm=norm, params=params,
        ),
    )  # fmt: skip


def _rotating(part: Part, function: Callable[..., torch.Tensor]) -> Step:
    """A product whose function (rows, cos, sin) rotates heads."""
    call = _prepared(function, checked=2)

    def step(rows, residual, context):
        cos, sin = context.position_embeddings
        out = call(rows, cos.flatten(0, 1), sin.flatten(0, 1))
        return out, residual if part.norm is None else rows

    return step


def _rotary(part: Part, params: Params, shape: Shape) -> Step:
    from .templates.rotary import rotary

    to = part.attention
    heads = to.heads, to.kv_heads, to.kv_heads
    view = (*shape, sum(heads), to.head_dim)
    call = _prepared(lambda q, k, cos, sin: rotary(q, k, cos, sin, params=params), checked=2)

    def step(rows, residual, context):
        q, k, _ = rows.view(view).split(heads, 2)
        call(q, k, *context.position_embeddings)
        return rows, residual

    return step


def _norm(part: Part, params: Params, shape: Shape) -> Step:
    from .templates.norm import norm

    return _normed(part, norm, params)


def _clamped_norm(part: Part, params: Params, shape: Shape) -> Step:
    from .templates.clamped_norm import clamped_norm

    norm = part.norm
    options = {"eps": norm.eps, "rms": norm.rms, "params": params}
    call = _prepared(
        lambda rows, residual: clamped_norm(rows, residual, norm.weight, norm.bias, **options)
    )
    return lambda rows, residual, _: call(rows, residual)


def _embed(part: Part, params: Params, shape: Shape) -> Step:
    from .templates.embed import embed

    tables, norm = [table.weight for table in part.operators[0].modules], part.norm
    call = _prepared(lambda *ids: embed(tables, ids, norm, params=params), checked=len(tables))

    def step(rows, residual, context):
        out = call(rows.view(shape), *context.ids)
        return out, out

    return step


def _gemm_norm(part: Part, params: Params, shape: Shape) -> Step:
    from .templates.gemm_norm import gemm_norm

    weight = part.weight
    return _normed(
        part, lambda rows, *rest, **options: gemm_norm(rows, weight, *rest, **options), params
    )


def _normed(part: Part, function: Callable, params: Params) -> Step:
    norm, bias, first = part.norm, part.bias, part.norm_first
    options = {"eps": norm.eps, "rms": norm.rms, "params": params}
    if "residual" not in part.names:
        call = _prepared(lambda rows: function(rows, norm.weight, norm.bias, bias, **options))

        def step(rows, residual, _):
            out = call(rows)
            return out, rows if first else out
    else:
        add = _prepared(
            lambda rows, residual: function(
                rows, norm.weight, norm.bias, bias, residual, return_sum=first, **options
            )
        )

        def step(rows, residual, _):
            out = add(rows, residual)
            return out if first else (out, out)

    return step


def _prepared(function: Callable[..., Any], checked: int = 0) -> Callable[..., Any]:
    from .templates.launch import Prepared

    # Rows of a plan have one layout.
    return Prepared(function, checked)


def _attention(part: Part, params: Params, shape: Shape) -> Step:
    to = part.attention

    def step(rows, residual, context):
        return attend(rows.view(*shape, -1), to, context).flatten(0, 1), residual

    return step


def _cross_attention(part: Part, params: Params, shape: Shape) -> Step:
    to, weight, bias = part.attention, part.weight, part.bias

    def step(rows, residual, context):
        out = attend_encoder(rows.view(*shape, -1), to, context, weight, bias)
        return out.flatten(0, 1), residual

    return step


def _overflow(part: Part, params: Params, shape: Shape) -> Step:
    from .templates.overflow import overflow

    if "residual" in part.names:
        return _producing(part, _prepared(lambda rows, other: overflow(rows, other, params=params)))

    def in_place(rows):
        overflow(rows, params=params)

    call = _prepared(in_place)

    def step(rows, residual, _):
        call(rows)
        return rows, residual

    return step


def _torch(part: Part, params: Params, shape: Shape) -> Step:
    steps, at = [], 0
    while at < len(part.names):
        for names, make in _PYTORCH.items():
            if part.names[at : at + len(names)] == names and (step := make(part, shape)):
                steps.append(step)
                at += len(names)
                break
    if len(steps) == 1:
        return steps[0]

    def all_of(rows, residual, context):
        for step in steps:
            rows, residual = step(rows, residual, context)
        return rows, residual

    return all_of


def _embed_torch(part: Part, shape: Shape) -> Step:
    (operator,) = part.operators[:1]

    def step(rows, residual, context):
        out = look_up(rows.view(shape), operator, context).flatten(0, 1)
        return out, out

    return step


def _linear(part: Part, _: Shape) -> Step:
    weight, bias = part.weight, part.bias
    return lambda rows, residual, _: (F.linear(rows, weight, bias), residual)


def _product(part: Part, _: Shape) -> Step:
    weight = part.weight
    return lambda rows, residual, _: (F.linear(rows, weight), residual)


def _product_residual(part: Part, _: Shape) -> Step:
    weight = part.weight.mT
    return lambda rows, residual, _: (torch.addmm(residual, rows, weight), residual)


def _linear_act(part: Part, _: Shape) -> Step | None:
    # On CUDA this is cuBLASLt's epilogue, whose GELU is the one by tanh.
    known = {"relu": False, "gelu_new": True, "gelu_pytorch_tanh": True}
    if not part.weight.is_cuda or part.activation not in known:
        return None
    weight, bias, gelu = part.weight.mT, part.bias, known[part.activation]
    if bias is None:
        # The epilogue adds one.
        bias = weight.new_zeros(weight.shape[1])
    return lambda rows, residual, _: (
        torch._addmm_activation(bias, rows, weight, use_gelu=gelu), residual
    )  # fmt: skip


def _act(part: Part, _: Shape) -> Step:
    function = part.function
    return lambda rows, residual, _: (function(rows), residual)


def _gate(part: Part, _: Shape) -> Step:
    function = part.function

    def step(rows, residual, _):
        gate, up = rows.chunk(2, -1)
        return function(gate) * up, residual

    return step


def _norm_torch(part: Part, _: Shape) -> Step:
    module, first = part.norm_module, part.norm_first

    def step(rows, residual, _):
        out = module(rows)
        return out, rows if first else out

    return step


def _bias(part: Part, _: Shape) -> Step:
    bias = part.bias
    return lambda rows, residual, _: (rows + bias, residual)


def _residual(part: Part, _: Shape) -> Step:
    return lambda rows, residual, _: (rows + residual, residual)


def _clamp(part: Part, _: Shape) -> Step:
    return lambda rows, residual, _: (clamp(rows), residual)


def _head_norm(part: Part, _: Shape) -> Step:
    (operator,) = part.operators
    return lambda rows, residual, _: (norm_heads(rows, operator), residual)


def _rotary_torch(part: Part, shape: Shape) -> Step:
    to = part.attention

    def step(rows, residual, context):
        return rotate(rows.view(*shape, -1), to, context).flatten(0, 1), residual

    return step


#: PyTorch's calls by the operators that they compute; those of several operators come first.
_PYTORCH: dict[tuple[str, ...], Callable[[Part, Shape], Step | None]] = {
    ("gemm", "bias", "act"): _linear_act,
    ("gemm", "act"): _linear_act,
    ("gemm", "bias"): _linear,
    ("gemm", "residual"): _product_residual,
    ("gemm",): _product,
    ("bias",): _bias,
    ("act",): _act,
    ("gate",): _gate,
    ("residual",): _residual,
    ("clamp",): _clamp,
    ("norm",): _norm_torch,
    ("embed",): _embed_torch,
    ("head norm",): _head_norm,
    ("rotary",): _rotary_torch,
}


def _takes(part: Part) -> bool:
    """Whether products know the activation, and a norm in front that is not a residual too."""
    known = part.names[0] != "norm" or (part.norm is not None and part.norm_first)
    clamped = "clamp" not in part.names or part.weight.dtype == torch.float16
    return known and clamped and part.activation is not None


def _takes_norm(part: Part) -> bool:
    return part.norm is not None and len(part.norm.weight) <= 16384


def _takes_embed(part: Part) -> bool:
    tables = part.operators[0].modules
    return len(tables) <= 3 and all(t.weight.is_contiguous() for t in tables) and _takes_norm(part)


def _norm_default(code: Any, part: Part, rows: int, device: torch.device) -> Params:
    return code.default(rows, len(part.norm.weight), device)


def _norm_fits(code: Any, params: Params, part: Part, memory: int) -> bool:
    return code.fits(params, len(part.norm.weight), shared_memory=memory)


def _in_front(part: Part, rows: int) -> bool:
    """Whether a norm is in front of a product; refuses it where that cannot pay."""
    if part.norm is not None and rows > _FEW:
        raise UnsupportedError(f"a norm of {rows} rows is faster by itself")
    return part.norm is not None


def _gemm_default(code: Any, part: Part, rows: int, device: torch.device) -> Params:
    norm = _in_front(part, rows)
    return code.default(rows, *part.weight.shape, part.weight.dtype, device, norm=norm)


def _takes_cuda(family: str, part: Part) -> bool:
    from .templates.gemm_cuda import serves

    return _takes(part) and serves(family, part.weight, gated="gate" in part.names)


def _hopper_default(code: Any, part: Part, rows: int, device: torch.device) -> Params:
    if rows < _MANY:
        raise UnsupportedError(f"tiles of 128 rows and more are not for {rows} rows")
    gated = "gate" in part.names
    return code.default(rows, part.weight.shape[0] // (1 + gated), device, gated=gated)


def _split_k_default(code: Any, part: Part, rows: int, device: torch.device) -> Params:
    if rows > code.ROWS:
        raise UnsupportedError(f"{rows} rows have tiles enough without a shared depth")
    gated, (n, k) = "gate" in part.names, part.weight.shape
    return code.default(rows, n // (1 + gated), k, device, gated=gated)


def _gemv_default(code: Any, part: Part, rows: int, device: torch.device) -> Params:
    pairs = "gate" in part.names or "rotary" in part.names
    transposed = part.weight.stride(1) != 1
    return code.default(part.weight.shape[0] // (1 + pairs), transposed=transposed)


def _gemm_fits(code: Any, params: Params, part: Part, memory: int) -> bool:
    norm = part.norm is not None
    return code.fits(params, part.weight.dtype, shared_memory=memory, norm=norm)


TEMPLATES: dict[str, Template] = {
    "torch": Template(_torch),
    "attention": Template(_attention),
    "cross attention": Template(_cross_attention),
    "overflow": Template(
        _overflow, module="overflow",
        default=lambda code, part, rows, device: code.default(),
        fits=lambda code, params, part, memory: code.fits(params),
    ),
    "gemm": Template(_gemm, _takes, "gemm", _gemm_default, _gemm_fits),
    "gated": Template(
        _gated, _takes, "gated",
        lambda code, part, rows, device: code.default(
            rows, part.weight.shape[0] // 2, part.weight.shape[1], part.weight.dtype, device,
            norm=_in_front(part, rows),
        ),
        _gemm_fits,
    ),
    "gemm_hopper": Template(
        _gemm_hopper, partial(_takes_cuda, "gemm"), "gemm_hopper", _hopper_default,
        lambda code, params, part, memory: code.fits(params),
    ),
    "gemm_split_k": Template(
        _gemm_split_k, partial(_takes_cuda, "gemm_split_k"), "gemm_split_k", _split_k_default,
        lambda code, params, part, memory: code.fits(
            params, part.weight.shape[1], shared_memory=memory
        ),
    ),
    "gemv": Template(
        _gemv, _takes, "gemv", _gemv_default,
        lambda code, params, part, memory: code.fits(params), rows=1,
    ),
    "qkv": Template(_qkv, _takes, "qkv", _gemm_default, _gemm_fits),
    "rotary": Template(
        _rotary, module="rotary",
        default=lambda code, part, rows, device: code.default(
            rows, part.attention.heads, part.attention.head_dim, device
        ),
        fits=lambda code, params, part, memory: code.fits(
            params, part.attention.head_dim, shared_memory=memory
        ),
    ),
    "norm": Template(_norm, _takes_norm, "norm", _norm_default, _norm_fits),
    "clamped_norm": Template(
        _clamped_norm, lambda part: part.norm_first and _takes_norm(part), "clamped_norm",
        _norm_default, _norm_fits,
    ),
    "embed": Template(_embed, _takes_embed, "embed", _norm_default, _norm_fits),
    "gemm_norm": Template(
        _gemm_norm, lambda part: part.norm is not None and len(part.norm.weight) <= 1024,
        "gemm_norm",
        lambda code, part, rows, device: code.default(
            rows, len(part.norm.weight), part.weight.dtype, device
        ),
        lambda code, params, part, memory: code.fits(
            params, len(part.norm.weight), part.weight.dtype, shared_memory=memory
        ),
    ),
}  # fmt: skip
