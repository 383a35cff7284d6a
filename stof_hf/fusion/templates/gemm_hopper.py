"""Linear layers of many rows on Hopper GPUs, by a CUDA kernel (csrc/cuda/gemm.cu).

A warpgroup computes what is behind its product while another's keeps the tensor cores busy, which
Triton's compiler does not arrange.
"""

from __future__ import annotations

import ctypes
import warnings
from functools import lru_cache

import torch

from ...attention.select import multiprocessors
from ...errors import BuildError, StofWarning, UnsupportedError
from ...kernels import cuda_build
from ...kernels.cuda_kernels import kernel
from .norm_common import on_device_of, refuse_gradients

__all__ = ["ACTIVATIONS", "SPACE", "Gemm", "default", "fits", "gemm_hopper", "serves"]

#: Tiles have so many rows of the weight; so many pairs of row tiles are walked together.
SPACE: dict[str, tuple[int, ...]] = {"block_n": (128, 192), "group": (4, 8, 16)}
#: Numbers of csrc/cuda/gemm.h by names of Transformers' ACT2FN.
ACTIVATIONS = {
    "none": 0, "relu": 1, "gelu": 2, "gelu_new": 3, "gelu_pytorch_tanh": 3, "quick_gelu": 4,
    "silu": 5,
}  # fmt: skip
#: Rows of two tiles, one below the other, which a cluster computes.
_PAIR = 256
_MOST = 2**31 - 1


class Problem(ctypes.Structure):
    """`stof::GemmProblem` of csrc/cuda/gemm.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "residual", "out")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "rows", "columns", "depth", "x_row", "weight_row", "residual_row", "activation",
                "gated", "block_n", "group", "device",
            )
        ),
    ]  # fmt: skip


@lru_cache
def _library(dtype: torch.dtype, index: int) -> ctypes.CDLL | None:
    """The kernel for a GPU; None, with one warning, where it cannot be built."""
    try:
        made = cuda_build.library("gemm", None, dtype, index)
    except BuildError as error:
        warnings.warn(
            f"stof_hf: fused linear layers do without their CUDA kernel ({error})",
            StofWarning,
            stacklevel=2,
        )
        return None
    if made.stof_problem_bytes() != ctypes.sizeof(Problem):
        raise BuildError("csrc/cuda/gemm.h and gemm_hopper.py do not agree")
    return made


def serves(weight: torch.Tensor, *, gated: bool = False) -> bool:
    """Whether the kernel takes a weight [N, K], or [2 N, K] gated, and is there for its device.

    What lies on no GPU is taken as if it lay on one, for searches among recorded times.
    """
    (n, k), dtype = weight.shape, weight.dtype
    taken = (
        dtype in (torch.float16, torch.bfloat16) and weight.stride(1) == 1
        and k % 8 == 0 and n % (16 if gated else 8) == 0 and _aligned(weight)
    )  # fmt: skip
    if not taken or not weight.is_cuda:
        return taken
    capability = torch.cuda.get_device_capability(weight.device)
    known = kernel("gemm", None, dtype, capability) is not None
    return known and _library(dtype, weight.device.index) is not None


def default(m: int, n: int, device: torch.device, *, gated: bool = False) -> dict[str, int]:
    """Parameters for m rows and n columns of the result that nobody tuned.

    The tile whose rounds over the multiprocessors cost less: a round takes as long as the tile is
    wide, and what is loaded for it.
    """
    clusters = multiprocessors(device) // 2

    def cost(block_n: int) -> int:
        across = -(-n * (1 + gated) // block_n)
        return -(-across * -(-m // _PAIR) // clusters) * (block_n + 64)

    return {"block_n": min(reversed(SPACE["block_n"]), key=cost), "group": 8}


def fits(params: dict[str, int]) -> bool:
    """Whether the kernel was compiled for these parameters."""
    return all(params[name] in values for name, values in SPACE.items())


class Gemm:
    """act(x @ w^T + bias) + residual for a weight, bias and parameters; see `gemm_hopper`.

    Each call looks at rows alone.

    Raises UnsupportedError for what the kernel does not take.
    """

    def __init__(
        self, w: torch.Tensor, bias: torch.Tensor | None = None, *, activation: str = "none",
        gated: bool = False, params: dict[str, int] | None = None,
    ):  # fmt: skip
        if activation not in ACTIVATIONS:
            raise UnsupportedError(
                f"activation {activation!r} is not supported: use one of {', '.join(ACTIVATIONS)}"
            )
        if w.ndim != 2 or not w.is_cuda or not serves(w, gated=gated):
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
        if params is not None and not fits(params):
            raise UnsupportedError(f"there is no kernel for {params}: take values of {SPACE}")
        self.w, self.bias, self.params, self.columns = w, bias, params, n
        self._run = _library(w.dtype, w.device.index).stof_run
        self._problem = Problem(
            weight=w.data_ptr(), bias=None if bias is None else bias.data_ptr(), columns=n,
            depth=w.shape[1], weight_row=w.stride(0), activation=ACTIVATIONS[activation],
            gated=gated, device=w.device.index,
        )  # fmt: skip

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x: [M, K]. residual: [M, N] or None. Returns [M, N]."""
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
        params = self.params or default(m, n, x.device, gated=bool(p.gated))
        p.block_n, p.group = params["block_n"], params["group"]
        p.x, p.out, p.rows, p.x_row = x.data_ptr(), out.data_ptr(), m, x.stride(0)
        with on_device_of(x):
            stream = torch.cuda.current_stream().cuda_stream
            message = self._run(ctypes.addressof(p), stream)
        if message:
            raise RuntimeError(f"stof_hf could not launch a linear layer: {message.decode()}")
        return out


def gemm_hopper(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    *,
    activation: str = "none",
    gated: bool = False,
    params: dict[str, int] | None = None,
) -> torch.Tensor:
    """act(x @ w^T + bias) + residual, accumulated in fp32 and rounded once.

    Args:
        x: [M, K], fp16 or bf16; copied where rows do not begin at multiples of 16 bytes.
        w: [N, K], K and N multiples of 8, rows at multiples of 16 bytes.
        bias: [N] or None.
        residual: [M, N] or None; added after the activation.
        activation: one of ACTIVATIONS; "gelu" is the exact one, to a relative error of 1e-4.
        gated: w is [2 N, K], gate above up, and the result act(x @ gate^T) * (x @ up^T), without
            bias and residual.
        params: one value of SPACE each; None takes `default`.

    Returns:
        [M, N], contiguous, x's dtype.

    Raises:
        UnsupportedError: shapes, dtypes or devices that do not fit each other or the kernel, an
            unknown activation, or tensors that require grad.

    Example:
        >>> with torch.no_grad():                                                 # doctest: +SKIP
        ...     y = gemm_hopper(x, linear.weight, linear.bias, activation="gelu")
    """
    return Gemm(w, bias, activation=activation, gated=gated, params=params)(x, residual)


def _aligned(x: torch.Tensor) -> bool:
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0


def _copied(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)
