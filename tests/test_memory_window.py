"""Sizes and forms of the attention-level memories of which the contract suite has one each."""

from dataclasses import replace

import pytest
import torch
from memory_references import D, compare, feed, make, qkv, rope_table, slow
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from infini_bench import schema
from infini_bench.config import build_config
from infini_bench.errors import UserError
from infini_bench.memory import build_memory, local, reference
from infini_bench.memory.local import PATHS
from infini_bench.models import attach_memory, build_model
from infini_bench.schema import MemoryConfig
from infini_bench.train.loss import SequenceLoss

# --- Compressive Transformer ----------------------------------------------------------------------------


@pytest.mark.parametrize("compression", schema.COMPRESSIONS)
@pytest.mark.parametrize(("rate", "slots"), [(1, 4), (2, 5), (3, 2), (6, 3), (2, 30)])
def test_compressed_slots_and_outputs_equal_the_reference(compression, rate, slots):
    mem = make(kind="compressed", compression=compression, rate=rate, compressed=slots)
    q, k, v = qkv(5 * 6 + 2)
    out, state = mem(q, k, v, rope_table(mem.span))
    assert (out - slow(mem, q, k, v)).abs().max() < 1e-5
    conv = getattr(mem, "memory_conv", None)
    for row in range(2):
        _, keys, values, _ = reference.compressed(q[row], k[row], v[row], 6, slots, rate, compression, conv)
        assert len(keys) == min(slots, 4 * 6 // rate)  # the last full segment is in the cache
        assert (state["slot_k"][row, slots - len(keys) :] - keys).abs().max() < 1e-5
        assert (state["slot_v"][row, slots - len(values) :] - values).abs().max() < 1e-5
    assert not state["slot_k"].requires_grad and not state["slot_v"].requires_grad


@pytest.mark.parametrize("sizes", [[26], [6, 12, 8], [1] * 26, [4, 9, 13]])
def test_the_reconstruction_loss_trains_the_convolution_alone_in_any_cut(sizes):
    mem = make(kind="compressed", rate=3, compressed=4)
    q, k, v = qkv(26)
    out, _, loss = feed(mem, q, k, v, sizes)
    rows = zip(q, k, v, strict=True)
    expected = sum(reference.compressed(*row, 6, 4, 3, "conv", mem.memory_conv)[3] for row in rows)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted = [mem.memory_conv, q, k, v]
    ours = torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)
    theirs = torch.autograd.grad(expected, wanted, allow_unused=True)
    assert (ours[0] - theirs[0]).abs().max() < 1e-4 * theirs[0].abs().max()
    assert ours[1:] == theirs[1:] == (None, None, None)
    assert torch.autograd.grad(out.sum(), [mem.memory_conv], allow_unused=True) == (None,)


def test_the_loss_is_left_in_training_only():
    mem, (q, k, v) = make(kind="compressed", rate=2), qkv(20)
    for call in (mem.eval, mem.train):
        call()
        mem(q, k, v, rope_table(mem.span))
        assert (mem.auxiliary is None) == (not mem.training)
    with torch.no_grad():
        mem(q, k, v, rope_table(mem.span))
    assert mem.auxiliary is None
    mask = torch.ones(2, 20, dtype=torch.bool)
    with pytest.raises(ValueError, match="without padding"):
        mem(q, k, v, rope_table(mem.span), None, mask)
    mean = make(kind="compressed", rate=2, compression="mean")
    mean(q, k, v, rope_table(mean.span))
    assert mean.auxiliary is None and not list(mean.parameters())


def test_the_convolution_starts_as_the_mean():
    conv, mean = (make(kind="compressed", rate=3, compression=how) for how in ("conv", "mean"))
    with torch.no_grad():
        conv.reset_parameters()
    q, k, v = qkv(26)
    assert (conv(q, k, v, rope_table(18))[0] - mean(q, k, v, rope_table(18))[0]).abs().max() < 1e-6


def test_training_adds_the_loss_and_reports_none_of_it(decoder):
    cfg = MemoryConfig(segment=8, kind="compressed", rate=2, compressed=5)
    model = build_model(decoder, cfg, 13)
    plain = build_model(decoder, replace(cfg, compression="mean"), 13)  # what conv is at the start
    plain.load_state_dict(model.state_dict(), strict=False)
    tokens, weights = torch.randint(13, (2, 60)), torch.full((2, 59), 1 / 118)
    loss, sums = SequenceLoss(model)(tokens, weights, weights)
    expected, same = SequenceLoss(plain)(tokens, weights, weights)
    torch.testing.assert_close(sums, same)
    torch.testing.assert_close(sums[0], expected.detach())
    assert loss > sums[0]
    model.hidden(tokens[:, :-1])
    auxiliary = sum(memory.auxiliary for memory in model.memories) / 118
    torch.testing.assert_close(loss, expected + auxiliary)
    SequenceLoss(model).eval()(tokens, weights, weights)
    assert all(memory.auxiliary is None for memory in model.memories)
    assert model.take_auxiliary() == 0


