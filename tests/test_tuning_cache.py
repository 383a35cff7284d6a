"""The tuning cache: keys, files of several processes and environments, damage, the command."""

import dataclasses
import json
import math
import multiprocessing
import warnings
from datetime import UTC, datetime, timedelta

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    T5Config,
    ViTConfig,
)
from typer.testing import CliRunner

import stof_hf
from stof_hf.cli import app
from stof_hf.errors import StofError, StofWarning
from stof_hf.tuning import cache
from stof_hf.tuning.cache import Entry, Key, Layer, Segment
from stof_hf.tuning.environment import Environment

H200 = Environment("NVIDIA H200", "580.65.06", "13.0", "2.13.0", "3.6.0", "0.1.0", "abc")
ELSEWHERE = dataclasses.replace(H200, device="NVIDIA Nowhere")
KEY = Key("bert-0", 8, 512, "forward", "float16", "1/8")
DAY = datetime(2026, 5, 1, tzinfo=UTC)
# Configuration, the field that names its hidden size, the field that counts its layers.
CONFIGS = [
    (BertConfig, "hidden_size", "num_hidden_layers"),
    (GPT2Config, "n_embd", "n_layer"),
    (LlamaConfig, "hidden_size", "num_hidden_layers"),
    (T5Config, "d_model", "num_decoder_layers"),
    (ViTConfig, "hidden_size", "num_hidden_layers"),
    (ModernBertConfig, "hidden_size", "num_hidden_layers"),
]
each_config = pytest.mark.parametrize(
    ("cls", "width", "depth"), CONFIGS, ids=[cls.__name__ for cls, *_ in CONFIGS]
)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Own caches for each test: (this user's files, what the package ships)."""
    monkeypatch.setenv("STOF_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "shipped_dir", lambda: tmp_path / "configs")
    (tmp_path / "configs").mkdir()
    return tmp_path / "cache" / "tuning", tmp_path / "configs"


def kept(key, where):
    """What a user's own file, or else the package's, holds for a key."""
    return dict(cache.results(key.model, key.dtype, where)).get(key)


def entry(time_us=900.0, *, days=0, **changes):
    segments = (
        Segment("packed_qkv", {"BLOCK_M": 128, "num_warps": 8}, 31.5),
        Segment("gemm", {"order": ["m", "n"], "split": None, "share": 0.5, "on": True}, 20),
    )
    fields = {
        "name": "bert-base-uncased",
        "layers": {"encoder": Layer("00011", segments)},
        "batch_size": 8,
        "seq_len": 512,
        "baseline_us": 1400.0,
        "measured": DAY + timedelta(days=days),
    }
    return Entry(**{**fields, **changes, "time_us": time_us})


def resized(key=KEY, **changes):
    return dataclasses.replace(key, **changes)


def only_file(folder):
    (path,) = folder.glob("*.json")
    return path


def ship(folder, entries, where=H200):
    cache._write(folder / f"{where.slug}.json", where, entries)


# Keys


@given(st.integers(1, 10**6))
def test_buckets_hold_their_sizes(n):
    for bucket, least in ((cache.batch_bucket, 1), (cache.seq_bucket, 16)):
        size = bucket(n)
        assert n <= size and bucket(size) == size
        assert size == least or size / max(n, least) <= 1.5
        power = size & -size
        assert size // power in (1, 3)


def test_bucket_steps():
    steps = sorted({cache.seq_bucket(n) for n in range(1, 1025)})
    assert steps == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    for bucket in (cache.batch_bucket, cache.seq_bucket):
        with pytest.raises(StofError, match="at least 1, not 0"):
            bucket(0)


def test_mask_buckets():
    assert cache.mask_bucket(0.0) == cache.mask_bucket(1 / 300) == "1/256"
    mask = stof_hf.SparseMask.from_dense(torch.ones(512, 512, dtype=torch.bool).tril())
    assert cache.mask_bucket(mask.valid_share) == "1/2"
    with pytest.raises(StofError, match="between 0 and 1"):
        cache.mask_bucket(math.nan)


@each_config
def test_fingerprint_survives_saving_and_loading(cls, width, depth, tmp_path):
    config = cls()
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded._name_or_path != config._name_or_path
    assert cache.fingerprint(loaded) == cache.fingerprint(config)
    assert cache.fingerprint(config).startswith(config.model_type + "-")


@each_config
def test_fingerprint_survives_what_is_no_architecture(cls, width, depth):
    other = cls(
        dtype="bfloat16", id2label={0: "a", 1: "b", 2: "c"}, name_or_path="elsewhere",
        architectures=["Some"], bos_token_id=7, use_cache=False, output_hidden_states=True,
        initializer_range=0.5, attention_dropout=0.3, hidden_dropout_prob=0.3, dropout_rate=0.3,
        resid_pdrop=0.3,
    )  # fmt: skip
    other.transformers_version = "4.0.0"
    other._attn_implementation = "stof"
    assert cache.fingerprint(other) == cache.fingerprint(cls())


@each_config
def test_fingerprint_differs_by_size(cls, width, depth):
    sizes = {width: [96, 192], depth: [3, 5]}
    configs = [cls(**{name: size}) for name, values in sizes.items() for size in values]
    assert len({cache.fingerprint(config) for config in [cls(), *configs]}) == 5


def test_fingerprints_of_different_types_differ():
    assert len({cache.fingerprint(cls()) for cls, *_ in CONFIGS}) == len(CONFIGS)


def test_fingerprint_of_a_model_and_of_its_sparse_one():
    config = BertConfig(
        num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=48
    )
    before = cache.fingerprint(config)
    from transformers import BertModel

    model = BertModel(config).half()
    stof_hf.set_pattern(model, stof_hf.patterns.Longformer(window=64))
    assert cache.fingerprint(model.config) == before
    assert cache.fingerprint(AutoConfig.for_model("bert", activation="x")) != before


def test_key_of_a_call():
    key = Key.of(BertConfig(), 7, 500, phase="forward", dtype=torch.float16, mask="none")
    assert (key.batch, key.seq_len, key.dtype) == (8, 512, "float16")
    assert key == Key.of(BertConfig(), 8, 512, phase="forward", dtype=torch.float16, mask="none")
    assert len({key.id, resized(key, dtype="bfloat16").id, resized(key, batch=16).id}) == 3
    with pytest.raises(StofError, match="forward, prefill, decode, not 'train'"):
        Key.of(BertConfig(), 7, 500, phase="train", dtype=torch.float16, mask="none")
    with pytest.raises(StofError, match="Key.of"):
        resized(seq_len=500)
    with pytest.raises(TypeError, match="batch must be of type int"):
        resized(batch=8.0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: entry(math.nan),
        lambda: entry(0.0),
        lambda: entry(baseline_us=-1.0),
        lambda: entry(measured=datetime(2026, 5, 1)),
        lambda: Segment("gemm", {"block": (1, 2)}, 1.0),
        lambda: Segment("gemm", {1: 2}, 1.0),
        lambda: Segment("gemm", {"x": object()}, 1.0),
        lambda: Segment(None, {}, 1.0),
    ],
)
def test_entries_that_would_not_survive(wrong):
    with pytest.raises((TypeError, ValueError)):
        wrong()


# Files


def test_what_is_stored_is_found(folders):
    assert kept(KEY, H200) is None and not folders[0].exists()
    cache.store(KEY, entry(), H200)
    assert kept(KEY, H200) == entry()
    assert only_file(folders[0]).name.startswith("nvidia-h200-")
    assert json.loads(only_file(folders[0]).read_text())["header"]["driver"] == "580.65.06"


def test_the_faster_is_kept_and_the_newer_of_equals():
    cache.store(KEY, entry(900.0), H200)
    cache.store(KEY, entry(950.0, days=1), H200)
    assert kept(KEY, H200) == entry(900.0)
    cache.store(KEY, entry(900.0, days=2), H200)
    cache.store(KEY, entry(900.0, days=1), H200)
    assert kept(KEY, H200) == entry(900.0, days=2)
    cache.store(KEY, entry(800.0, days=-9), H200)
    assert kept(KEY, H200) == entry(800.0, days=-9)


def test_faster_means_per_token():
    """A shorter input of the same bucket takes less time without being faster."""
    cache.store(KEY, entry(900.0), H200)
    cache.store(KEY, entry(850.0, seq_len=400), H200)
    assert kept(KEY, H200).seq_len == 512


@pytest.mark.parametrize("other", [{"model": "bert-1"}, {"dtype": "bfloat16"}])
def test_results_of_other_models_and_dtypes_are_left_out(other):
    cache.store(resized(**other), entry(), H200)
    assert cache.results(KEY.model, KEY.dtype, H200) == []


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Environment)])
def test_other_environments_see_nothing(field, folders):
    other = dataclasses.replace(H200, **{field: "other"})
    cache.store(KEY, entry(900.0), H200)
    assert kept(KEY, other) is None
    cache.store(KEY, entry(100.0), other)
    assert kept(KEY, H200).time_us == 900.0
    assert len(list(folders[0].glob("*.json"))) == 2


