"""Notes launches of a template for a GPU that is not here, and lets a pool compile them.

Run in a process of its own: kernels of a process whose kernels are interpreted cannot be compiled.
Prints JSON: what failed, kernels in the cache, and whether this process finds what it launches.
"""

import json
import sys
import time
from concurrent.futures import wait
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from stof_hf.fusion.templates import common, gemm
from stof_hf.kernels import dependent
from stof_hf.tuning.compile_pool import CompilePool, noted
from stof_hf.tuning.compile_worker import compile_job


class NoGPU:
    """The driver of a GPU whose kernels are compiled and never launched."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def until_ready(pool):
    end = time.monotonic() + 120
    while not pool.ready and time.monotonic() < end:
        time.sleep(0.05)
    return pool.ready


def main(cache: str) -> None:
    driver.set_active(NoGPU())
    common.check = lambda *arguments: None
    common.shared_memory, common.multiprocessors = lambda device: 227 << 10, lambda device: 132
    dependent.overlaps = lambda device: True
    x, w, bias = torch.randn(64, 128).half(), torch.randn(96, 128).half(), torch.randn(96).half()
    base = {"block_n": 32, "block_k": 64, "group_m": 8, "warps": 4, "stages": 3}
    with noted() as jobs:
        for block_m in (16, 32):
            gemm.gemm(x, w, bias, activation="gelu", params={"block_m": block_m, **base})
    pool = CompilePool(["stof_hf.fusion.templates.gemm"], workers=2)
    early = pool.submit(jobs[0]).result()
    told = {"early": early, "ready": until_ready(pool), "jobs": len(jobs)}
    wrong = jobs[0]._replace(name="no_such_kernel")
    done = [pool.submit(job) for job in (*jobs, wrong)]
    wait(done, timeout=120)
    told["errors"] = [future.result() for future in done]
    told["kernels"] = len(list(Path(cache).rglob("*.cubin")))

    def compiled_here(*arguments, **options):
        raise AssertionError("it is compiled again")

    CUDABackend.make_cubin = compiled_here
    for job in jobs:
        compile_job(job)
    # Workers that end leave nobody waiting.
    waiting = [pool.submit(job) for job in jobs * 20]
    pool.close()
    told["ended"] = len(wait(waiting, timeout=60).done)
    told["after"] = pool.submit(jobs[0]).result()
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
