"""What is compared: forward under several masks, features, gradients and generation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import inputs as given

TOLERANCE, GRADIENT_TOLERANCE = 2e-4, 2e-3
NEW_TOKENS = 8

Named = dict[str, torch.Tensor]
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """One comparison. run: from the model to named tensors; real: which of a tensor counts."""

    name: str
    run: Callable[[Any], Named]
    stof_run: Callable[[Any], Named] | None = None
    real: Callable[[torch.Tensor], torch.Tensor] = lambda t: t
    tolerance: float = TOLERANCE
    unlike: str | None = None


def checks_of(model: Any, inputs: Inputs, thorough: bool) -> Iterator[Check]:
    """The checks that suit a model with these inputs; forward and padding unless `thorough`."""
    names = given.parameters(model)
    yield Check("forward", lambda m: forward(m, inputs))
    text = "input_ids" in inputs
    encdec = "decoder_input_ids" in inputs
    if text and "attention_mask" in names:
        for side in ("left", "right"):
            masked = given.padded(inputs, side)
            real = _real(masked["attention_mask"].bool())
            yield Check(
                f"{side} padding",
                lambda m, x=masked: forward(m, x),
                real=real,
                unlike="forward" if side == "left" else None,
            )
    if not thorough:
        return
    only_text = set(inputs) == {"input_ids"}
    if only_text and "attention_mask" in names:
        yield _check_4d(model, inputs)
    if only_text and "position_ids" in names and _is_causal(model):
        ids = inputs["input_ids"][:1]
        positions = torch.cat([torch.arange(8), torch.arange(ids.shape[1] - 8)])[None]
        packed = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        yield Check("packed", lambda m: forward(m, packed))
    yield from _features(model)
    yield Check("backward", lambda m: gradients(m, inputs), tolerance=GRADIENT_TOLERANCE)
    if not (hasattr(model, "can_generate") and model.can_generate()):
        return
    settings = model.generation_config
    settings.pad_token_id = 0
    if settings.decoder_start_token_id is None:
        settings.decoder_start_token_id = 1
    prompt = {n: t for n, t in inputs.items() if n != "decoder_input_ids"}
    if text and "attention_mask" in names:
        prompt = given.padded(prompt, "right" if encdec else "left")
    window = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)
    for name, arguments in {
        "generate": {},
        "generate static": {"cache_implementation": "static"},
        "generate beams": {"num_beams": 2, "num_return_sequences": 2, "output_scores": True},
        "generate assisted": {"prompt_lookup_num_tokens": 2},
    }.items():
        x = prompt
        if name == "generate assisted":
            x = {n: t[:1] for n, t in prompt.items()}
        yield Check(
            name + (" (window)" if window and name == "generate" else ""),
            lambda m, x=x, a=arguments: generation(m, x, **a),
        )


def _check_4d(model: Any, inputs: Inputs) -> Check:
    allowed = given.mask_4d(_is_causal(model))
    additive = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    named = {"full_attention", "sliding_attention", "chunked_attention"} & set(kinds)

    def masked(mask: torch.Tensor) -> Inputs:
        value = {name: mask for name in named} if named else mask
        return {**inputs, "attention_mask": value}

    # Eager attention adds the mask, whatever its dtype: only a float one is defined for it.
    return Check(
        "4D mask",
        lambda m: {f"{k}.{n}": t for k in "fb" for n, t in forward(m, masked(additive)).items()},
        lambda m: {
            f"{k}.{n}": t
            for k, mask in (("f", additive), ("b", allowed))
            for n, t in forward(m, masked(mask)).items()
        },
        unlike="forward",
    )


def _features(model: Any) -> Iterator[Check]:
    """Towers for images and sounds of models that also run on text alone."""
    for method, key in (
        ("get_image_features", "pixel_values"),
        ("get_audio_features", "input_features"),
    ):
        function = getattr(model, method, None)
        if function is None:
            continue
        options = given.pictures(model.config) if "image" in method else given.recordings(model)
        for option in options:
            run = _feature_run(method, option)
            try:
                if not run(model):
                    continue
            except Exception:
                continue
            yield Check(key.split("_")[0].replace("pixel", "image") + " features", run)
            break


def _feature_run(method: str, option: Inputs) -> Callable[[Any], Named]:
    def run(model: Any) -> Named:
        torch.manual_seed(0)
        with torch.no_grad():
            return dict(_tensors(getattr(model, method)(**option)))

    return run


def _is_causal(model: Any) -> bool:
    return any(getattr(m, "is_causal", False) for m in model.modules())


def _real(mask: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rows of real tokens; of a tensor without rows, the sequence without padding."""

    def rows(t: torch.Tensor) -> torch.Tensor:
        if t.ndim >= 2 and t.shape[:2] == mask.shape:
            return t[mask]
        if t.ndim >= 3 and t.shape[:2] == (given.BATCH, given.DECODER_LENGTH):
            return t
        if t.ndim >= 2 and t.shape[:2] == (given.BATCH, given.BATCH):
            return t[:1, :1]  # similarities between sequences
        return t[0] if t.ndim and t.shape[0] == given.BATCH else t[:0]

    return rows


def forward(model: Any, inputs: Inputs, **arguments: Any) -> Named:
    """The float tensors that a forward returns; caches, masks and attention weights left out."""
    torch.manual_seed(0)
    with torch.no_grad():
        return dict(_tensors(model(**inputs, **arguments)))


def _tensors(value: Any, name: str = "out") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.numel():
            yield name, value.detach()
    elif hasattr(value, "items"):
        for key, part in value.items():
            if not re.search("past_key_values|mask|attentions", str(key)):
                yield from _tensors(part, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _tensors(part, f"{name}.{i}")


def gradients(model: Any, inputs: Inputs) -> Named:
    """Gradients of all parameters for a fixed random weighting of the outputs."""
    torch.manual_seed(0)
    model.zero_grad()
    outputs: list[torch.Tensor] = []
    out = model(**inputs)
    for part in out.values() if hasattr(out, "values") else out:
        if isinstance(part, torch.Tensor) and part.requires_grad and part.isfinite().all():
            outputs.append(part)
    if not outputs:
        raise ValueError("no output has a gradient")
    sum((part.float() * given.noise(*part.shape)).sum() for part in outputs).backward()
    named = {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.numel()
    }
    model.zero_grad()
    return named


def generation(model: Any, inputs: Inputs, **arguments: Any) -> Named:
    """Greedy search: the logits of each step up to where the choice was a tie.

    Beam search: the scores, and the new tokens of the best text, zeros where the next is as good.
    """
    torch.manual_seed(0)
    out = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
        output_logits=True, return_dict_in_generate=True, disable_compile=True, use_cache=True,
        **arguments,
    )  # fmt: skip
    if (scores := getattr(out, "sequences_scores", None)) is not None:
        pairs = scores.unflatten(0, (-1, 2))
        ahead = pairs[:, 0] - pairs[:, 1] > 10 * TOLERANCE
        best = out.sequences.unflatten(0, (-1, 2))[:, 0, -NEW_TOKENS:]
        return {"scores": scores, "sequences": (best * ahead[:, None]).float()}
    logits = torch.stack(out.logits, 1).float()
    return {"logits": logits, "tokens": logits.argmax(-1)}
