"""What is computed of each window, and how dense attention and a pattern compare in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from ..errors import UnsupportedError
from .data import Windows

__all__ = ["METRICS", "Metric", "embeddings", "masked_losses", "token_losses"]

#: Goes through batches, and shows somebody how far it is.
Track = Callable[[Sequence[Any]], Iterable[Any]]
#: Of so many tokens of a window, one is masked.
_ONE_IN = 16


def token_losses(
    model: nn.Module, windows: Windows, batch: int, seed: int, track: Track
) -> torch.Tensor:
    """Negative log-likelihood of a window's tokens under a causal model, on average.

    Args:
        batch: windows a forward. seed: not used.

    Returns:
        fp64 [N], nats a token. A token with nothing in front of it is not counted.
    """
    first = max(windows.first, 1)
    out = []
    for ids in track(windows.ids.split(batch)):
        logits = _forward(model, ids).logits
        for row, target in zip(logits, ids.to(logits.device), strict=True):
            out.append(cross_entropy(row[first - 1 : -1].float(), target[first:]))
    return torch.stack(out).double().cpu()


def masked_losses(
    model: nn.Module, windows: Windows, batch: int, seed: int, track: Track
) -> torch.Tensor:
    """Negative log-likelihood of tokens that are masked, each by itself (Salazar et al., 2020,
    arXiv 1910.14659), averaged over one in 16 of a window's, drawn by `seed`.

    Args:
        batch: masked copies of windows a forward.

    Returns:
        fp64 [N], nats a masked token.

    Raises:
        UnsupportedError: the tokenizer has no mask token.
    """
    if windows.mask_token is None:
        raise UnsupportedError(
            "the model's tokenizer has no mask token: name a model that was saved with one"
        )
    room = windows.last - windows.first
    count = max(1, room // _ONE_IN)
    draw = torch.Generator().manual_seed(seed)
    places = [
        (window, windows.first + place)
        for window in range(len(windows.ids))
        for place in torch.randperm(room, generator=draw)[:count].tolist()
    ]
    out = []
    for part in track(torch.tensor(places).split(batch)):
        window, place = part.unbind(1)
        ids, each = windows.ids[window], torch.arange(len(part))
        target = ids[each, place]
        ids[each, place] = windows.mask_token
        logits = _forward(model, ids).logits
        rows = logits[each.to(logits.device), place.to(logits.device)]
        out.append(cross_entropy(rows.float(), target.to(rows.device), reduction="none"))
    return torch.cat(out).double().cpu().view(-1, count).mean(1)


def embeddings(
    model: nn.Module, windows: Windows, batch: int, seed: int, track: Track
) -> torch.Tensor:
    """Unit embeddings of windows: the mean of the last hidden states.

    Args:
        batch: windows a forward. seed: not used.

    Returns:
        fp64 [N, hidden].
    """
    out = [
        _forward(model, ids).last_hidden_state.float().mean(1).cpu()
        for ids in track(windows.ids.split(batch))
    ]
    return normalize(torch.cat(out).double(), dim=-1)


def _forward(model: nn.Module, ids: torch.Tensor) -> Any:
    with torch.no_grad():
        return model(input_ids=ids.to(model.device))


def compare_losses(losses: torch.Tensor, dense: torch.Tensor) -> dict[str, float | None]:
    """Perplexity ("value"), nats a token, and how much more than dense they are, with that
    difference's standard error over windows (None for a single one).

    >>> figures = compare_losses(torch.tensor([1.0, 1.5]), torch.tensor([1.0, 1.0]))
    >>> figures["difference"], round(figures["standard_error"], 6)
    (0.25, 0.25)
    """
    more = losses - dense
    spread = float(more.std()) / math.sqrt(len(more)) if len(more) > 1 else None
    loss = float(losses.mean())
    return {
        "value": math.exp(loss), "loss": loss, "difference": float(more.mean()),
        "standard_error": spread,
    }  # fmt: skip


def compare_embeddings(found: torch.Tensor, dense: torch.Tensor) -> dict[str, float | None]:
    """Cosine similarity to dense attention's: its mean ("value") and its 5 % quantile ("q05").

    >>> same = torch.eye(2, dtype=torch.float64)
    >>> compare_embeddings(same, same)
    {'value': 1.0, 'q05': 1.0}
    """
    similarity = (found * dense).sum(-1).clamp(max=1)
    return {"value": float(similarity.mean()), "q05": float(similarity.quantile(0.05))}


@dataclass(frozen=True)
class Metric:
    """What a model's outputs are worth.

    Args:
        scores: (model, windows, batch, seed, track) -> [N, ...], something of each window.
        compare: (scores, dense attention's) -> figures, of which "value" is the one to look at.
    """

    scores: Callable[[nn.Module, Windows, int, int, Track], torch.Tensor]
    compare: Callable[[torch.Tensor, torch.Tensor], dict[str, float | None]]


METRICS = {
    "perplexity": Metric(token_losses, compare_losses),
    "pseudo-perplexity": Metric(masked_losses, compare_losses),
    "similarity": Metric(embeddings, compare_embeddings),
}
