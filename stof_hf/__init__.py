"""Sparse attention masks that make Hugging Face Transformers faster.

Importing the package registers ``attn_implementation="stof"`` with Transformers, as soon as that is
imported too:

    import stof_hf
    model = AutoModel.from_pretrained(name, attn_implementation="stof")
    stof_hf.set_pattern(model, stof_hf.patterns.Longformer(window=256, global_tokens=[0]))
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType

import wrapt

from stof_hf import attention
from stof_hf.errors import BuildError, MaskError, StofError, StofWarning, UnsupportedError

__version__ = "0.1.0"

__all__ = [
    "BuildError",
    "MaskError",
    "RelativeBias",
    "SparseMask",
    "StofError",
    "StofWarning",
    "UnsupportedError",
    "__version__",
    "apply_tuned",
    "attention",
    "patterns",
    "restore",
    "set_pattern",
    "tune",
    "unpad",
    "use_graphs",
]

_LAZY = {
    "attention": ("stof_hf.attention.op", "attention"),
    "RelativeBias": ("stof_hf.attention.relative", "RelativeBias"),
    "SparseMask": ("stof_hf.masks.sparse_mask", "SparseMask"),
    "patterns": ("stof_hf.masks.patterns", None),
    "set_pattern": ("stof_hf.hf.patching", "set_pattern"),
    "tune": ("stof_hf.tuning.tune", "tune"),
    "apply_tuned": ("stof_hf.tuning.tune", "apply_tuned"),
    "restore": ("stof_hf.runtime.restore", "restore"),
    "unpad": ("stof_hf.runtime.unpad", "unpad"),
    "use_graphs": ("stof_hf.runtime.graphs", "use_graphs"),
}

# The public name is the function: __getattr__ finds it once the package no longer hides it.
del attention

# An install maps the top-level patches/ onto stof_hf.patches; a source tree does so here.
if (_source := Path(__file__).parents[1] / "pyproject.toml").is_file():
    __path__.append(str(_source.parent))


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = import_module(module)
    value = getattr(value, attribute) if attribute else value
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _patch(module: ModuleType) -> None:
    from stof_hf.hf.own import patch

    patch(module)


# Registered before Transformers is imported: a pickle may import a family's module first of all.
for _family in import_module("stof_hf.patches").OWN_ATTENTION:
    wrapt.register_post_import_hook(_patch, f"transformers.models.{_family}.modeling_{_family}")


@wrapt.when_imported("transformers.modeling_utils")
def _register(_: ModuleType) -> None:
    from stof_hf.hf import register

    register()
