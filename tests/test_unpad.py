"""unpad: padded batches on their real tokens alone, against the same model without it."""

import copy
import pickle
import warnings
import weakref

import pytest
import torch
import transformers
from layers import build, sizes
from taping import TapeRecorder, ids, same
from torch import nn

import stof_hf
from stof_hf import SparseMask, StofWarning, UnsupportedError, patterns
from stof_hf.fusion.install import find, install
from stof_hf.runtime import graphs, unpadded
from stof_hf.runtime.real_tokens import RealTokens, round_up
from stof_hf.runtime.recorder import no_collection

MODELS = ["bert", "roberta", "electra", "distilbert", "modernbert"]
#: The sums of another number of rows may be in another order.
TOLERANCE = 5e-6


@pytest.fixture(autouse=True)
def no_fallbacks(fresh_warnings):
    with warnings.catch_warnings():
        warnings.simplefilter("error", StofWarning)
        yield


@pytest.fixture
def packings(monkeypatch):
    """Batches that were computed on their real tokens alone."""
    made, init = [], RealTokens.__init__

    def noted(self, *args):
        init(self, *args)
        made.append(self)

    monkeypatch.setattr(RealTokens, "__init__", noted)
    return made


def right(batch, length):
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(1, batch):
        mask[row, length - 17 * row :] = 0
    return mask


def with_holes(batch, length):
    mask = right(batch, length)
    mask[0, 20:30] = 0
    mask[1, 0] = 0
    return mask


def with_an_empty_row(batch, length):
    mask = right(batch, length)
    mask[1] = 0
    return mask


PADDINGS = {
    "right": right,
    "left": lambda batch, length: right(batch, length).flip(1),
    "both": lambda batch, length: right(batch, length) * right(batch, length).flip(0, 1),
    "empty row": with_an_empty_row,
    "bool": lambda batch, length: right(batch, length).bool(),
}


def pair(name, **options):
    model, plain = build(name, **options), build(name, **options)
    stof_hf.unpad(model)
    return model, plain


def call(mask, seed=0):
    return {"input_ids": ids(*mask.shape, seed), "attention_mask": mask}


def compare(model, plain, inputs, packings, **options):
    """Outputs are the same at real tokens, zeros elsewhere."""
    before = len(packings)
    with torch.no_grad():
        got, wanted = model(**inputs, **options), plain(**inputs, **options)
    assert len(packings) == before + 1
    mask = inputs["attention_mask"].bool()
    real, expected = dict(got), dict(wanted)
    if "pooler_output" in real:
        # Of the first token, where that is one.
        begins = mask[:, 0]
        pooled = real.pop("pooler_output")[begins], expected.pop("pooler_output")[begins]
        same(*pooled, None, TOLERANCE)
    same(real, expected, mask, TOLERANCE)
    assert not got.last_hidden_state[~mask].any()
    return got


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", MODELS)
def test_outputs(name, padding, packings):
    model, plain = pair(name)
    got = compare(model, plain, call(PADDINGS[padding](3, 70)), packings)
    assert type(got).__name__.startswith("BaseModelOutput")


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_one(name, packings):
    model, plain = pair(name)
    compare(model, plain, call(right(3, 70)[1:2]), packings)
    compare(model, plain, call(right(3, 70)[1:2].flip(1)), packings)


@pytest.mark.parametrize("name", MODELS[:-1])
def test_holes(name, packings):
    compare(*pair(name), call(with_holes(3, 70)), packings)


def test_holes_change_distances(packings):
    model, plain = pair("modernbert")
    inputs = call(with_holes(3, 70))
    with torch.no_grad():
        with pytest.warns(StofWarning, match="runs padded: padding in the middle"):
            got = model(**inputs)
        same(model(**inputs), plain(**inputs))
        same(got, plain(**inputs))


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_without_any_token(name, packings):
    model, _ = pair(name)
    with torch.no_grad():
        out = model(**call(torch.zeros(2, 70, dtype=torch.int64)))
    assert len(packings) == 1 and not out.last_hidden_state.any()


