"""What the search found, kept on disk and found again.

One JSON file for each environment (GPU, driver, versions, sources of the kernels) lies in
``<cache>/tuning``, where `stof_hf.kernels.jit.cache_dir` is the cache: ``STOF_CACHE_DIR`` moves it.
A file whose header names another environment is never used, not even in part. Results that the
package ships lie in tuning/configs, one file for each GPU: these are matched by the GPU's name
alone, because kernels, drivers and versions change faster than somebody tunes again. They are
starting points that were measured elsewhere.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..errors import StofError, StofWarning
from ..kernels import jit
from .entry import Entry, Layer, Segment
from .environment import Environment, environment
from .keys import Key, batch_bucket, fingerprint, mask_bucket, seq_bucket

__all__ = [
    "Entry", "Environment", "Key", "Layer", "Segment", "TunedFile", "batch_bucket",
    "clear", "environment", "export", "fingerprint", "folder", "import_", "list_",
    "mask_bucket", "results", "seq_bucket", "shipped_dir", "show", "store",
]  # fmt: skip

FORMAT = 1


def folder() -> Path:
    """Where this user's files lie."""
    return jit.cache_dir() / "tuning"


def shipped_dir() -> Path:
    """Where the package carries files, <slug of the GPU>.json."""
    return Path(__file__).parent / "configs"


@dataclass(frozen=True)
class TunedFile:
    """What a file holds. Shared by all who read it: not to be changed."""

    path: Path
    environment: Environment
    entries: Mapping[Key, Entry]

    @property
    def shipped(self) -> bool:
        """Whether it comes with the package."""
        return self.path.parent == shipped_dir()


def results(model: str, dtype: str, where: Environment) -> list[tuple[Key, Entry]]:
    """All results for a model's fingerprint and dtype, those found last at the end.

    What the package ships comes in front of what was tuned here. A damaged file is skipped with
    one StofWarning.
    """
    return [
        (key, entry)
        for entries in (_shipped(where), _own(where))
        for key, entry in sorted(entries.items(), key=lambda item: item[1].measured)
        if (key.model, key.dtype) == (model, dtype)
    ]


def store(key: Key, entry: Entry, where: Environment) -> None:
    """Keep a result, if no faster one (`Entry.beats`) is kept for its key.

    Processes may store at once: each adds to what the others wrote. Where the folder cannot be
    written, a StofWarning says so and nothing is kept.
    """
    try:
        _merge({key: entry}, where)
    except OSError as error:
        warnings.warn(
            f"stof_hf: cannot write the tuning cache {folder()} ({error}); this result is not "
            "kept. Set STOF_CACHE_DIR to a writable folder.",
            StofWarning,
            stacklevel=2,
        )


def list_() -> list[TunedFile]:
    """All files, this user's and those that the package ships, of any environment."""
    paths = [*sorted(folder().glob("*.json")), *sorted(shipped_dir().glob("*.json"))]
    return [file for path in paths if (file := _read(path)) is not None]


def show(id: str) -> list[tuple[TunedFile, Key, Entry]]:
    """The results whose `Key.id` begins with `id`, each with its file.

    Raises StofError where there is none.
    """
    found = [
        (file, key, entry)
        for file in list_()
        for key, entry in file.entries.items()
        if key.id.startswith(id)
    ]
    if not found:
        raise StofError(f"no tuned result is called {id!r}: stof cache list shows what there is")
    return found


def export(path: Path, where: Environment) -> int:
    """Write what was tuned in an environment to a file for `import_`; the number of results.

    Raises StofError where there is nothing to export, and where the file cannot be written.
    """
    entries = _own(where)
    if not entries:
        raise StofError(
            f"nothing was tuned for {where.device} with these versions: stof cache list shows what "
            "there is, stof tune tunes a model"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, where, entries)
    except OSError as error:
        raise StofError(f"cannot write {path} ({error}): name another file") from error
    return len(entries)


