"""`stof info`: what there is on this machine, and which backends work."""

from __future__ import annotations

import os
import platform
import subprocess
import warnings
from importlib import metadata

import torch
from rich.markup import escape
from rich.table import Table

from . import SparseMask, __version__, attention, patterns
from .attention.reference import reference_attention
from .errors import StofError
from .kernels import cuda_build, jit

__all__ = ["backends", "report"]


def report() -> Table:
    """Everything that `stof info` shows."""
    table = Table(show_header=False, title=f"stof_hf {__version__}")
    for name in ("torch", "transformers", "triton", "flash-attn-4"):
        table.add_row(name, _version(name))
    table.add_row("Python", f"{platform.python_version()} on {platform.platform()}")
    table.add_section()
    table.add_row("GPU", _gpu())
    table.add_row("CPU", f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores")
    table.add_row("C++ compiler", _compiler(jit.find_compiler()))
    nvcc = cuda_build.find_nvcc()
    table.add_row("CUDA compiler", f"{nvcc} ({cuda_build.nvcc_version(nvcc)})" if nvcc else "none")
    table.add_row("kernel cache", f"{jit.cache_dir()}")
    table.add_section()
    for name, state in backends().items():
        table.add_row(f"backend {name}", state)
    return table


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.cuda.is_available():
        reason = "torch is a CPU build" if torch.version.cuda is None else "no driver or no device"
        return f"none ({reason})"
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return "; ".join(
        f"{p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"
        for p in found
    )


def _compiler(path: str | None) -> str:
    if path is None:
        return "none"
    result = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    release = next((line for line in lines if "release" in line), lines[0] if lines else "")
    return f"{path} ({release.strip()})"


def backends() -> dict[str, str]:
    """Backend -> "works", or what it does instead and why; each is run once on a small input."""
    return {"cpu": _try("cpu"), "triton": _try("cuda")}


def _try(device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        return "needs a CUDA GPU: " + _gpu()
    q, k, v = (torch.randn(1, 2, 100, 64, device=device) for _ in range(3))
    mask = SparseMask.from_pattern(patterns.Causal(), 100, device=device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            out = attention(q, k, v, mask)
        except (StofError, ImportError, RuntimeError) as error:
            return f"[red]fails[/]: {type(error).__name__}: {escape(str(error))}"
    expected, _ = reference_attention(q, k, v, mask.to_dense())
    if not torch.allclose(out.double(), expected, atol=1e-2):
        return "[red]gives wrong results[/]"
    return "; ".join(["works", *(escape(str(warning.message)) for warning in caught)])