@pytest.mark.parametrize("name", MODELS)
def test_other_inputs(name, packings):
    model, plain = pair(name)
    mask = right(3, 70)
    noise = torch.Generator().manual_seed(0)
    embeds = torch.randn(3, 70, 32 if name == "electra" else 64, generator=noise)
    given = {"inputs_embeds": embeds, "attention_mask": mask}
    if model.get_input_embeddings().embedding_dim == embeds.shape[2]:
        compare(model, plain, given, packings)
    positions = torch.arange(70).flip(0)[None]
    compare(model, plain, {**call(mask), "position_ids": positions}, packings)
    compare(model, plain, {**call(mask), "position_ids": positions.expand(3, -1)}, packings)
    if name in ("bert", "electra"):
        types = (torch.arange(70) > 20).long().expand(3, -1)
        compare(model, plain, {**call(mask), "token_type_ids": types}, packings)


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states(name, packings):
    model, plain = pair(name)
    mask = right(3, 70)
    got = compare(model, plain, call(mask), packings, output_hidden_states=True)
    assert len(got.hidden_states) == 3 and got.hidden_states[-1] is got.last_hidden_state
    assert not any(states[~mask.bool()].any() for states in got.hidden_states)
    with torch.no_grad():
        several = model(**call(mask), output_hidden_states=True, return_dict=False)
    same(several[-1], got.hidden_states)
    with pytest.raises(UnsupportedError, match="attention weights"):
        model(**call(mask), output_attentions=True)


HEADS = {
    "bert": ["ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"],
    "distilbert": ["ForMaskedLM", "ForSequenceClassification", "ForQuestionAnswering"],
    "modernbert": ["ForMaskedLM", "ForSequenceClassification"],
}


def head(name, kind):
    config = build(name).config
    config.num_labels = 2
    torch.manual_seed(0)
    prefix = {"bert": "Bert", "distilbert": "DistilBert", "modernbert": "ModernBert"}[name]
    cls = getattr(transformers, f"{prefix}{kind}")
    return cls._from_config(config, attn_implementation="stof").eval()


@pytest.mark.parametrize("name, kind", [(name, kind) for name in HEADS for kind in HEADS[name]])
def test_heads(name, kind, packings):
    model, plain = head(name, kind), head(name, kind)
    stof_hf.unpad(model)
    inputs = call(right(3, 70))
    per_token = kind != "ForSequenceClassification"
    if kind in ("ForMaskedLM", "ForTokenClassification"):
        labels = ids(3, 70, 5) % 2
        inputs["labels"] = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        got, wanted = model(**inputs), plain(**inputs)
    assert len(packings) == 1
    same(got, wanted, inputs["attention_mask"] if per_token else None, TOLERANCE)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_in_training(name, checkpointing, packings):
    model, plain = pair(name)
    for one in (model, plain):
        one.train()
        for module in one.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for key in ("dropout_prob", "attention_dropout"):
                if isinstance(getattr(module, key, None), float):
                    setattr(module, key, 0.0)
        if checkpointing:
            one.gradient_checkpointing_enable({"use_reentrant": False})
        one.zero_grad()
    inputs = call(right(3, 70))
    mask = inputs["attention_mask"].bool()
    weights = torch.randn(int(mask.sum()), 64, generator=torch.Generator().manual_seed(0))
    for one in (model, plain):
        (one(**inputs).last_hidden_state[mask] * weights).sum().backward()
    assert len(packings) == 1
    for (path, got), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (got.grad is None) == (wanted.grad is None), path
        if got.grad is not None:
            torch.testing.assert_close(got.grad, wanted.grad, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_a_fallback_to_sdpa_is_computed_padded(packings, training):
    model, plain = pair("bert")
    model.config.stof = {"version": 1, "fallback": "sdpa", "patterns": []}
    for one in (model, plain):
        one.train(training)
    inputs = call(right(3, 70))
    torch.manual_seed(0)
    with pytest.warns(StofWarning, match='padded: fallback="sdpa" is set'):
        got = model(**inputs)
    torch.manual_seed(0)
    same(got, plain(**inputs))
    assert not packings
    model(**inputs)


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert"])
def test_what_is_computed_padded(name, packings):
    model, plain = pair(name)
    given = ids(3, 70)
    whole = torch.ones(3, 70, dtype=torch.int64)
    allowed = torch.rand(3, 1, 70, 70) < 0.5
    masks = [None, whole, allowed | torch.eye(70, dtype=torch.bool)]
    with torch.no_grad():
        for mask in masks:
            same(model(given, attention_mask=mask), plain(given, attention_mask=mask))
        with unpadded.padded():
            same(model(**call(right(3, 70))), plain(**call(right(3, 70))))
        for one in (model, plain):
            one.set_attn_implementation("sdpa")
        same(model(**call(right(3, 70))), plain(**call(right(3, 70))))
    assert not packings


def test_results_are_gone_with_their_last_name(packings):
    model, _ = pair("bert")
    with torch.no_grad(), no_collection():
        out = model(**call(right(3, 60)))
        gone = weakref.ref(out.last_hidden_state)
        del out
        assert packings and gone() is None


def test_a_mask_that_is_on_a_gpu_is_read_once(monkeypatch, packings):
    # There, nobody looks whether it is all ones before.
    monkeypatch.setattr("stof_hf.hf.masks._all_ones_for_free", lambda _: False)
    model, plain = pair("modernbert")
    reads, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (reads.append(self), cpu(self))[1])
    with torch.no_grad():
        whole = call(torch.ones(3, 70, dtype=torch.int64))
        same(model(**whole), plain(**whole))
        assert len(reads) == 1 and not packings
        model(**call(right(3, 70)))
    assert len(reads) == 2 and len(packings) == 1


