"""A Triton kernel compiled for a GPU that need not be here, for the scripts that tests run."""

import contextlib
import io
import re

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
#: Shared memory of a block by compute capability.
MEMORY = {90: 227 << 10, 89: 99 << 10}


def compiled(kernel, capability, values, options):
    """A launch's kernel.

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
        elif isinstance(value, TensorDescriptor):
            element, shape = TYPES[value.base.dtype][1:], ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{element}[{shape}]>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            attributes |= divisible if value % 16 == 0 else {}
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options)


def shared_memory_of(*launch):
    """Bytes of shared memory that a launch takes; see `compiled` for the arguments."""
    return compiled(*launch).metadata.shared


def shared_memory_of_wgmma(*launch):
    """The same of a kernel whose products run by wgmma, of operands that TMA loads.

    Raises AssertionError where ptxas uses local memory or serialises wgmma.
    """
    log = io.StringIO()
    with contextlib.redirect_stdout(log), knobs.nvidia.scope(), knobs.compilation.scope():
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
        made = compiled(*launch)
    text = log.getvalue()
    # Stack frame, spill stores, spill loads.
    local = [int(count) for count in re.findall(r"(\d+) bytes (?:stack|spill)", text)]
    assert len(local) == 3 and not any(local) and "serialized" not in text, text
    code = made.asm["ptx"]
    assert "wgmma.mma_async" in code and "wgmma.wait_group.sync.aligned 1;" in code
    # Operands by TMA alone.
    assert "cp.async.bulk.tensor" in code
    assert not re.search(r"cp\.async\.c[ag]", code)
    return made.metadata.shared
