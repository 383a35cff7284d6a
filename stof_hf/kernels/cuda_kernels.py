"""The CUDA kernels that exist: what each family is compiled from, and for what."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["FAMILIES", "Family", "Kernel", "all_kernels", "kernel"]


@dataclass(frozen=True)
class Family:
    """Kernels of one source file, compiled into a library per head size, dtype and architecture.

    A family that does not depend on one of them has None for it.

    Args:
        sources: files in csrc/cuda.
        architectures: ``sm_86`` is machine code, ``compute_80`` intermediate code that the driver
            compiles, for GPUs that none of the others fits.
        head_dims, dtypes: what the macros STOF_HEAD_DIM and STOF_DTYPE are defined as.
        seconds: about how long a library takes to compile.
    """

    sources: tuple[str, ...]
    architectures: tuple[str, ...]
    head_dims: tuple[int | None, ...]
    dtypes: tuple[torch.dtype | None, ...] = (torch.float16, torch.bfloat16)
    seconds: int = 5


FAMILIES: dict[str, Family] = {
    "hopper": Family(("hopper.cu",), ("sm_90a",), (64, 128)),
    "band": Family(("band.cu",), ("sm_90a",), (64, 128)),
    "gemm": Family(("gemm.cu",), ("sm_90a",), (None,), seconds=18),
    "gemm_split_k": Family(("gemm_split_k.cu",), ("sm_90a",), (None,), seconds=12),
    "tiles": Family(
        ("tiles.cu",), ("sm_80", "sm_90", "sm_100", "sm_120", "compute_80"), (None,), (None,)
    ),
    "sm80": Family(
        ("sm80.cu",),
        ("sm_80", "sm_86", "sm_89", "sm_120", "compute_80"),
        (32, 64, 80, 96, 128, 256),
    ),
    "decode": Family(
        ("decode.cu",),
        ("sm_80", "sm_90", "compute_90"),
        (32, 64, 80, 96, 128, 256),
        seconds=12,
    ),
}

_TYPES = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16", torch.float32: "float"}


@dataclass(frozen=True)
class Kernel:
    """One library of a family."""

    family: str
    head_dim: int | None
    dtype: torch.dtype | None
    architecture: str

    def __str__(self) -> str:
        return f"{describe(self.family, self.head_dim, self.dtype)}, {self.architecture}"

    @property
    def name(self) -> str:
        """File name of the library, without its ending."""
        size = () if self.head_dim is None else (str(self.head_dim),)
        return "-".join((self.family, *size, *_dtype(self.dtype), self.architecture))

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(f"cuda/{source}" for source in FAMILIES[self.family].sources)

    @property
    def seconds(self) -> int:
        return FAMILIES[self.family].seconds

    @property
    def flags(self) -> tuple[str, ...]:
        """What tells this library from the others of its family."""
        virtual = self.architecture.replace("sm_", "compute_")
        flags = [f"-gencode=arch={virtual},code={self.architecture}"]
        if self.head_dim is not None:
            flags.append(f"-DSTOF_HEAD_DIM={self.head_dim}")
        if self.dtype is not None:
            flags.append(f"-DSTOF_DTYPE={_TYPES[self.dtype]}")
        return tuple(flags)


def describe(family: str, head_dim: int | None, dtype: torch.dtype | None) -> str:
    """Such as "hopper, head size 64, float16", for messages."""
    size = () if head_dim is None else (f"head size {head_dim}",)
    return ", ".join((family, *size, *_dtype(dtype)))


def _dtype(dtype: torch.dtype | None) -> tuple[str, ...]:
    return () if dtype is None else (str(dtype).removeprefix("torch."),)


def kernel(
    family: str, head_dim: int | None, dtype: torch.dtype | None, capability: tuple[int, int]
) -> Kernel | None:
    """The library that serves a GPU of this compute capability, or None."""
    known = FAMILIES[family]
    architecture = _architecture(known.architectures, capability)
    if architecture is None or head_dim not in known.head_dims or dtype not in known.dtypes:
        return None
    return Kernel(family, head_dim, dtype, architecture)


def all_kernels(capability: tuple[int, int] | None = None) -> list[Kernel]:
    """Every library that there is, or every one that serves a GPU of this compute capability."""
    found = []
    for name, family in FAMILIES.items():
        architectures = family.architectures
        if capability is not None:
            chosen = _architecture(architectures, capability)
            architectures = () if chosen is None else (chosen,)
        found += [
            Kernel(name, head_dim, dtype, architecture)
            for architecture in architectures
            for head_dim in family.head_dims
            for dtype in family.dtypes
        ]
    return found


def _architecture(architectures: tuple[str, ...], capability: tuple[int, int]) -> str | None:
    """The best of `architectures` for a GPU.

    Machine code runs on its own compute capability and on later ones of the same major version,
    with an ``a`` on its own alone; intermediate code on every later GPU.

    >>> ampere = ("sm_80", "sm_86", "compute_80")
    >>> [_architecture(ampere, capability) for capability in ((8, 0), (8, 9), (9, 0), (7, 5))]
    ['sm_80', 'sm_86', 'compute_80', None]
    >>> [_architecture(("sm_90a",), capability) for capability in ((9, 0), (10, 0))]
    ['sm_90a', None]
    """
    major, minor = capability
    own = f"sm_{major}{minor}"
    if f"{own}a" in architectures:
        return f"{own}a"
    code = {a: int(a.split("_")[1]) for a in architectures if not a.endswith("a")}
    here = 10 * major + minor
    machine = [a for a in code if a.startswith("sm_") and 10 * major <= code[a] <= here]
    portable = [a for a in code if a.startswith("compute_") and code[a] <= here]
    return max(machine or portable, key=code.__getitem__, default=None)
