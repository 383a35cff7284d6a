"""Compiles a template of few parameters, or a cache's kernel, for GPUs that need not be here.

Prints one JSON line a launch: [what was compiled, bytes of shared memory or the error, bytes that
there are]. Run by these kernels' tests in a process of its own, because kernels that are to be
interpreted, as the tests' own are on a CPU, cannot be compiled.
"""

import json
import sys
from itertools import product

import torch
from compiled_kernel import MEMORY, shared_memory_of
from transformers import MistralConfig, StaticCache

from stof_hf.attention import select
from stof_hf.fusion import static_cache
from stof_hf.fusion.parts import Norm
from stof_hf.fusion.templates import (
    clamped_norm,
    common,
    embed,
    gemm_norm,
    gemv,
    norm,
    overflow,
    rotary,
)
from stof_hf.kernels import dependent

HALF, FULL = torch.float16, torch.float32


def zeros(*shape, dtype=HALF):
    return torch.zeros(*shape, dtype=dtype)


def norm_calls(memory):
    for (m, n), dtype, rms, full in product(
        ((3, 5), (128, 768), (32768, 4096), (7, 16384)), (HALF, FULL), (False, True), (False, True)
    ):
        x, v = zeros(m, n, dtype=dtype), zeros(n, dtype=FULL if full else dtype)
        extra = {"bias": v, "residual": x, "return_sum": True} if full else {}
        norm.norm(x, v, None if rms else v, eps=1e-5, rms=rms, **extra)
        yield f"{m}x{n} {dtype} {rms=} {full=}"


def embed_calls(memory):
    for (b, s, n), dtype, tables, full in product(
        ((1, 1, 64), (1, 128, 768), (8, 512, 768), (2, 7, 16384)), (HALF, FULL), (1, 3),
        (False, True),
    ):  # fmt: skip
        table, v = zeros(97, n, dtype=dtype), zeros(n, dtype=FULL if full else dtype)
        ids = zeros(b, s, dtype=torch.int64 if full else torch.int32)
        norm = Norm(v, v if full else None, 1e-5, False)
        embed.embed([table] * tables, [ids, ids[:1], ids[:, :1]][:tables], norm)
        yield f"{b}x{s}x{n} {dtype} {tables} {full=}"


def gemm_norm_calls(memory):
    for m, n, k, dtype in (
        (128, 768, 3072, HALF), (32768, 1024, 4096, HALF), (70, 1000, 72, torch.bfloat16),
        (32768, 512, 2048, torch.bfloat16), (300, 33, 7, HALF), (128, 768, 768, FULL),
    ):  # fmt: skip
        x, v, h = zeros(m, k, dtype=dtype), zeros(n), zeros(m, n, dtype=dtype)
        for conv1d, rms in ((False, False), (True, True)):
            w = zeros(k, n, dtype=dtype).T if conv1d else zeros(n, k, dtype=dtype)
            gemm_norm.gemm_norm(
                x, w, v, None if rms else v, v, h, eps=1e-5, rms=rms, return_sum=rms
            )
            yield f"{m}x{n}x{k} {dtype} {conv1d=} {rms=}"
    # The most that `fits` allows: what it says of shared memory has to hold.
    for n, dtype in ((1024, HALF), (512, HALF)):
        x, w, v = zeros(64, 64, dtype=dtype), zeros(n, 64, dtype=dtype), zeros(n)
        h = zeros(64, n, dtype=dtype)
        for params in largest(gemm_norm, n, dtype, memory):
            gemm_norm.gemm_norm(x, w, v, v, v, h, eps=1e-5, return_sum=True, params=params)
            yield f"{n} {dtype} {params}"


def largest(template, n, dtype, memory):
    """Parameters of 8 warps that fit, but not with a size doubled or with one more stage."""
    for values in product(*(template.SPACE | {"warps": (8,)}).values()):
        params = dict(zip(template.SPACE, values, strict=True))
        more = [params | {name: 2 * params[name]} for name in ("block_m", "block_k")]
        more.append(params | {"stages": params["stages"] + 1})
        if template.fits(params, n, dtype, shared_memory=memory) and not any(
            template.fits(p, n, dtype, shared_memory=memory) for p in more
        ):
            yield params


def rotary_calls(memory):
    for tokens, heads, kv_heads, dim, width, dtype in (
        (1, 32, 8, 128, 128, HALF), (128, 12, 12, 64, 64, torch.bfloat16),
        (4096, 32, 8, 128, 128, HALF), (70, 5, 1, 80, 20, HALF), (2048, 8, 8, 256, 256, FULL),
    ):  # fmt: skip
        q, k = (zeros(2, tokens, h, dim, dtype=dtype) for h in (heads, kv_heads))
        cos = zeros(1, tokens, width, dtype=dtype)
        rotary.rotary(q, k, cos, cos)
        yield f"{tokens} {heads}/{kv_heads} {dim}/{width} {dtype}"


def overflow_calls(memory):
    for count in (1, 98_304, 25_165_824):
        for values in product(*overflow.SPACE.values()):
            params = dict(zip(overflow.SPACE, values, strict=True))
            overflow.overflow(zeros(count, dtype=HALF), params=params)
            yield f"{count} {params}"
        overflow.overflow(zeros(count, dtype=HALF), zeros(count, dtype=HALF))
        yield f"{count} with a residual"


