"""Peak memory and time of a piece of code, in a process of its own."""

import json
import subprocess
import sys

PRELUDE = """
import json, resource, sys, time
import torch

def peak():
    if sys.platform == "linux":
        # ru_maxrss outlives exec: it would start at the peak of the process that started this one.
        with open("/proc/self/status") as status:
            return next(int(x.split()[1]) for x in status if x.startswith("VmHWM")) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

torch.set_num_threads(2)
{setup}

def work(n):
    {work}

work({small})
before, start = peak(), time.perf_counter()
result = work({large})
seconds = time.perf_counter() - start
print(json.dumps([seconds, peak() - before, result]))
"""


def measure(setup: str, work: str, small: int, large: int):
    """(seconds, MiB of new peak memory, result) of work(large), after a warm-up by work(small).

    `work` is the body of a function of n that returns something JSON knows.
    """
    code = PRELUDE.format(setup=setup, work=work, small=small, large=large)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
