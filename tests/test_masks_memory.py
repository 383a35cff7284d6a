"""Long masks: build time and peak memory."""

import pytest
from measure import measure

SETUP = """
import matplotlib; matplotlib.use("Agg")
import matplotlib.pyplot as plt
from stof_hf.masks import SparseMask, patterns as p
"""
# Threads that wait for a core count as work.
BY_NUMPY = """
torch.set_num_threads(1)
from stof_hf.masks import closed_form
closed_form.program = lambda pattern: None
"""


@pytest.mark.parametrize("builder", ["host library", "numpy"])
def test_closed_form_at_131072_tokens(builder):
    work = """made = [
        p.Longformer(256, (0, 77000)),
        p.Causal(),
        p.BigBird(192, (0,), 3),
        p.Causal() & p.SlidingWindow(4096, 0) | p.GlobalTokens((0, 1, 2)),
        p.Documents(torch.arange(n) // 700) & p.Causal(),
        ~p.Chunked(5000),
    ]
    out = []
    for pattern in made:
        begin = time.process_time()
        mask = SparseMask.from_pattern(pattern, n)
        out.append([repr(pattern)[:20], time.process_time() - begin, mask.nbytes])
    return out"""
    setup = SETUP + (BY_NUMPY if builder == "numpy" else "")
    _, mib, masks = measure(setup, work, 512, 131072)
    assert mib < 64
    for name, seconds, nbytes in masks:
        assert seconds < (1 if builder == "host library" else 4), name
        assert nbytes < 16 << 20, name


def test_mask_function_never_holds_all_pairs():
    work = "return SparseMask.from_function(lambda b, h, q, k: (q - k) % 1024 < 9, n).kept"
    _, mib, kept = measure(SETUP, work, 512, 16384)
    assert kept == sum((q - k) % 1024 < 9 for q in range(1024) for k in range(1024)) * 256
    assert mib < 200, "16384 x 16384 booleans are 256 MiB"


def test_dense_form_of_a_decode_view_is_small():
    work = """mask = SparseMask.from_pattern(p.Causal(), n)
    return int(mask.rows(n - 2, 2, n).to_dense().sum())"""
    _, mib, kept = measure(SETUP, work, 512, 131072)
    assert kept == 2 * 131072 - 1 and mib < 100


def test_pictures_at_131072_tokens():
    work = """out = []
    for pattern in (p.Longformer(256, (0,)), p.Causal()):
        mask = SparseMask.from_pattern(pattern, n)
        plt.close(mask.plot().figure)
        out.append(len(mask._repr_html_()))
    return out"""
    seconds, mib, lengths = measure(SETUP, work, 512, 131072)
    assert seconds < 10 and mib < 150
    assert all(1000 < length < 200_000 for length in lengths)
