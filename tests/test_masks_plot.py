"""Pictures of masks."""

import base64
import re

import pytest
import torch

from stof_hf.masks import SparseMask, patterns
from stof_hf.masks.plot import picture


@pytest.fixture(autouse=True)
def without_display(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    yield
    plt.close("all")


def test_small_picture_is_the_mask():
    dense = torch.rand(2, 3, 70, 90) < 0.3
    mask = SparseMask.from_dense(dense)
    assert torch.equal(picture(mask, 1, 2), dense[1, 2].float())


@pytest.mark.parametrize("padded", [False, True])
def test_large_picture_averages_the_mask(padded):
    valid = torch.arange(2048)[None] < 1500 if padded else None
    mask = SparseMask.from_pattern(patterns.Longformer(100, (0, 1999)), 2048, padding=valid)
    image = picture(mask)
    assert image.shape == (32, 32)
    want = mask.to_dense()[0, 0].float().view(32, 64, 32, 64).mean((1, 3))
    if padded:
        # A tile that padding cuts shows the average of its keys.
        cut = 1500 // 64
        assert (image[:, cut] - want[:, cut]).abs().max() < 0.1
        image[:, cut] = want[:, cut]
    torch.testing.assert_close(image, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("padded", [False, True])
def test_plot(padded):
    valid = torch.ones(2, 300, dtype=torch.bool) if padded else None
    mask = SparseMask.from_pattern(patterns.Causal(), 200, 300, q_offset=100, padding=valid)
    ax = mask.plot(batch=1)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key", "query")
    assert ax.images[0].get_extent() == [0, 300, 200, 0]
    assert "200 x 300" in ax.get_title() and f"{100 * mask.density:.2f} % kept" in ax.get_title()


def test_plot_into_given_axes():
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(1, 2)
    assert SparseMask.from_pattern(patterns.Causal(), 64).plot(axes[1]) is axes[1]
    assert not axes[0].images and len(axes[1].images) == 1


def test_plot_of_a_decode_view():
    view = SparseMask.from_pattern(patterns.Causal(), 200).rows(torch.tensor([150]), 3, 180)
    assert view.plot().images[0].get_array().shape == (3, 180)


def test_html():
    mask = SparseMask.from_pattern(patterns.Longformer(64), 3000)
    html = mask._repr_html_()
    image = re.search(r'src="data:image/png;base64,([^"]+)"', html).group(1)
    assert base64.b64decode(image).startswith(b"\x89PNG")
    assert "1 x 1 x 3000 x 3000" in html and f"{100 * mask.density:.3f} %" in html
