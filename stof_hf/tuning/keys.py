"""What a tuned result holds for: the model's architecture, buckets of its shape, dtype, mask."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from ..errors import StofError

__all__ = [
    "PHASES", "Key", "batch_bucket", "fingerprint", "mask_bucket", "mask_distance", "seq_bucket",
]  # fmt: skip

PHASES = ("forward", "prefill", "decode")

# What is not listed counts: a field that nobody thought of costs a search, not a wrong result.
_IRRELEVANT = re.compile(
    r"_.*|transformers_version|architectures|auto_map|name_or_path|dtype|torch_dtype|stof"
    r"|attn_implementation|id2label|label2id|problem_type|finetuning_task|task_specific_params"
    r"|return_dict|use_cache|output_(attentions|hidden_states|router_logits)"
    r"|.*dropout.*|.*_pdrop|initializer_.*|.*_token_ids?"
    r"|(type_)?vocab_size|max_position_embeddings|n_positions|n_ctx|image_size"
    r"|position_embedding_type|gradient_checkpointing|pretraining_tp|output_past"
)


def fingerprint(config: Any) -> str:
    """What stands for a model's architecture: its type and a hash of its configuration.

    Args:
        config: a Transformers configuration; those inside it count too.

    Names, paths, versions, dtypes, labels, token ids, dropout, initialisation, what a call returns,
    vocabularies and greatest lengths do not count, nor do patterns set by `stof_hf.set_pattern`
    (the mask's bucket tells them apart). A field that is None or False counts as one that is not
    there, since newer versions of Transformers add such fields.

    >>> from transformers import BertConfig
    >>> fingerprint(BertConfig()) == fingerprint(BertConfig(name_or_path="x", dtype="float16"))
    True
    >>> fingerprint(BertConfig()) == fingerprint(BertConfig(hidden_size=384))
    False
    """
    # The JSON that is saved with a model, so that loading it changes nothing.
    values = _relevant(json.loads(config.to_json_string(use_diff=False)))
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return f"{values.get('model_type', 'model')}-{digest[:16]}"


def _relevant(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: _relevant(entry)
            for name, entry in value.items()
            if entry is not None and entry is not False and not _IRRELEVANT.fullmatch(name)
        }
    return [_relevant(entry) for entry in value] if isinstance(value, list) else value


def batch_bucket(batch_size: int) -> int:
    """The bucket of a batch size, its upper end: powers of two and one step between each two.

    >>> [batch_bucket(n) for n in (1, 2, 3, 4, 5, 7, 16, 20)]
    [1, 2, 3, 4, 6, 8, 16, 24]
    """
    return _bucket("batch_size", batch_size, 1)


def seq_bucket(seq_len: int) -> int:
    """The bucket of a number of tokens, its upper end: as for batches, and at least 16.

    >>> [seq_bucket(n) for n in (1, 17, 65, 128, 129, 200, 1025)]
    [16, 24, 96, 128, 192, 256, 1536]
    """
    return _bucket("seq_len", seq_len, 16)


def _bucket(name: str, size: int, least: int) -> int:
    if size < 1:
        raise StofError(f"{name} must be at least 1, not {size}")
    power = 1 << (max(size, least) - 1).bit_length()
    between = power // 4 * 3
    return between if max(size, least) <= between else power


def mask_bucket(share: float | None) -> str:
    """The bucket of a mask, by how much it keeps, to the nearest power of two down to 1/256.

    Args:
        share: of its 16 x 16 blocks, how many hold an allowed pair (`SparseMask.valid_share`), in
            [0, 1]; None where there is no mask.

    >>> [mask_bucket(share) for share in (None, 1.0, 0.53, 0.1)]
    ['none', '1/1', '1/2', '1/8']
    """
    if share is None:
        return "none"
    if not 0 <= share <= 1:
        raise StofError(f"a mask's share must lie between 0 and 1, not be {share}")
    return f"1/{2 ** round(-math.log2(max(share, 1 / 256)))}"


def mask_distance(one: str, other: str) -> float:
    """How far buckets of masks are: doublings of what they keep. Without a mask, all is kept.

    A dense mask, which says nothing of what it keeps, is far from all others.

    >>> mask_distance("1/8", "1/2"), mask_distance("none", "1/1"), mask_distance("none", "dense")
    (2.0, 0.0, inf)
    """
    if one == other:
        return 0.0
    if "dense" in (one, other):
        return math.inf
    first, second = (1 if mask == "none" else int(mask[2:]) for mask in (one, other))
    return abs(math.log2(first / second))


@dataclass(frozen=True)
class Key:
    """What a tuned result holds for.

    Args:
        model: `fingerprint` of the model's configuration.
        batch, seq_len: upper ends of the buckets; in decoding, seq_len counts the keys.
        phase: one of `PHASES`.
        dtype: such as "float16".
        mask: such as `mask_bucket` gives.

    >>> key = Key("bert-0123456789abcdef", 8, 512, "forward", "float16", "none")
    >>> print(key)
    bert-0123456789abcdef, 8 x 512, forward, float16, mask none
    """

    model: str
    batch: int
    seq_len: int
    phase: str
    dtype: str
    mask: str

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value).__name__ != field.type:
                raise TypeError(f"{field.name} must be of type {field.type}, not {value!r}")
        if self.batch != batch_bucket(self.batch) or self.seq_len != seq_bucket(self.seq_len):
            raise StofError(
                f"{self.batch} x {self.seq_len} is no bucket: make keys with Key.of, which rounds"
            )
        if self.phase not in PHASES:
            raise StofError(f"phase must be one of {', '.join(PHASES)}, not {self.phase!r}")

    @classmethod
    def of(
        cls, config: Any, batch_size: int, seq_len: int, *, phase: str, dtype: torch.dtype,
        mask: str,
    ) -> Key:  # fmt: skip
        """The key of a call: its configuration's fingerprint and its sizes' buckets."""
        buckets = batch_bucket(batch_size), seq_bucket(seq_len)
        name = str(dtype).removeprefix("torch.")
        return cls(fingerprint(config), *buckets, phase, name, mask)

    def __str__(self) -> str:
        size = f"{self.batch} x {self.seq_len}"
        return f"{self.model}, {size}, {self.phase}, {self.dtype}, mask {self.mask}"

    @property
    def id(self) -> str:
        """Eight hexadecimal digits that stand for the key on the command line."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:8]
