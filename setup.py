"""Wheels that carry compiled kernels, beyond what pyproject.toml says.

STOF_CUDA_ARCHS="90a" pip wheel --no-build-isolation --no-deps .
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ARCHITECTURES = os.environ.get("STOF_CUDA_ARCHS", "").replace(",", " ").replace(";", " ").split()


class BuildKernels(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return
        root = Path(self.build_lib).resolve()
        # What an earlier wheel carried is still there.
        shutil.rmtree(root / "stof_hf" / "lib", ignore_errors=True)
        if not ARCHITECTURES:
            return
        # In a process of its own, on the files that the wheel will hold.
        code = (
            "import sys; from pathlib import Path; from stof_hf.kernels import cuda_build; "
            "cuda_build.build(cuda_build.kernels_for(sys.argv[1:]), cuda_build.prebuilt_dir())"
        )
        subprocess.run(
            [sys.executable, "-c", code, *ARCHITECTURES],
            check=True,
            env={**os.environ, "PYTHONPATH": str(root)},
            cwd=root,
        )


class KernelWheel(bdist_wheel):
    def get_tag(self):
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if ARCHITECTURES else tag


class KernelDistribution(Distribution):
    def has_ext_modules(self):
        return bool(ARCHITECTURES)


setup(cmdclass={"build_py": BuildKernels, "bdist_wheel": KernelWheel}, distclass=KernelDistribution)
