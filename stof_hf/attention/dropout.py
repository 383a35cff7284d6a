"""Which attention probabilities a call drops: a function of a seed and of the element's place.

Element (b, h, q, k) has a random number of 16 bits, and is dropped where that is below a threshold.
Philox 4x32 with 7 rounds (Salmon et al., 2011) makes such numbers for the 32 keys of a word side by
side: with the seed as its key, the counter (k // 32, q, b * H + h, i) gives four words, which hold
bits 4 i to 4 i + 3 of the numbers of all 32. A comparison is then an "and" or an "or" for each bit,
of 32 elements at once. Tiles do not matter, so that forward and backward may take any.

Here for all that is not Triton, by csrc/cpu/dropout.cpp for tensors on the CPU and else in plain
PyTorch; `triton_dropout.py` makes the same bits.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ..errors import BuildError, UnsupportedError
from ..kernels.threads import openmp

#: Philox's multipliers, what is added to its key each round, and rounds.
_MULTIPLY = 0xD2511F53, 0xCD9E8D57
_RAISE = 0x9E3779B9, 0xBB67AE85
ROUNDS = 7
#: Of a random number.
BITS = 16
_WORD = 0xFFFFFFFF
_FLAGS = ("-O3", "-fvisibility=hidden")


@dataclass(frozen=True)
class Dropout:
    """Dropout of one call: its seed, int64 [1] on the device of the query, and the threshold."""

    seed: torch.Tensor
    threshold: int

    @property
    def scale(self) -> float:
        """What the probabilities that are kept are multiplied by."""
        return (1 << BITS) / ((1 << BITS) - self.threshold)

    def kept(self, copies: torch.Tensor, rows: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Which elements are kept: bool [*copies.shape, rows, 32 * words].

        Args:
            copies: b * H + h. rows: of the queries, [rows]. words: of the keys, k // 32, [words].
                All int64.
        """
        library = _library() if self.seed.device.type == "cpu" else None
        if library is not None:
            return self._kept_natively(library, copies, rows, words)
        at = words, rows[:, None], copies[..., None, None]
        kept = torch.full((), _WORD, device=self.seed.device)
        for i in range(BITS // 4):
            for bit, numbers in enumerate(_philox(self.seed, *at, torch.full_like(words, i))):
                one = self.threshold >> (4 * i + bit) & 1
                kept = kept & numbers if one else kept | numbers
        lane = torch.arange(32, device=words.device)
        return (kept[..., None] >> lane & 1).bool().flatten(-2)

    def _kept_natively(
        self, library: Any, copies: torch.Tensor, rows: torch.Tensor, words: torch.Tensor
    ) -> torch.Tensor:
        out = torch.empty(*copies.shape, len(rows), 32 * len(words), dtype=torch.bool, device="cpu")
        copies, rows, words = (x.contiguous() for x in (copies, rows, words))
        indices = [n for x in (copies, rows, words) for n in (x.data_ptr(), x.numel())]
        threads = openmp(), torch.get_num_threads()
        if library(int(self.seed), self.threshold, *indices, out.data_ptr(), *threads) != 0:
            raise MemoryError("attention dropout on the CPU ran out of memory")
        return out


def threshold_of(p: float) -> int:
    """The threshold for a probability, which is rounded to a multiple of 2**-16.

    Raises UnsupportedError for what is no probability below 1.
    """
    if not 0 <= p < 1:
        raise UnsupportedError(f"dropout_p is {p}: give a probability from 0 on, below 1")
    return min(round(p * (1 << BITS)), (1 << BITS) - 1)


def draw_seed(device: torch.device) -> torch.Tensor:
    """A seed from torch's generator of the device, which nobody waits for."""
    return torch.randint(2**63 - 1, (1,), device=device)


@lru_cache(1)
def _library() -> Any | None:
    """The entry point of csrc/cpu/dropout.cpp, or None where it does not build."""
    from ..kernels import jit

    try:
        library = jit.load_library("stof_dropout", ["cpu/dropout.cpp"], _FLAGS)
    except BuildError:
        return None
    function = library.stof_dropout_kept
    function.argtypes = [ctypes.c_uint64] * 2 + [ctypes.c_void_p, ctypes.c_int64] * 3
    function.argtypes += [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function.restype = ctypes.c_int
    return function


def _philox(seed: torch.Tensor, *counter: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Four words of 32 bits, in int64, whose products wrap around and so keep all bits."""
    c0, c1, c2, c3 = counter
    keys = seed & _WORD, seed >> 32 & _WORD
    for _ in range(ROUNDS):
        first, second = c0 * _MULTIPLY[0], c2 * _MULTIPLY[1]
        c0, c2 = (second >> 32 & _WORD) ^ c1 ^ keys[0], (first >> 32 & _WORD) ^ c3 ^ keys[1]
        c1, c3 = second & _WORD, first & _WORD
        keys = tuple(key + step & _WORD for key, step in zip(keys, _RAISE, strict=True))
    return c0, c1, c2, c3
