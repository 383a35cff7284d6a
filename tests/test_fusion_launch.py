"""Prepared launches: what is put in the place of what, and when a call is made anew."""

import gc
import importlib
import inspect
import weakref

import pytest
import torch

from stof_hf.fusion.parts import Norm
from stof_hf.fusion.templates.launch import Prepared, launch, scratch


class Kernel:
    """Stands in for a Triton kernel, and for what it is compiled to, which takes addresses."""

    arg_names = ["x", "w", "out", "n", "BLOCK"]

    def __init__(self):
        self.weight = torch.ones(8, 16)
        self.bound, self.repeated = 0, []

    def __getitem__(self, grid):
        def bind(x, w, out, n, BLOCK):
            self.bound += 1
            out.copy_(x + w[: len(x)])
            return Compiled(self)

        return bind


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        assert grid == (3, 1, 1)
        return lambda *args: self.kernel.repeated.append(args)


@pytest.fixture
def kernel():
    return Kernel()


@pytest.fixture
def template(kernel):
    def function(x):
        out = torch.empty(x.shape, dtype=x.dtype)
        launch(kernel, (3,), x, kernel.weight, out, 8, BLOCK=4)
        return out

    return function


def aligned(*shape):
    made = torch.randn(*shape)
    assert made.data_ptr() % 16 == 0
    return made


def test_a_repeated_call_puts_in_new_addresses(kernel, template):
    call = Prepared(template)
    first, second = aligned(8, 16), aligned(8, 16)
    torch.testing.assert_close(call(first), first + 1)
    out = call(second)
    assert kernel.bound == 1
    assert kernel.repeated == [(second.data_ptr(), kernel.weight.data_ptr(), out.data_ptr(), 8, 4)]
    assert out.shape == second.shape and out.dtype == second.dtype


@pytest.mark.parametrize(
    "other",
    [
        lambda: torch.randn(8, 16).double(),
        lambda: torch.randn(16, 8).t(),
        lambda: torch.randn(1, 16),
        lambda: torch.randn(8 * 16 + 1)[1:].view(8, 16),
    ],
    ids=["dtype", "strides", "shape", "address"],
)
def test_other_layouts_are_bound_anew(kernel, template, other):
    call = Prepared(template, checked=1)
    call(aligned(8, 16))
    call(other())
    assert kernel.bound == 2 and not kernel.repeated


def test_a_tensor_given_twice_is_not_told_apart(kernel):
    def function(x, y):
        out = torch.empty(x.shape)
        launch(kernel, (3,), x, y, out, 8, BLOCK=4)
        return out

    call, both = Prepared(function), aligned(8, 16)
    call(both, both)
    first, second = aligned(8, 16), aligned(8, 16)
    torch.testing.assert_close(call(first, second), first + second)
    assert kernel.bound == 2 and not kernel.repeated


class Adder:
    """A kernel of two tensors, and what it is compiled to, which notes how it is called."""

    arg_names = ["x", "out"]

    def __init__(self):
        self.repeated = []

    def __getitem__(self, grid):
        return self.bind if len(grid) == 1 else lambda *args: self.repeated.append(args)

    def bind(self, x, out):
        out.copy_(x + 1)
        return self


def test_several_launches_hand_on_memory_of_the_call():
    one, other, between = Adder(), Adder(), []

    def function(x):
        between.append(scratch(16, torch.float64, x.device))
        out = torch.empty_like(x)
        launch(one, (1,), x, between[-1])
        launch(other, (1,), between[-1], out)
        return out

    call, x, y = Prepared(function), aligned(16), aligned(16)
    torch.testing.assert_close(call(x), x + 2)
    out = call(y)
    assert len(between) == 1 and out.dtype == y.dtype and out.shape == y.shape
    ((first, place),), ((again, last),) = one.repeated, other.repeated
    assert first == y.data_ptr() and last == out.data_ptr() and place == again
    assert place not in (first, last, x.data_ptr())


def test_inputs_are_not_kept(template):
    call = Prepared(template)
    x = aligned(8, 16)
    gone = weakref.ref(x)
    call(x)
    del x
    gc.collect()
    assert gone() is None


