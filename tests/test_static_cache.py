"""Static caches that one kernel writes to, against Transformers' own code."""

import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig, StaticCache
from transformers.cache_utils import DynamicCache

pytest.importorskip("triton", reason="Triton is not installed")
from compiling import without_a_gpu, wrong  # noqa: E402
from gemms import DEVICE, matrix  # noqa: E402

from stof_hf.fusion import static_cache  # noqa: E402
from stof_hf.fusion.static_cache import append  # noqa: E402

SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
WINDOW = 12


def cache_of(windows, room=40, **options):
    config = MistralConfig(sliding_window=WINDOW, **SIZES) if windows else LlamaConfig(**SIZES)
    return StaticCache(config, max_cache_len=room, **options)


def states(batch, tokens, dim, dtype, packed):
    """Keys and values of tokens, as rows of a packed projection have them, or contiguous."""
    if packed:
        rows = matrix(batch * tokens, 8 * dim, dtype, amid_nan=True)
        heads = rows.view(batch, tokens, 8, dim).transpose(1, 2)
        return heads[:, 4:6], heads[:, 6:]
    return tuple(
        matrix(batch * 2 * tokens, dim, dtype).view(batch, 2, tokens, dim) for _ in range(2)
    )


def assert_equal(got, want):
    for mine, theirs in zip(got.layers, want.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
        assert torch.equal(mine.cumulative_length, theirs.cumulative_length)
        count = "cumulative_length_int"
        assert getattr(mine, count, None) == getattr(theirs, count, None)


@given(
    st.booleans(), st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(1, 3),
    st.sampled_from([16, 20, 64]), st.sampled_from([torch.float16, torch.float32]), st.booleans(),
    st.sampled_from([64, 8192]),
)  # fmt: skip
def test_as_transformers_writes_them(windows, steps, batch, dim, dtype, packed, elements):
    cache = cache_of(windows, room=80)
    cache.early_initialization(batch, 2, dim, dtype, DEVICE)
    want = deepcopy(cache)
    with pytest.MonkeyPatch.context() as patch:
        # Several programs, too.
        patch.setattr(static_cache, "_ELEMENTS", elements)
        for tokens in (*steps, 1, 1):
            for index in range(2):
                k, v = states(batch, tokens, dim, dtype, packed)
                given = want.update(k, v, index)
                got = append(cache, k, v, index)
                if got is None:
                    assert windows and cache.layers[index].cumulative_length_int + tokens > WINDOW
                    got = cache.update(k, v, index)
                for mine, theirs in zip(got, given, strict=True):
                    assert torch.equal(mine, theirs)
    assert_equal(cache, want)


def test_a_full_window_moves_whatever_its_length():
    for window in (1, 7, 64, 100):
        cache = StaticCache(MistralConfig(sliding_window=window, **SIZES), max_cache_len=200)
        cache.early_initialization(1, 2, 16, torch.float16, DEVICE)
        want = deepcopy(cache)
        for tokens in (window, 1, 1):
            k, v = states(1, tokens, 16, torch.float16, True)
            want.update(k, v, 0)
            assert append(cache, k, v, 0) is not None
        assert_equal(cache, want)


def test_leaves_to_transformers_what_is_not_there():
    k, v = states(1, 1, 16, torch.float32, False)
    unset, dynamic = cache_of(False), DynamicCache()
    offloaded = cache_of(False)
    offloaded.early_initialization(1, 2, 16, torch.float32, DEVICE)
    offloaded.offloading = True
    for cache in (unset, dynamic, offloaded):
        assert append(cache, k, v, 0) is None
    ready = cache_of(False)
    ready.early_initialization(1, 2, 16, torch.float32, DEVICE)
    for other in (k.half(), k[..., :8], k.expand(2, -1, -1, -1), k.mT.contiguous().mT[..., :1, :]):
        if other.shape != k.shape or other.dtype != k.dtype:
            assert append(ready, other, other, 0) is None
    assert not ready.layers[0].cumulative_length.any()


FULL = """
import torch
from transformers import LlamaConfig, StaticCache
from stof_hf.fusion.static_cache import append
cache = StaticCache(LlamaConfig(num_hidden_layers=1, num_attention_heads=2), max_cache_len=3)
cache.early_initialization(1, 2, 16, torch.float16, torch.device("cuda"))
k = torch.ones(1, 2, 2, 16, dtype=torch.float16, device="cuda")
for _ in range(2):
    append(cache, k, k, 0)
torch.cuda.synchronize()
"""


@pytest.mark.gpu
def test_a_full_cache_is_an_error():
    ended = subprocess.run(
        [sys.executable, "-c", FULL], capture_output=True, text=True, check=False
    )
    assert ended.returncode and "a static cache is full" in ended.stderr


@pytest.mark.parametrize("kernel, launches", [("append", 24), ("shift", 24)])
@pytest.mark.timeout(600)
def test_compiles(kernel, launches):
    cases = without_a_gpu("compile_norms.py", kernel)
    assert len(cases) == launches
    assert not wrong(cases), wrong(cases)
