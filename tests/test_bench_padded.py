"""`stof bench padded` on a model that is small enough for a CPU."""

import json

import pytest
import torch
from small_zoo import shrink

from stof_hf import StofError
from stof_hf.bench import padded
from stof_hf.runtime import unpadded

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch)


def run(names, **options):
    return padded.run(names, device=CPU, batch=3, least=20, tokens=96, **options)


def test_contestants_compute_the_same_real_tokens(monkeypatch, tmp_path):
    monkeypatch.setenv("STOF_CACHE_DIR", str(tmp_path))
    data = run(padded.CONTESTANTS, budget_s=0.5, json_path=tmp_path / "padded.json")
    results = data["results"]
    assert data["lengths"] == [20, 58, 96] and list(results) == list(padded.CONTESTANTS)
    assert {result["status"] for result in results.values()} == {"ok"}, results
    assert all(result["time_ms"] > 0 and result["error"] < 1e-5 for result in results.values())
    assert "search" in results["tuned"] and "sources" in results["unpadded"]
    assert json.loads((tmp_path / "padded.json").read_text()) == json.loads(json.dumps(data))
    assert padded.table(data).row_count == len(padded.CONTESTANTS)


def test_what_is_wrong_is_noticed(monkeypatch):
    monkeypatch.setattr(unpadded.RealTokens, "scatter", lambda self, x: x.new_zeros(3, 96, 64))
    results = run(["sdpa", "unpadded"])["results"]
    assert (results["sdpa"]["status"], results["unpadded"]["status"]) == ("ok", "wrong")


def test_an_unknown_contestant():
    with pytest.raises(StofError, match="no contestant is called 'flash'"):
        run(["flash"])
