"""Compiles the launches of a GEMM template for GPUs that need not be here; prints JSON.

Usage: python compile_fusion.py gemm|gated|qkv [norm]. Run in a process of its own, because kernels
that are to be interpreted, as a test's own are on a CPU, cannot be compiled.
"""

import json
import sys

import torch
import triton
from compiled_kernel import MEMORY, shared_memory_of

from stof_hf.fusion.parts import Norm
from stof_hf.fusion.templates import common, gated, gemm, qkv
from stof_hf.kernels import dependent

#: Corners of the space (block_m, block_n, block_k, warps), compiled with all the stages that fit.
TILES = [
    (256, 128, 64, 8), (64, 256, 32, 8), (16, 32, 128, 8), (256, 32, 128, 4), (128, 128, 128, 8),
]  # fmt: skip


class Compiler:
    """Stands in for a kernel: a launch compiles it for a target and keeps what that gave."""

    def __init__(self, kernel: triton.JITFunction, capability: int):
        self.kernel, self.capability = kernel, capability
        self.result = None

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *arguments, **options):
        names = self.kernel.arg_names
        values = dict(zip(names, arguments, strict=False))
        values |= {name: options.pop(name) for name in [*options] if name in names}
        self.result = shared_memory_of(self.kernel, self.capability, values, options)


def calls(family: str):
    """(name, tensors, options) of calls with default parameters."""
    for m, dtype, transposed in (
        (1, torch.float16, False),
        (128, torch.float32, False),
        (128, torch.bfloat16, True),
        (77, torch.float16, False),
        (32768, torch.float16, False),
    ):
        n, k = (1920, 1024) if m != 77 else (1960, 1001)
        x = torch.empty(m, k, dtype=dtype, device="meta")
        if transposed:
            w, up = torch.empty(2, k, n, dtype=dtype, device="meta").mT
        else:
            w, up = torch.empty(2, n, k, dtype=dtype, device="meta")
        bias, table = w[:, 0].contiguous(), torch.empty(m, n // 20, dtype=dtype, device="meta")
        residual = torch.empty(m, n, dtype=dtype, device="meta")
        positions = torch.empty(m, dtype=torch.int64, device="meta")
        name = f"{m}x{n}x{k} {dtype}"
        if family == "gemm":
            for act in common.ACTIVATIONS if m == 1 else ("none", "gelu"):
                options = {"bias": bias, "residual": residual, "activation": act}
                yield f"{name} {act}", (x, w), options if act != "none" else {}
            if dtype == torch.float16:
                yield f"{name} clamp", (x, w), {"residual": residual, "clamp": True}
        elif family == "gated":
            yield name, (x, w, up), {}
        else:
            for p in (None, positions) if m in (1, 77) else (None,):
                options = {"heads": 12, "kv_heads": 4, "cos": table, "sin": table, "positions": p}
                yield f"{name} {p is not None}", (x, w, bias), options


def normalised(family: str):
    """The same with a norm in front of them, LayerNorm and RMSNorm in turn."""
    # Activations are behind the product, whatever is in front.
    few = [call for call in calls(family) if call[2].get("activation", "gelu") == "gelu"]
    few = [call for call in few if "clamp" not in call[2]]
    for i, (name, tensors, options) in enumerate(few):
        weight = tensors[0][0].contiguous()
        norm = Norm(weight, None if i % 2 else weight, 1e-5, bool(i % 2))
        yield f"{name} rms={norm.rms}", tensors, options | {"norm": norm}


def corners(given, fits, memory: int, norm: bool):
    """Calls with the parameters of TILES as far as they fit."""
    _, tensors, options = given[-1]
    for tile in TILES:
        params = dict(zip(("block_m", "block_n", "block_k", "warps"), tile, strict=True))
        for stages in reversed(common.SPACE["stages"]):
            params |= {"group_m": 8, "stages": stages}
            if fits(params, torch.float16, shared_memory=memory, norm=norm):
                yield f"{params}", tensors, options | {"params": params}
                break


def main(family: str, norm: str = "") -> None:
    module, kernel = {
        "gemm": (gemm, "gemm_kernel"),
        "gated": (gated, "gated_kernel"),
        "qkv": (qkv, "rotary_kernel"),
    }[family]
    function, original = getattr(module, family), getattr(module, kernel)
    common.check = lambda *arguments: None
    gemm.clamp_flagged = lambda *arguments: None
    given = list(normalised(family) if norm else calls(family))
    for capability, memory in MEMORY.items():
        common.shared_memory = lambda device, memory=memory: memory
        common.multiprocessors = lambda device: 132
        dependent.overlaps = lambda device, hopper=capability >= 90: hopper
        common.default.cache_clear()
        compiler = Compiler(original, capability)
        setattr(module, kernel, compiler)
        for name, tensors, options in (*given, *corners(given, module.fits, memory, bool(norm))):
            try:
                function(*tensors, **options)
                taken = compiler.result
            except Exception as error:
                taken = repr(error)
            print(json.dumps([f"sm_{capability} {name}", taken, memory]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
