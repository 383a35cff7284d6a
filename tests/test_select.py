"""Which kernel computes a call; nothing here runs on a GPU."""

import pytest
import torch

from stof_hf import SparseMask, patterns
from stof_hf.attention import cuda, cuda_band, model, sdpa, select
from stof_hf.errors import BuildError, UnsupportedError
from stof_hf.kernels import jit
from stof_hf.masks import native

MASK = SparseMask.from_pattern(patterns.Longformer(50, (0,)), 500)


@pytest.fixture
def families(monkeypatch):
    """families(capability, ...): what computes such a call on a GPU of that compute capability."""

    def found(capability, dim=64, value_dim=None, dtype=torch.float16, shift=0, mask=MASK, **rest):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        memory = torch.zeros(2, 4, 500 * 256 + 8, dtype=dtype)

        def make(dim):
            return memory[..., shift : shift + 500 * dim].unflatten(2, (500, dim))

        options = {"bias": None, "scale": 0.2, "softcap": 0.0, **rest}
        q = make(dim)
        return cuda.families(q, q, make(value_dim or dim), mask, *options.values())

    return found


def test_families_that_compute_a_call(families):
    hopper = (9, 0)
    both, general = ["hopper", "sm80"], ["sm80"]
    assert families(hopper) == families(hopper, 128, dtype=torch.bfloat16) == both
    for capability in ((8, 0), (8, 6), (8, 9), (10, 0), (12, 0)):
        assert families(capability) == families(capability, 256) == general
    for dim in (32, 80, 96, 256):
        assert families(hopper, dim) == general
    for other in (
        {"softcap": 30.0}, {"bias": torch.zeros(1, 1, 1, 500)}, {"scale": -0.2}, {"shift": 1},
        {"value_dim": 32}, {"value_dim": 128},
    ):  # fmt: skip
        assert families(hopper, **other) == general


def test_bands(families, monkeypatch):
    sliding = patterns.SlidingWindow(70, 30)
    for pattern, band in (
        (patterns.Causal() & sliding, (70, 0)), (patterns.Full() & sliding, (70, 30)),
        (patterns.Causal() | sliding, None), (patterns.Longformer(9, (0,)), None),
        (~patterns.Causal(), None), (patterns.Chunked(64), None),
    ):  # fmt: skip
        assert cuda_band.band_of(pattern) == band
    far, to = cuda_band.band_of(patterns.Causal())
    assert far > 1 << 20 and to == 0

    def computes(capability, dim=64, **rest):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        q = torch.zeros(2, 4, 500, dim, dtype=torch.float16)
        options = {"mask": mask, "bias": None, "scale": 0.2, "softcap": 0.0, **rest}
        return cuda_band.computes(q, q, q, *options.values())

    mask = SparseMask.from_pattern(patterns.Causal(), 500)
    assert computes((9, 0)) and computes((9, 0), 128)
    padded = SparseMask.from_pattern(patterns.Causal(), 500, padding=torch.ones(2, 500) > 0)
    for other in (
        {"dim": 96}, {"mask": MASK}, {"mask": padded}, {"scale": -1.0}, {"softcap": 1.0},
        {"bias": torch.zeros(1, 1, 1, 500)},
    ):  # fmt: skip
        assert not computes((9, 0), **other)
    assert not computes((8, 0)) and not computes((10, 0))


