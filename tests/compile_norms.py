"""Compiles norm, gemm_norm or rotary for GPUs that need not be here: one JSON line a launch.

Each line is [what was compiled, bytes of shared memory or the error, bytes that there are]. Run by
the tests of these templates in a process of its own, because kernels that are to be interpreted, as
the tests' own are on a CPU, cannot be compiled.
"""

import json
import sys
from itertools import product

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stof_hf.attention import select
from stof_hf.fusion.templates import gemm_norm, norm, rotary

TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
}  # fmt: skip
#: Shared memory of a block by compute capability.
MEMORY = {90: 227 << 10, 89: 99 << 10}
HALF, FULL = torch.float16, torch.float32


def zeros(*shape, dtype=HALF):
    return torch.zeros(*shape, dtype=dtype)


def compiled(kernel, capability, args, named):
    """Bytes of shared memory that a launch with these arguments takes."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | named
    signature, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        name, value = parameter.name, values.pop(parameter.name)
        divisible = {(parameter.num,): [["tt.divisibility", 16]]}
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes |= divisible
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            attributes |= divisible if value % 16 == 0 else {}
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=values).metadata.shared


def norm_calls(memory):
    for (m, n), dtype, rms, full in product(
        ((3, 5), (128, 768), (32768, 4096), (7, 16384)), (HALF, FULL), (False, True), (False, True)
    ):
        x, v = zeros(m, n, dtype=dtype), zeros(n)
        extra = {"bias": v, "residual": x, "return_sum": True} if full else {}
        shift = None if rms else v
        yield (
            f"{m}x{n} {dtype} rms={rms} full={full}",
            lambda: norm.norm(x, v, shift, eps=1e-5, rms=rms, **extra),
        )


def gemm_norm_calls(memory):
    for m, n, k, dtype in (
        (128, 768, 3072, HALF), (32768, 768, 768, HALF), (32768, 1024, 4096, HALF),
        (70, 1000, 72, torch.bfloat16), (32768, 512, 2048, torch.bfloat16), (32768, 64, 64, HALF),
        (300, 33, 7, HALF), (128, 768, 768, FULL),
    ):  # fmt: skip
        x, v, h = zeros(m, k, dtype=dtype), zeros(n), zeros(m, n, dtype=dtype)
        for conv1d, rms in ((False, False), (True, True)):
            w = zeros(k, n, dtype=dtype).T if conv1d else zeros(n, k, dtype=dtype)
            yield (
                f"{m}x{n}x{k} {dtype} {conv1d=} {rms=}",
                lambda: gemm_norm.gemm_norm(
                    x, w, v, None if rms else v, v, h, eps=1e-5, rms=rms, return_sum=rms
                ),
            )
    # The largest that `fits` allows: what it says of shared memory and registers has to hold.
    x, w, v, h = zeros(128, 4096), zeros(1024, 4096), zeros(1024), zeros(128, 1024)
    for values in product(*gemm_norm.SPACE.values()):
        params = dict(zip(gemm_norm.SPACE, values, strict=True))
        sizes = [
            gemm_norm.fits(
                params | {name: 2 * params[name]}, 1024, 4096, HALF, shared_memory=memory
            )
            for name in ("block_m", "block_k")
        ]
        if gemm_norm.fits(params, 1024, 4096, HALF, shared_memory=memory) and not any(sizes):
            yield (
                str(params),
                lambda: gemm_norm.gemm_norm(
                    x, w, v, v, v, h, eps=1e-5, return_sum=True, params=params
                ),
            )


def rotary_calls(memory):
    for tokens, heads, kv_heads, dim, width, dtype in (
        (1, 32, 8, 128, 128, HALF), (128, 12, 12, 64, 64, torch.bfloat16), (4096, 32, 8, 128, 128, HALF),
        (70, 5, 1, 80, 20, HALF), (2048, 8, 8, 256, 256, FULL),
    ):  # fmt: skip
        q, k = (
            zeros(2, tokens, heads, dim, dtype=dtype),
            zeros(2, tokens, kv_heads, dim, dtype=dtype),
        )
        cos = zeros(1, tokens, width, dtype=dtype)
        yield (
            f"{tokens} {heads}/{kv_heads} {dim}/{width} {dtype}",
            lambda: rotary.rotary(q, k, cos, cos),
        )


if __name__ == "__main__":
    kernel, calls = {
        "norm": (norm.norm_kernel, norm_calls),
        "gemm_norm": (gemm_norm.gemm_norm_kernel, gemm_norm_calls),
        "rotary": (rotary.rotary_kernel, rotary_calls),
    }[sys.argv[1]]
    select.multiprocessors = lambda device: 132
    launches = []
    kernel.run = lambda *args, grid, warmup, **named: launches.append((args, named))
    for capability, memory in MEMORY.items():
        select.shared_memory = lambda device, memory=memory: memory
        for name, call in calls(memory):
            call()
            args, named = launches.pop()
            try:
                taken = compiled(kernel, capability, args, named)
            except Exception as error:
                taken = repr(error)
            print(json.dumps([f"sm_{capability} {name}", taken, memory]), flush=True)