def test_compiled_graphs_hold_the_padded_forward(packings):
    model, plain = pair("bert")
    inputs = call(right(3, 70))
    with torch.no_grad():
        got = torch.compile(model, backend="eager", fullgraph=True)(**inputs)
        same(got, plain(**inputs), None, TOLERANCE)
    assert not packings


PATTERNS = {
    "window": patterns.SlidingWindow(9, 9),
    "longformer": patterns.Longformer(5, (0, 30)),
    "chunked": patterns.Chunked(24) | patterns.GlobalTokens((0,)),
}


@pytest.mark.parametrize("padding", ["right", "left", "empty row"])
@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_patterns(name, kind, padding, packings):
    model, plain = pair(name)
    inputs = call(PADDINGS[padding](3, 70))
    for one in (model, plain):
        stof_hf.set_pattern(one, PATTERNS[kind])
    compare(model, plain, inputs, packings)
    compare(copy.deepcopy(model), plain, inputs, packings)
    layer = "layers.1" if name == "modernbert" else "encoder.layer.1"
    for one in (model, plain):
        stof_hf.set_pattern(one, None)
        stof_hf.set_pattern(one, PATTERNS[kind], modules=layer)
        stof_hf.set_pattern(one, patterns.SlidingWindow(30, 30))
    compare(model, plain, inputs, packings)


def test_patterns_of_a_configuration(tmp_path, packings):
    plain = build("bert")
    stof_hf.set_pattern(plain, patterns.Longformer(5))
    plain.save_pretrained(tmp_path)
    model = transformers.BertModel.from_pretrained(tmp_path)
    stof_hf.unpad(model)
    compare(model, plain, call(right(3, 70)), packings)


def test_patterns_that_cannot_be_packed(packings):
    model, plain = pair("bert")
    for one in (model, plain):
        stof_hf.set_pattern(one, patterns.BigBird(3, random_blocks=1, block_size=16))
    inputs = call(right(3, 70))
    with torch.no_grad():
        with pytest.warns(StofWarning, match="runs padded: its pattern BigBird") as said:
            got = model(**inputs)
        assert len(said) == 1
        same(got, plain(**inputs))
        same(model(**inputs), plain(**inputs))
    assert not packings


@pytest.mark.parametrize("name", MODELS)
def test_replaced_layers(name, packings, ran):
    model, plain = pair(name)
    count = len(install(find(model)))
    compare(model, plain, call(right(3, 70)), packings)
    assert len(ran) == count
    stof_hf.set_pattern(model, patterns.SlidingWindow(9, 9))
    stof_hf.set_pattern(plain, patterns.SlidingWindow(9, 9))
    compare(model, plain, call(right(3, 70)), packings)
    assert len(ran) == 2 * count
    assert stof_hf.restore(model) == count


def test_tuning_measures_the_rows_that_layers_get(packings, monkeypatch, tmp_path):
    monkeypatch.setenv("STOF_CACHE_DIR", str(tmp_path))
    model, plain = pair("bert")
    inputs = call(right(3, 70))
    report = stof_hf.tune(model, inputs, budget_s=0.5, progress=False)
    rows = {(layer.batch_size, layer.seq_len) for layer in report.layers if layer.count == 2}
    assert rows == {(1, packings[0].rows)}
    compare(model, plain, inputs, packings)