def test_the_convolution_learns_to_reconstruct_attention():
    """Keys and values live in a plane in which neighbours are opposite: the mean keeps nothing, W can."""
    mem = build_memory(MemoryConfig(segment=8, kind="compressed", rate=2), 2, 2, D)
    q, x = torch.randn(4, 32, 2, D), torch.randn(4, 16, 2, D)
    k = v = torch.stack([x, -x], 2).flatten(1, 2)
    optimizer = torch.optim.Adam(mem.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        mem(q, k, v, rope_table(24, dtype=torch.float32))
        optimizer.zero_grad()
        mem.auxiliary.backward()
        optimizer.step()
        losses.append(mem.auxiliary.item())
    assert losses[-1] < 0.6 * losses[0]


# --- sinks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "sinks"), [(None, 4), (2, 1), (3, 6), (6, 6), (7, 4), (20, 3)])
def test_sinks_equal_the_reference(width, sinks):
    mem = make(kind="sink", window=width, sinks=sinks)
    compare(mem, 5 * 6 + 2, 1e-12, [1, 3, 9, 1, 12, 6])


def test_what_a_sink_adds_no_longer_depends_on_the_documents_length():
    mem = make(kind="sink", window=4, sinks=2).eval()
    q, k, v = qkv(60)
    last = [x[:, -4:] for x in (q, k, v)]
    outs = []
    for gone in (6, 48):  # tokens between the sinks and the window
        parts = [
            torch.cat([x[:, :2], x[:, 2 : 2 + gone], end], 1) for x, end in zip((q, k, v), last, strict=True)
        ]
        outs.append(mem(*parts, rope_table(mem.span))[0][:, -1])
    assert (outs[0] - outs[1]).abs().max() < 1e-12


# --- local paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 3, 4, 13, 20])
def test_sparse_attention_equals_the_reference(stride):
    compare(make(13, kind="sparse", stride=stride), 2 * 13 + 9, 1e-12, [1, 1, 5, 7, 15, 1, 5])


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_linear_attention_equals_the_reference(chunk, monkeypatch):
    monkeypatch.setattr(local, "CHUNK", chunk)
    compare(make(13, kind="kernel"), 2 * 13 + 9, 5e-6, [1, 1, 5, 7, 15, 1, 5])


@pytest.mark.parametrize(("kind", "share"), [("sparse", 0.2), ("kernel", 0.6)])
def test_local_paths_cost_less_than_the_segment(kind, share):
    """Multiplications of 2 segments of 256; the block path counts all N x N scores, masked or not."""

    def flops(mem):
        q, k, v = (x.detach() for x in qkv(512))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            mem(q, k, v, rope_table(256))
        return counter.get_total_flops()

    cheap, block = (make(256, kind=kind) for kind in (kind, "block"))
    assert flops(cheap) < share * flops(block)


@pytest.mark.parametrize("update", ["linear", "delta"])
@pytest.mark.parametrize("path", schema.LOCALS)
def test_any_local_path_stands_beside_the_compressive_memory(path, update):
    mem = make(kind="compressive", update=update, local=path, window=9, stride=2)
    compare(mem, 3 * 6 + 4, 5e-6, [1, 4, 13, 4])
    q, k, v = qkv(18)
    block = make(kind="compressive", update=update)
    state, plain = (m(q, k, v, rope_table(m.span))[1] for m in (mem, block))
    assert torch.equal(state["M"], plain["M"]) and torch.equal(state["z"], plain["z"])
    sizes = {name: x[0].numel() for name, x in state.items() if name in ("M", "z", "past_k", "past_v")}
    assert sum(sizes.values()) == mem.state_floats()
    assert set(PATHS) == set(schema.LOCALS)


@pytest.mark.parametrize("path", schema.LOCALS)
def test_memory_off_leaves_the_own_segment_alone(decoder, path):
    cfg = MemoryConfig(kind="compressive", update="delta", segment=8, local=path, stride=3)
    model = build_model(decoder, cfg, 13).eval()
    ids = torch.randint(13, (1, 29))
    with torch.no_grad(), model.memory_off():
        off = model.step(ids)[0]
        alone = torch.cat([model.step(part)[0] for part in ids.split(8, 1)], 1)
    assert (off - alone).abs().max() < 1e-5
    assert all(module.enabled for module in model.modules() if hasattr(module, "enabled"))


@pytest.mark.parametrize("padded", [False, True])
def test_full_attention_goes_on_under_autocast(padded, decoder):
    model = build_model(decoder, MemoryConfig(kind="full", segment=8), 13).eval()
    ids, mask = torch.randint(13, (2, 20)), torch.ones(2, 20, dtype=torch.bool)
    mask[1, :3] = not padded
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        whole = model.step(ids, None, "last", mask)[0]
        state = model.step(ids[:, :12], None, "none", mask[:, :12])[1]
        assert (model.step(ids[:, 12:], state, "last")[0] - whole).abs().max() < 0.02
    assert state.layers[0].state["past_k"].dtype == torch.bfloat16


# --- attached to a pretrained model, and mistakes --------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [{"kind": "compressed"}, {"kind": "knn", "gate_start": -1.0}, {"kind": "compressive", "local": "xl"}],
)
def test_attached_memories_start_as_configured(kwargs):
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    cfg = MemoryConfig(segment=8, **kwargs)
    model = attach_memory(LlamaForCausalLM(config), cfg)
    for mem in model.memories:
        fresh = build_memory(replace(cfg, kind=mem.cfg.kind), 4, 4, 8, 1, 2).state_dict()
        assert fresh.keys() == mem.state_dict().keys()
        assert all(torch.equal(x, fresh[name]) for name, x in mem.state_dict().items())
    assert model.step(torch.randint(50, (1, 30)))[0].isfinite().all()


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"kind": "compressed", "segment": 128, "rate": 3}, "not a multiple of memory.rate=3"),
        ({"kind": "sink", "segment": 4, "sinks": 5}, "memory.sinks=5 is more than memory.segment=4"),
        ({"kind": "sliding", "window": 1}, "set 2 or more"),
        ({"compression": "sum"}, "one of conv, mean, max"),
        ({"local": "full"}, "one of block, sliding, xl, sparse, kernel"),
        ({"index": "annoy"}, "one of auto, torch, faiss"),
    ],
)
def test_a_mistake_is_named_before_anything_starts(memory, message):
    with pytest.raises(UserError, match=message):
        build_config({"task": {"name": "lm"}, "memory": memory})
