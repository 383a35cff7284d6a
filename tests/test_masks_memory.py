"""Long masks: build time and peak memory, measured in a process of their own."""

import json
import subprocess
import sys

import pytest

MEASURE = """
import json, resource, sys, time
import matplotlib; matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from stof_hf.masks import SparseMask, patterns as p

def peak():
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale

torch.set_num_threads(2)
def work(n):
    {work}

work(512)
before, start = peak(), time.perf_counter()
result = work({n})
seconds = time.perf_counter() - start
print(json.dumps([seconds, (peak() - before) / 2**20, result]))
"""


def measure(work, n):
    """Seconds, MiB of new peak memory, and what the last line of `work` returned."""
    code = MEASURE.format(work=work, n=n)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "pattern",
    [
        "p.Longformer(256, (0, 77000))",
        "p.Causal()",
        "p.BigBird(192, (0,), 3)",
        "p.Causal() & p.SlidingWindow(4096, 0) | p.GlobalTokens((0, 1, 2))",
        "p.Documents(torch.arange(n) // 700) & p.Causal()",
        "~p.Chunked(5000)",
    ],
)
def test_closed_form_at_131072_tokens(pattern):
    seconds, mib, nbytes = measure(f"return SparseMask.from_pattern({pattern}, n).nbytes", 131072)
    assert seconds < 1 and mib < 64
    assert nbytes < 16 << 20


def test_mask_function_never_holds_all_pairs():
    work = "return SparseMask.from_function(lambda b, h, q, k: (q - k) % 1024 < 9, n).kept"
    _, mib, kept = measure(work, 16384)
    assert kept == sum((q - k) % 1024 < 9 for q in range(1024) for k in range(1024)) * 256
    assert mib < 200, "16384 x 16384 booleans are 256 MiB"


@pytest.mark.parametrize("pattern", ["p.Longformer(256, (0,))", "p.Causal()"])
def test_pictures_at_131072_tokens(pattern):
    work = f"""mask = SparseMask.from_pattern({pattern}, n)
    plt.close(mask.plot().figure)
    return len(mask._repr_html_())"""
    seconds, mib, length = measure(work, 131072)
    assert seconds < 5 and mib < 150
    assert 1000 < length < 200_000