@pytest.mark.parametrize("name", ["bert", "modernbert"])
@pytest.mark.parametrize("first", ["unpad", "use_graphs"])
def test_graphs_take_small_calls(name, first, monkeypatch, packings):
    monkeypatch.setattr(graphs, "Recorder", TapeRecorder)
    model, plain = build(name), build(name)
    if first == "unpad":
        stof_hf.unpad(model)
    stof_hf.use_graphs(model)
    if first == "use_graphs":
        stof_hf.unpad(model)
    recorder = model.__dict__["_stof_graphs"]._recorder
    inputs = call(right(3, 70))
    with torch.no_grad():
        for _ in range(4):
            same(model(**inputs), plain(**inputs), inputs["attention_mask"], TOLERANCE)
    # The first call of its kind is not captured.
    assert (recorder.captures, recorder.replays) == (1, 3) and len(packings) == 1
    monkeypatch.setattr("stof_hf.runtime.buckets._MOST_TOKENS", 100)
    for _ in range(3):
        compare(model, plain, inputs, packings)
    assert recorder.replays == 3
    again = pickle.loads(pickle.dumps(model))
    compare(again, plain, inputs, packings)
    stof_hf.restore(model)
    assert type(model) is type(plain)
    with torch.no_grad():
        same(model(**inputs), plain(**inputs))


@pytest.mark.parametrize("name", MODELS)
def test_state(name, packings, tmp_path):
    model, plain = pair(name)
    inputs = call(right(3, 70))
    cls = type(plain)
    assert isinstance(model, cls) and type(model).__name__ == cls.__name__
    assert list(model.state_dict()) == list(plain.state_dict())
    model.save_pretrained(tmp_path / "unpadded")
    plain.save_pretrained(tmp_path / "plain")
    saved, wanted = (
        {file.name: file.read_bytes() for file in (tmp_path / kind).iterdir()}
        for kind in ("unpadded", "plain")
    )
    assert saved == wanted
    loaded = cls.from_pretrained(tmp_path / "unpadded", attn_implementation="stof")
    assert not unpadded.unpads(loaded)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        compare(other, plain, inputs, packings)
        stof_hf.restore(other)
        assert type(other) is cls and not unpadded.unpads(other)
    stof_hf.unpad(model)
    compare(model, plain, inputs, packings)
    assert stof_hf.restore(model) == 0 and not unpadded.unpads(model)
    with torch.no_grad():
        same(model(**inputs), plain(**inputs), None, 0)


def test_what_cannot_be_unpadded():
    with pytest.raises(UnsupportedError, match="GPT2LMHeadModel has no encoder"):
        stof_hf.unpad(build("gpt2"))
    with pytest.raises(UnsupportedError, match=r'set_attn_implementation\("stof"\)'):
        stof_hf.unpad(build("bert", "sdpa"))
    for options, reason in (
        ({"is_decoder": True}, "decoder"), ({"chunk_size_feed_forward": 2}, "chunk_size"),
    ):  # fmt: skip
        config = transformers.BertConfig(**sizes(64), **options)
        model = transformers.BertModel._from_config(config, attn_implementation="stof")
        with pytest.raises(UnsupportedError, match=f"BertEncoder cannot be unpadded: .*{reason}"):
            stof_hf.unpad(model)
        assert not unpadded.unpads(model)


def test_a_given_mask_with_padding(packings):
    model, plain = pair("bert")
    mask = right(3, 70)
    given = SparseMask.from_pattern(patterns.SlidingWindow(5, 5), 70, padding=mask.bool())
    inputs = {"input_ids": ids(3, 70), "attention_mask": given}
    with torch.no_grad():
        got, wanted = model(**inputs)[0], plain(**inputs)[0]
    same(got[mask.bool()], wanted[mask.bool()], None, TOLERANCE)
    assert len(packings) == 1


def test_rows_come_in_few_sizes():
    for count in range(5000):
        rows = round_up(count)
        assert rows >= max(count, 64) and rows % 64 == 0
        assert rows - count < max(64, count / 32 + 1) or count == 0
    assert len({round_up(count) for count in range(8192, 16384)}) <= 33
