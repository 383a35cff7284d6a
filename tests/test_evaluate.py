"""What a pattern costs: measured on models that learned, here, what a window keeps and cuts off.

The text they learn is pairs of a small letter and its capital, which a neighbour tells, and repeats
itself after 24 characters, which only a window of that size tells.
"""

import json
import math

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import cosine_similarity, cross_entropy
from typer.testing import CliRunner

from stof_hf import MaskError, StofError, UnsupportedError, evaluate, set_pattern
from stof_hf.cli import app
from stof_hf.evaluate import data, metrics, speed
from stof_hf.evaluate.models import is_causal, length_for, metric_of
from stof_hf.masks.patterns import Dense, Documents, Full, Longformer, RandomBlocks, SlidingWindow

pytestmark = pytest.mark.usefixtures("one_thread")

PERIOD, LENGTH = 24, 72
LETTERS = "abcdefghijklmnopABCDEFGHIJKLMNOP"
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
CPU = torch.device("cpu")


def passages(count: int, noise: torch.Generator) -> torch.Tensor:
    """Token ids [count, LENGTH], of which each row repeats pairs of its own."""
    small = torch.randint(0, 16, (count, PERIOD // 2), generator=noise)
    pairs = torch.stack([small, small + 16], 2).flatten(1)
    return pairs.repeat(1, LENGTH // PERIOD) + len(SPECIAL)


def tokenizer(masked: bool) -> transformers.PreTrainedTokenizerFast:
    """A token a letter; for masked models with [CLS] in front and [SEP] behind."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *LETTERS])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="[PAD]"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    if masked:
        around = [(name, vocab[name]) for name in ("[CLS]", "[SEP]")]
        made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, around)
    names = {"pad_token": "[PAD]", "mask_token": "[MASK]"} if masked else {"pad_token": "[PAD]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def trained(model, steps: int, masked: bool):
    noise = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        ids = passages(32, noise)
        if masked:
            ids = torch.nn.functional.pad(ids, (1, 0), value=1)
            ids = torch.nn.functional.pad(ids, (0, 1), value=2)
            drawn = (torch.rand(ids.shape, generator=noise) < 0.15) & (ids > 3)
            given = {
                "input_ids": ids.masked_fill(drawn, 3),
                "labels": ids.masked_fill(~drawn, -100),
            }
        else:
            given = {"input_ids": ids, "labels": ids}
        optimizer.zero_grad()
        model(**given).loss.backward()
        optimizer.step()
    return model.eval()


SIZES = {
    "vocab_size": len(SPECIAL) + len(LETTERS), "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 100,
    "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(one_thread, tmp_path_factory):
    """Folders of trained models, "llama", "bert" and "encoder", and text.txt, new to them."""
    root = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, bos_token_id=None, eos_token_id=None)
    trained(transformers.LlamaForCausalLM(config), 80, False).save_pretrained(root / "llama")
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**SIZES, **dropout, initializer_range=0.1)
    bert = trained(transformers.BertForMaskedLM(config), 180, True)
    bert.save_pretrained(root / "bert")
    bert.bert.save_pretrained(root / "encoder")
    for name in ("llama", "bert", "encoder"):
        tokenizer(name != "llama").save_pretrained(root / name)
    rows = passages(12, torch.Generator().manual_seed(1)) - len(SPECIAL)
    text = "".join(LETTERS[i] for i in rows.flatten().tolist())
    (root / "text.txt").write_text(text)
    return root


def prepared(folder, name: str, count: int = 8):
    """(model, windows, metric), each window one passage of the text."""
    model, tokens, metric = evaluate.load(str(folder / name), CPU)
    size = LENGTH if name == "llama" else LENGTH + 2
    texts = evaluate.read(str(folder / "text.txt"))
    return model, evaluate.windows(texts, tokens, size, count), metric


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(speed, "_TURN_S", 0.0)


def allowed(pattern, size: int, causal: bool) -> torch.Tensor:
    """An additive mask [1, 1, size, size] for eager attention."""
    q, k = torch.arange(size)[:, None], torch.arange(size)
    kept = pattern.bind(size)(0, 0, q, k) & ((k <= q) | (not causal))
    return torch.where(kept, 0.0, torch.finfo(torch.float32).min)[None, None]


def test_perplexity_of_a_sweep(folder):
    model, windows, metric = prepared(folder, "llama")
    widths = (60, 24, 8, 0)
    sweep = [Full(), *(SlidingWindow(left, 0) for left in widths)]
    found = evaluate.evaluate(model, windows, sweep, metric, batch=3)
    assert (found["metric"], found["causal"], found["windows"]) == ("perplexity", True, 8)
    dense, full, *others = found["results"]
    # A passage's own letters are 11 of 71 tokens, drawn among 16; the others can be told.
    assert dense["quality"]["loss"] == pytest.approx(11 / 71 * math.log(16), abs=0.05)
    assert full["quality"]["value"] == pytest.approx(dense["quality"]["value"], rel=1e-6)
    more = [result["quality"]["difference"] for result in others]
    assert abs(more[0]) < 0.03 and abs(more[1]) < 0.1
    assert more[2] > 0.7 and more[2] > 5 * others[2]["quality"]["standard_error"]
    assert more[3] > 0.7
    assert all(a <= b + 0.03 for a, b in zip(more, more[1:], strict=False))
    assert full["density"] == dense["density"] == (LENGTH + 1) / 2 / LENGTH
    kept = [sum(min(q, left) + 1 for q in range(LENGTH)) for left in widths]
    assert [result["density"] for result in others] == [n / LENGTH**2 for n in kept]
    assert all(result["time_ms"] > 0 for result in found["results"])
    assert dense["speedup"] == 1
    assert model(input_ids=windows.ids[:1]).logits.isfinite().all()
    assert getattr(model.config, "stof", None) is None


def test_perplexity_is_that_of_transformers(folder):
    model, windows, metric = prepared(folder, "llama")
    pattern = SlidingWindow(9, 0)
    found = evaluate.evaluate(model, windows, [pattern], metric)["results"]
    eager = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "llama", attn_implementation="eager"
    )
    with torch.no_grad():
        dense = eager(input_ids=windows.ids, labels=windows.ids).loss
        mask = allowed(pattern, LENGTH, True).expand(len(windows.ids), -1, -1, -1)
        sparse = eager(input_ids=windows.ids, labels=windows.ids, attention_mask=mask).loss
    for result, loss in zip(found, (dense, sparse), strict=True):
        assert result["quality"]["value"] == pytest.approx(float(loss.exp()), rel=1e-4)
        assert result["quality"]["loss"] == pytest.approx(float(loss), rel=1e-4)


def test_patterns_saved_with_a_model_are_no_part_of_dense(folder, tmp_path):
    model, windows, metric = prepared(folder, "llama", 2)
    dense = evaluate.evaluate(model, windows, [], metric)["results"][0]
    set_pattern(model, SlidingWindow(2, 0))
    model.save_pretrained(tmp_path)
    tokenizer(False).save_pretrained(tmp_path)
    model, _, _ = evaluate.load(str(tmp_path), CPU)
    assert model.config.stof["patterns"]
    found, wide = evaluate.evaluate(model, windows, [SlidingWindow(60, 0)], metric)["results"]
    assert found["quality"] == dense["quality"]
    assert abs(wide["quality"]["difference"]) < 0.03


def test_pseudo_perplexity_of_a_sweep(folder):
    model, windows, metric = prepared(folder, "bert")
    sweep = [Full(), SlidingWindow(60, 60), SlidingWindow(0, 0)]
    found = evaluate.evaluate(model, windows, sweep, metric)
    assert (found["metric"], found["causal"]) == ("pseudo-perplexity", False)
    dense, full, wide, narrow = (result["quality"] for result in found["results"])
    assert dense["value"] < 1.2
    assert full["value"] == pytest.approx(dense["value"], rel=1e-6)
    assert wide["value"] < 1.3
    assert narrow["value"] > 4
    assert [result["density"] for result in found["results"]][:2] == [1, 1]


def test_pseudo_perplexity_is_that_of_transformers(folder, monkeypatch):
    monkeypatch.setattr(metrics, "_ONE_IN", 1)
    model, windows, metric = prepared(folder, "bert", 2)
    pattern = SlidingWindow(1, 0)
    found = evaluate.evaluate(model, windows, [pattern], metric, batch=16)["results"]
    eager = transformers.AutoModelForMaskedLM.from_pretrained(
        folder / "bert", attn_implementation="eager"
    )
    for result, mask in zip(found, (None, allowed(pattern, LENGTH + 2, False)), strict=True):
        losses = []
        for row in windows.ids:
            for place in range(1, LENGTH + 1):
                ids = row.clone()
                ids[place] = 3
                with torch.no_grad():
                    logits = eager(input_ids=ids[None], attention_mask=mask).logits
                losses.append(cross_entropy(logits[0, place], row[place]))
        expected = float(torch.stack(losses).mean().exp())
        assert result["quality"]["value"] == pytest.approx(expected, rel=1e-4)


def test_the_seed_draws_what_is_masked(folder):
    model, windows, _ = prepared(folder, "bert", 3)
    a, b, c = (
        metrics.masked_losses(model, windows, batch, seed, lambda parts: parts)
        for batch, seed in ((4, 0), (5, 0), (4, 1))
    )
    assert a.shape == (3,) and a.dtype == torch.float64
    assert torch.allclose(a, b, rtol=1e-4) and not torch.allclose(a, c, rtol=1e-2)


def test_similarity_of_embeddings(folder):
    model, windows, metric = prepared(folder, "encoder")
    assert metric == "similarity" and type(model).__name__ == "BertModel"
    pattern = Longformer(2, (0,))
    found = evaluate.evaluate(model, windows, [Full(), pattern, SlidingWindow(0, 0)], metric)
    dense, full, longformer, alone = (result["quality"] for result in found["results"])
    assert [dense["value"], dense["q05"]] == pytest.approx([1, 1])
    assert full["q05"] == pytest.approx(1, abs=1e-6)
    assert alone["value"] < longformer["value"] < 1 and longformer["q05"] < longformer["value"]
    eager = transformers.AutoModel.from_pretrained(folder / "encoder", attn_implementation="eager")
    with torch.no_grad():
        a, b = (
            eager(input_ids=windows.ids, attention_mask=mask).last_hidden_state.mean(1)
            for mask in (None, allowed(pattern, LENGTH + 2, False))
        )
    similarity = cosine_similarity(a, b)
    assert longformer["value"] == pytest.approx(float(similarity.mean()), abs=1e-5)
    assert longformer["q05"] == pytest.approx(float(similarity.quantile(0.05)), abs=1e-5)


def test_windows_follow_the_text(folder):
    text = (folder / "text.txt").read_text()
    ids = [len(SPECIAL) + LETTERS.index(letter) for letter in text]
    found = evaluate.windows([text[:50], text[50:]], tokenizer(True), 12, 5)
    assert (found.ids.shape, found.first, found.last, found.mask_token) == ((5, 12), 1, 11, 3)
    assert found.ids[:, 0].eq(1).all() and found.ids[:, -1].eq(2).all()
    # The empty line between two texts is no letter, and so no token here.
    assert found.ids[:, 1:-1].flatten().tolist()[:50] == ids[:50]
    found = evaluate.windows([text], tokenizer(True), 11, 3, ending=False)
    assert found.ids[:, 1:].flatten().tolist() == ids[:30] and found.last == 11
    found = evaluate.windows([text[:25]], tokenizer(False), 10, 5)
    assert found.ids.tolist() == [ids[:10], ids[10:20]] and found.mask_token is None


def test_no_more_is_read_than_the_windows_take():
    taken = []

    def texts():
        while True:
            taken.append(1)
            yield "abc" * 10

    found = evaluate.windows(texts(), tokenizer(False), 10, 7)
    assert found.ids.shape == (7, 10) and len(taken) < 20


def test_texts_of_files(tmp_path):
    (tmp_path / "b.txt").write_text("third")
    (tmp_path / "a.txt").write_text("first\nline\n\n\n\nsecond")
    assert [text.strip() for text in evaluate.read(str(tmp_path))] == [
        "first\nline", "second", "third",
    ]  # fmt: skip
    table = tmp_path / "table.csv"
    table.write_text("number,body,title\n1,one,x\n2,,y\n3,three,z\n")
    assert [*evaluate.read(str(table), column="body")] == ["one", "three"]
    with pytest.raises(StofError, match="not clear: pass --column; .* body, title"):
        next(evaluate.read(str(table)))
    with pytest.raises(StofError, match="no column 'number' of texts; it has body, title"):
        next(evaluate.read(str(table), column="number"))
    with pytest.raises(StofError, match="has no split test; it has train"):
        next(evaluate.read(str(table), split="test"))
    with pytest.raises(StofError, match="there is no file nothing.txt"):
        next(evaluate.read("nothing.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(StofError, match="cannot load the dataset .*empty"):
        next(evaluate.read(str(tmp_path / "empty")))
    (tmp_path / "none.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(StofError, match="0 tokens, one window takes 8: pass a smaller --seq-len"):
        evaluate.windows(evaluate.read(str(tmp_path / "none.jsonl")), tokenizer(False), 8, 1)
    with pytest.raises(StofError, match="3 tokens leave no room"):
        evaluate.windows([], tokenizer(True), 3, 1)


def test_the_metric_follows_from_the_class():
    def metric(name, config, embeds=False, **fields):
        return metric_of(config(architectures=[name], **fields), embeds)

    assert metric("GPT2LMHeadModel", transformers.GPT2Config) == "perplexity"
    assert metric("ModernBertForMaskedLM", transformers.ModernBertConfig) == "pseudo-perplexity"
    assert metric("T5EncoderModel", transformers.T5Config) == "similarity"
    # sentence-transformers/all-mpnet-base-v2 names a head that it has no weights for.
    assert metric("MPNetForMaskedLM", transformers.MPNetConfig, embeds=True) == "similarity"
    for name, config in (
        ("BertForSequenceClassification", transformers.BertConfig),
        ("T5ForConditionalGeneration", transformers.T5Config),
        ("BartForConditionalGeneration", transformers.BartConfig),
        ("ViTModel", transformers.ViTConfig),
    ):
        with pytest.raises(UnsupportedError, match=f"no metric for {name}: name a causal"):
            metric(name, config)


def test_models_that_give_no_figures(folder, tmp_path):
    with pytest.raises(StofError, match="cannot load .*nothing"):
        evaluate.load(str(tmp_path / "nothing"), CPU)
    head = transformers.BertForSequenceClassification.from_pretrained(folder / "bert")
    head.save_pretrained(tmp_path / "head")
    with pytest.raises(UnsupportedError, match="no metric for BertForSequenceClassification"):
        evaluate.load(str(tmp_path / "head"), CPU)
    encoder = transformers.BertModel.from_pretrained(folder / "encoder")
    encoder.save_pretrained(tmp_path / "headless")
    tokenizer(True).save_pretrained(tmp_path / "headless")
    file = tmp_path / "headless" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    with pytest.raises(StofError, match="holds no weights for cls.predictions.*of BertForMaskedLM"):
        evaluate.load(str(tmp_path / "headless"), CPU)
    # Laid out as sentence-transformers does, it is an encoder, whatever its configuration says.
    (tmp_path / "headless" / "modules.json").write_text("[]")
    assert evaluate.load(str(tmp_path / "headless"), CPU)[2] == "similarity"


def test_windows_and_patterns_that_do_not_fit(folder):
    model, windows, metric = prepared(folder, "llama", 2)
    assert length_for(model, None) == 100 and length_for(model, 64) == 64
    with pytest.raises(UnsupportedError, match="takes 100 tokens, not 101: pass --seq-len 100"):
        length_for(model, 101)
    short = torch.ones(8, 8, dtype=torch.bool)
    for pattern in (Documents([0] * 8), Dense(short), RandomBlocks(3)):
        with pytest.raises(MaskError, match=f"{type(pattern).__name__}.* does not fit 72 tokens"):
            evaluate.evaluate(model, windows, [pattern], metric)
    model.lm_head.weight.data.fill_(math.inf)
    with pytest.raises(StofError, match="of dense are not finite in torch.float32: pass --dtype"):
        evaluate.evaluate(model, windows, [Full()], metric)


def test_a_model_that_sees_what_follows_has_no_perplexity(folder):
    _, windows, _ = prepared(folder, "bert", 2)
    config = transformers.BertConfig(**SIZES, architectures=["BertLMHeadModel"])
    for decoder in (False, True):
        config.is_decoder = decoder
        model = transformers.BertLMHeadModel._from_config(config, attn_implementation="stof").eval()
        assert is_causal(model, windows.ids[:1]) == decoder
        if not decoder:
            with pytest.raises(UnsupportedError, match="see those behind them"):
                evaluate.evaluate(model, windows, [Full()], "perplexity")
    with pytest.raises(UnsupportedError, match="no mask token"):
        bare = data.Windows(windows.ids, 1, LENGTH + 1)
        evaluate.evaluate(model, bare, [Full()], "pseudo-perplexity")


def test_patterns_are_timed_in_turns(monkeypatch):
    order = []
    monkeypatch.setattr(speed, "use_pattern", lambda model, pattern: order.append(pattern))

    class Model:
        device = CPU

        def __call__(self, input_ids):
            pass

    patterns = [None, Full(), SlidingWindow(1, 1)]
    times = speed.times_ms(Model(), patterns, torch.zeros(1, 4, dtype=torch.long))
    assert len(times) == 3
    assert order == (patterns + patterns[::-1]) * 2 + patterns


def invoke(*arguments):
    return CliRunner().invoke(app, ["eval", *(str(argument) for argument in arguments)])


@pytest.mark.parametrize("name", ["llama", "bert", "encoder"])
def test_eval(name, folder, tmp_path):
    narrow = '{"type": "SlidingWindow", "left": 4, "right": 4}'
    options = (
        "--dataset", folder / "text.txt", "--seq-len", 74, "--samples", 4, "--device", "cpu",
        "--pattern", "sliding-window", "--pattern", narrow,
    )  # fmt: skip
    file, picture = tmp_path / "eval.json", tmp_path / "eval.png"
    result = invoke(folder / name, *options, "--json", file, "--plot", picture)
    assert result.exit_code == 0, result.output
    for text in ("dense", "SlidingWindow(64, 64)", "SlidingWindow(4, 4)", "4 windows of 74"):
        assert text in result.output
    assert picture.read_bytes()[1:4] == b"PNG"
    found = json.loads(file.read_text())
    assert found["format"] == 1 and found["dataset"]["name"] == str(folder / "text.txt")
    assert [x["pattern"] and x["pattern"]["type"] for x in found["results"]] == [
        None, "SlidingWindow", "SlidingWindow",
    ]  # fmt: skip
    again = tmp_path / "again.json"
    assert invoke(folder / name, *options, "--json", again).exit_code == 0
    qualities = [
        [x["quality"] for x in json.loads(path.read_text())["results"]] for path in (file, again)
    ]
    assert qualities[0] == qualities[1]


def test_eval_names_the_mistake(folder):
    text = folder / "text.txt"
    for arguments, message in (
        (("--pattern", "bird", "--dataset", text), "no pattern is called 'bird'"),
        (("--pattern", "full", "--dataset", text, "--dtype", "int8"), "none of float16"),
        (("--pattern", "full"), "Missing option '--dataset'"),
        (("--dataset", text), "Missing option '--pattern'"),
    ):
        result = invoke(folder / "llama", *arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.output.replace("│", " ").split())
    result = invoke(folder / "llama", "--pattern", "bigbird", "--dataset", text)
    assert isinstance(result.exception, MaskError)
    assert "BigBird(64) does not fit 100 tokens: 3 random blocks" in str(result.exception)


def test_encoders_of_other_kinds(folder, tmp_path):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    config = transformers.T5Config(vocab_size=SIZES["vocab_size"], **sizes, pad_token_id=0)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path / "t5")
    tokenizer(True).save_pretrained(tmp_path / "t5")
    llama = transformers.LlamaModel.from_pretrained(folder / "llama")
    llama.save_pretrained(tmp_path / "body")
    tokenizer(False).save_pretrained(tmp_path / "body")
    texts = [*evaluate.read(str(folder / "text.txt"))]
    for name, cls, causal in (("t5", "T5EncoderModel", False), ("body", "LlamaModel", True)):
        model, tokens, metric = evaluate.load(str(tmp_path / name), CPU)
        assert (type(model).__name__, metric) == (cls, "similarity")
        windows = evaluate.windows(texts, tokens, 40, 2)
        found = evaluate.evaluate(model, windows, [SlidingWindow(2, 2)], metric)
        assert found["causal"] == causal
        assert found["results"][0]["density"] == (41 / 80 if causal else 1)
        assert found["results"][1]["quality"]["value"] < 1
