"""Settings that all tests share."""

import os

import hypothesis
import pytest
import torch

# Triton kernels are tested in Triton's interpreter where there is no GPU to run them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile(
    "ci", max_examples=50, derandomize=True, deadline=None, database=None, print_blob=True
)
hypothesis.settings.register_profile("slow", max_examples=1000, deadline=None, database=None)
hypothesis.settings.register_profile(
    "thorough", max_examples=10_000, deadline=None, database=None, print_blob=True
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items):
    """Tests marked gpu are skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """Small tensors gain nothing from more threads, and wait for those that others use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_warnings(monkeypatch):
    """What was said once is said again."""
    from stof_hf import errors

    monkeypatch.setattr(errors, "_said", set())


@pytest.fixture
def no_other_backward(monkeypatch):
    """Plain PyTorch must not compute gradients that the kernels are for."""
    from stof_hf.attention import gradients

    def refuse(*args):
        raise AssertionError("plain PyTorch was asked")

    monkeypatch.setattr(gradients.plain, "backward", refuse)


@pytest.fixture
def ran(monkeypatch):
    """Layers that ran fused."""
    from stof_hf.fusion import fused

    found, run = [], fused.Fused.run

    def counted(self, module, *args):
        out = run(self, module, *args)
        if out is not None:
            found.append(module)
        return out

    monkeypatch.setattr(fused.Fused, "run", counted)
    return found


@pytest.fixture(scope="module")
def poisoned_empty():
    """torch.empty and its kin hand out NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