def import_(path: Path) -> tuple[int, Environment]:
    """Add what `export` wrote: the number of results taken, and the environment they hold for.

    Results of another environment go to that one's file, and are used there alone. A result is
    taken unless a faster one of its key is there.

    Raises StofError where the file cannot be read or holds no tuned results.
    """
    try:
        file = _parse(path)
    except (OSError, ValueError) as error:
        raise StofError(f"{path} holds no tuned results ({error}): name another file") from error
    if file is None:
        raise StofError(
            f"{path} was written by another version of stof_hf: this one reads format {FORMAT}"
        )
    try:
        return _merge(file.entries, file.environment), file.environment
    except OSError as error:
        raise StofError(
            f"cannot write {folder()} ({error}): set STOF_CACHE_DIR to a writable folder"
        ) from error


def clear() -> int:
    """Remove this user's files, of all environments; their number. What is shipped stays."""
    if not folder().is_dir():
        return 0
    try:
        with FileLock(folder() / "lock"):
            files = [path for path in folder().iterdir() if path.name != "lock"]
            for path in files:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise StofError(f"cannot clear {folder()} ({error}): remove it by hand") from error
    return sum(path.suffix == ".json" for path in files)


def _path(where: Environment) -> Path:
    return folder() / f"{where.slug}-{where.digest}.json"


def _own(where: Environment) -> Mapping[Key, Entry]:
    file = _read(_path(where))
    return file.entries if file is not None and file.environment == where else {}


def _shipped(where: Environment) -> Mapping[Key, Entry]:
    file = _read(shipped_dir() / f"{where.slug}.json")
    same = file is not None and file.environment.device == where.device
    return file.entries if same else {}


def _read(path: Path) -> TunedFile | None:
    """What a file holds; None where it is missing, damaged (one warning) or of another format."""
    try:
        state = path.stat()
    except OSError:
        return None
    return _remembered(path, state.st_ino, state.st_mtime_ns, state.st_size)


@lru_cache(64)
def _remembered(path: Path, *state: int) -> TunedFile | None:
    return _parse_or_warn(path)


def _parse_or_warn(path: Path) -> TunedFile | None:
    try:
        return _parse(path)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"stof_hf: the tuned results in {path} are damaged ({error}) and are not used: tune "
            "again, or remove the file",
            StofWarning,
            stacklevel=2,
        )
    return None


def _parse(path: Path) -> TunedFile | None:
    """None where the file is of another format. Raises OSError, and ValueError for damage."""
    try:
        data = json.loads(path.read_bytes())
        header = dict(data["header"])
        if header.pop("format") != FORMAT:
            return None
        entries = {Key(**item.pop("key")): Entry.from_json(item) for item in data["entries"]}
        return TunedFile(path, Environment(**header), entries)
    except (KeyError, TypeError, AttributeError, StofError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _write(path: Path, where: Environment, entries: Mapping[Key, Entry]) -> None:
    data: dict[str, Any] = {"header": {"format": FORMAT, **asdict(where)}}
    data["entries"] = [{"key": asdict(key), **entry.to_json()} for key, entry in entries.items()]
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    # Whoever reads meanwhile sees the old file or the new one, never half of one.
    os.replace(part, path)


def _merge(new: Mapping[Key, Entry], where: Environment) -> int:
    """Add results to an environment's file; the number of those that were taken."""
    path = _path(where)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / "lock"):
        # Read again: another process may have written since, faster than clocks of files tick.
        file = _parse_or_warn(path) if path.exists() else None
        if path.exists() and (file is None or file.environment != where):
            os.replace(path, path.with_name(path.name + ".skipped"))
            file = None
        entries = dict(file.entries) if file is not None else {}
        taken = {
            key: entry
            for key, entry in new.items()
            if key not in entries or entry.beats(entries[key])
        }
        if taken:
            _write(path, where, entries | taken)
        return len(taken)
