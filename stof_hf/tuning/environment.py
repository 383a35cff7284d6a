"""What measured times hold for: the GPU, its driver, versions, and the sources of the kernels."""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from .. import __version__
from ..kernels import jit

__all__ = ["Environment", "environment"]


@dataclass(frozen=True)
class Environment:
    """What must be equal for a measured time to hold.

    Args:
        device: the GPU's name, or "cpu".
        driver, cuda, torch, triton, stof_hf: versions; None where there is none.
        sources: hash of the kernels' sources.
    """

    device: str
    driver: str | None
    cuda: str | None
    torch: str
    triton: str | None
    stof_hf: str
    sources: str

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, str) and (value is not None or name == "device"):
                raise TypeError(f"{name} must be a string, not {value!r}")

    @property
    def slug(self) -> str:
        """The device in a file's name.

        >>> Environment("NVIDIA H200", None, None, "2.13.0", None, "0.1.0", "").slug
        'nvidia-h200'
        """
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:12]

    def differences(self, here: Environment) -> str:
        """Where it differs from another one: "torch 2.12.0 (here 2.13.0)", and so on."""
        mine, theirs = asdict(self), asdict(here)
        return ", ".join(
            f"{name} {value} (here {theirs[name]})"
            for name, value in mine.items()
            if value != theirs[name]
        )


def environment(device: torch.device | None = None) -> Environment:
    """The environment of a device: by default, of the current GPU, or of the CPU without one."""
    on_gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return Environment(
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        driver=_driver() if on_gpu else None,
        cuda=torch.version.cuda,
        torch=str(torch.__version__),
        triton=triton,
        stof_hf=__version__,
        sources=_sources(),
    )


@lru_cache(1)
def _driver() -> str | None:
    """Version of the NVIDIA driver, which torch does not tell: NVML does."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    version = ctypes.create_string_buffer(96)
    if nvml.nvmlInit_v2() != 0:
        return None
    failed = nvml.nvmlSystemGetDriverVersion(version, len(version))
    nvml.nvmlShutdown()
    return None if failed else version.value.decode()


@lru_cache(1)
def _sources() -> str:
    """Hash of what kernels and schemes are made from, wherever the package lies."""
    package = Path(__file__).parents[1]
    folders = [package / "attention", package / "fusion", jit.source_dir() / "cuda"]
    folders += map(Path, find_spec("stof_hf.patches").submodule_search_locations)
    groups = [
        [file for file in folder.rglob("*") if file.suffix in (".py", ".cu", ".cuh", ".cpp", ".h")]
        for folder in folders
    ]
    return jit.key_of((), [jit.key_of(files, ()) for files in groups])
