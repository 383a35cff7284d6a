"""A Triton kernel compiled for a GPU that need not be here, for the scripts that tests run."""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
#: Shared memory of a block by compute capability.
MEMORY = {90: 227 << 10, 89: 99 << 10}


def shared_memory_of(kernel, capability, values, options):
    """Bytes of shared memory that a launch takes.

    Args:
        values: of the kernel's parameters, by name; tensors are taken for aligned ones.
        options: warps, stages.
    """
    signature, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        divisible = {(parameter.num,): [["tt.divisibility", 16]]}
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
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
    return triton.compile(source, target=target, options=options).metadata.shared
