"""unpad on a GPU: fp16 and bf16, one synchronisation a forward, and CUDA graphs beside it."""

import warnings

import pytest
import torch
from layers import build
from taping import ids

import stof_hf
from stof_hf import StofWarning, patterns
from stof_hf.fusion.install import find, install
from stof_hf.runtime.real_tokens import RealTokens

pytestmark = pytest.mark.gpu

MODELS = ["bert", "roberta", "electra", "distilbert", "modernbert"]
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
LENGTHS = (64, 150, 257, 400)


def call(left=False):
    mask = torch.arange(400) < torch.tensor(LENGTHS)[:, None]
    mask = (mask.flip(1) if left else mask).to("cuda", torch.int64)
    return {"input_ids": ids(*mask.shape).cuda(), "attention_mask": mask}


def pair(name, dtype=torch.float16):
    model, plain = (build(name).to("cuda", dtype) for _ in range(2))
    stof_hf.unpad(model)
    return model, plain


@torch.no_grad()
def compare(model, plain, inputs):
    mask = inputs["attention_mask"].bool()
    got, wanted = model(**inputs)[0], plain(**inputs)[0]
    assert not got[~mask].any() and wanted[~mask].any()
    torch.testing.assert_close(got[mask], wanted[mask], atol=TOLERANCE[got.dtype], rtol=1e-2)


@pytest.fixture(autouse=True)
def no_fallbacks():
    with warnings.catch_warnings():
        warnings.simplefilter("error", StofWarning)
        yield


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_outputs(name, dtype, left):
    model, plain = pair(name, dtype)
    compare(model, plain, call(left))
    for one in (model, plain):
        stof_hf.set_pattern(one, patterns.Longformer(40))
    compare(model, plain, call(left))
    install(find(model))
    compare(model, plain, call(left))


@pytest.mark.parametrize("name", MODELS)
def test_gradients(name):
    model, plain = pair(name, torch.float32)
    inputs = call()
    mask = inputs["attention_mask"].bool()
    for one in (model, plain):
        (one(**inputs)[0][mask] ** 2).mean().backward()
    for got, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        if wanted.grad is not None:
            scale = float(wanted.grad.abs().max())
            torch.testing.assert_close(got.grad, wanted.grad, atol=1e-2 * scale + 1e-6, rtol=1e-2)


@pytest.mark.parametrize("replaced", [False, True], ids=["", "replaced"])
@pytest.mark.parametrize("name", MODELS)
def test_a_forward_waits_once(name, replaced):
    model, _ = pair(name)
    if replaced:
        install(find(model))
    with torch.no_grad():
        model(**call())
        # Other lengths: nothing that depends on them is there yet.
        inputs = call(left=True)
        inputs["attention_mask"][0, :-30] = 0
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                model(**inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in said if "synchroniz" in str(one.message)]
    assert len(waits) == 1, waits


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_captures_and_graphs_are_of_the_padded_forward(name, monkeypatch):
    model, plain = pair(name)
    stof_hf.use_graphs(model)
    inputs = call()
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        wanted = plain(**inputs)[0]
        model(**inputs)
        made, init = [], RealTokens.__init__

        def noted(self, *args):
            made.append(self)
            init(self, *args)

        monkeypatch.setattr(RealTokens, "__init__", noted)
        for _ in range(3):
            got = model(**inputs)[0]
            torch.testing.assert_close(got[mask], wanted[mask], atol=2e-2, rtol=1e-2)
    assert not made and len(model.__dict__["_stof_graphs"]._graphs) == 1
    large = {key: x.repeat(3, 1) for key, x in inputs.items()}
    compare(model, plain, large)
    assert len(made) == 1
