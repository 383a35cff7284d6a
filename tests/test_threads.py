"""Threads of the C++ libraries: the same arrays whatever their number, none for small work."""

import ctypes
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from strategies import cases

from stof_hf.attention.granules import Layout, granule_plan, work_of
from stof_hf.bench.building import PATTERNS
from stof_hf.kernels import jit, threads
from stof_hf.masks import SparseMask, native
from stof_hf.masks import patterns as p

pytestmark = pytest.mark.skipif(jit.find_compiler() is None, reason="no C++ compiler")

LAYOUTS = (Layout(2, False), Layout(1, False), Layout(1, True))
IDS = torch.randint(-1, 9, (3, 1600), generator=torch.Generator().manual_seed(0))
LARGER = [
    p.Dilated(100, 8),
    p.Dilated(100, 8) | p.GlobalTokens((0, 700)),
    p.RandomBlocks(3, 48, fill=0.1),
    p.RandomBlocks(2, 64, 7, causal=True) & p.Causal() | p.SlidingWindow(70, 70),
    p.Documents(IDS),
    p.Documents(IDS.repeat_interleave(90, 1)[:, :1600]) & p.Causal(),
    ~p.Longformer(100, range(0, 1600, 400)),
]


def made(monkeypatch, number, openmp, pattern, *args, **kwargs):
    """All that is made of a pattern by so many threads, as lists."""
    monkeypatch.setattr(native, "threads", lambda: (openmp, number, 1))
    mask = SparseMask.from_pattern(pattern, *args, **kwargs)
    out = [x.tolist() for x in (mask.pattern_id, *mask.host_arrays())]
    for layout in LAYOUTS:
        plan = granule_plan(mask, layout, 4, 33, 2)
        out += [x.tolist() if isinstance(x, torch.Tensor) else x for x in vars(plan).values()]
    return [*out, mask.valid_share, work_of(mask)]


def compare(pattern, *args, **kwargs):
    with pytest.MonkeyPatch.context() as monkeypatch:
        want = made(monkeypatch, 1, 0, pattern, *args, **kwargs)
        for number in (2, 3, 7):
            for openmp in {threads.openmp(), 0}:
                assert made(monkeypatch, number, openmp, pattern, *args, **kwargs) == want


@settings(max_examples=25)
@given(cases())
def test_random_patterns(case):
    compare(case.pattern, case.q_len, case.kv_len, **case.where)


@pytest.mark.parametrize("pattern", LARGER, ids=range(len(LARGER)))
def test_larger_patterns(pattern):
    compare(pattern, 1600)
    compare(pattern, 1000, 1555, q_offset=500)


@pytest.fixture
def asked(monkeypatch):
    """How many threads the library asks for, call by call."""
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    numbers = []

    @kind
    def parallel(function, data, number, flags):
        numbers.append(number)
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(data)

    address = ctypes.cast(parallel, ctypes.c_void_p).value
    monkeypatch.setattr(native, "openmp", lambda: address)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    yield numbers
    del parallel


@pytest.mark.parametrize("name", PATTERNS)
def test_small_masks_take_no_thread(asked, name):
    mask = SparseMask.from_pattern(PATTERNS[name](1024), 1024)
    granule_plan(mask, LAYOUTS[0], 12, 264, 12)
    work_of(mask)
    assert asked == []


@pytest.mark.parametrize("name", ["dilated_wide", "random"])
def test_large_masks_take_threads(asked, name):
    mask = SparseMask.from_pattern(PATTERNS[name](16384), 16384)
    granule_plan(mask, LAYOUTS[0], 12, 264, 12)
    assert asked and max(asked) <= 16


SOURCE = """
#include <new>

#include "TEAM"

// How many items were done, or minus that where an error arrived. bad: which item fails.
extern "C" int run(void* parallel, long threads, long bad) {
  std::atomic<int> done{0};
  try {
    stof::Team(parallel, threads, 1).each(1000, threads, [&](int64_t i) {
      if (i == bad) throw std::bad_alloc();
      ++done;
    });
  } catch (const std::bad_alloc&) {
    return -done;
  }
  return done;
}
"""


@pytest.mark.parametrize("openmp", [True, False])
def test_an_error_in_a_thread_reaches_the_caller(tmp_path, monkeypatch, openmp):
    source = SOURCE.replace("TEAM", str(jit.source_dir() / "team.h"))
    (tmp_path / "team_test.cpp").write_text(source)
    monkeypatch.setattr(jit, "source_dir", lambda: tmp_path)
    run = jit.load_library("team_test", ["team_test.cpp"]).run
    run.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_long]
    address = threads.openmp() if openmp else 0
    for number in (1, 2, 7):
        assert run(address, number, -1) == 1000
        for bad in (0, 500, 999):
            assert -999 <= run(address, number, bad) <= 0


OUT_OF_MEMORY = """
import resource
import torch
from stof_hf.masks import SparseMask, native, patterns

address = {openmp}
native.openmp = lambda: address
torch.set_num_threads(4)
SparseMask.from_pattern(patterns.RandomBlocks(3, fill=0.1), 16384)
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**24, -1))
try:
    SparseMask.from_pattern(patterns.Dilated(20000, 5) | patterns.GlobalTokens((0,)), 131072)
except MemoryError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("openmp", ["native.openmp()", "0"])
def test_memory_that_runs_out_does_not_end_the_process(openmp):
    code = [sys.executable, "-c", OUT_OF_MEMORY.format(openmp=openmp)]
    result = subprocess.run(code, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "does not fit into the host's memory" in result.stdout
