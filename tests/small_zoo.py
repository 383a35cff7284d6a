"""The zoo's models, small enough for a CPU."""

from stof_hf.bench import timing, zoo

SMALL = {
    "bert_base": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2,
                  "intermediate_size": 96, "vocab_size": 99},
    "gpt": {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 99},
    "llama_base": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2,
                   "intermediate_size": 96, "vocab_size": 99},
    "t5": {"num_layers": 2, "d_model": 64, "num_heads": 2, "d_kv": 32, "d_ff": 96,
           "vocab_size": 99},
    "vit_base": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2,
                 "intermediate_size": 96},
}  # fmt: skip


def shrink(monkeypatch):
    """Make the zoo's models small, and the turns in which they are timed short."""
    monkeypatch.setattr(timing, "_TURN_S", 0.001)
    for name, options in SMALL.items():
        entry = zoo.ZOO[name]
        monkeypatch.setitem(
            zoo.ZOO, name, zoo.Entry(entry.name, {**entry.options, **options},
                                     *(getattr(entry, f) for f in ("lengths", "causal", "masked")))
        )  # fmt: skip


def tokens(name):
    return 65 if name == "vit_base" else 96
