"""A segment of a layer as templates see it: its weights, and what its other operators stand for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .layer import Attention, Layer, Operator, matrix

__all__ = ["Norm", "Part", "activation_name", "kind", "norm_of", "part_of"]

Weights = Callable[[tuple[nn.Module, ...]], tuple[torch.Tensor, torch.Tensor | None]]

#: Classes of Transformers' activations, and what templates call what they compute.
ACTIVATIONS = {
    "GELUActivation": "gelu", "NewGELUActivation": "gelu_new", "GELUTanh": "gelu_pytorch_tanh",
    "QuickGELUActivation": "quick_gelu", "SiLUActivation": "silu", "SiLU": "silu", "ReLU": "relu",
}  # fmt: skip
#: Classes that multiply rows by weight / rms(row).
RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "T5LayerNorm")


@dataclass(frozen=True)
class Norm:
    """weight, bias: [N]. rms: no mean is subtracted."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    rms: bool


def norm_of(module: nn.Module) -> Norm | None:
    """What a norm computes, or None where templates do not know its class."""
    if type(module) is nn.LayerNorm and module.weight is not None and len(module.weight.shape) == 1:
        return Norm(module.weight, module.bias, module.eps, False)
    if type(module).__name__ in RMS_NORMS:
        return Norm(module.weight, None, module.variance_epsilon, True)
    return None


def activation_name(function: Callable) -> str | None:
    """The templates' name of an activation, or None where they do not compute it."""
    return ACTIVATIONS.get(type(function).__name__)


@dataclass(frozen=True)
class Part:
    """A segment's operators, and what they work with, None where no operator needs it.

    Args:
        weight: [N, K], any strides; bias: [N].
        norm_first: as in Layer.
        text: what, with rows and dtype, decides how long it takes.
    """

    operators: tuple[Operator, ...]
    names: tuple[str, ...]
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    function: Callable | None
    activation: str | None
    norm: Norm | None
    norm_module: nn.Module | None
    attention: Attention | None
    norm_first: bool
    text: str


def part_of(layer: Layer, begin: int, end: int, weights: Weights) -> Part:
    """Operators [begin, end) of a layer.

    Args:
        weights: gives the packed weight [N, K] and bias [N] of projections.
    """
    operators = layer.operators[begin:end]
    found = {operator.name: operator for operator in operators}
    product = found.get("gemm") or found.get("bias") or found.get("cross attention")
    weight, bias = weights(product.modules) if product else (None, None)
    nonlinear = found.get("act") or found.get("gate")
    norm = found["norm"].modules[0] if "norm" in found else None
    heads = next((o.attention for o in operators if o.attention is not None), None)
    # Of cross attention, the projections are its own.
    crosses = "cross attention" in found
    return Part(
        operators, tuple(operator.name for operator in operators),
        weight if crosses or "gemm" in found else None,
        bias if crosses or "bias" in found else None,
        nonlinear and nonlinear.function,
        activation_name(nonlinear.function) if nonlinear else "none",
        None if norm is None else norm_of(norm), norm, heads,
        layer.norm_first, text_of(operators, layer.norm_first),
    )  # fmt: skip


def text_of(operators: tuple[Operator, ...], norm_first: bool) -> str:
    """Operators with their sizes."""
    return " ".join(map(_text, operators)) + (", norm first" if norm_first else "")


def _text(operator: Operator) -> str:
    name, modules = operator.name, operator.modules
    if name == "embed":
        count = "+".join(str(len(m.weight)) for m in modules)
        return f"embed[{count} x {modules[0].weight.shape[1]}]"
    if name == "gemm":
        layout = "" if isinstance(modules[0], nn.Linear | nn.Conv2d) else " transposed"
        size = (matrix(m).shape for m in modules)
        rows, columns = zip(*size, strict=True)
        return f"gemm[{'+'.join(map(str, rows))} x {columns[0]}{layout}]"
    if name == "norm":
        module = modules[0]
        bias = "" if getattr(module, "bias", None) is None else " with bias"
        size = "" if module.weight is None else f" {module.weight.shape[-1]}"
        return f"norm[{type(module).__name__}{size}{bias}]"
    if operator.function is not None:
        known = activation_name(operator.function)
        return f"{name}[{known or type(operator.function).__name__}]"
    if operator.attention is not None:
        to = operator.attention
        return f"{name}[{to.heads}/{to.kv_heads} x {to.head_dim}]"
    return name


def kind(cls: type[nn.Module], layer: Layer) -> str:
    """A name that layers share whose operators, sizes and functions are equal."""
    text = text_of(layer.operators, layer.norm_first)
    return f"{cls.__name__}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
