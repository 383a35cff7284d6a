"""What a user installs: its contents, its public names and what importing it costs."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import stof_hf

ROOT = Path(__file__).parents[1]


def python(code: str, **env: str) -> str:
    """Output of a fresh interpreter that runs `code` away from the source tree."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A copy of the source tree, so that building leaves no files in it."""
    copy = tmp_path_factory.mktemp("tree") / "stof"
    skip = shutil.ignore_patterns("__pycache__", "*.so")
    for folder in ("stof_hf", "patches", "csrc"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=skip)
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy / file)
    return copy


@pytest.fixture(scope="session")
def built(tree, tmp_path_factory):
    """Folder with the sdist and the wheel made from it."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return out


def shipped() -> set[str]:
    """Paths under stof_hf/ that an install must hold, from the source tree."""
    names = {"stof_hf/py.typed", "stof_hf/data/alice.txt"}
    names.add("stof_hf/tuning/configs/nvidia-h200.json")
    for folder, prefix in (("stof_hf", "stof_hf"), ("patches", "stof_hf/patches")):
        files = (ROOT / folder).rglob("*.py")
        names |= {f"{prefix}/{file.relative_to(ROOT / folder)}" for file in files}
    sources = [f for f in (ROOT / "csrc").rglob("*") if f.suffix in (".cpp", ".cu", ".cuh", ".h")]
    assert sources
    return names | {f"stof_hf/csrc/{file.relative_to(ROOT / 'csrc')}" for file in sources}


def test_wheel_holds_everything(built):
    (wheel,) = built.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert shipped() <= held
    assert not [n for n in held if not n.startswith(("stof_hf/", "stof_hf-"))]
    assert any(name.endswith("licenses/LICENSE") for name in held)


def test_sdist_holds_everything(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    mapped = ("stof_hf/patches", "stof_hf/csrc")
    at_root = {n.removeprefix("stof_hf/") if n.startswith(mapped) else n for n in shipped()}
    assert at_root | {"pyproject.toml", "setup.py", "README.md", "LICENSE"} <= held


def test_wheel_runs_where_it_is_installed(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import stof_hf.patches; from stof_hf.kernels import jit; "
        "print(stof_hf.patches.__file__); print(jit.source_dir()); print(*stof_hf.__path__)"
    )
    patches, csrc, path = python(code, PYTHONPATH=str(tmp_path)).splitlines()
    assert Path(patches) == tmp_path / "stof_hf" / "patches" / "__init__.py"
    assert Path(csrc) == tmp_path / "stof_hf" / "csrc"
    assert path == str(tmp_path / "stof_hf")


def test_source_tree_on_pythonpath(tree):
    code = "import stof_hf.patches as p; print(p.__file__); print(__import__('stof_hf').__file__)"
    patches, package = python(code, PYTHONPATH=str(tree)).splitlines()
    assert Path(package) == tree / "stof_hf" / "__init__.py"
    assert Path(patches) == tree / "patches" / "__init__.py"


def test_import_is_cheap():
    """To the first result at most 1 s beyond torch, and no heavy library."""
    code = (
        "import sys, time, torch; before = set(sys.modules); begin = time.perf_counter(); "
        "import stof_hf as s; x = torch.zeros(1, 1, 64, 32); "
        "s.attention(x, x, x, s.SparseMask.from_pattern(s.patterns.Causal(), 64));"
        "print(time.perf_counter() - begin, torch.cuda.is_initialized(), "
        "'torch._dynamo' in sys.modules, "
        "*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    runs = [python(code).split() for _ in range(3)]
    assert min(float(seconds) for seconds, *_ in runs) <= 1
    _, initialized, dynamo, *loaded = runs[0]
    assert initialized == dynamo == "False"
    heavy = {"transformers", "triton", "matplotlib", "datasets", "typer", "rich", "scipy"}
    assert not heavy & set(loaded)


@pytest.mark.parametrize("order", ["import stof_hf, transformers", "import transformers, stof_hf"])
def test_registers_with_transformers_that_is_imported_before_or_after(order):
    code = (
        f"{order}; from transformers import AttentionInterface; "
        "print({'stof', 'paged|stof'} <= set(AttentionInterface()))"
    )
    assert python(code).strip() == "True"
    # Whoever has it already is served at once.
    code = "from transformers import AttentionInterface as A; import stof_hf; print('stof' in A())"
    assert python(code).strip() == "True"


@pytest.mark.parametrize("name", ["attention", "check", "masks", "own", "patching"])
def test_submodules_can_be_imported_first(name):
    code = (
        f"import stof_hf.hf.{name}; from transformers import AttentionInterface; "
        "print('stof' in AttentionInterface())"
    )
    assert python(code).strip() == "True"


def test_public_names_resolve():
    for name in stof_hf.__all__:
        assert getattr(stof_hf, name) is not None
    assert set(stof_hf.__all__) <= set(dir(stof_hf))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = stof_hf.nothing


def test_attention_is_the_function_after_its_package_is_imported():
    code = (
        "import stof_hf.attention.op; import stof_hf; from stof_hf.attention import op; "
        "print(stof_hf.attention is op.attention)"
    )
    assert python(code).strip() == "True"
