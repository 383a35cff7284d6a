"""The audit of model types, on a few of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

import stof_hf.audit
import stof_hf.hf.attention as hf_attention
from stof_hf.audit import audit, markdown, summary
from stof_hf.audit.compare import audit_type
from stof_hf.audit.report import outcome_of, share
from stof_hf.audit.shrink import shrunk
from stof_hf.cli import app


def checks(result: dict[str, Any], cls: str) -> dict[str, str]:
    return {name: check["outcome"] for name, check in result["classes"][cls]["checks"].items()}


def test_decoder_works() -> None:
    result = audit_type("mistral")
    assert outcome_of(result) == ("works", "")
    found = checks(result, "MistralForCausalLM")
    assert set(found.values()) == {"works"}
    assert {"left padding", "4D mask", "packed", "backward", "generate static"} <= set(found)


def test_seq2seq_works() -> None:
    result = audit_type("t5")
    assert outcome_of(result) == ("works", "")
    assert checks(result, "T5ForConditionalGeneration")["generate beams"] == "works"


def test_vision_works() -> None:
    result = audit_type("vit")
    assert checks(result, "ViTModel") == {"forward": "works", "backward": "works"}


def test_refused() -> None:
    outcome, reason = outcome_of(audit_type("xlnet"))
    assert outcome == "refused"
    assert "XLNetModel computes attention on its own" in reason


def test_wrong_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    original = hf_attention.attention_by_rows

    def without_mask(q: Any, k: Any, v: Any, mask: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return original(q, k, v, None, *args, **kwargs)

    monkeypatch.setattr(hf_attention, "attention_by_rows", without_mask)
    result = audit_type("gpt2")
    outcome, reason = outcome_of(result)
    assert outcome == "WRONG"
    assert "differs from eager" in reason
    data = {"transformers": "5", "torch": "2", "types": {"gpt2": result}}
    assert summary(data)["WRONG"] == 1
    assert "| gpt2 | WRONG | GPT2Model forward: differs" in markdown(data)


def test_bypass_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import PreTrainedModel

    monkeypatch.setattr(PreTrainedModel, "set_attn_implementation", lambda *args, **kwargs: None)
    result = audit_type("vit")
    assert outcome_of(result)[0] == "ignored"
    data = {"transformers": "5", "torch": "2", "types": {"vit": result}}
    monkeypatch.setattr(stof_hf.audit, "audit", lambda *args, **kwargs: data)
    assert CliRunner().invoke(app, ["models", "--types", "vit"]).exit_code == 1


@pytest.mark.parametrize("name", ["pp_formulanet_vision", "gemma4_audio", "gemma3n_audio"])
def test_towers_with_attention_of_their_own_are_refused(name: str) -> None:
    outcome, reason = outcome_of(audit_type(name))
    assert outcome == "refused" and "computes attention on its own" in reason


def test_summary_counts_as_compared_what_computed_both_outputs() -> None:
    def checked(outcome: str, **more: Any) -> dict[str, Any]:
        return {"classes": {"A": {"checks": {"forward": {"outcome": outcome, **more}}}}}

    own = "AModel computes attention on its own and would ignore it"
    types = {
        "fine": checked("works", error=0.0),
        "apart": checked("WRONG", error=1.0),
        "plain": checked("no attention", error=0.0),
        "indexed": checked("refused", reason="passes indices"),
        "tower": checked("refused", reason=own),
        "own": {"classes": {"A": {"load": own, "checks": {}}}},
        "by name": {"classes": {"A": {"load": "picks classes", "checks": {}}}},
        "unbuilt": {"reason": "is a part of other models"},
    }
    counts = summary({"types": types})
    assert counts == {
        "types": 8, "compared": 3, "refused at load": 2, "use the interface": 4, "refused": 4,
        "works": 1, "WRONG": 1, "no attention": 1, "unverified": 1,
    }  # fmt: skip
    assert share(counts).startswith("1 of the 4 types") and share(counts).endswith("(25.0 %)")


def test_shrunk_keeps_each_kind_of_layer() -> None:
    text = shrunk(AutoConfig.for_model("gemma3")).text_config
    assert text.layer_types == ["sliding_attention", "full_attention"]
    assert (text.num_hidden_layers, text.hidden_size, text.sliding_window) == (2, 64, 8)
    assert text.vocab_size == 120 and text.num_key_value_heads == 2


def test_results_are_resumed(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    data = audit(["vit"], json_path=path, workers=1)
    assert outcome_of(data["types"]["vit"])[0] == "works"
    kept = json.loads(path.read_text())
    kept["types"]["vit"] = {"reason": "from the file"}
    path.write_text(json.dumps(kept))
    assert audit(["vit"], json_path=path)["types"]["vit"] == {"reason": "from the file"}


def test_time_limit() -> None:
    result = audit(["vit"], workers=1, time_limit=0.0)["types"]["vit"]
    assert result == {"reason": "took more than 0 seconds"}


def test_command(tmp_path: Path) -> None:
    page = tmp_path / "models.md"
    result = CliRunner().invoke(app, ["models", "--types", "vit", "--markdown", str(page)])
    assert result.exit_code == 0, result.output
    assert "vit: works" in result.output and "1 of the 1 types" in result.output
    assert "| vit | works |" in page.read_text()
    unknown = CliRunner().invoke(app, ["models", "--types", "vit,nonesuch"])
    assert unknown.exit_code == 2
