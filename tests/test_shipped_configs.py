"""Tuned results that come with the package."""

import pytest
import torch
import transformers

from stof_hf.bench.zoo import ZOO, cells
from stof_hf.fusion.install import find
from stof_hf.fusion.layer_ops import SEGMENTS, Scheme
from stof_hf.fusion.runners import TEMPLATES
from stof_hf.tuning import cache
from stof_hf.tuning.cache import Key
from stof_hf.tuning.environment import Environment

HERE = Environment("NVIDIA H200", None, "13.0", "2.13.0", "3.6.0", "0.1.0", "other sources")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STOF_CACHE_DIR", str(tmp_path))


def key(config, batch, tokens, mask):
    return Key.of(config, batch, tokens, phase="forward", dtype=torch.float16, mask=mask)


@pytest.mark.parametrize("name", ZOO)
def test_models_of_the_paper_are_tuned_for_an_h200(name):
    for cell in cells([name]):
        wanted = key(ZOO[name].config(cell.tokens), cell.batch, cell.tokens, "1/8")
        found = [k for k, _ in cache.results(wanted.model, "float16", HERE)]
        sizes = {(k.batch, k.seq_len) for k in found}
        assert (wanted.batch, wanted.seq_len) in sizes, cell


def test_checkpoints_share_them_whatever_lengths_and_vocabularies_they_have():
    gpt2 = transformers.GPT2Config(n_positions=1024, vocab_size=50000)
    vit = transformers.ViTConfig(image_size=224)
    for config in (transformers.BertConfig(), gpt2, vit):
        assert cache.results(cache.fingerprint(config), "float16", HERE), config.model_type


def test_they_are_of_this_gpu_alone():
    elsewhere = Environment("NVIDIA Nowhere", *list(vars(HERE).values())[1:])
    model = cache.fingerprint(transformers.BertConfig())
    assert not cache.results(model, "float16", elsewhere)


@pytest.mark.parametrize("name", ZOO)
def test_their_schemes_and_parameters_still_exist(name):
    config = ZOO[name].config(128)
    model = cache.fingerprint(config)
    for layers in ("num_hidden_layers", "num_layers", "num_decoder_layers"):
        if layers in config.to_dict():
            setattr(config, layers, 1)
    layers = {f.kind: f.layer for f in find(ZOO[name].cls(config).half().eval()) if not f.reason}
    seen = set()
    for _, entry in cache.results(model, "float16", HERE):
        for kind in entry.layers.keys() & layers.keys():
            seen.add(kind)
            scheme = Scheme.decode(layers[kind].names, entry.layers[kind].scheme)
            assert scheme.legal
            for bounds, segment in zip(scheme.bounds, entry.layers[kind].segments, strict=True):
                template = TEMPLATES[segment.template]
                assert segment.template in SEGMENTS[layers[kind].names[slice(*bounds)]]
                assert segment.params.keys() == template.space.keys()
                assert all(value in template.space[n] for n, value in segment.params.items())
    assert seen
