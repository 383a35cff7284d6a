"""Compilation of kernels in a process of its own, where there need not be a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path


def without_a_gpu(script, *arguments):
    """What a script of the tests prints, line by line, with nothing interpreted."""
    path = Path(__file__).with_name(script)
    paths = [str(path.parents[1]), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, path, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def wrong(cases: list) -> list:
    """Of (name, bytes of shared memory or an error, bytes that there are), what does not fit."""
    return [case for case in cases if isinstance(case[1], str) or case[1] > case[2]]


def misfits(template: str) -> list:
    """Launches by `compile_norms.py` that do not compile or take too much shared memory."""
    cases = without_a_gpu("compile_norms.py", template)
    assert len(cases) >= 10
    return wrong(cases)