def test_a_foreign_header_under_our_name_is_skipped_whole(folders):
    cache.store(KEY, entry(), H200)
    path = only_file(folders[0])
    data = json.loads(path.read_text())
    for change in ({"torch": "2.11.0"}, {"device": "NVIDIA A100"}, {"format": 2}):
        foreign = json.dumps({**data, "header": {**data["header"], **change}})
        path.write_text(foreign)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert kept(KEY, H200) is None
            # Storing starts a new file; what was there is set aside, not lost.
            cache.store(resized(batch=1), entry(), H200)
        assert list(cache._read(path).entries) == [resized(batch=1)]
        assert path.with_name(path.name + ".skipped").read_text() == foreign


def _remove(name):
    def damage(data):
        del data["entries"][0][name]
        return data

    return damage


def _replace(value, *path):
    def damage(data):
        part = data
        for step in path[:-1]:
            part = part[step]
        part[path[-1]] = value
        return data

    return damage


DAMAGES = {
    "no-key": _remove("key"),
    "no-time": _remove("time_us"),
    "no-header": lambda data: {"entries": data["entries"]},
    "no-object": lambda data: [],
    "another-field": _replace(1, "entries", 0, "more"),
    "header-field": _replace(1, "header", "more"),
    "header-type": _replace(None, "header", "device"),
    "no-bucket": _replace(500, "entries", 0, "key", "seq_len"),
    "key-type": _replace("8", "entries", 0, "key", "batch"),
    "negative-time": _replace(-1, "entries", 0, "time_us"),
    "date": _replace("yesterday", "entries", 0, "measured"),
    "layers": _replace([], "entries", 0, "layers"),
    "entries": _replace(3, "entries"),
}


