"""Tensor parallelism as Transformers has it, and FSDP, on two processes."""

import os
import subprocess
import sys
from pathlib import Path

import in_parallel
import pytest
import torch

import stof_hf
from stof_hf import StofError
from stof_hf.bench import parallel

CPU = torch.device("cpu")
SMALL = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32,
    "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 60, "sliding_window": 40,
}  # fmt: skip
several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
devices = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, several])]
)


@devices
def test_two_processes_compute_what_one_does(device, tmp_path):
    """With tensor parallelism and with FSDP; in_parallel.py has the assertions."""
    in_parallel.save(tmp_path)
    paths = [str(Path(stof_hf.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        in_parallel.__file__, tmp_path, device,
    ]  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@devices
def test_the_benchmark(device, tmp_path):
    path = tmp_path / "parallel.json"
    data = parallel.run(
        device=torch.device(device), batch=2, tokens=90, options=SMALL, json_path=path
    )
    results = data["results"]
    assert [(r["contestant"], r["processes"], r["heads"]) for r in results] == [
        ("sdpa", 1, [[4]]), ("stof", 1, [[4]]), ("sdpa", 2, [[2], [2]]), ("stof", 2, [[2], [2]]),
    ]  # fmt: skip
    assert all(r["status"] == "ok" and r["time_ms"] > 0 for r in results), results
    assert path.exists() and parallel.table(data).row_count == 4


def test_what_goes_wrong_in_a_process_is_told(tmp_path, monkeypatch):
    def measure(*arguments):
        raise RuntimeError("no memory")

    def launch(command, **options):
        with pytest.raises(RuntimeError):
            parallel._main(tmp_path, ["stof"], CPU)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(parallel, "_measure", measure)
    monkeypatch.setattr(subprocess, "run", launch)
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(StofError, match="process 1 of 2: RuntimeError: no memory"):
            parallel._apart(tmp_path, ["stof"], CPU, 2)


def test_a_process_that_dies_is_told(tmp_path, monkeypatch):
    died = subprocess.CompletedProcess([], 1, stderr="Signal 9 (SIGKILL) received by PID 7")
    monkeypatch.setattr(subprocess, "run", lambda *_, **options: died)
    with pytest.raises(StofError, match="SIGKILL"):
        parallel._apart(tmp_path, ["stof"], CPU, 2)


def test_other_logits_are_wrong(tmp_path):
    parallel._prepare(tmp_path, 1, 60, CPU, SMALL)
    given = torch.load(tmp_path / "given.pt")
    torch.save({**given, "exact": given["exact"] * 1.1}, tmp_path / "given.pt")
    assert parallel._measure(tmp_path, ["stof"], CPU)[0]["status"] == "wrong"


def test_there_must_be_as_many_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(StofError, match="on 2 GPUs: there are 1 here"):
        parallel.run(device=torch.device("cuda"))


def test_contestants_have_names():
    with pytest.raises(StofError, match="no contestant is called 'flash'; there are sdpa, stof"):
        parallel.run(["flash"], device=CPU)
