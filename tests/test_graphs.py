"""use_graphs on the CPU, with tapes in the place of CUDA graphs: see tests/taping.py."""

import copy
import pickle
import warnings
import weakref

import pytest
import torch
import transformers
from layers import build, inputs_of, sizes
from taping import TapeRecorder, compare, ids, masked, same
from torch import nn

import stof_hf
from stof_hf import StofWarning, UnsupportedError, patterns
from stof_hf.fusion.install import find, install
from stof_hf.masks import cache as mask_cache
from stof_hf.runtime import graphs
from stof_hf.runtime.buckets import Size, round_up
from stof_hf.runtime.recorder import OnDevice, no_collection

TEXT = ["bert", "roberta", "modernbert", "gpt2", "llama", "mistral", "qwen2"]
DECODERS = {"gpt2", "llama", "mistral", "qwen2"}


@pytest.fixture(autouse=True)
def taping(monkeypatch):
    """Tapes, and warnings as errors: a call that is not captured must say so."""
    monkeypatch.setattr(graphs, "Recorder", TapeRecorder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", StofWarning)
        yield


def graphed(name, implementation="stof", **options):
    """Twice the same model, one of them with graphs, and the latter's recorder."""
    model, plain = build(name, implementation), build(name, implementation)
    stof_hf.use_graphs(model, **options)
    return model, plain, TapeRecorder.latest


@pytest.mark.parametrize("implementation", ["stof", "sdpa", "eager"])
@pytest.mark.parametrize("name", TEXT)
def test_one_graph_serves_every_length_and_mask_of_its_bucket(name, implementation):
    model, plain, recorder = graphed(name, implementation)
    options = {"use_cache": False} if name in DECODERS else {}
    calls = [masked(2, 50), masked(2, 50), masked(2, 41, left=7), masked(2, 63, right=9)]
    calls += [masked(2, 64, 5, 5), masked(2, 33, seed=3), masked(2, 64)]
    compare(model, plain, calls, **options)
    assert (recorder.captures, recorder.replays) == (1, 6)
    compare(model, plain, [{"input_ids": ids(2, n, n)} for n in (64, 64, 40, 63, 1, 64)], **options)
    # An encoder is given a mask where it is padded: as if it had been called with one.
    assert recorder.captures == 2 and recorder.replays >= 10


@pytest.mark.parametrize("implementation", ["stof", "sdpa", "eager"])
def test_images_have_graphs_of_their_own_shape(implementation):
    model, plain, recorder = graphed("vit", implementation)
    compare(model, plain, [inputs_of(model) for _ in range(4)])
    compare(model, plain, [{"pixel_values": torch.randn(3, 3, 28, 28)} for _ in range(3)])
    assert (recorder.captures, recorder.replays) == (2, 5)


@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_no_mask_is_made_where_there_is_none(name, monkeypatch):
    attention, seen = nn.functional.scaled_dot_product_attention, []

    def spy(*args, attn_mask=None, **options):
        seen.append(attn_mask)
        return attention(*args, attn_mask=attn_mask, **options)

    model, _, recorder = graphed(name, "sdpa")
    inputs = inputs_of(model) if name == "vit" else {"input_ids": ids(2, 64)}
    options = {} if name == "vit" else {"use_cache": False}
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    # As while a CUDA graph is captured.
    monkeypatch.setattr(transformers.utils.import_utils, "is_cuda_stream_capturing", lambda: True)
    with torch.no_grad():
        model(**inputs, **options)
        seen.clear()
        model(**inputs, **options)
    assert recorder.captures == 1 and seen and not any(mask is not None for mask in seen)


@pytest.mark.parametrize("implementation", ["stof", "sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_whole_masks_have_graphs_where_plans_do_not_follow_from_them(name, implementation):
    model, plain, recorder = graphed(name, implementation)
    calls = []
    for seed in range(4):
        torch.manual_seed(seed)
        allowed = (torch.rand(1, 1, 50, 50) < 0.5) | torch.eye(50, dtype=torch.bool)
        allowed = allowed.tril() if name == "llama" else allowed
        if implementation != "sdpa":
            allowed = torch.zeros(allowed.shape).masked_fill_(~allowed, torch.finfo().min)
        calls.append({"input_ids": ids(2, 50), "attention_mask": allowed})
    with torch.no_grad():
        for call in calls:
            same(model(**call, use_cache=False)[0], plain(**call, use_cache=False)[0])
    assert recorder.captures == (implementation != "stof")


def test_batches_are_padded_too():
    model, plain, recorder = graphed("bert")
    calls = [masked(n, 50, left=4, right=2, seed=n) for n in (3, 4, 3)]
    compare(model, plain, calls)
    compare(model, plain, [{"input_ids": ids(n, 64)} for n in (4, 3, 3)])
    assert (recorder.captures, recorder.replays) == (2, 4)


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert", "gpt2", "llama"])
def test_replaced_layers_and_patterns(name):
    model, plain = build(name), build(name)
    for one in (model, plain):
        install(find(one))
        stof_hf.set_pattern(one, patterns.Longformer(16, (0,)), persist=False)
    stof_hf.use_graphs(model)
    recorder = TapeRecorder.latest
    options = {"use_cache": False} if name in DECODERS else {}
    compare(model, plain, [masked(2, n, left=3) for n in (50, 50, 41, 64)], **options)
    assert recorder.replays == 3
    stof_hf.set_pattern(model, None)
    stof_hf.set_pattern(plain, None)
    compare(model, plain, [masked(2, n, left=3) for n in (50, 41)], **options)
    assert recorder.captures == 2


def test_masks_that_others_capture_are_not_forgotten(monkeypatch):
    class OnGpu:
        device = torch.device("cuda")

    mask = OnGpu()
    monkeypatch.setattr(mask_cache, "_built", lambda *_: mask)
    monkeypatch.setattr(mask_cache, "_captured", captured := set())
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda on=capturing: on)
        with mask_cache.noting():
            mask_cache.mask_for(stof_hf.patterns.Full(), 64, 64, device=mask.device)
        assert not captured
        mask_cache.mask_for(stof_hf.patterns.Full(), 64, 64, device=mask.device)
        assert (mask in captured) == capturing


def test_masks_outlive_their_cache():
    model, plain, recorder = graphed("modernbert")
    calls = [masked(2, 50), masked(2, 50)]
    compare(model, plain, calls)
    (graph,) = model.__dict__["_stof_graphs"]._graphs.values()
    mask_cache.clear()
    held = [entry[0] for entry in graph._held]
    assert {mask.pattern for mask in held} and all(mask.q_len == 64 for mask in held)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_hidden_states_and_tuples(name):
    model, plain, recorder = graphed(name)
    inputs = [inputs_of(model, n) for n in (50, 40, 30)]
    options = {"use_cache": False} if name in DECODERS else {}
    compare(model, plain, inputs, output_hidden_states=True, **options)
    compare(model, plain, inputs, return_dict=False, **options)
    assert recorder.captures >= 2 and recorder.replays >= 4
    with torch.no_grad():
        for _ in range(2):
            out = model(**inputs[0], output_hidden_states=True, **options)
        wanted = plain(**inputs[0], output_hidden_states=True, **options)
    assert out.hidden_states[0].data_ptr() != out.hidden_states[1].data_ptr()
    if name == "bert":
        assert (out.hidden_states[-1] is out[0]) == (wanted.hidden_states[-1] is wanted[0])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_cache_that_a_forward_returns_is_the_callers(name):
    model, plain, recorder = graphed(name)
    with torch.no_grad():
        outs = [model(ids(2, n)) for n in (50, 50, 41)]
        assert recorder.replays == 2
        wanted = [plain(ids(2, n)) for n in (50, 50, 41)]
        for got, want in zip(outs, wanted, strict=True):
            same(got.logits, want.logits)
            pairs = zip(got.past_key_values.layers, want.past_key_values.layers, strict=True)
            for mine, theirs in pairs:
                same(mine.keys, theirs.keys)
                same(mine.values, theirs.values)
        more = [m(ids(2, 1), past_key_values=o.past_key_values) for m, o in
                ((model, outs[1]), (plain, wanted[1]))]  # fmt: skip
        same(more[0].logits, more[1].logits)
    assert recorder.replays == 2


@pytest.mark.parametrize("implementation", ["stof", "sdpa", "eager"])
def test_encoder_and_decoder(implementation):
    config = transformers.T5Config(
        vocab_size=97, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.set_attn_implementation(implementation)
    plain = copy.deepcopy(model)
    stof_hf.use_graphs(model)
    steps = []
    with torch.no_grad():
        for i in range(4):
            target = masked(2, 20, right=i)
            call = masked(2, 50, left=i, right=2 * i, seed=i)
            call |= {f"decoder_{name}": x for name, x in target.items()}
            got, wanted = model(**call), plain(**call)
            same(got.logits, wanted.logits, target["attention_mask"])
            steps.append((got, wanted, call))
        for got, wanted, call in steps:
            encoded = (got.encoder_last_hidden_state,), (wanted.encoder_last_hidden_state,)
            rest = {"attention_mask": call["attention_mask"], "decoder_input_ids": ids(2, 1)}
            mine = model(encoder_outputs=encoded[0], past_key_values=got.past_key_values, **rest)
            theirs = plain(
                encoder_outputs=encoded[1], past_key_values=wanted.past_key_values, **rest
            )
            same(mine.logits, theirs.logits)
    assert TapeRecorder.latest.replays == 3


def test_a_cache_with_windows_is_not_captured():
    model, plain, recorder = graphed("mistral")
    with torch.no_grad(), pytest.warns(StofWarning, match="use_cache=False") as said:
        for _ in range(5):
            same(model(**masked(2, 50)).logits, plain(**masked(2, 50)).logits)
    assert len(said) == 1 and not recorder.tapes


@pytest.mark.parametrize(
    "head",
    ["ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"],
)
@pytest.mark.parametrize("family", ["Bert", "ModernBert", "DistilBert", "Electra", "Roberta"])
def test_heads(family, head):
    config = getattr(transformers, f"{family}Config")
    options = sizes(64) | {"pad_token_id": 1}
    if family == "DistilBert":
        options = {"vocab_size": 97, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4}
    if family == "ModernBert":
        options |= {"classifier_pooling": "mean"}
    model = getattr(transformers, family + head)(config(**options)).eval()
    model.set_attn_implementation("stof")
    plain = copy.deepcopy(model)
    stof_hf.use_graphs(model)
    compare(model, plain, [masked(2, 50, 3, 4), masked(2, 50), masked(3, 20), masked(4, 64, 9)])
    assert TapeRecorder.latest.replays >= 2


def test_last_tokens_are_not_the_paddings():
    model, plain, recorder = graphed("llama")
    calls = [{"input_ids": ids(2, n)} for n in (50, 50, 41, 41)]
    compare(model, plain, calls, logits_to_keep=1, use_cache=False)
    assert (recorder.captures, recorder.replays) == (2, 2)


def test_a_classifier_that_reads_the_last_token_is_not_padded():
    config = transformers.LlamaConfig(**sizes(64), pad_token_id=0, use_cache=False)
    model = transformers.LlamaForSequenceClassification(config).eval()
    model.set_attn_implementation("sdpa")
    plain = copy.deepcopy(model)
    stof_hf.use_graphs(model)
    compare(model, plain, [masked(2, 50, right=9), masked(2, 50, right=1), masked(2, 40)])
    assert [t.outputs[0].shape[0] for t in TapeRecorder.latest.tapes] in ([2], [])


def test_sequences_up_to_the_last_position_are_not_padded_beyond_it():
    config = transformers.BertConfig(**sizes(64), max_position_embeddings=100)
    model = transformers.BertModel(config).eval()
    plain = copy.deepcopy(model)
    stof_hf.use_graphs(model)
    compare(model, plain, [masked(2, 90), masked(2, 90, left=5), masked(2, 60), masked(2, 60)])
    shapes = {tape.outputs.last_hidden_state.shape[1] for tape in TapeRecorder.latest.tapes}
    assert shapes == {90, 64}


def test_large_calls_run_by_themselves():
    model, plain, recorder = graphed("llama")
    compare(model, plain, [{"input_ids": ids(9, 1900)}] * 2, use_cache=False)
    assert recorder.captures == 0


def test_outputs_that_cannot_be_cut_are_captured_at_their_own_shape():
    model, plain, recorder = graphed("bert", "eager")
    compare(model, plain, [masked(2, 50)] * 5, output_attentions=True)
    tape = recorder.tapes[-1]
    assert tape.outputs.attentions[0].shape[-1] == 50 and recorder.replays >= 2


def test_inference_mode_and_no_grad_share_graphs():
    model, plain, recorder = graphed("gpt2")
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad):
        for n in (50, 41):
            with mode():
                call = masked(2, n, left=3)
                got, wanted = model(**call, use_cache=False), plain(**call, use_cache=False)
            same(got, wanted, call["attention_mask"])
            assert got.logits.is_inference() == (mode is torch.inference_mode)
    assert recorder.captures == 1


def test_least_recently_used_goes():
    model, plain, recorder = graphed("bert", max_graphs=2)
    for length in (64, 128, 64, 128, 64, 192, 192):
        compare(model, plain, [masked(1, length)])
    assert len(recorder.tapes) == 2 and recorder.captures == 3
    compare(model, plain, [masked(1, 64)])
    assert recorder.captures == 3
    compare(model, plain, [masked(1, 128)])
    assert recorder.captures == 4 and len(recorder.tapes) == 2


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_results_are_gone_with_their_last_name(name):
    """Not when Python looks for circles, until when several would fill a GPU's memory."""
    model, _, recorder = graphed(name)
    call = inputs_of(model)
    with torch.no_grad(), no_collection():
        for _ in range(4):
            out = model(**call, use_cache=False) if name == "gpt2" else model(**call)
        assert recorder.replays == 3
        gone = [weakref.ref(x) for x in out.values() if isinstance(x, torch.Tensor)]
        del out
        assert gone and all(one() is None for one in gone)


def test_results_are_nobody_elses():
    model, _, recorder = graphed("bert")
    with torch.no_grad():
        first, second, third = (model(**masked(2, 64, seed=i)) for i in range(3))
    kept = second.last_hidden_state.clone()
    third.last_hidden_state.zero_()
    recorder.tapes[0].poison()
    assert torch.equal(second.last_hidden_state, kept) and not first[0].isnan().any()


def test_weights_changed_in_place_count_and_moved_ones_are_captured_anew():
    model, plain, recorder = graphed("bert")
    compare(model, plain, [masked(2, 50)] * 2)
    with torch.no_grad():
        for one in (model, plain):
            one.encoder.layer[0].output.dense.weight.mul_(2)
    compare(model, plain, [masked(2, 50)])
    assert recorder.captures == 1
    for one in (model, plain):
        torch.manual_seed(1)
        one.encoder.layer[1].output.dense.weight = nn.Parameter(torch.randn(64, 96))
    compare(model, plain, [masked(2, 50)])
    assert recorder.captures == 2
    compare(model.bfloat16(), plain.bfloat16(), [masked(2, 50)], 0.05)
    assert recorder.captures == 3 and len(recorder.tapes) == 1
    model.set_attn_implementation("sdpa")
    compare(model, plain, [masked(2, 50)], 0.05)
    assert recorder.captures == 4


def test_what_runs_by_itself_without_a_word():
    model, plain, recorder = graphed("llama")
    call = masked(2, 50)
    with torch.no_grad():
        for _ in range(3):
            same(
                model(**call, labels=call["input_ids"]).loss,
                plain(**call, labels=call["input_ids"]).loss,
            )
            # Packed: the second document begins at 20.
            packed = {"input_ids": ids(1, 50), "position_ids": (torch.arange(50) % 20)[None]}
            same(model(**packed, use_cache=False), plain(**packed, use_cache=False))
            with torch.autocast("cpu", torch.bfloat16):
                model(**call, use_cache=False)
            model(**call, past_key_values=transformers.DynamicCache())
            dense = torch.ones(2, 1, 50, 50, dtype=torch.bool).tril()
            model(input_ids=call["input_ids"], attention_mask=dense, use_cache=False)
    model(**call, use_cache=False).logits.sum().backward()
    model.train()
    with torch.no_grad():
        model(**call, use_cache=False)
    assert recorder.captures == 0


def test_positions_with_a_mask_are_kept():
    model, plain, recorder = graphed("llama")
    calls = []
    for left in (0, 3, 9, 9):
        call = masked(2, 50, left=left)
        call["position_ids"] = (call["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        calls.append(call)
    compare(model, plain, calls, use_cache=False)
    assert recorder.replays == 3
    calls = [masked(3, n) | {"position_ids": torch.arange(2, n + 2)[None]} for n in (50, 50, 41)]
    compare(model, plain, calls, use_cache=False)
    assert recorder.replays == 5


def test_generate():
    model, plain, _ = graphed("llama")
    call = masked(2, 20, left=4)
    for cached in (True, False):
        options = {"max_new_tokens": 6, "do_sample": False, "use_cache": cached, "pad_token_id": 0}
        assert torch.equal(model.generate(**call, **options), plain.generate(**call, **options))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied):
    model, plain, recorder = graphed("bert")
    compare(model, plain, [masked(2, 50)] * 2)
    other = copied(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    assert type(other) is type(model) and other.__dict__["_stof_graphs"]._graphs == {}
    compare(model, plain, [masked(2, 50)])
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.5)
    compare(other, plain, [masked(2, 50)] * 3)
    assert other.__dict__["_stof_graphs"]._recorder.replays == 2 and recorder.replays == 2


def test_restore_and_what_does_not_change(tmp_path):
    model, plain, recorder = graphed("bert")
    assert list(model.state_dict()) == list(plain.state_dict())
    assert isinstance(model, transformers.BertModel) and type(model).__name__ == "BertModel"
    compare(model, plain, [masked(2, 50)] * 2)
    model.save_pretrained(tmp_path)
    assert type(transformers.AutoModel.from_pretrained(tmp_path)) is transformers.BertModel
    count = len(install(find(model)))
    assert stof_hf.restore(model) == count and stof_hf.restore(model) == 0
    assert type(model) is transformers.BertModel and "_stof_graphs" not in vars(model)
    assert not recorder.tapes
    with torch.no_grad():
        wanted = plain(**masked(2, 50))
        assert torch.equal(model(**masked(2, 50)).last_hidden_state, wanted.last_hidden_state)


def test_hooks_run():
    model, plain, recorder = graphed("bert")
    compare(model, plain, [masked(2, 50)] * 2)
    seen = []
    handle = model.encoder.layer[0].register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(StofWarning, match="forward hooks"):
        compare(model, plain, [masked(2, 50)])
    compare(model, plain, [masked(2, 50)])
    assert len(seen) == 2 and recorder.replays == 1
    handle.remove()
    compare(model, plain, [masked(2, 50)])
    assert len(seen) == 2 and recorder.replays == 2


class Reading(transformers.BertModel):
    """A forward that no graph can repeat."""

    def forward(self, input_ids, scale=1.0):
        out = super().forward(input_ids)
        return out if input_ids.sum().item() >= 0 else None


def test_what_cannot_be_captured_warns_once():
    model = Reading(transformers.BertConfig(**sizes(64))).eval()
    stof_hf.use_graphs(model)
    with torch.no_grad():
        model(ids(2, 50))
        with pytest.warns(StofWarning, match="without CUDA graphs: UnsupportedError") as said:
            model(ids(2, 50))
        assert len(said) == 1
        for n in (50, 50, 40, 40, 40):
            assert model(ids(2, n)).last_hidden_state.shape[1] == n
    assert TapeRecorder.latest.captures == 2 and not TapeRecorder.latest.tapes


def test_models_that_cannot_be_captured(monkeypatch):
    model, _, recorder = graphed("llama")
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "cpu"}
    with torch.no_grad(), pytest.warns(StofWarning, match="hf_device_map"):
        for _ in range(3):
            model(**masked(2, 50), use_cache=False)
    model, _, recorder = graphed("llama")
    model.model.rotary_emb.rope_type = "dynamic"
    with torch.no_grad(), pytest.warns(StofWarning, match="rotary"):
        for _ in range(3):
            model(**masked(2, 50), use_cache=False)
    assert not recorder.captures
    monkeypatch.setattr(TapeRecorder, "device_type", "cuda")
    with pytest.raises(UnsupportedError, match=r'model.to\("cuda"\)'):
        stof_hf.use_graphs(build("bert"))
    with pytest.raises(UnsupportedError, match="Linear"):
        stof_hf.use_graphs(nn.Linear(2, 2))


def test_compiled_models_see_their_own_forward():
    model, plain, recorder = graphed("bert", "sdpa")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for _ in range(3):
            same(dict(compiled(**masked(2, 50))), dict(plain(**masked(2, 50))))
    assert recorder.captures == 0


def test_masks_kept_for_a_tensors_version_are_not_captured():
    """What a mask function reads from a tensor decides the mask that kernels stream."""
    model = build("gpt2", "stof")
    cls = type(model)

    class Blocks(cls):
        def forward(self, input_ids, groups):
            from transformers.masking_utils import create_causal_mask

            def chosen(b, h, q, k):
                return (groups[b, q] + 2 * groups[b, k]) % 3 < 2

            embeds = self.transformer.wte(input_ids)
            mask = create_causal_mask(self.config, embeds, None, None, and_mask_function=chosen)
            return super().forward(input_ids, attention_mask=mask, use_cache=False)

    model.__class__ = Blocks
    plain = copy.deepcopy(model)
    stof_hf.use_graphs(model)
    with torch.no_grad(), pytest.warns(StofWarning, match="cannot be built") as said:
        for seed in range(4):
            groups = torch.randint(0, 3, (2, 50), generator=torch.Generator().manual_seed(seed))
            call = {"input_ids": ids(2, 50), "groups": groups}
            same(model(**call).logits, plain(**call).logits)
    assert len(said) == 1


def test_buckets():
    for size, bucket in {
        (1, 1): (1, 64), (3, 64): (4, 64), (5, 65): (8, 128), (8, 512): (8, 512),
        (1, 513): (1, 768), (1, 769): (1, 1024), (2, 1025): (2, 1536), (16, 1537): (16, 2048),
    }.items():  # fmt: skip
        assert round_up(Size(*size)) == bucket


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x.nonzero(),
        lambda x: x[x > 0], lambda x: x.tolist(), lambda x: torch.equal(x, x),
        lambda x: x.to("meta"),
        lambda x: torch.tensor([1.0], device=x.device), lambda x: x.to(device="meta"),
        lambda x: torch.empty(4, device="meta").copy_(x), lambda x: int(x[0]),
    ],
)  # fmt: skip
def test_a_capture_refuses_to_read_before_the_device_does(read):
    x = torch.arange(4.0)
    with OnDevice("cpu"), pytest.raises(UnsupportedError, match="no CUDA graph"):
        read(x)
    with OnDevice("cpu"):
        x.to(torch.float16) + x[1:2].to(x) + torch.tensor([], device="cpu").sum()
