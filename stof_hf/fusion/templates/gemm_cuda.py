"""What the CUDA kernels for linear layers share: how they are found, checked and launched."""

from __future__ import annotations

import ctypes
import warnings
from functools import lru_cache
from typing import Any, ClassVar

import torch

from ...errors import BuildError, StofWarning, UnsupportedError
from ...kernels import cuda_build
from ...kernels.cuda_kernels import kernel
from .norm_common import on_device_of, refuse_gradients

__all__ = ["ACTIVATIONS", "Gemm", "serves"]

#: Numbers of csrc/cuda/gemm.h by names of Transformers' ACT2FN.
ACTIVATIONS = {
    "none": 0, "relu": 1, "gelu": 2, "gelu_new": 3, "gelu_pytorch_tanh": 3, "quick_gelu": 4,
    "silu": 5,
}  # fmt: skip
_MOST = 2**31 - 1


class Problem(ctypes.Structure):
    """`stof::GemmProblem` of csrc/cuda/gemm.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "residual", "out")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "rows", "columns", "depth", "x_row", "weight_row", "residual_row", "activation",
                "gated", "transposed", "block_n", "device", "group", "block_m", "split", "stages",
                "constant",
            )
        ),
        ("overflow", ctypes.c_void_p),
    ]  # fmt: skip


@lru_cache
def library(family: str, dtype: torch.dtype, index: int) -> ctypes.CDLL | None:
    """The kernel for a GPU; None, with one warning, where it cannot be built."""
    try:
        made = cuda_build.library(family, None, dtype, index)
    except BuildError as error:
        warnings.warn(
            f"stof_hf: fused linear layers do without their CUDA kernel ({error})",
            StofWarning,
            stacklevel=2,
        )
        return None
    if made.stof_problem_bytes() != ctypes.sizeof(Problem):
        raise BuildError("csrc/cuda/gemm.h and gemm_cuda.py do not agree")
    return made


def serves(family: str, weight: torch.Tensor, *, gated: bool = False) -> bool:
    """Whether a kernel takes a weight [N, K], or [2 N, K] gated, and is there for its device.

    What lies on no GPU is taken as if it lay on one, for searches among recorded times.
    """
    (n, k), dtype = weight.shape, weight.dtype
    along = weight if weight.stride(1) == 1 else weight.t()
    taken = (
        dtype in (torch.float16, torch.bfloat16) and along.stride(1) == 1 and _aligned(along)
        and k % 8 == 0 and n % (16 if gated else 8) == 0 and not (gated and along is not weight)
    )  # fmt: skip
    if not taken or not weight.is_cuda:
        return taken
    capability = torch.cuda.get_device_capability(weight.device)
    known = kernel(family, None, dtype, capability) is not None
    return known and library(family, dtype, weight.device.index) is not None


class Gemm:
    """act(x @ w^T + bias) + residual for a weight, bias and parameters.

    Each call looks at rows alone. A kernel's template says in a class of its own which library it
    is, which parameters it takes, and what else goes into the problem.

    Args:
        w: [N, K], fp16 or bf16, K and N multiples of 8, rows at multiples of 16 bytes; or such a
            [K, N] transposed, as a Conv1D's `weight.t()` is.
        bias: [N] or None.
        activation: one of ACTIVATIONS; "gelu" is the exact one, to a relative error of 1e-4.
        gated: w is [2 N, K], gate above up, and the result act(x @ gate^T) * (x @ up^T), without
            bias and residual.
        params: one value of the template's SPACE each; None takes its `default`.

    Raises UnsupportedError for what the kernel does not take.

    Example:
        >>> with torch.no_grad():                                                 # doctest: +SKIP
        ...     y = Gemm(linear.weight, linear.bias, activation="gelu")(x)
    """

    family: ClassVar[str]
    space: ClassVar[dict[str, tuple[int, ...]]]

    def __init__(
        self, w: torch.Tensor, bias: torch.Tensor | None = None, *, activation: str = "none",
        gated: bool = False, params: dict[str, int] | None = None,
    ):  # fmt: skip
        if activation not in ACTIVATIONS:
            raise UnsupportedError(
                f"activation {activation!r} is not supported: use one of {', '.join(ACTIVATIONS)}"
            )
        if w.ndim != 2 or not w.is_cuda or not serves(self.family, w, gated=gated):
            raise UnsupportedError(
                f"a weight {list(w.shape)} of {w.dtype}, strides {w.stride()}, on {w.device} is "
                "not for this kernel: it takes [N, K] in fp16 or bf16, N and K multiples of 8, "
                "rows at multiples of 16 bytes, on a Hopper GPU; templates.gemm takes others"
            )
        n = w.shape[0] // (1 + gated)
        if bias is not None:
            if gated or bias.shape != (n,) or bias.dtype != w.dtype or bias.device != w.device:
                raise UnsupportedError(
                    f"a bias {list(bias.shape)} of {bias.dtype} on {bias.device} does not fit "
                    f"{'a gated' if gated else 'a'} weight {list(w.shape)} of {w.dtype}"
                )
            bias = bias.contiguous()
            bias = bias if bias.data_ptr() % 4 == 0 else bias.clone()
        known = self.space.items()
        if params is not None and any(params.get(name) not in values for name, values in known):
            raise UnsupportedError(f"there is no kernel for {params}: take values of {self.space}")
        self.w, self.bias, self.params, self.columns = w, bias, params, n
        self._run = library(self.family, w.dtype, w.device.index).stof_run
        along = int(w.stride(1) != 1)
        self._problem = Problem(
            weight=w.data_ptr(), bias=None if bias is None else bias.data_ptr(), columns=n,
            depth=w.shape[1], weight_row=w.stride(along), activation=ACTIVATIONS[activation],
            gated=gated, transposed=along, device=w.device.index,
        )  # fmt: skip

    def default(self, m: int) -> dict[str, int]:
        """Parameters for m rows that nobody tuned."""
        raise NotImplementedError

    def before(self, problem: Problem, x: torch.Tensor) -> Any:
        """Adds to a problem what only this kernel is told; returns what `behind` is given."""

    def behind(self, out: torch.Tensor, kept: Any) -> None:
        """Launches what follows the kernel."""

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """act(x @ w^T + bias) + residual, accumulated in fp32 and rounded once.

        Args:
            x: [M, K], the weight's dtype; copied where rows do not begin at multiples of 16 bytes.
            residual: [M, N] or None; added after the activation.

        Returns:
            [M, N], contiguous.

        Raises UnsupportedError for tensors that do not fit the weight, or require grad.
        """
        w, n = self.w, self.columns
        p = Problem.from_buffer_copy(self._problem)
        if x.ndim != 2 or x.shape[1] != p.depth or x.dtype != w.dtype or x.device != w.device:
            raise UnsupportedError(
                f"x {list(x.shape)} of {x.dtype} on {x.device} does not fit a weight "
                f"{list(w.shape)} of {w.dtype} on {w.device}"
            )
        refuse_gradients(x, w, residual, self.bias)
        m = x.shape[0]
        if max(m, n, p.depth) > _MOST:
            raise UnsupportedError(f"{m} rows are more than the kernel counts: pass fewer at once")
        out = torch.empty(m, n, dtype=x.dtype, device=x.device)
        if m == 0:
            return out
        # Rows that a caller cut out of something else.
        x = x if x.stride(1) == 1 and _aligned(x) else _copied(x)
        if residual is not None:
            if p.gated or residual.shape != out.shape or residual.dtype != x.dtype:
                raise UnsupportedError(
                    f"a residual {list(residual.shape)} of {residual.dtype} does not fit "
                    f"{'a gated' if p.gated else 'a'} result {list(out.shape)} of {x.dtype}"
                )
            fitting = residual.stride(1) == 1 and _aligned(residual)
            residual = residual if fitting else _copied(residual)
            p.residual, p.residual_row = residual.data_ptr(), residual.stride(0)
        for name, value in (self.params or self.default(m)).items():
            setattr(p, name, value)
        p.x, p.out, p.rows, p.x_row = x.data_ptr(), out.data_ptr(), m, x.stride(0)
        kept = self.before(p, x)
        with on_device_of(x):
            stream = torch.cuda.current_stream().cuda_stream
            message = self._run(ctypes.addressof(p), stream)
            if message:
                raise RuntimeError(f"stof_hf could not launch a linear layer: {message.decode()}")
            self.behind(out, kept)
        return out


def _aligned(x: torch.Tensor) -> bool:
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0


def _copied(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)
