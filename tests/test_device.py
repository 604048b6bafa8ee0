import ctypes
from pathlib import Path

import pytest
import torch

from infini_bench.device import computing, reset_peak, torch_device
from infini_bench.errors import UserError


def test_a_device_that_is_none_is_told():
    assert torch_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="device must be one of auto, cpu, cuda, not tpu"):
        torch_device("tpu")


def test_an_evaluation_in_bf16_computes_products_in_it_and_leaves_nothing_behind():
    a = torch.full((2, 2), 1 + 2**-10)
    before = torch.get_float32_matmul_precision()
    with computing(a.device, "bf16"):
        assert (a @ a).dtype == torch.bfloat16
        assert torch.get_float32_matmul_precision() == "highest"  # for what leaves autocast
    with computing(a.device, "float32"):
        assert (a @ a).dtype == torch.float32
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_what_was_freed_is_no_part_of_the_next_peak():
    """The last of many blocks keeps the heap from shrinking by itself."""

    def held() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024

    blocks = [bytes([1]) * 50_000 for _ in range(2_000)]
    last = blocks.pop()
    del blocks
    before = held()
    reset_peak(torch.device("cpu"))
    assert before - held() > 90e6 and len(last) == 50_000