@pytest.mark.parametrize("band", [(10**6, 10**6), (10**6, 0), (700, 100)])
@pytest.mark.parametrize(
    "rows, copies, length, together", [(192, 12, 4096, 12), (192, 24, 1000, 7), (128, 24, 1000, 7)]
)
def test_the_time_of_a_band_is_that_of_its_busiest_block(band, rows, copies, length, together):
    form = model.BandForm(rows)
    start, item, step = model.BAND[False][form]

    def seen(row):
        """Steps that 64 rows compute, and of them those that not all rows see all of."""
        last = min(row + 64, length) - 1
        begin, end = max(0, row - band[0]) // 128, -(-min(length, last + band[1] + 1) // 128)
        whole = range(128 * begin, min(128 * end, length - 127), 128)
        whole = [k for k in whole if last - band[0] <= k and k + 127 <= row + band[1]]
        return begin, end, end - begin - len(whole)

    blocks = [0.0] * 132
    items = []
    for first in range(0, copies, together):
        heads = min(together, copies - first)
        for tile_end in range(-(-length // 64) * 64, 0, -rows):
            groups = [seen(row) for row in range(max(0, tile_end - rows), tile_end, 64)]
            passed = max(end for _, end, _ in groups) - min(begin for begin, _, _ in groups)
            own = sum(end - begin for begin, end, _ in groups) * 64 / rows
            cut = sum(cut for *_, cut in groups) * 64 / rows
            items += [item + step * (0.3 * passed + 0.7 * own) + 0.25 * cut] * heads
    for i, time in enumerate(items):
        turn, block = divmod(i, 132)
        blocks[131 - block if turn % 2 else block] += time
    got = model.band_us(form, copies, length, length, band, 0, together, 64, 132)
    assert got == pytest.approx(start + max(blocks))


def test_calls_left_to_triton(families):
    bias = torch.zeros(1, 1, 1, 500, dtype=torch.float64)
    view = SparseMask.from_pattern(patterns.Causal(), 600).rows(100, 500, 600)
    for rest in ({"dim": 72}, {"dtype": torch.float32}, {"bias": bias}, {"mask": view}):
        assert families((9, 0), **rest) == []
    assert families((7, 5)) == []


def test_block_kernel():
    q = torch.zeros(16, 12, 500, 64, dtype=torch.float16)
    rest = q, q, q, MASK, None, 0.0
    assert select.block_kernel(["hopper", "sm80"], *rest) == "hopper"
    assert select.block_kernel(["sm80"], *rest) == "sm80"
    assert select.block_kernel([], *rest) is None


def test_hopper_gpus_leave_to_triton_what_their_own_kernel_does_not_compute(monkeypatch):
    q = torch.zeros(16, 12, 500, 64, dtype=torch.float16)
    monkeypatch.setattr(select, "_capability", lambda device: (9, 0))
    assert select.block_kernel(["sm80"], q, q, q, MASK, None, 30.0) is None
    assert select.block_kernel(["hopper", "sm80"], q, q, q, MASK, None, 0.0) == "hopper"


#: Shared memory of a block of an H100 or H200, and of an RTX 4090.
LARGE, SMALL = 227 << 10, 99 << 10


@pytest.mark.parametrize(
    "heads, kv_heads, dim, dtype, memory, most",
    [
        # What Triton 3.6 takes: 270,336 bytes for 64 rows in two stages, with a mask and padding.
        (15, 3, 256, torch.float32, LARGE, (6, 32, 2)),
        (16, 1, 256, torch.float32, SMALL, (2, 32, 1)),
        # 106,496 bytes in three stages.
        (8, 2, 128, torch.float16, SMALL, (16, 64, 1)),
        # 131,080 bytes in three stages, 81,920 in one.
        (71, 1, 64, torch.float32, SMALL, (1, 64, 1)),
        (32, 8, 128, torch.bfloat16, LARGE, (16, 64, 3)),
    ],
)
def test_row_wise_blocks_fit_into_shared_memory(
    monkeypatch, heads, kv_heads, dim, dtype, memory, most
):
    monkeypatch.setattr(select, "shared_memory", lambda device: memory)
    q, k = (torch.empty(1, n, 500, dim, dtype=dtype) for n in (heads, kv_heads))
    config = select.row_config(q, k, dim)
    assert (config.take, config.keys, config.stages) == most


def test_row_wise_blocks_that_cannot_fit(monkeypatch):
    monkeypatch.setattr(select, "shared_memory", lambda device: SMALL)
    q, k = (torch.empty(1, n, 1, 256) for n in (40, 1))
    with pytest.raises(UnsupportedError, match="use fp16 or bf16"):
        select.row_config(q, k, 256)


@pytest.mark.parametrize(
    "pattern, splits", [(patterns.Full(), 8), (patterns.SlidingWindow(1023, 0), 6)]
)
def test_pieces_of_a_decode_step_are_of_what_its_row_sees(monkeypatch, pattern, splits):
    monkeypatch.setattr(select, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(select, "multiprocessors", lambda device: 132)
    q, k = (torch.empty(1, n, 1, 128, dtype=torch.float16, device="meta").expand(1, n, s, 128)
            for n, s in ((32, 1), (8, 16384)))  # fmt: skip
    assert select.decode_splits(q, k, SparseMask.from_pattern(pattern, 16384)) == splits


def test_cudnn_gets_rows_that_its_copies_can_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(select, "cudnn_is_ahead", lambda *call: True)
    mask = SparseMask.from_pattern(patterns.Full(), 500)
    base = torch.zeros(4 * 500 * 32 + 8, dtype=torch.float16)
    for first, asked in ((0, True), (8, True), (1, False)):
        q = base[first : first + 4 * 500 * 32].view(1, 4, 500, 32)
        call = sdpa.prepare(q, q, q, mask, None, None, 0.2, 0.0, False)
        assert (call is not None) == asked


def test_cudnn_reads_the_largest_caches():
    def ahead(batch, rows, cached):
        q, k = (
            torch.empty(batch, heads, n, 128, dtype=torch.bfloat16, device="meta")
            for heads, n in ((32, rows), (8, cached))
        )
        mask = SparseMask.from_pattern(patterns.Full(), rows, cached)
        return select.cudnn_is_ahead(q, k, mask, causal=False)

    assert ahead(16, 1, 32768) and ahead(64, 1, 8192)
    assert not ahead(16, 1, 8192) and not ahead(1, 1, 32768) and not ahead(16, 2, 32768)


def test_cudnn_is_asked_even_where_no_kernel_builds(monkeypatch):
    def none():
        raise BuildError("no C++ compiler found")

    q = torch.empty(1, 2, 500, 64, dtype=torch.float16, device="meta")
    mask = SparseMask.from_pattern(patterns.Full(), 500)
    monkeypatch.setattr(native, "library", none)
    assert select.cudnn_is_ahead(q, q, mask, causal=False)
    monkeypatch.setattr(select, "_failures", [BuildError("no nvcc found")])
    monkeypatch.setattr(sdpa, "prepare", lambda *call: "cuDNN")
    assert select._prepare(True, q, q, q, mask, None, None, 0.1, 0.0, False) == "cuDNN"


def test_a_host_library_that_does_not_build_is_tried_once(monkeypatch):
    tried = []

    def none(*args):
        tried.append(args)
        raise BuildError("it does not compile")

    monkeypatch.setattr(jit, "load_library", none)
    native._library.cache_clear()
    try:
        for _ in range(2):
            with pytest.raises(BuildError, match="it does not compile"):
                native.library()
        assert len(tried) == 1
    finally:
        native._library.cache_clear()
