"""The build cache of the C++ kernels: damage, folders that cannot be written, several processes."""

import ctypes
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from stof_hf.attention import cpu
from stof_hf.errors import BuildError, StofWarning
from stof_hf.kernels import jit

SOURCE = 'extern "C" int answer() { return 42; }\n'
needs_compiler = pytest.mark.skipif(jit.find_compiler() is None, reason="no C++ compiler")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A library of one function, built in a cache of its own; returns (load, cache folder)."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "small.cpp").write_text(SOURCE)
    monkeypatch.setattr(jit, "source_dir", lambda: tmp_path / "csrc")
    monkeypatch.setenv("STOF_CACHE_DIR", str(tmp_path / "cache"))
    return lambda **kw: jit.load_library("small", ["small.cpp"], **kw), tmp_path / "cache"


def built_files(cache: Path) -> list[Path]:
    return sorted(cache.glob("kernels/*/small.so"))


@needs_compiler
def test_builds_once(small, capfd):
    load, cache = small
    assert load().answer() == 42
    assert "building" in capfd.readouterr().err
    modified = built_files(cache)[0].stat().st_mtime_ns
    assert load().answer() == 42
    assert capfd.readouterr().err == ""
    assert [f.stat().st_mtime_ns for f in built_files(cache)] == [modified]


@needs_compiler
def test_key_covers_sources_and_flags(small):
    load, cache = small
    load()
    load(flags=("-DOTHER",))
    assert len(built_files(cache)) == 2
    (jit.source_dir() / "header.h").write_text("\n")
    load()
    assert len(built_files(cache)) == 3


def _truncate(library: Path) -> None:
    library.write_bytes(library.read_bytes()[:1000])


def _overwrite(library: Path) -> None:
    library.write_bytes(b"not a library")


def _lose_digest(library: Path) -> None:
    library.with_suffix(".sha256").unlink()


def _garble_digest(library: Path) -> None:
    library.with_suffix(".sha256").write_bytes(b"\xff\xfe")


def _turn_into_folder(library: Path) -> None:
    library.unlink()
    (library / "inside").mkdir(parents=True)


def _leave_a_build_behind(library: Path) -> None:
    library.unlink()
    work = library.parent / "build"
    work.mkdir()
    (work / "library.so").touch()
    (work / "build.ninja").write_text("garbage")


@needs_compiler
@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _overwrite,
        _lose_digest,
        _garble_digest,
        _turn_into_folder,
        _leave_a_build_behind,
    ],
)
def test_a_damaged_cache_is_rebuilt(small, damage):
    load, cache = small
    # Not loaded before the damage: the system would hand out the library that is already mapped.
    subprocess.run([sys.executable, "-c", _PROCESS], env=_environment(small), check=True)
    library = built_files(cache)[0]
    damage(library)
    subprocess.run([sys.executable, "-c", _PROCESS], env=_environment(small), check=True)
    assert jit.is_intact(library)


_PROCESS = """
import os, pathlib
from stof_hf.kernels import jit
jit.source_dir = lambda: pathlib.Path(os.environ["SMALL_SOURCES"])
assert jit.load_library("small", ["small.cpp"]).answer() == 42
"""


def _environment(small) -> dict[str, str]:
    root = str(Path(cpu.__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {
        "STOF_CACHE_DIR": str(small[1]),
        "SMALL_SOURCES": str(jit.source_dir()),
        "PYTHONPATH": path,
    }


@needs_compiler
def test_processes_share_one_build(small):
    load, cache = small
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS],
            env=_environment(small),
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    errors = [p.communicate(timeout=120)[1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], errors
    assert sum("building" in e for e in errors) == 1
    assert load().answer() == 42


@needs_compiler
def test_a_cache_that_cannot_be_written(small, tmp_path, monkeypatch):
    load, _ = small
    (tmp_path / "file").write_text("")
    # A folder below a file: not even root can create it.
    monkeypatch.setenv("STOF_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(StofWarning, match="STOF_CACHE_DIR") as caught:
        assert load().answer() == 42
    assert len(caught) == 1
    monkeypatch.setattr(jit.tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(BuildError, match="STOF_CACHE_DIR"):
        load()


@needs_compiler
def test_sources_that_do_not_compile(small):
    load, cache = small
    (jit.source_dir() / "small.cpp").write_text("syntax error")
    with pytest.raises(BuildError, match=r"(?s)small\.cpp.*error"):
        load()
    assert not built_files(cache)


def test_no_compiler(small, monkeypatch):
    load, _ = small
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
        load()


@needs_compiler
def test_a_compiler_that_does_not_run(small, tmp_path, monkeypatch):
    load, _ = small
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(BuildError, match="set CXX to a working one"):
        load()


def test_attention_without_a_compiler_warns_once_and_is_correct(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    cpu._library.cache_clear()
    q, k, v = torch.randn(3, 1, 2, 70, 16).unbind()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                out, _ = cpu.forward(q, k, v, None, scale=0.25)
    finally:
        cpu._library.cache_clear()
    assert [w.category for w in caught] == [StofWarning]
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.25)
    torch.testing.assert_close(out.transpose(1, 2), want)


def test_the_environment_is_left_alone(small, monkeypatch):
    load, _ = small
    if jit.find_compiler() is None:
        pytest.skip("no C++ compiler")
    before = dict(os.environ)
    assert isinstance(load(), ctypes.CDLL)
    assert dict(os.environ) == before
