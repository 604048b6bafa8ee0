"""What the attention inside and beside a segment asks of torch's kernels."""

import pytest
import torch
from conftest import MEMORIES
from memory_references import rope_table
from torch.utils._python_dispatch import TorchDispatchMode

from infini_bench.memory import build_memory
from infini_bench.memory.base import attend
from infini_bench.schema import MemoryConfig

B, N, H, D = 2, 6, 2, 8


class AttentionGradients(TorchDispatchMode):
    """Collects the gradients of outputs (B, H, Q, D) that the backward passes of attention are given."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if "attention" in str(op) and "backward" in str(op):
            self.found.append(args[0])
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "compiled"),
    [(name, False) for name in ("transformer_xl", "memorizing", "infini_delta_xl", "local_sliding")]
    + [("transformer_xl", True), ("memorizing", True)],
)
def test_attention_is_given_gradients_of_one_layout_in_every_layer(name, compiled):
    """cuDNN reads the gradient of one layer by the strides of another's (`ContiguousGradient`)."""
    mem = build_memory(MemoryConfig(segment=N, **MEMORIES[name]), H, H, D)
    forward = torch.compile(mem.forward, backend="aot_eager") if compiled else mem.forward
    parts = [torch.randn(B, 4 * N, H, D, requires_grad=True) for _ in range(3)]
    out = forward(*parts, rope_table(mem.span, D, dtype=torch.float32))[0]
    with AttentionGradients() as gradients:
        out.backward(torch.randn_like(out))
    assert len(gradients.found) >= 2  # of a document's first segments, and of all others
    assert all(dout.transpose(1, 2).is_contiguous() for dout in gradients.found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only on a GPU is there more than one kernel")
@pytest.mark.parametrize("masked", [True, False])
def test_gradients_of_attention_do_not_depend_on_the_layout_of_their_gradient(masked):
    """The view's strides are the larger, and come second: a wrong read stays inside the view's storage."""
    q, k, v = (torch.randn(B, 1, 128, H, 64, device="cuda").bfloat16().requires_grad_() for _ in range(3))
    mask = torch.ones(128, 128, dtype=torch.bool, device="cuda").tril() if masked else None
    view = torch.randn(B, 3, 128, H, 64, device="cuda").bfloat16()[:, :1]
    dense, strided = (
        torch.autograd.grad(attend(q, k, v, mask, not masked), (q, k, v), dout)
        for dout in (view.contiguous(), view)
    )
    for x, y in zip(dense, strided, strict=True):
        torch.testing.assert_close(x, y)
