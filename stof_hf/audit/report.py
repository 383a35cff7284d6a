"""What the audit found, as a summary and as the table of docs/models.md."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

# Worst first: a model type has the outcome of its worst check.
FAILURES = ("WRONG", "crash", "ignored")
_ORDER = (*FAILURES, "falls back")


def outcome_of(result: dict[str, Any]) -> tuple[str, str]:
    """(outcome, reason) of a model type.

    A type works where all checks that could be made agree with eager, or are refused with a clear
    error in a part; it is refused where it cannot be loaded with "stof" or no check passes.

    >>> outcome_of({"reason": "is a part of other models"})
    ('unverified', 'is a part of other models')
    """
    classes = result.get("classes", {})
    checks = [c for cls in classes.values() for c in cls["checks"].values()]
    for worst in _ORDER:
        found = [(n, c) for n, c in _named(classes) if c["outcome"] == worst]
        if found:
            name, check = found[0]
            return worst, f"{name}: {check.get('reason', '')}".rstrip(": ")
    loads = [cls["load"] for cls in classes.values() if "load" in cls]
    if loads:
        return "refused", loads[0]
    for outcome in ("works", "refused", "no attention", "unverified"):
        found = [c for c in checks if c["outcome"] == outcome]
        if found:
            return outcome, found[0].get("reason", "") if outcome != "works" else ""
    reasons = [cls["reason"] for cls in classes.values() if "reason" in cls]
    return "unverified", (reasons or [result.get("reason", "not compared")])[0]


def _named(classes: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{name} {check}", outcome)
        for name, cls in classes.items()
        for check, outcome in cls["checks"].items()
    ]


def summary(data: dict[str, Any]) -> dict[str, int]:
    """Numbers of model types by outcome, "compared" being those whose tiny model ran."""
    counts = Counter(outcome_of(result)[0] for result in data["types"].values())
    total = sum(counts.values())
    compared = total - counts["unverified"] - counts["no attention"]
    return {"types": total, "compared": compared, **dict(counts.most_common())}


_INTRO = """# Model types

Written by `stof models --markdown docs/models.md`. Each model type of Transformers {transformers} (torch {torch}) as a tiny random model in fp32 on the CPU,
`attn_implementation="stof"` against `"eager"`. Padded query rows do not count, nor do attention weights, which "stof" never holds.

{counts}

**works**: every check that eager itself passes agrees. **refused**: raises an error that names the fix. **falls back**: another implementation runs, with a warning.
**ignored**: the outputs agree, but "stof" was never called although the model has attention. **no attention**: nothing to replace. **crash**: an error of another kind than ours.
**unverified**: could not be built or run with eager, or eager itself gives nothing to compare with. **WRONG**: differs from eager without an error.

In the last column: checks that passed; then, by outcome, those that did not.

| model type | outcome | reason | checks of the largest class |
|---|---|---|---|
"""  # noqa: E501


def markdown(data: dict[str, Any]) -> str:
    """The page docs/models.md."""
    counts = summary(data)
    lines = [f"- {name}: {number}" for name, number in counts.items()]
    page = _INTRO.format(
        transformers=data["transformers"], torch=data["torch"], counts="\n".join(lines)
    )
    for name, result in sorted(data["types"].items()):
        outcome, reason = outcome_of(result)
        page += f"| {name} | {outcome} | {_cell(reason)} | {_cell(_checks(result))} |\n"
    return page


def _checks(result: dict[str, Any]) -> str:
    classes = list(result.get("classes", {}).values())
    if not classes:
        return ""
    groups: dict[str, list[str]] = {}
    for name, check in classes[-1]["checks"].items():
        groups.setdefault(check["outcome"], []).append(name)
    passed = ", ".join(groups.pop("works", []))
    rest = [f"{outcome}: {', '.join(names)}" for outcome, names in groups.items()]
    return "; ".join(filter(None, [passed, *rest]))


def _cell(text: str) -> str:
    text = re.sub(r" from '[^']*'", "", " ".join(text.split())).replace("|", "\\|")
    return text if len(text) <= 240 else text[:237] + "..."
