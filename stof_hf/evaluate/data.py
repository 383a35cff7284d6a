"""Text of a dataset, and the windows of tokens that a model is evaluated on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import StofError

__all__ = ["Windows", "read", "windows"]

#: What `datasets` reads a file by.
_BUILDERS = {
    ".txt": "text", ".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet",
}  # fmt: skip
#: Between two rows, as between the paragraphs of a text.
_BREAK = "\n\n"


@dataclass(frozen=True)
class Windows:
    """Consecutive windows of a text that do not overlap, all of one length, without padding.

    Args:
        ids: int64 [N, S], the special tokens that the tokenizer adds to a text included.
        first, last: where the text's own tokens are, ids[:, first:last].
        mask_token: id of the tokenizer's mask token, or None.
    """

    ids: torch.Tensor
    first: int
    last: int
    mask_token: int | None = None


def read(
    dataset: str, *, config: str | None = None, split: str | None = None, column: str | None = None
) -> Iterator[str]:
    """The texts of a dataset in their order, read as they are asked for; empty ones are left out.

    Args:
        dataset: a text file, a folder with such (*.txt, at any depth), a CSV, JSON or Parquet file,
            or what else `datasets.load_dataset` takes, such as a name on the Hugging Face hub.
        config: the dataset's configuration, where it has several.
        split: by default test, else validation, else train.
        column: by default "text", else the only one that holds strings.

    Raises:
        StofError: there is no such dataset, configuration, split or column of texts.

    >>> from stof_hf import data
    >>> next(read(data.__path__[0]))[:40]
    'Alice was beginning to get very tired of'
    """
    rows = iter(_open(dataset, config, split))
    try:
        first = next(rows)
    except StopIteration:
        raise StofError(f"the dataset {dataset} is empty: name another one") from None
    name = _column(dataset, first, column)
    yield from (text for text in _texts(first, rows, name) if text and text.strip())


def _texts(first: dict[str, Any], rows: Iterable[dict[str, Any]], name: str) -> Iterator[Any]:
    yield first[name]
    for row in rows:
        yield row[name]


def _open(dataset: str, config: str | None, split: str | None) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset

    path, options = Path(dataset), {}
    builder = dataset
    texts = sorted(map(str, path.rglob("*.txt"))) if path.is_dir() else []
    if path.is_file() or texts:
        builder = _BUILDERS.get(path.suffix, "text") if path.is_file() else "text"
        options["data_files"] = texts or [dataset]
        if builder == "text":
            options["sample_by"] = "paragraph"
    elif path.suffix in _BUILDERS:
        raise StofError(f"there is no file {dataset}")
    try:
        splits = load_dataset(builder, config, streaming=True, **options)
    except Exception as error:  # of the hub, of a connection, of a file system, of a format
        raise StofError(
            f"cannot load the dataset {dataset}: {_line(error)}. Name a text file, a folder of "
            "*.txt, or a dataset of the Hugging Face hub (with --config where it has several)"
        ) from error
    chosen = [split] if split else [name for name in ("test", "validation", "train")]
    found = next((name for name in chosen if name in splits), None)
    if found is None:
        raise StofError(
            f"the dataset {dataset} has no split {' or '.join(chosen)}; it has "
            f"{', '.join(splits)}: pass one as --split"
        )
    return splits[found]


def _column(dataset: str, row: dict[str, Any], asked: str | None) -> str:
    strings = [name for name, value in row.items() if isinstance(value, str)]
    has = ", ".join(strings) or "none"
    if asked is not None and asked not in strings:
        raise StofError(
            f"the dataset {dataset} has no column {asked!r} of texts; it has {has}: pass one as "
            "--column"
        )
    if asked or "text" in strings:
        return asked or "text"
    if len(strings) != 1:
        raise StofError(
            f"which column of the dataset {dataset} holds the texts is not clear: pass --column; "
            f"columns of strings are {has}"
        )
    return strings[0]


def windows(
    texts: Iterable[str], tokenizer: Any, seq_len: int, count: int, *, ending: bool = True
) -> Windows:
    """The first windows of texts, which are put one behind the other with an empty line between.

    Args:
        tokenizer: of Transformers. What it puts in front of a text and behind it stands in front of
            each window and behind it: a pattern may give these tokens a part of their own.
        seq_len: tokens of a window, special ones included.
        count: windows at most; fewer where the texts end.
        ending: False leaves out what the tokenizer puts behind a text.

    Raises:
        StofError: the texts do not fill one window, or seq_len leaves them no room.
    """
    front, behind = _special(tokenizer)
    behind = behind if ending else []
    room = seq_len - len(front) - len(behind)
    if room < 2:
        raise StofError(f"{seq_len} tokens leave no room for text: pass a larger --seq-len")
    ids = _tokens(texts, tokenizer, room * count)
    found = len(ids) // room
    if not found:
        raise StofError(
            f"the dataset has {len(ids)} tokens, one window takes {room}: pass a smaller --seq-len "
            "or a larger dataset"
        )
    rows = [front + ids[i * room : (i + 1) * room] + behind for i in range(found)]
    mask = getattr(tokenizer, "mask_token_id", None)
    return Windows(torch.tensor(rows), len(front), seq_len - len(behind), mask)


def _special(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a tokenizer puts in front of a text and behind it."""
    own = tokenizer("a", add_special_tokens=False)["input_ids"]
    given = tokenizer("a")["input_ids"]
    for start in range(len(given) - len(own) + 1):
        if own and given[start : start + len(own)] == own:
            return given[:start], given[start + len(own) :]
    raise StofError(
        f"{type(tokenizer).__name__} gives no tokens for text: pass a model with its own tokenizer"
    )


def _tokens(texts: Iterable[str], tokenizer: Any, count: int) -> list[int]:
    """The first tokens of joined texts, of which no more is read than that takes."""
    held: list[str] = []
    length, wanted = 0, 4 * count

    def encode() -> list[int]:
        return tokenizer(_BREAK.join(held), add_special_tokens=False, verbose=False)["input_ids"]

    for text in texts:
        held.append(text)
        length += len(text)
        if length >= wanted:
            ids = encode()
            # The last token may be another one once more text follows.
            if len(ids) > count:
                return ids[:count]
            wanted = 2 * length
    return encode()[:count]


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
