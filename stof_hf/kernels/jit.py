"""Builds shared libraries at first use and keeps them.

A library is compiled by ninja into ``<cache>/kernels/<name>-<key>``, where the key covers the
sources, the commands, the compiler and what the machine can do, so that a cached file is never used
where it does not belong. ``STOF_CACHE_DIR`` moves the cache; without it, it lies where the platform
keeps user caches.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock
from platformdirs import user_cache_path

from ..errors import BuildError, StofWarning

__all__ = [
    "Recipe",
    "cache_dir",
    "find_compiler",
    "is_intact",
    "key_of",
    "load",
    "load_library",
    "source_dir",
]


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


@dataclass(frozen=True)
class Recipe:
    """How a shared library is made: each source is compiled by itself, then all are linked.

    Args:
        name: file name of the library, without its ending.
        key: what stands for its content, in the name of its folder.
        compile: command that takes ``-c SOURCE -o OBJECT``.
        link: command that takes ``OBJECTS -o LIBRARY`` and then `libraries`.
        title, seconds: what the progress line says is built, and how long that takes.
        advice: what may help where the compiler fails.
    """

    name: str
    key: str
    sources: tuple[Path, ...]
    compile: tuple[str, ...]
    link: tuple[str, ...]
    libraries: tuple[str, ...] = ()
    title: str = "the kernels"
    seconds: int = 15
    advice: str = "A newer compiler may help, g++ 12 or clang++ 14: set CXX to it"

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.key}"


def load_library(name: str, sources: Sequence[str], flags: Sequence[str] = ()) -> ctypes.CDLL:
    """Load a C++ library of plain C functions, built first where no valid build is cached.

    Args:
        name: file name of the library, without its ending.
        sources: C++ files relative to `source_dir`; headers beside them and in `source_dir` count
            into the key.
        flags: compiler flags.

    Raises what `load` raises, and BuildError where there is no compiler.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(
            "no C++ compiler found: install g++ or clang++, or set CXX to one, "
            "to build the CPU kernels"
        )
    paths = tuple(source_dir() / source for source in sources)
    compile = (compiler, "-std=c++17", "-fPIC", *flags)
    link = (compiler, "-shared", "-pthread")
    folders = {source_dir(), *(path.parent for path in paths)}
    files = {file for folder in folders for file in folder.iterdir() if file.is_file()}
    key = key_of(files, [*sources, *compile, *link, compiler_version(compiler), _processor()])
    return load(Recipe(name, key, paths, compile, link, title=f"the kernels {name}"))


def key_of(files: Iterable[Path], parts: Iterable[str]) -> str:
    """Hash of what the files hold, their names and the other parts."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update("\0".join(parts).encode())
    return digest.hexdigest()[:20]


def load(recipe: Recipe, loader: Callable[[str], Any] = ctypes.CDLL) -> Any:
    """What `loader` makes of the library's path; it is built first where no valid build is cached.

    Raises BuildError where the sources do not compile, and where neither the cache nor a temporary
    folder can be written.
    """
    try:
        return _load_or_build(cache_dir() / "kernels", recipe, loader)
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
        return _load_or_build(scratch, recipe, loader)
    except OSError as error:
        raise BuildError(
            f"cannot build in {scratch} either ({error}): set STOF_CACHE_DIR to a writable folder "
            "with some free space"
        ) from error


def _load_or_build(cache: Path, recipe: Recipe, loader: Callable[[str], Any]) -> Any:
    folder = cache / recipe.folder
    library = folder / f"{recipe.name}.so"
    if not is_intact(library):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not is_intact(library):
                _build(library, recipe)
    return loader(str(library))


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def is_intact(library: Path) -> bool:
    """Whether the file is the one that was built: loading a damaged library can kill a process."""
    try:
        digest = hashlib.sha256(library.read_bytes()).hexdigest()
        return digest == _digest_file(library).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return False


def _build(library: Path, recipe: Recipe) -> None:
    print(
        f"stof_hf: building {recipe.title} (once, about {recipe.seconds} s) ...",
        file=sys.stderr,
        flush=True,
    )
    start = time.perf_counter()
    # The build happens in a fresh folder: what an interrupted or damaged one left is not trusted.
    work = library.parent / "build"
    for leftover in (work, library, _digest_file(library)):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    work.mkdir()
    built, log = _ninja(work, recipe)
    library.with_suffix(".log").write_text(log)
    # Rename last, so that an intact digest stands for a complete library.
    part = library.with_suffix(".part")
    part.write_text(hashlib.sha256(built.read_bytes()).hexdigest())
    os.replace(built, library)
    os.replace(part, _digest_file(library))
    shutil.rmtree(work, ignore_errors=True)
    print(
        f"stof_hf: built {recipe.title} in {time.perf_counter() - start:.0f} s",
        file=sys.stderr,
        flush=True,
    )


def _ninja(work: Path, recipe: Recipe) -> tuple[Path, str]:
    """The library, made in `work`, and what the compiler said."""
    import ninja

    def escape(path: Path | str) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def command(*words: str) -> str:
        return shlex.join(words).replace("$", "$$")

    objects = [f"{i}-{source.stem}.o" for i, source in enumerate(recipe.sources)]
    rules = [
        f"rule compile\n  command = {command(*recipe.compile)} -c $in -o $out",
        f"rule link\n  command = {command(*recipe.link)} $in -o $out {command(*recipe.libraries)}",
    ]
    for object, source in zip(objects, recipe.sources, strict=True):
        rules.append(f"build {object}: compile {escape(source)}")
    rules.append(f"build library.so: link {' '.join(map(escape, objects))}")
    (work / "build.ninja").write_text("\n".join(rules) + "\n")
    # The interpreter's scripts need not be on PATH.
    path = os.pathsep.join([os.environ.get("PATH", ""), ninja.BIN_DIR])
    program = shutil.which("ninja", path=path)
    if program is None:
        raise BuildError(f"ninja is not in {ninja.BIN_DIR}: pip install --force-reinstall ninja")
    result = subprocess.run(
        [program, "-C", str(work)], capture_output=True, text=True, errors="replace", check=False
    )
    if result.returncode != 0:
        names = ", ".join(source.name for source in recipe.sources)
        raise BuildError(
            f"{recipe.compile[0]} could not build {names}: {result.stdout}{result.stderr}\n"
            f"{recipe.advice}"
        )
    return work / "library.so", result.stdout


@lru_cache
def compiler_version(compiler: str) -> str:
    """Path and version of a compiler. Raises BuildError where it does not run."""
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
    with suppress(OSError), open("/proc/cpuinfo") as info:
        for line in info:
            if line.lower().startswith(("flags", "features")):
                return platform.machine() + line
    return platform.machine() + platform.processor()
