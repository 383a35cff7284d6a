"""What the audit found, as a summary and as the table of docs/models.md."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

# Worst first: a model type has the outcome of its worst check.
FAILURES = ("WRONG", "crash", "ignored")
_ORDER = (*FAILURES, "falls back")
_OWN = "computes attention on its own"  # as a refusal says it


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
    """Numbers of model types, and of those of each outcome.

    "compared": a check computed both outputs. "refused at load": no model was built at all; these
    are among the refused. "use the interface": neither unverified, nor without attention, nor
    refused because the model computes attention on its own; those that work are a share of these.

    >>> summary({"types": {"a": {"reason": "is a part of other models"}}})
    {'types': 1, 'compared': 0, 'refused at load': 0, 'use the interface': 0, 'unverified': 1}
    """
    results = data["types"].values()
    outcomes = [outcome_of(result) for result in results]
    apart = ("unverified", "no attention", "ignored")
    return {
        "types": len(outcomes),
        "compared": sum(map(_compared, results)),
        "refused at load": sum(map(_refused_at_load, results)),
        "use the interface": sum(o not in apart and _OWN not in why for o, why in outcomes),
        **dict(Counter(outcome for outcome, _ in outcomes).most_common()),
    }


def share(counts: dict[str, int]) -> str:
    """How many types work of those that use the attention interface, from `summary`.

    >>> share({"works": 3, "use the interface": 4})
    '3 of the 4 types that use the attention interface work (75.0 %)'
    """
    works, of = counts.get("works", 0), counts["use the interface"]
    percent = f" ({100 * works / of:.1f} %)" if of else ""
    return f"{works} of the {of} types that use the attention interface work{percent}"


def _compared(result: dict[str, Any]) -> bool:
    return any("error" in check for _, check in _named(result.get("classes", {})))


def _refused_at_load(result: dict[str, Any]) -> bool:
    classes = result.get("classes", {}).values()
    return any("load" in c for c in classes) and not any(c["checks"] for c in classes)


_INTRO = """# Model types

Written by `stof models --markdown docs/models.md`. Each model type of Transformers {transformers} (torch {torch}) as a tiny random model in fp32 on the CPU,
`attn_implementation="stof"` against `"eager"`. Padded query rows do not count, nor do attention weights, which "stof" never holds.

{counts}

{share}: those that are neither unverified, nor without attention, nor refused because they compute attention on their own.
**compared**: a check computed both outputs. **refused at load**: no model was built; these are among the refused.

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
        transformers=data["transformers"],
        torch=data["torch"],
        counts="\n".join(lines),
        share=share(counts),
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
