"""Builds the CUDA kernels and their torch op, at first use or ahead.

Kernel libraries know nothing of torch: they depend on csrc/cuda, the flags and nvcc alone. The op
is one C++ file on torch's stable ABI, which needs no CUDA compiler. What a wheel carries in
stof_hf/lib comes before the cache, if it was made from the same sources and flags.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..errors import BuildError
from . import jit
from .cuda_kernels import Kernel, all_kernels, describe, kernel

__all__ = [
    "binding",
    "build",
    "find_nvcc",
    "kernels_for",
    "library",
    "load_kernel",
    "nvcc_version",
    "prebuilt_dir",
    "present_gpus",
]

_NVCC_FLAGS = ("-O3", "-std=c++17", "-Xcompiler=-fPIC", "-Xptxas=-v")
#: The op loads into this release of torch, 2.11, and into later ones.
_CXX_FLAGS = ("-O2", "-std=c++17", "-fPIC", "-DTORCH_TARGET_VERSION=0x020b000000000000")


def prebuilt_dir() -> Path:
    """Where a wheel carries compiled libraries."""
    return Path(__file__).parents[1] / "lib"


@lru_cache
def library(
    family: str, head_dim: int | None, dtype: torch.dtype | None, device_index: int
) -> ctypes.CDLL:
    """The kernels of a family for a CUDA device, built first where they are not there yet.

    The types of its functions stof_run and stof_problem_bytes (csrc/cuda/problem.h) are set.

    Raises BuildError where there is no such kernel for the device, and where it cannot be built.
    """
    capability = torch.cuda.get_device_capability(device_index)
    chosen = kernel(family, head_dim, dtype, capability)
    if chosen is None:
        raise BuildError(
            f"there is no CUDA kernel {describe(family, head_dim, dtype)} for compute capability "
            f"{capability[0]}.{capability[1]}"
        )
    loaded = load_kernel(chosen, ctypes.CDLL)
    loaded.stof_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    loaded.stof_run.restype = ctypes.c_char_p
    loaded.stof_problem_bytes.restype = ctypes.c_int64
    return loaded


@lru_cache(1)
def binding() -> None:
    """Load the op `torch.ops.stof_cuda.run`, built first where it is not there yet.

    Raises BuildError where there is no C++ compiler, and where it does not compile.
    """
    _load_binding(torch.ops.load_library)


def build(
    kernels: Sequence[Kernel], into: Path | None = None, done: Callable[[], Any] = lambda: None
) -> None:
    """Build these kernels and the op ahead, in parallel, without loading them.

    Args:
        into: folder that gets copies, laid out like `prebuilt_dir`.
        done: called after each library, len(kernels) + 1 times.

    Raises BuildError where one does not build.
    """

    def keep(path: str) -> None:
        if into is not None:
            built = Path(path)
            folder = into / built.parent.name.rpartition("-")[0]
            folder.mkdir(parents=True, exist_ok=True)
            for file in (built, built.with_suffix(".sha256")):
                shutil.copy(file, folder)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(_load_binding, keep)]
        jobs += [pool.submit(load_kernel, one, keep) for one in kernels]
        for job in as_completed(jobs):
            job.result()
            done()


def kernels_for(architectures: Sequence[str]) -> list[Kernel]:
    """The libraries that GPUs of these architectures use, named like ``90a``, ``sm_90a`` or 9.0.

    Raises BuildError for a name that is none, and for a GPU that no kernel serves.
    """
    found: dict[Kernel, None] = {}
    for name in architectures:
        match = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)a?", name)
        some = all_kernels((int(match[1]), int(match[2]))) if match else []
        if not some:
            known = sorted({one.architecture for one in all_kernels()})
            raise BuildError(
                f"{name!r} is no architecture that the CUDA kernels serve: there is "
                + ", ".join(known)
            )
        found.update(dict.fromkeys(some))
    return list(found)


def present_gpus() -> list[str]:
    """The architectures of this machine's GPUs, such as "9.0"."""
    found = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    return [f"{major}.{minor}" for major, minor in dict.fromkeys(found)]


