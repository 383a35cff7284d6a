"""The models of `stof bench model`, at their sizes, with and without padding."""

import pytest
import torch

import stof_hf
from stof_hf.bench.zoo import ZOO, Problem
from stof_hf.tuning import cache

TOKENS = {"vit_base": 65}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "folder", lambda: tmp_path / "tuning")


def padding(problem, batch, tokens, device):
    """Masks of sequences of several lengths, by the names of a model's arguments."""
    lengths = torch.linspace(tokens // 3, tokens - 1, batch, device=device).long()
    valid = (torch.arange(tokens, device=device) < lengths[:, None]).long()
    names = [name.replace("input_ids", "attention_mask") for name in problem.inputs]
    return dict.fromkeys(names, valid), valid.bool()


@torch.no_grad()
def forward(model, inputs, real):
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return model(**inputs)[0].float()[real]


def check(name, padded, batch, device, dtype, **options):
    tokens = TOKENS.get(name, 128)
    problem = Problem(name, batch, tokens, dtype, device)
    given, real = dict(problem.inputs), ...
    if padded:
        masks, real = padding(problem, batch, tokens, device)
        given |= masks
    exact = forward(problem.model("eager", torch.float32), given, real)
    plain = forward(problem.model("eager"), given, real)
    model = problem.model("stof")
    before = forward(model, given, real)
    assert stof_hf.tune(model, given, progress=False, **options).installed
    stof_hf.use_graphs(model)
    errors = [float((forward(model, given, real) - exact).norm() / exact.norm()) for _ in range(3)]
    assert max(errors) <= 1.25 * float((plain - exact).norm() / exact.norm()) + 1e-6
    stof_hf.restore(model)
    assert torch.equal(forward(model, given, real), before)


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "padded"])
@pytest.mark.parametrize("name", ZOO)
def test_tuned_models_are_as_exact_as_plain_ones(name, padded):
    if padded and not ZOO[name].masked:
        pytest.skip("images have no padding")
    check(name, padded, 4, torch.device("cuda"), torch.float16, budget_s=6)


@pytest.mark.gpu
def test_results_of_a_mask_that_only_the_gpu_holds_apply():
    problem = Problem("bert_base", 2, 128, torch.float16, torch.device("cuda"))
    options = {"budget_s": 2, "progress": False}
    tuned = stof_hf.tune(problem.sparse_model(), problem.inputs, **options)
    applied = stof_hf.apply_tuned(problem.sparse_model(), strict=True)
    assert applied.installed == tuned.installed > 0
