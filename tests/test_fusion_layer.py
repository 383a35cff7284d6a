"""Patches: layers told as operators compute what the models' own code does, and go in and out."""

import copy
import pickle

import pytest
import torch
from layers import MODELS, blocks, build, first, inputs_of

import stof_hf
from stof_hf.fusion.install import find, install, restore
from stof_hf.fusion.layer_ops import schemes


@pytest.fixture(params=MODELS)
def model(request):
    made = build(request.param)
    stof_hf.set_pattern(made, stof_hf.patterns.SlidingWindow(20, 20))
    return made


@pytest.fixture
def inputs(model):
    return inputs_of(model)


def test_outputs_and_state_are_what_they_were(model, inputs, ran):
    want, names = first(model, inputs), list(model.state_dict())
    count = len(find(model))
    assert len(install(find(model))) == len(install(find(model))) == count and not ran
    torch.testing.assert_close(first(model, inputs), want)
    assert len(ran) == count
    assert list(model.state_dict()) == names
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        ran.clear()
        torch.testing.assert_close(first(other, inputs), want)
        assert len(ran) == count
        assert restore(other) == count
    assert restore(model) == count and restore(model) == 0
    assert torch.equal(first(model, inputs), want)


def test_hidden_states_are_recorded(model, inputs):
    with torch.no_grad():
        want = model(**inputs, output_hidden_states=True).hidden_states
        install(find(model))
        got = model(**inputs, output_hidden_states=True).hidden_states
    assert len(got) == len(want) == 3
    torch.testing.assert_close(got, want)


def test_gradients_take_the_layers_own_code(model, inputs):
    install(find(model))
    model(**inputs)[0].sum().backward()
    assert all(
        p.grad is not None for n, p in model.named_parameters() if "query" in n or "q_proj" in n
    )


def test_generation(model, inputs):
    if not model.can_generate():
        pytest.skip("an encoder")
    options = {"max_new_tokens": 5, "do_sample": False}
    want = model.generate(**inputs, **options)
    install(find(model))
    assert torch.equal(model.generate(**inputs, **options), want)


def test_weights_that_change_are_seen(model, inputs):
    install(find(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    got = first(model, inputs)
    restore(model)
    torch.testing.assert_close(got, first(model, inputs))


def test_every_layer_has_legal_schemes(model):
    layers = [found.layer for found in blocks(model) if found.reason is None]
    assert layers and all(len(schemes(layer.names)) >= 16 for layer in layers)