def load_kernel(one: Kernel, loader: Callable[[str], Any]) -> Any:
    """What `loader` makes of the library's path; see `library`."""
    sources = tuple(jit.source_dir() / source for source in one.sources)
    flags = (*_NVCC_FLAGS, *one.flags)
    key = jit.key_of(_with_headers(sources), flags)
    carried = _carried(one.name, key)
    if carried is not None:
        return loader(carried)
    nvcc = find_nvcc()
    if nvcc is None:
        # One that an nvcc made which is no longer here, or not on this machine of a cluster.
        for path in sorted((jit.cache_dir() / "kernels").glob(f"{one.name}-{key}-*/{one.name}.so")):
            if jit.is_intact(path):
                return loader(str(path))
        raise BuildError(
            "no nvcc found to build the CUDA kernels: install the CUDA toolkit and set CUDA_HOME "
            "to it, or pip install 'stof_hf[cuda]'"
        )
    compiler = _compiler()
    command = (nvcc, f"-ccbin={compiler}")
    return jit.load(
        jit.Recipe(
            name=one.name,
            key=f"{key}-{jit.key_of((), [nvcc_version(nvcc) or ''])}",
            sources=sources,
            compile=(*command, *flags),
            # The packages of PyPI keep the runtime in lib, where their nvcc does not look.
            link=(*command, "-shared", f"-L{Path(nvcc).resolve().parents[1] / 'lib'}"),
            title=f"the CUDA kernel {one}",
            seconds=one.seconds,
            advice="A C++ compiler that this nvcc knows may help: set CXX to it",
        ),
        loader,
    )


def _load_binding(loader: Callable[[str], Any]) -> Any:
    name, source = "stof_cuda", jit.source_dir() / "cuda" / "binding.cpp"
    key = jit.key_of(_with_headers((source,)), _CXX_FLAGS)
    carried = _carried(name, key)
    if carried is not None:
        return loader(carried)
    compiler, root = _compiler(), Path(torch.__file__).parent
    return jit.load(
        jit.Recipe(
            name=name,
            key=f"{key}-{jit.key_of((), [jit.compiler_version(compiler)])}",
            sources=(source,),
            compile=(compiler, *_CXX_FLAGS, f"-I{root / 'include'}"),
            link=(compiler, "-shared"),
            # libtorch depends on libtorch_cuda where torch has CUDA.
            libraries=(f"-L{root / 'lib'}", "-Wl,--no-as-needed", "-ltorch"),
            title="the torch op of the CUDA kernels",
            seconds=2,
        ),
        loader,
    )


def _carried(name: str, key: str) -> str | None:
    path = prebuilt_dir() / f"{name}-{key}" / f"{name}.so"
    return str(path) if jit.is_intact(path) else None


def _compiler() -> str:
    compiler = jit.find_compiler()
    if compiler is None:
        raise BuildError(
            "no C++ compiler found: install g++ or clang++, or set CXX to one, "
            "to build the CUDA kernels"
        )
    return compiler


def _with_headers(sources: Sequence[Path]) -> set[Path]:
    """The sources and what they include of our own."""
    found: set[Path] = set()
    todo = list(sources)
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            names = re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), re.MULTILINE)
            todo += [p for p in (path.parent / name for name in names) if p.is_file()]
    return found


@lru_cache(1)
def find_nvcc() -> str | None:
    """Path of nvcc: the first that runs, preferably of the major version that torch is built for.

    Looked for in ``CUDA_HOME`` and ``CUDA_PATH``, on PATH, in /usr/local/cuda, and in the packages
    that ``pip install nvidia-cuda-nvcc`` brings.
    """
    found = {path: version for path in _candidates() if (version := nvcc_version(path))}
    wanted = f"{torch.version.cuda or ''}".split(".")[0]
    fitting = [path for path, version in found.items() if version.split(".")[0] == wanted]
    return next(iter([*fitting, *found]), None)


def _candidates() -> Iterator[str]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield str(Path(os.environ[variable]) / "bin" / "nvcc")
    if path := shutil.which("nvcc"):
        yield path
    yield "/usr/local/cuda/bin/nvcc"
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield from map(str, sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True))


def nvcc_version(path: str) -> str | None:
    """Such as "13.0.88"; None where this nvcc does not run."""
    try:
        result = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(r"\bV([\d.]+)", result.stdout)
    return match[1] if match else None
