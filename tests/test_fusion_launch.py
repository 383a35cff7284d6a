"""Prepared launches: what is put in the place of what, and when a call is made anew."""

import gc
import weakref

import pytest
import torch

from stof_hf.fusion.templates.launch import Prepared, launch


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
