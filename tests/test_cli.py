"""The `stof` command."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from stof_hf import demo, info
from stof_hf.cli import app
from stof_hf.kernels import jit

runner = CliRunner()


def invoke(*arguments):
    return runner.invoke(app, [str(argument) for argument in arguments])


def test_info_names_every_backend():
    assert info.backends()["cpu"].startswith("works")
    result = invoke("info")
    assert result.exit_code == 0
    for name in ("torch", "transformers", "C++ compiler", "backend cpu", "backend triton"):
        assert name in result.output


def test_info_says_why_the_kernels_do_not_build(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "stof_hf.cli", "info"],
        env={"PATH": "", "STOF_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "no C++ compiler found" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("longformer", "--seq-len", 512),
        ("sliding-window", "--seq-len", 300, "--window", 16, "--causal"),
        ("BigBird", "--seq-len", 512, "--set", "random_blocks=1", "--global-tokens", "0,1"),
        ('{"type": "Causal"}', "--seq-len", 130),
    ],
    ids=["name", "options", "set", "json"],
)
def test_mask_show(arguments, tmp_path):
    out = tmp_path / "mask.png"
    result = invoke("mask", "show", *arguments, "--out", out)
    assert result.exit_code == 0, result.output
    assert "kept" in result.output
    assert out.read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bird", "--seq-len", 64), "no pattern is called 'bird'"),
        (("longformer", "--seq-len", 64, "--window", -1), "at least 0"),
        (("causal", "--seq-len", 64, "--window", 3), "Causal has no 'window'"),
        (("dilated", "--seq-len", 64, "--set", "dilation"), "write NAME=NUMBER"),
        (("longformer", "--seq-len", 64, "--global-tokens", "a"), "not a list of numbers"),
    ],
)
def test_mask_show_names_the_mistake(arguments, message):
    result = invoke("mask", "show", *arguments)
    assert result.exit_code != 0
    assert message in " ".join(result.output.replace("│", " ").split())


def test_an_error_of_ours_is_one_line():
    command = [sys.executable, "-m", "stof_hf.cli", "mask", "show", "bigbird", "--seq-len", "300"]
    result = subprocess.run(
        [*command, "--set", "random_blocks=99"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr.startswith("MaskError: 99 random blocks")
    assert "Traceback" not in result.stderr


def test_bench_attention_writes_json_and_a_picture(tmp_path):
    file, picture = tmp_path / "attention.json", tmp_path / "attention.png"
    sizes = ("--masks", "sliding", "--batch", 2, "--seq-len", "64,128", "--heads", 2)
    result = invoke(
        "bench", "attention", *sizes, "--head-dim", 32, "--device", "cpu",
        "--contestants", "stof,sdpa_mask", "--json", file, "--plot", picture,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    data = json.loads(file.read_text())
    assert [cell["cell"]["seq_len"] for cell in data["cells"]] == [64, 128]
    assert picture.read_bytes()[1:4] == b"PNG"


@pytest.mark.skipif(jit.find_compiler() is None, reason="no C++ compiler")
def test_bench_masks_writes_json(tmp_path):
    file = tmp_path / "masks.json"
    options = ("--patterns", "causal,longformer", "--seq-len", "64,200", "--device", "cpu")
    result = invoke("bench", "masks", *options, "--json", file)
    assert result.exit_code == 0, result.output
    cells = json.loads(file.read_text())["cells"]
    assert [(x["pattern"], x["seq_len"]) for x in cells] == [
        ("causal", 64), ("longformer", 64), ("causal", 200), ("longformer", 200),
    ]  # fmt: skip
    assert all(x["stof"]["mask_ms"] > 0 and x["stof"]["plan_ms"] > 0 for x in cells)
    result = invoke("bench", "masks", "--patterns", "bird", "--device", "cpu")
    assert "no pattern is called 'bird'" in str(result.exception)


def test_bench_backward_writes_json(tmp_path):
    file = tmp_path / "backward.json"
    sizes = ("--masks", "causal", "--batch", 2, "--seq-len", "64,128", "--heads", 2)
    options = ("--device", "cpu", "--contestants", "stof,sdpa_mask", "--json", file)
    result = invoke("bench", "backward", *sizes, "--head-dim", 32, *options)
    assert result.exit_code == 0, result.output
    data = json.loads(file.read_text())
    assert [cell["cell"]["seq_len"] for cell in data["cells"]] == [64, 128]
    assert all(set(cell["results"]) == {"stof", "sdpa_mask"} for cell in data["cells"])


def test_bench_decode_writes_json(tmp_path):
    file = tmp_path / "decode.json"
    options = ("--batch", "1,2", "--cached", "1100", "--device", "cpu")
    result = invoke("bench", "decode", *options, "--json", file)
    assert result.exit_code == 0, result.output
    assert "stof window 1024" in result.output
    cells = json.loads(file.read_text())["cells"]
    assert [(x["batch"], x["cached"]) for x in cells] == [(1, 1100), (2, 1100)]
    assert all(x["bytes"] == x["batch"] * 2 * 8 * 1100 * 128 * 2 for x in cells)
    names = {"stof", "stof causal", "stof window 1024", "copy"}
    assert all(set(x["results"]) == names for x in cells)
    assert all(r["time_us"] > 0 for x in cells for r in x["results"].values())


def test_a_decode_step_that_is_wrong_gets_no_time(monkeypatch):
    from stof_hf.bench import decode

    monkeypatch.setattr(decode, "attention", lambda q, k, v, view: torch.zeros_like(q))
    (cell,) = decode.run([1], [300], device=torch.device("cpu"))["cells"]
    assert "differs from the fp64 reference" in cell["results"]["stof"]["error"]
    assert "time_us" not in cell["results"]["stof causal"]


def test_demo(monkeypatch):
    """The demo on a real pretrained model, of less text; it fails where the embeddings differ."""
    texts = demo.sentences()
    assert len(texts) >= 150
    monkeypatch.setattr(demo, "sentences", lambda: texts[:24])
    result = invoke("demo", "--seq-len", 512)
    assert result.exit_code == 0, result.output
    assert "same" in result.output

    embed = demo.embed

    def wrong(model, batches):
        noise = 0.1 if model.config._attn_implementation == "stof" else 0.0
        return embed(model, batches) + noise

    monkeypatch.setattr(demo, "embed", wrong)
    monkeypatch.setattr(demo, "_sparse", lambda *arguments: None)
    monkeypatch.setattr(demo, "_long", lambda *arguments: None)
    result = invoke("demo")
    assert result.exit_code == 1
    assert "disagree" in result.output


def test_tune(tmp_path, monkeypatch):
    from layers import build

    from stof_hf.tuning import cache

    monkeypatch.setattr(cache, "folder", lambda: tmp_path / "tuning")
    build("bert").save_pretrained(tmp_path / "bert")
    paths = "--json", tmp_path / "report.json", "--plot", tmp_path / "report.png"
    result = invoke(
        "tune", tmp_path / "bert", "--batch", 2, "--seq-len", 32, "--budget", 2, "--device", "cpu",
        "--pattern", "longformer", *paths,
    )  # fmt: skip
    assert result.exit_code == 0 and "times as fast" in result.output
    assert json.loads(paths[1].read_text())["layers"][0]["seq_len"] == 32
    assert paths[3].stat().st_size > 10_000
    assert "forward" in invoke("cache", "list").output
    assert invoke("tune", tmp_path / "nothing").exit_code == 2
    assert invoke("tune", tmp_path / "bert", "--dtype", "int8").exit_code == 2