def _is_damaged(path, key):
    """One warning, nothing found, and the next result is kept."""
    damaged = path.read_bytes()
    with pytest.warns(StofWarning, match="damaged") as caught:
        assert kept(key, H200) is None
        assert kept(key, H200) is None
    assert len(caught) == 1
    with pytest.warns(StofWarning, match="damaged"):
        cache.store(key, entry(700.0), H200)
    assert kept(key, H200).time_us == 700.0
    assert path.with_name(path.name + ".skipped").read_bytes() == damaged


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_condemns_the_file(damage, folders):
    cache.store(KEY, entry(), H200)
    cache.store(resized(batch=1), entry(), H200)
    path = only_file(folders[0])
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    _is_damaged(path, resized(batch=1))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"null", b"NaN"])
def test_a_damaged_file_is_skipped_with_one_warning(content, folders):
    cache.store(KEY, entry(), H200)
    path = only_file(folders[0])
    path.write_bytes(content)
    _is_damaged(path, KEY)


def test_every_truncation_is_noticed(folders):
    cache.store(KEY, entry(), H200)
    whole = only_file(folders[0]).read_text()
    for size in range(0, len(whole) - 2, 17):
        only_file(folders[0]).write_text(whole[:size])
        with pytest.warns(StofWarning, match="damaged"):
            assert kept(KEY, H200) is None


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    # A folder below a file: not even root can create it.
    monkeypatch.setenv("STOF_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(StofWarning, match="STOF_CACHE_DIR"):
        cache.store(KEY, entry(), H200)
    assert kept(KEY, H200) is None and cache.list_() == [] and cache.clear() == 0


def _tune(process, barrier):
    barrier.wait(60)
    for i in range(20):
        own = resized(model=f"model-{process}-{i}")
        shared = resized(model=f"shared-{i}")
        cache.store(own, entry(), H200)
        # Each is the faster one for half of the shared keys.
        cache.store(shared, entry(500.0 + (i + process) % 2), H200)


def test_processes_that_tune_at_once_lose_nothing(folders):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_tune, args=(i, barrier)) for i in range(2)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # A reader never sees half of a file.
            kept(KEY, H200)
        processes[0].join(0.002)
        processes[1].join(0.002)
    assert [process.exitcode for process in processes] == [0, 0]
    entries = cache._read(only_file(folders[0])).entries
    for i in range(20):
        assert {resized(model=f"model-{process}-{i}") for process in range(2)} <= set(entries)
        assert entries[resized(model=f"shared-{i}")].time_us == 500.0
    assert len(entries) == 60
    assert not list(folders[0].glob("*.part"))


# Shipped results


def test_shipped_results_need_the_gpu_alone(folders):
    ship(folders[1], {KEY: entry()}, dataclasses.replace(H200, torch="2.11.0", sources="old"))
    assert kept(KEY, H200) == entry()
    assert kept(KEY, dataclasses.replace(H200, device="NVIDIA L4")) is None
    # Of one slug, but another GPU.
    assert kept(KEY, dataclasses.replace(H200, device="NVIDIA-H200")) is None


def test_the_users_results_take_the_place_of_shipped_ones(folders):
    ship(folders[1], {KEY: entry(100.0), resized(seq_len=2048): entry(200.0)})
    cache.store(KEY, entry(900.0), H200)
    assert kept(KEY, H200) == entry(900.0)
    assert kept(resized(seq_len=2048), H200) == entry(200.0)


