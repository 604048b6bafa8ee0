import torch

from infini_bench.device import computing


def test_an_evaluation_in_bf16_computes_products_in_it_and_leaves_nothing_behind():
    a = torch.full((2, 2), 1 + 2**-10)
    before = torch.get_float32_matmul_precision()
    with computing(a.device, "bf16"):
        assert (a @ a).dtype == torch.bfloat16
        assert torch.get_float32_matmul_precision() == "highest"  # for what leaves autocast
    with computing(a.device, "float32"):
        assert (a @ a).dtype == torch.float32
    assert torch.get_float32_matmul_precision() == before
