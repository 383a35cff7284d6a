"""Builds the C++ kernels at first use and keeps them.

A library is compiled by torch's extension builder and ninja into
``<cache>/kernels/<name>-<key>``, where the key covers the sources, the flags, the compiler, torch
and what the processor can do, so that a cached file is never used where it does not belong.
``STOF_CACHE_DIR`` moves the cache; without it, it lies where the platform keeps user caches.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from filelock import FileLock
from platformdirs import user_cache_path

from ..errors import BuildError, StofWarning

__all__ = ["cache_dir", "find_compiler", "load_library", "source_dir"]


def source_dir() -> Path:
    """Where csrc lies: inside an installed package, or at the root of a source tree."""
    package = Path(__file__).parents[1]
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


def cache_dir() -> Path:
    """The folder of everything stof_hf keeps on disk; ``STOF_CACHE_DIR`` overrides it."""
    chosen = os.environ.get("STOF_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else user_cache_path("stof_hf", appauthor=False)


def find_compiler() -> str | None:
    """Path of the C++ compiler: ``CXX`` if set, else the first of c++, g++ and clang++ on PATH."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


def load_library(name: str, sources: Sequence[str], flags: Sequence[str] = ()) -> ctypes.CDLL:
    """Load a library of plain C functions, built first where no valid build is cached.

    Args:
        name: file name of the library, without its ending.
        sources: C++ files relative to `source_dir`; headers beside them count into the key.
        flags: compiler flags.

    Raises BuildError where there is no compiler, where the sources do not compile, and where
    neither the cache nor a temporary folder can be written.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(
            "no C++ compiler found: install g++ or clang++, or set CXX to one, "
            "to build the CPU kernels"
        )
    folder = f"{name}-{_key(compiler, sources, flags)}"
    try:
        return _load_or_build(cache_dir() / "kernels" / folder, name, compiler, sources, flags)
    except OSError as error:
        problem = f"cannot use the kernel cache {cache_dir()} ({error})"
    try:
        scratch = Path(tempfile.mkdtemp(prefix="stof_hf-"))
    except OSError as error:
        raise BuildError(
            f"{problem}, nor a temporary folder ({error}): set STOF_CACHE_DIR to a writable folder"
        ) from error
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    warnings.warn(
        f"stof_hf: {problem}; the kernels are built into a temporary folder, again in every "
        "process. Set STOF_CACHE_DIR to a writable folder.",
        StofWarning,
        stacklevel=2,
    )
    try:
        return _load_or_build(scratch / folder, name, compiler, sources, flags)
    except OSError as error:
        raise BuildError(
            f"cannot build in {scratch} either ({error}): set STOF_CACHE_DIR to a writable folder "
            "with some free space"
        ) from error


def _load_or_build(
    folder: Path, name: str, compiler: str, sources: Sequence[str], flags: Sequence[str]
) -> ctypes.CDLL:
    library = folder / f"{name}.so"
    if _is_intact(library):
        return ctypes.CDLL(str(library))
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not _is_intact(library):
            _build(library, compiler, sources, flags)
    return ctypes.CDLL(str(library))


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _is_intact(library: Path) -> bool:
    """Whether the file is the one that was built: loading a damaged library can kill a process."""
    try:
        digest = hashlib.sha256(library.read_bytes()).hexdigest()
        return digest == _digest_file(library).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return False


def _build(library: Path, compiler: str, sources: Sequence[str], flags: Sequence[str]) -> None:
    from torch.utils import cpp_extension

    print(
        f"stof_hf: building the kernels {library.stem} (once, about 15 s) ...",
        file=sys.stderr,
        flush=True,
    )
    start = time.perf_counter()
    # The build happens in a fresh folder: what an interrupted or damaged one left is not trusted.
    work = library.parent / "build"
    for leftover in (work, library, _digest_file(library)):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    work.mkdir()
    try:
        with _build_environment(compiler):
            built = cpp_extension.load(
                name=library.stem,
                sources=[str(source_dir() / source) for source in sources],
                extra_cflags=list(flags),
                build_directory=str(work),
                is_python_module=False,
            )
    except RuntimeError as error:
        raise BuildError(
            f"{compiler} could not build {', '.join(sources)}: {error}\n"
            "A newer compiler may help, g++ 12 or clang++ 14: set CXX to it"
        ) from error
    # Rename last, so that an intact digest stands for a complete library.
    content = Path(built).read_bytes()
    part = library.with_suffix(".part")
    part.write_text(hashlib.sha256(content).hexdigest())
    os.replace(built, library)
    os.replace(part, _digest_file(library))
    shutil.rmtree(work, ignore_errors=True)
    print(f"stof_hf: built in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _build_environment(compiler: str) -> Iterator[None]:
    """CXX as chosen, and ninja found also where the interpreter's scripts are not on PATH."""
    import ninja

    saved = {name: os.environ.get(name) for name in ("CXX", "PATH")}
    os.environ["CXX"] = compiler
    os.environ["PATH"] = os.pathsep.join([*filter(None, [saved["PATH"]]), ninja.BIN_DIR])
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _key(compiler: str, sources: Sequence[str], flags: Sequence[str]) -> str:
    digest = hashlib.sha256()
    folders = {(source_dir() / source).parent for source in sources}
    for path in sorted(path for folder in folders for path in folder.iterdir() if path.is_file()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    parts = [*sources, *flags, torch.__version__, _compiler_version(compiler), _processor()]
    digest.update("\0".join(parts).encode())
    return digest.hexdigest()[:20]


def _compiler_version(compiler: str) -> str:
    try:
        result = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(
            f"the C++ compiler {compiler} does not run ({error}): set CXX to a working one"
        ) from error
    return compiler + result.stdout


@lru_cache(1)
def _processor() -> str:
    """The machine's instruction sets, which -march=native compiles for."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as info:
        for line in info:
            if line.lower().startswith(("flags", "features")):
                return platform.machine() + line
    return platform.machine() + platform.processor()
