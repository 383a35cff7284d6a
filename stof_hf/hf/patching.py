"""Patterns on the attention layers of a model: `set_pattern`, and what it writes on the layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal
from weakref import WeakSet, ref

import torch
from torch import nn

from ..errors import MaskError, UnsupportedError
from ..masks.pattern import And, Pattern
from ..masks.patterns import Causal
from ..masks.traced import text_of

Kind = Literal["self", "cross", "all"]

_CROSS = re.compile(r"cross|xattn|enc(oder)?_?dec|encoder_(decoder_)?att|src_att", re.IGNORECASE)


class Stamp:
    """The pattern of attention layers, with what every call would compute from it.

    Plain attributes, because torch.compile reads them.
    """

    def __init__(self, pattern: Pattern, cross: bool):
        self.pattern, self.cross = pattern, cross
        self.key = pattern.fingerprint
        self.causal = Causal() & pattern
        self.text = text_of(pattern) if pattern.serializable else None

    def required_text(self) -> str:
        """The pattern as JSON text, which is how it enters a compiled graph."""
        if self.text is None:
            raise UnsupportedError(
                f"the pattern {type(self.pattern).__name__} holds a function or tensor, which "
                "torch.compile cannot take: use another of stof_hf.patterns, or do not compile"
            )
        return self.text


@dataclass(frozen=True)
class Rule:
    """One `set_pattern` call."""

    pattern: Pattern
    modules: tuple[str, ...] | None
    kind: Kind

    def to_json(self) -> dict[str, Any]:
        modules = None if self.modules is None else list(self.modules)
        return {"pattern": self.pattern.to_json(), "modules": modules, "kind": self.kind}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Rule:
        modules = data.get("modules")
        pattern = Pattern.from_json(data["pattern"])
        return cls(pattern, None if modules is None else tuple(modules), data.get("kind", "self"))

    def applies(self, names: Iterable[str], cross: bool) -> bool:
        """Whether the rule applies to a layer, given the names it goes by."""
        if self.kind != "all" and cross != (self.kind == "cross"):
            return False
        return self.modules is None or any(matches(glob, n) for glob in self.modules for n in names)


def matches(glob: str, name: str) -> bool:
    """Whether a glob fits a module's dotted name or that of a module around it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:n]), glob) for n in range(1, len(parts) + 1))


def is_cross_attention(module: nn.Module, name: str) -> bool:
    """Whether a layer attends to another sequence: by its attribute, its class, its last names."""
    flag = getattr(module, "is_cross_attention", None)
    if isinstance(flag, bool):
        return flag
    return bool(_CROSS.search(".".join([type(module).__name__, *name.split(".")[-2:]])))


def set_pattern(
    model: nn.Module,
    pattern: Pattern | None,
    *,
    modules: str | Iterable[str] | None = None,
    kind: Kind = "self",
    persist: bool = True,
) -> None:
    """Let attention layers attend only where `pattern` allows it, on top of their own mask.

    Args:
        model: a Transformers model; it is switched to attn_implementation="stof" if no part of it
            uses that yet.
        pattern: a pattern on absolute positions (padding counts), or None to remove all patterns.
        modules: glob patterns of module names ("*.layers.0", "encoder.*"); a name stands for all
            attention layers below it. By default all layers of the kind.
        kind: "self" for self-attention, "cross" for cross-attention, or "all".
        persist: also write the pattern to the configuration (`config.stof`), so that saving and
            loading give the same sparse model.

    Several calls add up: a layer's pattern is the conjunction of all that apply to it. The
    patterns hold in forward, in generate and in training.

    Raises:
        MaskError: no module fits `modules`, or persist=True with a pattern that has no JSON form.
        UnsupportedError: the model does not use Transformers' attention interface.

    >>> import stof_hf
    >>> from transformers import BertConfig, BertModel
    >>> model = BertModel(BertConfig(num_hidden_layers=1))
    >>> stof_hf.set_pattern(model, stof_hf.patterns.Longformer(window=64))
    >>> model.config.stof["patterns"][0]["pattern"]["type"]
    'Longformer'
    >>> stof_hf.set_pattern(model, None)
    """
    if pattern is None:
        return _clear(model)
    if not isinstance(pattern, Pattern):
        raise MaskError(f"expected a pattern such as stof_hf.patterns.Causal(), not {pattern!r}")
    if kind not in ("self", "cross", "all"):
        raise MaskError(f'kind must be "self", "cross" or "all", not {kind!r}')
    globs = (modules,) if isinstance(modules, str) else None if modules is None else tuple(modules)
    rule = Rule(pattern, globs, kind)
    if globs is not None:
        _require_match(model, rule)
    entry = rule.to_json() if persist else None
    if not any(map(uses_stof, _configs(model))):
        model.set_attn_implementation("stof")
    if persist:
        for config in _configs(model):
            if config is not model.config and not uses_stof(config):
                continue
            settings = dict(getattr(config, "stof", None) or {"version": 1, "fallback": "error"})
            settings["patterns"] = [*settings.get("patterns", ()), entry]
            config.stof = settings
            # Saved with the configuration, unlike the choice of attention itself.
            config.attn_implementation = _choice(config)
    model.__dict__["_stof_rules"] = (*_rules(model), rule)
    _sparse_models.add(model)
    _stamp_all()