def test_a_damaged_shipped_file_is_skipped(folders):
    (folders[1] / "nvidia-h200.json").write_text("{}")
    with pytest.warns(StofWarning, match="damaged"):
        assert kept(KEY, H200) is None


# Moving and removing


def test_export_and_import(tmp_path, monkeypatch, folders):
    file = tmp_path / "elsewhere" / "h200.json"
    with pytest.raises(StofError, match="nothing was tuned for NVIDIA H200"):
        cache.export(file, H200)
    cache.store(KEY, entry(900.0), H200)
    cache.store(resized(batch=1), entry(900.0), H200)
    assert cache.export(file, H200) == 2
    monkeypatch.setenv("STOF_CACHE_DIR", str(tmp_path / "other"))
    cache.store(KEY, entry(800.0), H200)
    assert cache.import_(file) == (1, H200)
    assert kept(KEY, H200).time_us == 800.0
    assert kept(resized(batch=1), H200)
    assert cache.import_(file) == (0, H200)
    # An exported file is what the package would ship.
    file.rename(folders[1] / "nvidia-h200.json")
    assert cache.clear() == 1
    assert kept(KEY, H200).time_us == 900.0


def test_import_of_another_environment_is_not_used(tmp_path):
    file = tmp_path / "h200.json"
    cache.store(KEY, entry(), H200)
    cache.export(file, H200)
    cache.clear()
    assert cache.import_(file) == (1, H200)
    assert kept(KEY, cache.environment()) is None
    assert kept(KEY, dataclasses.replace(H200, driver="570.1")) is None


def test_import_of_what_is_no_export(tmp_path):
    file = tmp_path / "file.json"
    with pytest.raises(StofError, match="name another file"):
        cache.import_(file)
    file.write_text("{}")
    with pytest.raises(StofError, match="holds no tuned results"):
        cache.import_(file)
    file.write_text('{"header": {"format": 99}}')
    with pytest.raises(StofError, match="another version of stof_hf"):
        cache.import_(file)


def test_the_environment_of_this_machine():
    here = cache.environment(torch.device("cpu"))
    assert here == cache.environment(torch.device("cpu"))
    assert (here.device, here.driver, here.stof_hf) == ("cpu", None, stof_hf.__version__)
    assert here.torch == torch.__version__ and len(here.sources) == 20
    assert H200.differences(dataclasses.replace(H200, torch="2.14.0")) == (
        "torch 2.13.0 (here 2.14.0)"
    )


@pytest.mark.gpu
def test_the_environment_of_a_gpu():
    here = cache.environment()
    assert here.device == torch.cuda.get_device_name() and here.cuda == torch.version.cuda
    assert here.driver[0].isdigit() and "." in here.driver


# The command


def invoke(*arguments, **options):
    result = CliRunner().invoke(app, ["cache", *map(str, arguments)], **options)
    return result, " ".join(result.output.split())


def test_command(tmp_path, folders):
    here = cache.environment()
    result, text = invoke("list")
    assert result.exit_code == 0 and text == "nothing is tuned yet"
    cache.store(KEY, entry(), here)
    cache.store(resized(seq_len=1024), entry(), ELSEWHERE)
    ship(folders[1], {resized(batch=64): entry()}, ELSEWHERE)
    result, text = invoke("list")
    assert result.exit_code == 0, result.output
    for word in (
        KEY.id,
        resized(seq_len=1024).id,
        "used here",
        f"not used here: device {ELSEWHERE.device}",
        "shipped",
    ):
        assert word in text
    result, text = invoke("show", KEY.id[:6])
    assert result.exit_code == 0, result.output
    for word in ("packed_qkv", "BLOCK_M=128", "00011", "31.5", here.torch, "1.56 times as fast"):
        assert word in text

    result, text = invoke("export", tmp_path / "out.json")
    assert result.exit_code == 0 and text.endswith("out.json: 1")
    result, text = invoke("clear", input="n\n")
    assert result.exit_code == 1 and kept(KEY, here)
    result, text = invoke("clear", "--yes")
    assert result.exit_code == 0 and "files removed: 2" in text
    assert kept(KEY, here) is None
    result, text = invoke("import", tmp_path / "out.json")
    assert result.exit_code == 0 and text == "results new or faster than before: 1"
    assert kept(KEY, here)


def test_command_says_that_imported_results_are_not_used(tmp_path):
    cache.store(KEY, entry(), ELSEWHERE)
    cache.export(tmp_path / "out.json", ELSEWHERE)
    result, text = invoke("import", tmp_path / "out.json")
    assert result.exit_code == 0
    assert "not used here, being measured with device NVIDIA Nowhere (here " in text


def test_command_names_what_is_missing():
    result, _ = invoke("show", "12345678")
    assert isinstance(result.exception, StofError)
    assert "stof cache list" in str(result.exception)
