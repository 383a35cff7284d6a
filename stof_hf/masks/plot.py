"""Pictures of masks."""

from __future__ import annotations

import base64
import html as escape
import io
from typing import TYPE_CHECKING

import torch

from . import bits
from .bits import TILE
from .convert import tile_map, to_dense
from .sparse_mask import FULL, SparseMask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PIXELS = 512


def picture(mask: SparseMask, batch: int = 0, head: int = 0) -> torch.Tensor:
    """Share of allowed pairs per pixel, float32 [rows, cols] in [0, 1], at most 512 x 512 or so."""
    b, h = min(batch, mask.pattern_id.shape[0] - 1), min(head, mask.pattern_id.shape[1] - 1)
    if mask.is_view or max(mask.q_len, mask.kv_len) <= 2 * _PIXELS:
        dense = to_dense(mask)
        return dense[min(batch, dense.shape[0] - 1), min(head, dense.shape[1] - 1)].float().cpu()
    content = tile_map(mask)[int(mask.pattern_id[b, h])].cpu()
    filled = [bits.unpack(w, TILE * TILE).sum(1) for w in mask.tile_bits.cpu().split(512)]
    share = torch.cat([torch.zeros(1), torch.ones(1), *(n / TILE**2 for n in filled)])
    image = share[(content + 2).long()]
    if mask.kv_valid is not None:
        valid = bits.unpack(mask.kv_valid[min(batch, len(mask.kv_valid) - 1)].cpu(), mask.kv_len)
        valid = torch.nn.functional.pad(valid.float(), (0, -mask.kv_len % TILE))
        image = image * valid.view(-1, TILE).mean(1)
    size = tuple(min(_PIXELS, n) for n in image.shape)
    return torch.nn.functional.adaptive_avg_pool2d(image[None], size)[0]


def plot(mask: SparseMask, ax: Axes | None, batch: int, head: int) -> Axes:
    """See `SparseMask.plot`."""
    import matplotlib.pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(4.5, 4.5), layout="constrained")
    extent = (0, mask.kv_len, mask.q_len, 0)
    # A root makes thin stripes visible that cover a small share of a pixel.
    ax.imshow(
        picture(mask, batch, head).sqrt(), cmap="Blues", vmin=0, vmax=1, extent=extent,
        interpolation="nearest", aspect="auto" if mask.q_len != mask.kv_len else "equal",
    )  # fmt: skip
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    ax.set_title(f"{mask.q_len:,} x {mask.kv_len:,}, {100 * mask.density:.2f} % kept", fontsize=10)
    return ax


def html(mask: SparseMask) -> str:
    """See `SparseMask._repr_html_`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2, 3.2), layout="constrained")
    plot(mask, figure.subplots(), 0, 0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    image = base64.b64encode(buffer.getvalue()).decode()
    full = int(mask.run_len[mask.run_bits == FULL].sum())
    partial = int((mask.run_bits != FULL).sum())
    facts = {
        "shape": " x ".join(map(str, mask.shape)),
        "kept": f"{100 * mask.density:.3f} %",
        "full tiles": f"{full:,}",
        "partial tiles": f"{partial:,} ({len(mask.tile_bits):,} distinct)",
        "storage": f"{mask.nbytes / 1024:,.1f} KiB on {mask.device}",
    }
    cells = "".join(
        f"<tr><th>{escape.escape(k)}</th><td>{escape.escape(v)}</td></tr>" for k, v in facts.items()
    )
    picture = f'<img src="data:image/png;base64,{image}">'
    return f"<div><b>SparseMask</b><table>{cells}</table>{picture}</div>"
