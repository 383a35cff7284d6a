"""Patches: layers told as operators compute what the models' own code does, and go in and out."""

import copy
import pickle

import pytest
import torch
import transformers

import stof_hf
from stof_hf.fusion import fused
from stof_hf.fusion.install import find, install, restore
from stof_hf.fusion.layer_ops import schemes

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
GQA = SIZES | {"num_key_value_heads": 2}
MODELS = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**SIZES)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=97, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
        )
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GQA)),
    "llama with biases": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**GQA, attention_bias=True, mlp_bias=True)
    ),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**GQA)),
    "modernbert": lambda: transformers.ModernBertModel(
        transformers.ModernBertConfig(**SIZES, pad_token_id=0, local_attention=16)
    ),
    "vit": lambda: transformers.ViTModel(
        transformers.ViTConfig(
            **{k: v for k, v in SIZES.items() if k != "vocab_size"}, image_size=28, patch_size=4
        )
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GQA)),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    made = MODELS[request.param]().eval()
    made.set_attn_implementation("stof")
    stof_hf.set_pattern(made, stof_hf.patterns.SlidingWindow(20, 20))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return made


@pytest.fixture
def inputs(model):
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 28, 28)}
    ids = torch.randint(3, 97, (2, 50), generator=torch.Generator().manual_seed(1))
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(50) >= torch.tensor([[0], [7]])).long(),
    }


def first(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.fixture
def ran(monkeypatch):
    """Layers that ran fused."""
    found, run = [], fused.Fused.run

    def counted(self, module, *args):
        out = run(self, module, *args)
        if out is not None:
            found.append(module)
        return out

    monkeypatch.setattr(fused.Fused, "run", counted)
    return found


def test_outputs_and_state_are_what_they_were(model, inputs, ran):
    want, names = first(model, inputs), list(model.state_dict())
    assert len(install(find(model))) == 2 and len(install(find(model))) == 2 and not ran
    torch.testing.assert_close(first(model, inputs), want)
    assert len(ran) == 2
    assert list(model.state_dict()) == names
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        ran.clear()
        torch.testing.assert_close(first(other, inputs), want)
        assert len(ran) == 2
        assert restore(other) == 2
    assert restore(model) == 2 and restore(model) == 0
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
    layers = [found.layer for found in find(model)]
    assert len(layers) == 2 and all(len(schemes(layer.names)) >= 32 for layer in layers)
