"""Models of benchmarks: those of the paper's end-to-end figure, with random weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

import stof_hf

from ..errors import StofError
from ..masks.patterns import Causal, Custom, Pattern
from .masks import bench_mask

__all__ = ["SHAPES", "ZOO", "Cell", "Entry", "Problem", "cells", "in_dtype", "shapes_of"]

#: (batch size, tokens); images of a ViT are sized so that its tokens are near.
SHAPES = ((1, 128), (8, 512), (16, 2048))
_IMAGES = {128: 128, 512: 512, 2048: 512}
_PATCH = 16


@dataclass(frozen=True)
class Entry:
    """A model.

    Args:
        name: of its classes in Transformers, without Config or Model.
        options: of its configuration.
        lengths: those of its options that say how many tokens it takes.
        causal: whether the mask is causal, too.
        masked: whether it takes a mask.
    """

    name: str
    options: dict[str, Any]
    lengths: tuple[str, ...] = ("max_position_embeddings",)
    causal: bool = False
    masked: bool = True

    @property
    def cls(self) -> Any:
        return getattr(transformers, f"{self.name}Model")

    def config(self, tokens: int) -> Any:
        sizes = dict.fromkeys(self.lengths, tokens)
        if not self.masked:
            sizes = {"image_size": _IMAGES.get(tokens, tokens)}
        return getattr(transformers, f"{self.name}Config")(**self.options, **sizes)


_LARGE = {"num_hidden_layers": 24, "num_attention_heads": 16, "hidden_size": 1024}
ZOO = {
    "bert_base": Entry("Bert", {}),
    "bert_large": Entry("Bert", {**_LARGE, "intermediate_size": 4096}),
    "gpt": Entry("GPT2", {"use_cache": False}, causal=True),
    "llama_base": Entry(
        "Llama", {**_LARGE, "intermediate_size": 4096, "use_cache": False}, causal=True
    ),
    "t5": Entry(
        "T5",
        {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "use_cache": False},
        (),
    ),
    "vit_base": Entry("ViT", {}, (), masked=False),
}


def shapes_of(name: str) -> tuple[tuple[int, int], ...]:
    """(batch size, tokens) that a model is measured at; raises StofError for another name."""
    _known(name)
    if ZOO[name].masked:
        return SHAPES
    return tuple((batch, (_IMAGES[tokens] // _PATCH) ** 2 + 1) for batch, tokens in SHAPES)


@dataclass(frozen=True)
class Cell:
    """A model, batch size and number of tokens.

    >>> print(Cell.parse("bert_base:1x128"))
    bert_base:1x128
    """

    model: str
    batch: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Cell:
        """Read what `str` gives; raises StofError for anything else."""
        if not (found := re.fullmatch(r"(\w+):(\d+)x(\d+)", text)):
            raise StofError(f"{text!r} is no cell: write MODEL:BATCHxTOKENS, as bert_base:1x128")
        return cls(found[1], int(found[2]), int(found[3]))

    def __str__(self) -> str:
        return f"{self.model}:{self.batch}x{self.tokens}"


def cells(models: Iterable[str] = tuple(ZOO)) -> list[Cell]:
    """Of the paper's end-to-end figure."""
    return [Cell(name, *shape) for name in models for shape in shapes_of(name)]


def _known(name: str) -> None:
    if name not in ZOO:
        raise StofError(f"no model is called {name!r}; there are {', '.join(ZOO)}")


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A model's parameters in a dtype, as `from_pretrained(dtype=...)` has them.

    `model.to(dtype)` would round buffers, too: rotary frequencies, by which positions of some
    thousands turn by other angles altogether.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


class Problem:
    """A model at a shape: its inputs, and models that compute them.

    Args:
        name: of ZOO.
        tokens: as `shapes_of` has them.

    Raises StofError for another name.
    """

    def __init__(self, name: str, batch: int, tokens: int, dtype: torch.dtype, device: Any):
        _known(name)
        self.name, self.entry, self.dtype, self.device = name, ZOO[name], dtype, device
        self.tokens = tokens
        noise = torch.Generator().manual_seed(0)
        if self.entry.masked:
            self.config = self.entry.config(tokens)
            self.mask = bench_mask("bigbird", tokens, device)
            ids = torch.randint(5, self.config.vocab_size, (batch, tokens), generator=noise)
            self.inputs = {"input_ids": ids.to(device)}
            if self.config.is_encoder_decoder:
                self.inputs["decoder_input_ids"] = ids.flip(1).to(device)
        else:
            side = round((tokens - 1) ** 0.5) * _PATCH
            self.config = self.entry.config(side)
            pixels = torch.randn(batch, self.config.num_channels, side, side, generator=noise)
            self.inputs = {"pixel_values": pixels.to(device, dtype)}

    @classmethod
    def of(cls, cell: Cell, device: torch.device) -> Problem:
        """A cell's: in fp16 on a GPU, in fp32 on the CPU."""
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        return cls(cell.model, cell.batch, cell.tokens, dtype, device)

    def model(self, implementation: str, dtype: torch.dtype | None = None) -> nn.Module:
        """The model in evaluation mode; its weights are always the same.

        Raises what Transformers raises where it does not take the implementation.
        """
        torch.manual_seed(0)
        with torch.device(self.device):
            # The implementation is written into the configuration: each model has one of its own.
            made = self.entry.cls._from_config(
                deepcopy(self.config), attn_implementation=implementation
            )
        return in_dtype(made, dtype or self.dtype).eval()

    def sparse_model(self) -> nn.Module:
        """The model with our attention, and the mask as its pattern in place of `masks`."""
        made = self.model("stof")
        if (pattern := self.pattern()) is not None:
            stof_hf.set_pattern(made, pattern, kind="all", persist=False)
        return made

    def masks(self, form: str, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """What the model is called with besides `inputs`, so that it applies the mask.

        Args:
            form: "bool", "additive", or "flex" for a BlockMask.
        """
        if not self.entry.masked:
            return {}

        def given(causal: bool) -> Any:
            if form == "flex":
                return self._block_mask(causal)
            allowed = self.mask.dense(self.device)[None, None]
            if causal:
                allowed = allowed.tril()
            if form == "bool":
                return allowed
            dtype_ = dtype or self.dtype
            lowest = torch.finfo(dtype_).min
            return torch.zeros_like(allowed, dtype=dtype_).masked_fill_(~allowed, lowest)

        if self.config.is_encoder_decoder:
            return {"attention_mask": given(False), "decoder_attention_mask": given(True)}
        return {"attention_mask": given(self.entry.causal)}

    def _block_mask(self, causal: bool) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        allowed = self.mask.mod
        mod = (lambda b, h, q, k: allowed(b, h, q, k) & (q >= k)) if causal else allowed
        # One batch element and head stand for all.
        return create_block_mask(mod, None, None, self.tokens, self.tokens, device=self.device)

    def real(self, out: torch.Tensor) -> torch.Tensor:
        """What counts of an output."""
        return out

    def pattern(self) -> Pattern | None:
        """The mask as `stof_hf.set_pattern` takes it, for every attention layer."""
        if not self.entry.masked:
            return None
        pattern = Custom(self.mask.mod, key=f"bench bigbird {self.tokens}")
        return pattern & Causal() if self.entry.causal else pattern