def clamped_norm_calls(memory):
    for (m, n), rms in product(((1, 64), (128, 768), (32768, 768), (5000, 1000)), (False, True)):
        x, w = zeros(m, n, dtype=HALF), zeros(n, dtype=HALF)
        clamped_norm.clamped_norm(x, x, w, None if rms else w, eps=1e-5, rms=rms)
        yield f"{m}x{n} {rms=}"
    # The most that a thread holds.
    n, x, w = 1024, zeros(4096, 1024, dtype=HALF), zeros(1024, dtype=HALF)
    for values in product(*clamped_norm.SPACE.values()):
        params = dict(zip(clamped_norm.SPACE, values, strict=True))
        more = params | {"rows": 2 * params["rows"]}
        fits = [clamped_norm.fits(p, n, shared_memory=memory) for p in (params, more)]
        if fits == [True, False]:
            clamped_norm.clamped_norm(x, x, w, eps=1e-5, rms=True, params=params)
            yield f"{params}"


def gemv_calls(memory):
    for (n, k), dtype, transposed, rms in product(
        ((3072, 2048), (1001, 77)), (HALF, FULL), (False, True), (False, True)
    ):
        x, g, b = zeros(1, k, dtype=dtype), zeros(k, dtype=dtype), zeros(n, dtype=dtype)
        w = zeros(k, n, dtype=dtype).T if transposed else zeros(n, k, dtype=dtype)
        norm, about = Norm(g, None if rms else g, 1e-5, rms), f"{n}x{k} {dtype} {transposed=}"
        gemv.gemv(x, w, b, zeros(1, n, dtype=dtype), activation="gelu", norm=norm)
        yield f"{about} {rms=}"
        gemv.gemv(x, w[: n // 2 * 2], activation="silu", gated=True)
        yield f"{about} gated"
        table = zeros(1, 14, dtype=dtype)
        gemv.gemv(
            x, w[: n // 14 * 14], heads=n // 14, rotated_heads=5, cos=table, sin=table, norm=norm
        )
        yield f"{about} rotary {rms=}"
    # The most that a thread holds.
    for values in product(*gemv.SPACE.values()):
        params = dict(zip(gemv.SPACE, values, strict=True))
        if gemv.fits(params) and not gemv.fits(params | {"warps": params["warps"] / 2}):
            gemv.gemv(zeros(1, 2048), zeros(4096, 2048), gated=True, params=params)
            yield f"{params}"


def cache_calls(tokens, windows):
    def calls(memory):
        for dtype, dim, batch in product((HALF, FULL), (64, 80, 128), (1, 32)):
            window = (4096 if dtype is HALF else 1000) if windows else None
            config = MistralConfig(num_hidden_layers=1, sliding_window=window)
            cache = StaticCache(config, max_cache_len=5000 if windows else 64)
            cache.early_initialization(batch, 8, dim, dtype, torch.device("cpu"))
            cache.layers[0].cumulative_length_int = 4096
            k = zeros(batch, 8, tokens, dim, dtype=dtype)
            static_cache.append(cache, k, k, 0)
            yield f"{dtype} {dim} {batch}"

    return calls


if __name__ == "__main__":
    kernel, calls = {
        "norm": (norm.norm_kernel, norm_calls),
        "embed": (embed.embed_kernel, embed_calls),
        "gemm_norm": (gemm_norm.gemm_norm_kernel, gemm_norm_calls),
        "rotary": (rotary.rotary_kernel, rotary_calls),
        "gemv": (gemv.gemv_kernel, gemv_calls),
        "append": (static_cache.append_kernel, cache_calls(2, False)),
        "shift": (static_cache.shift_kernel, cache_calls(1, True)),
        "clamped_norm add": (clamped_norm.add_kernel, clamped_norm_calls),
        "clamped_norm clamp": (clamped_norm.clamp_kernel, clamped_norm_calls),
        "overflow find": (overflow.find_kernel, overflow_calls),
        "overflow clamp": (overflow.clamp_kernel, overflow_calls),
    }[sys.argv[1]]
    select.multiprocessors = lambda device: 132
    launches = []
    common.check = lambda *arguments: None
    # One call launches two.
    for one in (
        overflow.find_kernel, overflow.clamp_kernel, clamped_norm.add_kernel,
        clamped_norm.clamp_kernel,
    ):  # fmt: skip
        one.run = lambda *args, **named: None
    kernel.run = lambda *args, grid, warmup, **named: launches.append((args, named))
    for capability, memory in MEMORY.items():
        select.shared_memory = lambda device, memory=memory: memory
        dependent.overlaps = lambda device, hopper=capability >= 90: hopper
        for name in calls(memory):
            args, named = launches.pop()
            try:
                given = dict(zip(kernel.arg_names, args, strict=False)) | named
                options = {n: given.pop(n) for n in [*given] if n not in kernel.arg_names}
                taken = shared_memory_of(kernel, capability, given, options)
            except Exception as error:
                taken = repr(error)
            print(json.dumps([f"sm_{capability} {name}", taken, memory]), flush=True)
