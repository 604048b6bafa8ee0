import pytest
import torch

from infini_bench.device import computing, torch_device
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
