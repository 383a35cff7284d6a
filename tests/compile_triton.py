"""Compiles the Triton kernels for GPUs that need not be here: prints what each case takes as JSON.

With the argument `keys` it compiles nothing, and prints which calls share a compiled kernel.

Run by test_triton.py in a process of its own, because kernels that are to be interpreted, as its
own are on a CPU, cannot be compiled.
"""

import json
import sys
from itertools import product

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from stof_hf import SparseMask, patterns
from stof_hf.attention import select
from stof_hf.attention import triton as backend
from stof_hf.attention.triton_launch import Kernel

#: Shared memory of a block by compute capability.
MEMORY = {90: 227 << 10, 89: 99 << 10}
#: Queries, padding, bias, and the threshold of dropout.
SHAPES = (
    (1, False, False, 0),
    (1, False, True, 0),
    (1, True, True, 0),
    (12, False, False, 0),
    (700, True, True, 0),
    (700, False, False, 6554),
    (700, True, True, 6554),
)
#: Batches, query lengths, key lengths, of calls that should share a kernel.
SHARED = {
    "lengths": ((1, 2), (100, 112, 333, 1000), None),
    "lengths that 64 divides": ((1, 2), (128, 192, 1024), None),
    "growing cache": ((1,), (1,), (1000, 1001, 1002, 1008, 1023)),
    "batches of a step": ((17, 18, 20), (1,), (777, 1000)),
    "drafts": ((1,), (9, 10, 12, 15, 16), (1000, 1001)),
}  # fmt: skip


def specialised(kernel: Kernel, tensors: tuple[torch.Tensor, ...], target: GPUTarget):
    """(backend, arguments by name, types and specialisations, options) as a launch has them."""
    made = make_backend(target)
    bind = create_function_from_signature(kernel.fn.signature, kernel.fn.params, made)
    options = {name: value for name, value in kernel.options.items() if value is not None}
    return made, *bind(*tensors, *kernel.tensors, *kernel.rest, **options)


def compiled(kernel: Kernel, tensors: tuple[torch.Tensor, ...], capability: int) -> int:
    """Bytes of shared memory that a launch with these tensors in front takes."""
    target = GPUTarget("cuda", capability, 32)
    made, bound, types, options = specialised(kernel, tensors, target)
    _, *rest = kernel.fn._pack_args(made, options, bound, types, options)
    source = ASTSource(kernel.fn, *rest)
    return triton.compile(source, target=target, options=options).metadata.shared


def launches(call, q, k, mask, bias, seed=None):
    """(kernel, the tensors in front of its arguments)"""
    out, lse = call.outputs(q)
    rows = hasattr(call, "takes")
    more = (mask.row_start, mask.col_start) if rows else (seed,)
    part = torch.empty(4) if (call.splits > 1 if rows else call.split) else lse
    optional = call.optional(mask, bias, None, lse)
    yield call.main, (q, k, k, out, lse, part, part, *optional, *more)
    if part is not lse:
        yield call.merge, (out, lse, part, part, optional[2])


def keys(batches, q_lens, kv_lens):
    """By kernel, how many different ones Triton compiles for these calls."""
    target, found = GPUTarget("cuda", 90, 32), {}
    for batch, q_len, kv_len in product(batches, q_lens, kv_lens or (None,)):
        kv_len = kv_len or q_len
        q, k = (
            torch.zeros(batch, s, h, 128, dtype=torch.float16).transpose(1, 2)
            for h, s in ((32, q_len), (8, kv_len))
        )
        mask = SparseMask.from_pattern(
            patterns.Causal(), q_len, kv_len, q_offset=kv_len - q_len,
            padding=torch.ones(batch, kv_len, dtype=torch.bool),
        )  # fmt: skip
        call = backend.prepare(q, k, k, mask, None, None, 0.1, 0.0, False, False)
        for kernel, tensors in launches(call, q, k, mask, None):
            _, _, types, options = specialised(kernel, tensors, target)
            found.setdefault(kernel.fn.fn.__name__, set()).add(f"{types} {options}")
    return {name: len(different) for name, different in found.items()}


def calls():
    """(name, compute capability, call, tensors)"""
    causal, sparse = patterns.Causal(), patterns.Longformer(40, (0,))
    for capability, memory in MEMORY.items():
        select.shared_memory = lambda device, memory=memory: memory
        backend.overlaps = lambda device, hopper=capability >= 90: hopper
        for dtype, dim, (q_len, padded, bias, dropout) in product(
            (torch.float16, torch.float32), (64, 128, 256), SHAPES
        ):
            q, k = (torch.zeros(1, n, s, dim, dtype=dtype) for n, s in ((5, q_len), (1, 700)))
            mask = SparseMask.from_pattern(
                sparse if bias else causal, q_len, 700, q_offset=700 - q_len,
                padding=torch.ones(1, 700, dtype=torch.bool) if padded else None,
            )  # fmt: skip
            added = torch.zeros(1, 1, 1, 700) if bias else None
            rest, seed = (q, k, k, mask, added, None, 0.1, 0.0, False), None
            if not dropout:
                call = backend.prepare(*rest, False)
            elif select.fits_block_wise(q, dim):
                call, seed = backend.prepare_dropout(dropout, *rest), torch.zeros(1).long()
            else:
                continue
            main, tensors = next(launches(call, q, k, mask, added, seed))
            shape = f"{q_len}x{dim} {dtype} padded={padded} bias={bias} dropout={dropout}"
            yield f"sm_{capability} {type(call).__name__} {shape}", capability, main, tensors


def main():
    select.shared_memory = lambda device: MEMORY[90]
    select.multiprocessors = lambda device: 132
    if sys.argv[1:] == ["keys"]:
        for name, sizes in SHARED.items():
            print(json.dumps([name, keys(*sizes)]))
        return
    for name, capability, kernel, tensors in calls():
        try:
            taken = compiled(kernel, tensors, capability)
        except Exception as error:
            taken = repr(error)
        print(json.dumps([name, taken, MEMORY[capability]]), flush=True)


if __name__ == "__main__":
    main()
