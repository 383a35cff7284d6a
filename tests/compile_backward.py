"""Compiles the Triton kernels of the backward for GPUs that need not be here.

Prints a line of JSON a kernel: its name, bytes of shared memory or the error, bytes that there are,
registers of a thread, bytes that they spill, products by warpgroups, and what the assembler warns
of. Run by test_triton_backward.py in a process of its own, where nothing is interpreted.
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
import triton
from compile_triton import specialised
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from stof_hf import SparseMask, patterns
from stof_hf.attention import gradients, triton_backward
from stof_hf.attention.backward import gradient_like

#: Shared memory of a block by compute capability, for heads of up to 128 and for larger ones: what
#: compiles for 8.0 runs on 8.6 and 8.9, too, which have less.
MEMORY = {90: (227 << 10, 227 << 10), 80: (99 << 10, 163 << 10)}
#: Batch, heads that share keys, queries, whether there is padding, a softcap, the threshold of
#: dropout, and the pattern.
SHAPES = (
    (1, 1, 1024, False, 0.0, 0, patterns.Longformer(40, (0,))),
    (8, 4, 1024, False, 0.0, 0, patterns.Causal()),
    (1, 4, 700, True, 30.0, 0, patterns.Longformer(40, (0,))),
    (8, 1, 1024, False, 0.0, 6554, patterns.Causal()),
    (1, 4, 700, True, 30.0, 6554, patterns.Longformer(40, (0,))),
)


def compiled(kernel, tensors, capability):
    """(bytes of shared memory, registers, spilled bytes, warpgroup products, warnings)"""
    target = GPUTarget("cuda", capability, 32)
    made, bound, types, options = specialised(kernel, tensors, target)
    _, *rest = kernel.fn._pack_args(made, options, bound, types, options)
    found = triton.compile(ASTSource(kernel.fn, *rest), target=target, options=options)
    ptx = found.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        arch = f"sm_{capability}{'a' if capability == 90 else ''}"
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={arch}", file, "-o", f"{file}.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    registers = int(re.search(r"Used (\d+) registers", done.stderr)[1])
    spilled = int(re.search(r"(\d+) bytes spill stores", done.stderr)[1])
    warnings = [line for line in done.stderr.splitlines() if "Performance Loss" in line]
    return found.metadata.shared, registers, spilled, ptx.count("wgmma.mma_async"), warnings


def launches(call, grad, q, k, v, mask, seed):
    """(kernel, the tensors in front of its arguments)"""
    floats = torch.empty(4)
    made = [gradient_like(x) for x in (q, k, v)]
    valid = floats if mask.kv_valid is None else mask.kv_valid.view(torch.int32)
    yield call.main, (q, k, v, grad, floats, *made, floats, floats, valid, seed)
    yield call.statistics, (grad, grad, floats, floats)
    if call.split:
        yield call.sum, (*made, floats, floats)


def cases():
    """(name, compute capability, bytes of shared memory, kernel, tensors)"""
    for capability, (memory, more) in MEMORY.items():
        gradients.shared_memory = lambda device, memory=more: memory
        gradients.has_much_shared_memory = lambda device, memory=more: memory >= 227 << 10
        for dtype, dim, (batch, group, length, padded, softcap, dropout, pattern) in product(
            (torch.float16, torch.float32), (64, 128, 256), SHAPES
        ):
            q, k = (
                torch.zeros(batch, length, heads, dim, dtype=dtype).transpose(1, 2)
                for heads in (16, 16 // group)
            )
            if not gradients.supported(q, k, None):
                continue
            valid = torch.ones(batch, length, dtype=torch.bool) if padded else None
            mask = SparseMask.from_pattern(pattern, length, padding=valid)
            grad = q.transpose(1, 2)
            made = [gradient_like(x) for x in (q, k, k)]
            call = triton_backward._Call(grad, q, k, k, *made, mask, 0.1, softcap, False, dropout)
            seed = torch.zeros(1).long() if dropout else None
            for kernel, tensors in launches(call, grad, q, k, k, mask, seed):
                if kernel is not call.main and (dim, dtype) != (128, torch.float16):
                    continue
                name = f"{kernel.fn.fn.__name__} {length}x{dim} {dtype} group={group}"
                name += f" {type(pattern).__name__} padded={padded} softcap={softcap}"
                name += f" dropout={dropout}"
                limit = more if dim > 128 else memory
                yield f"sm_{capability} {name}", capability, limit, kernel, tensors


def main():
    gradients.multiprocessors = lambda device: 132
    only = sys.argv[1:]
    for name, capability, memory, kernel, tensors in cases():
        if any(word not in name for word in only):
            continue
        try:
            taken, *rest = compiled(kernel, tensors, capability)
        except Exception as error:
            taken, rest = repr(error), [0, 0, 0, []]
        print(json.dumps([name, taken, memory, *rest]), flush=True)


if __name__ == "__main__":
    main()
