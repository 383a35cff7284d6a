"""Compiles the Triton kernels for GPUs that need not be here: prints what each case takes as JSON.

Run by test_triton.py in a process of its own, because kernels that are to be interpreted, as its
own are on a CPU, cannot be compiled.
"""

import json
from itertools import product

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stof_hf import SparseMask, patterns
from stof_hf.attention import select
from stof_hf.attention import triton as backend

TYPES = {
    torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
#: Shared memory of a block by compute capability.
MEMORY = {90: 227 << 10, 89: 99 << 10}
#: Queries, padding, bias.
SHAPES = (
    (1, False, False),
    (1, False, True),
    (1, True, True),
    (12, False, False),
    (700, True, True),
)


def compiled(kernel: backend._Kernel, tensors: tuple[torch.Tensor, ...], capability: int) -> int:
    """Bytes of shared memory that a launch with these tensors in front takes."""
    signature, constants, attributes = {}, {}, {}
    for parameter, value in zip(
        kernel.fn.params, (*tensors, *kernel.tensors, *kernel.rest), strict=True
    ):
        name, divisible = parameter.name, {(parameter.num,): [["tt.divisibility", 16]]}
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
    source = ASTSource(kernel.fn, signature, constants, attributes)
    options = {name: value for name, value in kernel.options.items() if value is not None}
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options).metadata.shared


def calls():
    """(name, compute capability, call, tensors)"""
    causal, sparse = patterns.Causal(), patterns.Longformer(40, (0,))
    for capability, memory in MEMORY.items():
        select.shared_memory = lambda device, memory=memory: memory
        select.multiprocessors = lambda device: 132
        for dtype, dim, (q_len, padded, bias) in product(
            (torch.float16, torch.float32), (64, 128, 256), SHAPES
        ):
            q, k = (torch.zeros(1, n, s, dim, dtype=dtype) for n, s in ((5, q_len), (1, 700)))
            mask = SparseMask.from_pattern(
                sparse if bias else causal, q_len, 700, q_offset=700 - q_len,
                padding=torch.ones(1, 700, dtype=torch.bool) if padded else None,
            )  # fmt: skip
            added = torch.zeros(1, 1, 1, 700) if bias else None
            call = backend.prepare(q, k, k, mask, added, None, 0.1, 0.0, False, False)
            out, _ = call.outputs(q)
            starts = (mask.row_start, mask.col_start) if hasattr(call, "takes") else ()
            tensors = (q, k, k, out, out, out, out, *call.optional(mask, added, None, out), *starts)
            shape = f"{q_len}x{dim} {dtype} padded={padded} bias={bias}"
            yield f"sm_{capability} {type(call).__name__} {shape}", capability, call, tensors


if __name__ == "__main__":
    for name, capability, call, tensors in calls():
        try:
            taken = compiled(call.main, tensors, capability)
        except Exception as error:
            taken = repr(error)
        print(json.dumps([name, taken, MEMORY[capability]]), flush=True)
