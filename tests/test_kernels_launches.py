"""The checks of ``launches`` themselves: each kind of wrong launch is named, a right one is left alone."""

import pytest
import torch
from launches import checked
from test_kernels import GPU, runs  # noqa: F401

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.skipif(GPU, reason="checks Triton's interpreter")


@triton.jit
def shift(x, y, n, BY: tl.constexpr, BLOCK: tl.constexpr):
    """y[i + BY] = x[i], a block a program."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i + BY, tl.load(x + i, mask=i < n), mask=i < n)


@pytest.fixture(autouse=True)
def check(runs, monkeypatch):  # noqa: F811
    with checked(monkeypatch):
        yield


def test_a_launch_inside_its_tensors_runs():
    x, y = torch.arange(20.0), torch.zeros(21)
    shift[(3,)](x, y, 20, BY=1, BLOCK=8)
    assert torch.equal(y[1:], x)
    assert torch.empty(3).isnan().all()


@pytest.mark.parametrize("by", [1, -1])
def test_a_store_outside_is_named_though_it_hits_memory_of_the_same_storage(by):
    x, memory = torch.arange(20.0), torch.zeros(60)
    with pytest.raises(Exception, match=rf"shift, program .*: y \[20\] at {20 if by > 0 else -1} of 20"):
        shift[(3,)](x, memory[20:40], 20, BY=by, BLOCK=8)


def test_a_load_outside_is_named():
    with pytest.raises(Exception, match=r"x \[20\] at 20 of 20"):
        shift[(3,)](torch.arange(20.0), torch.zeros(40), 21, BY=0, BLOCK=8)


def test_an_empty_tensor_may_not_be_read():
    with pytest.raises(Exception, match=r"x \[0\] at 0 of 0"):
        shift[(1,)](torch.zeros(0), torch.zeros(8), 8, BY=0, BLOCK=8)


def test_programs_may_not_touch_what_another_one_writes():
    x = torch.arange(25.0)
    shift[(3,)](x[:24], x[:24], 24, BY=0, BLOCK=8)
    with pytest.raises(Exception, match=r"(x|y) \[24\] races with program 0"):
        shift[(3,)](x[:24], x[1:], 24, BY=0, BLOCK=8)