def test_kernels_that_are_interpreted_are_not_repeated():
    class Interpreted:
        arg_names = ["x"]

        def __getitem__(self, grid):
            return lambda x: [x.add_(1), None][1]

    call = Prepared(lambda x: launch(Interpreted(), (1,), x))
    x = torch.zeros(4)
    call(x)
    call(x)
    assert x.sum() == 8


class Stub:
    """A kernel that is bound as Triton binds it, and runs as it does for the addresses given."""

    def __init__(self, kernel):
        self.kernel, self.arg_names = kernel, kernel.arg_names
        self.bound, self.repeated = [], []

    def __getitem__(self, grid):
        def bind(*args, **rest):
            names = inspect.signature(self.kernel.fn).parameters
            options = {key: rest.pop(key) for key in list(rest) if key not in names}
            self.bound.append(tuple(inspect.signature(self.kernel.fn).bind(*args, **rest).args))
            self.kernel[grid](*args, **rest, **options)
            return Repeating(self)

        return bind


class Repeating:
    def __init__(self, stub):
        self.stub = stub

    def __getitem__(self, grid):
        assert len(grid) == 3
        return lambda *args: self.stub.repeated.append(args)


def _rows(*shape):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    *sizes, dtype = shape if isinstance(shape[-1], torch.dtype) else (*shape, torch.float16)
    return torch.randn(*sizes, device=device).to(dtype)


WEIGHT, VECTOR = _rows(64, 64), _rows(64)
NORM = Norm(VECTOR, VECTOR, 1e-5, False)
TEMPLATES = {
    "gemm": ("gemm_kernel", lambda f: lambda x, r: f(x, WEIGHT, VECTOR, r), (16, 64), (16, 64)),
    "gated": (
        "gated_kernel", lambda f: lambda x: f(x, WEIGHT, WEIGHT, norm=NORM), (16, 64)
    ),
    "norm": (
        "norm_kernel",
        lambda f: lambda x, r: f(x, VECTOR, None, None, r, eps=1e-5, return_sum=True),
        (16, 64), (16, 64),
    ),
    "gemm_norm": (
        "gemm_norm_kernel", lambda f: lambda x: f(x, WEIGHT, VECTOR, VECTOR, eps=1e-5), (16, 64)
    ),
    "qkv": (
        "rotary_kernel",
        lambda f: lambda x, c, s: f(x, WEIGHT, heads=2, kv_heads=1, cos=c, sin=s),
        (16, 64), (8, 16), (8, 16),
    ),
    "embed": (
        "embed_kernel",
        lambda f: lambda a, b: f([WEIGHT, WEIGHT], [a, b], NORM),
        (2, 32, torch.int64), (1, 32, torch.int64),
    ),
    "rotary": (
        "rotary_kernel", lambda f: lambda q, k, c, s: f(q, k, c, s),
        (2, 8, 2, 16), (2, 8, 1, 16), (1, 8, 16), (1, 8, 16),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_repeated_with_the_arguments_that_triton_binds(name, monkeypatch):
    kernel, call_of, *shapes = TEMPLATES[name]
    module = importlib.import_module(f"stof_hf.fusion.templates.{name}")
    stub = Stub(getattr(module, kernel))
    monkeypatch.setattr(module, kernel, stub)
    call = Prepared(call_of(getattr(module, name)), checked=len(shapes))
    one, two = ([_rows(*shape) for shape in shapes] for _ in range(2))
    call(*one)
    results = call(*two)
    assert len(stub.bound) == len(stub.repeated) == 1
    outputs = () if results is None else results if isinstance(results, tuple) else (results,)
    places = {id(x): y.data_ptr() for x, y in zip(one, two, strict=True)}
    fresh = iter(outputs)
    known = {id(x) for x in one}
    for bound, got in zip(stub.bound[0], stub.repeated[0], strict=True):
        if not isinstance(bound, torch.Tensor):
            assert got is bound or got == bound
        elif id(bound) in known:
            assert got == places[id(bound)]
        elif bound.data_ptr() != got:
            # Not a weight: a result.
            places[id(bound)] = got
            known.add(id(bound))
            assert got == next(fresh).data_ptr()
    assert next(fresh, None) is None