def _clear(model: nn.Module) -> None:
    for config in _configs(model):
        settings = getattr(config, "stof", None)
        if settings is None:
            continue
        del config.stof
        if settings.get("fallback", "error") != "error":
            config.stof = {**settings, "patterns": []}
        elif "attn_implementation" in config.__dict__:
            del config.attn_implementation
    for module in model.modules():
        module.__dict__.pop("_stof_rules", None)
        module.__dict__.pop("_stof_stamp", None)
    _stamp_all()


def _require_match(model: nn.Module, rule: Rule, prefix: str = "") -> None:
    names = [name for name, _ in model.named_modules() if name]
    names += [prefix + name for name in names if prefix] + [n.removeprefix(prefix) for n in names]
    unused = [glob for glob in rule.modules or () if not any(matches(glob, name) for name in names)]
    if unused:
        known = [n for n, m in model.named_modules() if "attention" in type(m).__name__.lower()]
        raise MaskError(
            f"no module is named {', '.join(map(repr, unused))}; attention layers of this model: "
            f"{', '.join(known[:6])}{', ...' if len(known) > 6 else ''}"
        )


def _configs(model: nn.Module) -> list[Any]:
    """The configurations of a model and of everything inside it, each once."""
    own = [module.config for module in model.modules() if hasattr(module, "config")]
    found = [config for top in own for config in configs_of(top)]
    return list({id(config): config for config in found}.values())


def configs_of(config: Any) -> Iterator[Any]:
    """A configuration and those inside it."""
    if hasattr(config, "sub_configs"):
        yield config
        for key in config.sub_configs:
            yield from configs_of(getattr(config, key, None))


def uses_stof(config: Any) -> bool:
    return config._attn_implementation == "stof"


def _choice(config: Any) -> str | dict[str, str]:
    """What to save as attn_implementation: "stof", or what each part uses where some do not."""
    parts = {"": config} | {key: getattr(config, key, None) for key in config.sub_configs}
    chosen = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    return chosen if "stof" in chosen.values() and set(chosen.values()) != {"stof"} else "stof"


#: Models with rules.
_sparse_models: WeakSet[nn.Module] = WeakSet()
#: Models that were made from a configuration with patterns, whose layers did not exist yet.
pending: list[ref[nn.Module]] = []
#: The patterns in use by models of a configuration class, by fingerprint.
active: dict[type, dict[str, Pattern]] = {}


def register(model: nn.Module) -> None:
    """Note a model that is being made from a configuration with patterns."""
    settings = getattr(model.config, "stof", None)
    if settings and settings.get("patterns"):
        if settings.get("version") != 1:
            raise MaskError(
                f"the sparse patterns were saved in format {settings.get('version')!r}, and this "
                "version of stof_hf reads format 1: install a newer one"
            )
        model.__dict__["_stof_rules"] = tuple(map(Rule.from_json, settings["patterns"]))
        # Loading takes it off the configuration; saving again must keep it.
        model.config.attn_implementation = _choice(model.config)
        pending.append(ref(model))


def stamp_pending() -> bool:
    """Write the patterns of models made since the last call onto their layers; True."""
    _sparse_models.update(model for model in (entry() for entry in pending) if model is not None)
    _stamp_all(check=True)
    pending.clear()
    return True


#: `stamp_pending` while torch.compile traces.
stamp_pending_traced = torch.compiler.assume_constant_result(stamp_pending)


def _rules(model: nn.Module) -> tuple[Rule, ...]:
    return model.__dict__.get("_stof_rules", ())


def _stamp_all(check: bool = False) -> None:
    """Write on every layer of all models with rules the pattern that they add up to.

    A model inside another carries a copy of its rules, whose names are the outer model's; what it
    has beyond them was set on itself. With `check`, raises MaskError if a rule fits no module.
    """
    active.clear()
    outermost_first = sorted(_sparse_models, key=lambda model: -sum(1 for _ in model.modules()))
    considered: dict[nn.Module, dict[Rule, bool]] = {}
    cross: dict[nn.Module, bool] = {}
    for model in outermost_first:
        # A base model's layers go by their names in the model with a head, and the reverse.
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        own = [r for r in _rules(model) if r not in considered.get(model, {})]
        for rule in own if check else ():
            _require_match(model, rule, prefix)
        for name, module in model.named_modules():
            names = {name, prefix + name, name.removeprefix(prefix)}
            cross.setdefault(module, is_cross_attention(module, name))
            held = considered.setdefault(module, {})
            for rule in own:
                if rule not in held:
                    held[rule] = rule.applies(names, cross[module])
        if not _rules(model):
            _sparse_models.discard(model)
    stamps: dict[tuple[Pattern, bool], Stamp] = {}
    for module, held in considered.items():
        patterns = [rule.pattern for rule, applies in held.items() if applies]
        module.__dict__.pop("_stof_stamp", None)
        if patterns:
            pattern = patterns[0] if len(patterns) == 1 else And(tuple(patterns))
            key = (pattern, cross[module])
            if key not in stamps:
                stamps[key] = Stamp(*key)
            module.__dict__["_stof_stamp"] = stamps[key]
    extra = {stamp.key: stamp.pattern for stamp in stamps.values()}
    for config in {type(c) for model in _sparse_models for c in _configs(model)} if extra else ():
        active[config] = extra


def has_patterns(model: nn.Module) -> bool:
    """Whether `set_pattern` or the configuration gave the model patterns."""
    return bool(_rules(model) or (getattr(model.config, "stof", None) or {}).get("patterns"))


def fallback_of(module: nn.Module) -> str:
    """ "sdpa" where the layer's configuration asks for it, else "error"."""
    settings = getattr(getattr(module, "config", None), "stof", None) or {}
    return settings.get("fallback", "error")
