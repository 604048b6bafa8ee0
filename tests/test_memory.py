"""Every memory against its slow float64 reference and against a public peer: outputs, state, gradients."""

from itertools import pairwise

import memory_references
import pytest
import torch
from conftest import MEMORIES
from memory_references import D, G, H, N, compressive, qkv, rope_table, slow
from torch.utils._python_dispatch import TorchDispatchMode

from infini_bench import schema
from infini_bench.errors import UserError
from infini_bench.layer import MemoryDecoderLayer
from infini_bench.memory import KINDS, TOKENS, build_memory, reference
from infini_bench.memory.base import forms
from infini_bench.memory.features import FEATURES
from infini_bench.memory.kernels import backend
from infini_bench.models import build_model
from infini_bench.schema import DecoderConfig, MemoryConfig, TrainerConfig
from infini_bench.train.optim import parameter_groups

IN_LAYERS = [name for name, settings in MEMORIES.items() if settings["kind"] not in TOKENS]


def make(**kwargs):
    segment = N + 1 if kwargs["kind"] == "compressed" else N  # a multiple of the rate
    return memory_references.make(segment, **kwargs)


@pytest.mark.parametrize("tokens", [1, N - 1, N, 3 * N, 4 * N + 3])
@pytest.mark.parametrize("name", IN_LAYERS)
def test_outputs_and_gradients_equal_the_reference(name, tokens):
    mem, (q, k, v) = make(**MEMORIES[name]), qkv(tokens)
    rope = rope_table(mem.span or tokens)
    fast, expected = mem(q, k, v, rope)[0], slow(mem, q, k, v)
    # M and z, the look-up of neighbours, slots and linear attention are float32 whatever the model's dtype
    tolerance = 2e-6 if mem.cfg.kind in ("compressive", "knn", "compressed", "kernel") else 1e-12
    assert (fast - expected).abs().max() < tolerance
    wanted = [q, k, v, *mem.parameters()]
    weight = torch.randn_like(fast)
    ours = torch.autograd.grad((fast * weight).sum(), wanted, allow_unused=True)
    theirs = torch.autograd.grad((expected * weight).sum(), wanted, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        a, b = (torch.zeros(1) if g is None else g for g in (a, b))
        assert (a - b).abs().max() < 20 * tolerance


SUMS = ("linear", "delta", "delta_corrected")
VARIANTS = [
    *({"update": update, "features": features} for update in SUMS for features in FEATURES),
    *({"update": "delta_token", "features": features, "normaliser": "none"} for features in FEATURES),
    *({"update": update, "normaliser": n} for update in ("linear", "delta") for n in ("mean", "max")),
    *({"update": update, "features": "relu2", "normaliser": "norm"} for update in ("linear", "delta_token")),
    *({"update": update, "decay": 0.9} for update in SUMS),
    *({"update": update, "write_gate": True} for update in SUMS),
    {"update": "delta_token", "normaliser": "norm", "write_gate": True, "decay": 0.9, "gate_input": True},
    {"update": "delta", "gate_input": True, "gradient_depth": 9},
]


def variant(settings):
    return " ".join(map(str, settings.values()))


@pytest.mark.parametrize("chunk", [64, 3])  # a segment's keys at once, and by twos
@pytest.mark.parametrize("settings", [x for x in VARIANTS if x["update"] == "delta_token"], ids=variant)
def test_keys_written_one_by_one_may_be_solved_in_any_chunks(settings, chunk, monkeypatch):
    monkeypatch.setattr("infini_bench.memory.compressive.CHUNK", chunk)
    test_outputs_states_and_gradients_of_every_variant_equal_the_reference(settings)


@pytest.mark.parametrize("settings", [x for x in VARIANTS if x["update"] != "delta_token"], ids=variant)
def test_outputs_states_and_gradients_of_every_variant_equal_the_reference(settings):
    mem, (q, k, v) = make(kind="compressive", **settings), qkv(3 * N + 2)
    out, state = mem(q, k, v, rope_table(N))
    slow_out, *slow_state = compressive(mem, q, k, v)
    wanted = [q, k, v, *mem.parameters()]
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum() + state["M"].sum(), wanted)
    theirs = torch.autograd.grad((slow_out * weight).sum() + slow_state[0].sum(), wanted)
    named = [(state[name], x) for name, x in zip(("M", "z"), slow_state, strict=True) if name in state]
    assert ("z" in state) == (mem.cfg.normaliser not in ("none", "norm"))
    for a, b in [(out, slow_out), *named, *zip(ours, theirs, strict=True)]:
        # near zero the normaliser of GELU loses digits in float32
        tolerance = 1e-2 if mem.cfg.features == "gelu" else 2e-4
        assert (a - b).abs().max() < tolerance * b.abs().max().clamp_min(1)


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_gradients_of_the_state_reach_the_first_segment(update):
    mem, (q, k, v) = make(kind="compressive", update=update), qkv(4 * N)
    _, state = mem(q, k, v, rope_table(N))
    M = compressive(mem, q, k, v)[1]
    weight = torch.randn_like(M)
    ours = torch.autograd.grad((state["M"] * weight).sum(), [k, v])
    theirs = torch.autograd.grad((M * weight).sum(), [k, v])
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()
        assert a[:, 0].abs().max() > 0


@pytest.mark.parametrize("update", ["linear", "delta", "delta_corrected"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_gradient_depth_cuts_at_its_boundaries_and_keeps_values(update, depth):
    full, cut = (
        make(kind="compressive", update=update),
        make(kind="compressive", update=update, gradient_depth=depth),
    )
    cut.load_state_dict(full.state_dict())
    q, k, v = qkv(6 * N)
    a, b = full(q, k, v, rope_table(N))[0], cut(q, k, v, rope_table(N))[0]
    assert (a - b).abs().max() < 1e-6
    reach = torch.autograd.grad(b[:, 5 * N :].sum(), v)[0].abs().sum((0, 2, 3)).view(6, N).sum(1) > 0
    first = 5 // depth * depth  # the last boundary at which gradients stop
    assert reach.tolist() == [s >= first for s in range(6)]
    halves = torch.cat([b_ for b_ in two_calls(cut, q, k, v)], 1)  # the cut counts segments of the document
    again = torch.autograd.grad(halves[:, 5 * N :].sum(), v)[0]
    assert (
        again - torch.autograd.grad(cut(q, k, v, rope_table(N))[0][:, 5 * N :].sum(), v)[0]
    ).abs().max() < 1e-6


def two_calls(mem, q, k, v):
    at = 3 * N + 2
    first, state = mem(q[:, :at], k[:, :at], v[:, :at], rope_table(N))
    return first, mem(q[:, at:], k[:, at:], v[:, at:], rope_table(N), state)[0]


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_public_peer_agrees_on_memory_and_read_out(update):
    """infini-transformer-pytorch 0.2.1: one KV head a query head, and its gate weights the local side."""
    from infini_transformer_pytorch.infini_transformer import (  # not on every GPU machine
        FastweightMemory,
        Memories,
    )

    mem = build_memory(MemoryConfig(kind="compressive", update=update, segment=N), H, H, D)
    mem.memory_gate.data = torch.randn(H)
    q, k, v = (x.detach().float() for x in qkv(4 * N, H, H))
    rope = rope_table(N, dtype=torch.float32)
    peer = FastweightMemory(H, use_mem_delta_rule=update == "delta")
    peer.head_gates.data = -mem.memory_gate.data
    ours, state = mem(q, k, v, rope)
    with torch.no_grad():
        memories: Memories | None = None
        for s in range(4):
            part = slice(s * N, s * N + N)
            local = mem(q[:, part], k[:, part], v[:, part], rope)[0].transpose(1, 2)
            heads = [x[:, part].transpose(1, 2) for x in (q, k, v)]
            theirs = peer.retrieve_and_add_to_output(local, heads[0], memories)
            assert (ours[:, part].transpose(1, 2) - theirs).abs().max() < 2e-5
            memories = peer.create_new_memories(heads[1], heads[2], memories)
        assert (state["M"] - memories.kv_mem).abs().max() < 1e-4
        assert (state["z"] - memories.k_norm).abs().max() < 1e-4


def test_names_that_settings_allow_are_those_that_exist():
    assert set(schema.MEMORY_KINDS) == set(KINDS)
    assert set(schema.FEATURES) == set(FEATURES) == set(reference.SIGMA)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"kind": "foo"}, {"update": "Delta"}, {"features": "q"}, {"segment": 0}, {"normaliser": "l2"}),
        *({"kind": "knn", "layer": 2}, {"update": "delta_token"}, {"update": "delta", "normaliser": "none"}),
        {"local": "full"},
        {"kind": "compressed", "compression": "sum"},
        {"kind": "compressed", "segment": 6, "rate": 4},
        {"kind": "sink", "segment": 6, "sinks": 7},
        {"kind": "sliding", "window": 1},
        {"kind": "sparse", "stride": 0},
        {"kind": "knn", "index": "annoy"},
    ],
)
def test_a_memory_that_does_not_exist_is_named(wrong):
    with pytest.raises(UserError, match=r"memory\."):
        build_memory(MemoryConfig(**wrong), H, G, D, 0, 2)


def test_split_gates_start_on_both_sides():
    starts = {
        "gate_start": 0.5,
        "gate_split": 2.0,
        "write_gate": True,
        "write_start": -1.0,
        "write_split": 3.0,
    }
    mem = build_memory(MemoryConfig(**starts), 4, 2, 8)
    assert mem.memory_gate.tolist() == [-1.5, 2.5, -1.5, 2.5]
    assert mem.memory_write[:, -1].tolist() == [-4.0, 2.0] and not mem.memory_write[:, :-1].any()


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_frozen_gates_are_not_trained(value):
    model = build_model(DecoderConfig(), MemoryConfig(segment=N, gate_frozen=value), 20)
    trained = {id(p) for group in parameter_groups(model, TrainerConfig()) for p in group["params"]}
    gates = [memory.memory_gate for memory in model.memories]
    assert not trained & set(map(id, gates)) and len(trained) == len(list(model.parameters())) - len(gates)
    assert (model.gates() == value).all()
    nll = model.losses(*torch.randint(0, 20, (2, 1, 3 * N)))[0].sum()
    nll.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_state_stays_float32_under_bfloat16_and_autocast():
    mem = build_memory(MemoryConfig(segment=N), H, G, D)
    q, k, v = (x.detach().bfloat16() for x in qkv(3 * N))
    rope = rope_table(N, dtype=torch.bfloat16)
    out, state = mem(q, k, v, rope)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, auto = mem(q, k, v, rope)
    assert out.dtype == torch.bfloat16
    for s in (state, auto):
        assert s["M"].dtype == s["z"].dtype == torch.float32
    exact = mem(q.float(), k.float(), v.float(), rope_table(N, dtype=torch.float32))[1]
    assert (auto["M"] - exact["M"]).abs().max() < 1e-5


@pytest.mark.parametrize("update", ["linear", "delta", "delta_token"])
def test_while_no_segment_ends_the_memory_is_not_copied(update):
    normaliser = "none" if update == "delta_token" else "sum"
    mem = build_memory(MemoryConfig(segment=N, update=update, normaliser=normaliser), H, G, D).double()
    q, k, v = (x.detach() for x in qkv(2 * N))
    rope, cuts = rope_table(N), (0, N, N + 1, 2 * N - 1, 2 * N)
    places, state = [], None
    for begin, end in pairwise(cuts):
        state = mem(*(x[:, begin:end] for x in (q, k, v)), rope, state)[1]
        places.append(state["M"].data_ptr())
    assert places[0] == places[1] == places[2] != places[3]


def test_a_call_of_whole_segments_copies_no_rotary_values():
    names = set()

    class Called(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.add(func.name().split(".")[0])
            return func(*args, **(kwargs or {}))

    mem = build_memory(MemoryConfig(kind="block", segment=N), H, G, D)
    x = [x.detach() for x in qkv(3 * N)]
    rope = rope_table(N)
    with Called():
        mem(*x, rope)
    assert "aten::mul" in names and not names & {"aten::arange", "aten::index"}


def test_every_live_entry_is_found_after_the_store_wrapped_several_times():
    entries = 3 * N
    mem = build_memory(MemoryConfig(kind="knn", segment=N, entries=entries, neighbours=1), H, H, D).double()
    mem.memory_gate.data.fill_(50.0)  # the look-up alone
    state, written = None, []
    for call in (4, N, 2 * N + 1, 3 * N, 2, 5 * N):  # 12 N and more: the store is overwritten four times
        _, k, v = (x.detach() for x in qkv(call, H, H))
        _, state = mem(k, k, v, rope_table(2 * N), state)
        written.append((k, v))
    k, v = (torch.cat(x, 1) for x in zip(*written, strict=True))
    done = k.shape[1] // N * N
    for j in range(done - entries, done):
        out, _ = mem(k[:, j : j + 1], k[:, j : j + 1], v[:, :1], rope_table(2 * N), state)
        assert (out[:, 0] - v[:, j]).abs().max() < 1e-6
    lost = mem(k[:, done - entries - 1 :][:, :1], k[:, :1], v[:, :1], rope_table(2 * N), state)[0][:, 0]
    assert (lost - v[:, done - entries - 1]).abs().amax((1, 2)).min() > 1e-2


def test_a_pair_repeated_inside_one_segment_is_written_once_by_the_token_level_rule_only():
    k, v = torch.randn(2, 1, 1, 1, D, dtype=torch.float64)
    pairs = [x.expand(-1, 3, -1, -1) for x in (k, k, v)]
    for update, share in (("delta_token", 1.0), ("linear", 3.0)):
        mem = build_memory(
            MemoryConfig(kind="compressive", update=update, normaliser="none", segment=3), 1, 1, D
        ).double()
        mem.memory_gate.data.fill_(50.0)
        state = mem(*pairs, rope_table(3))[1]
        assert (mem(k, k, v, rope_table(3), state)[0] - share * v).abs().max() < 1e-5


@pytest.mark.parametrize(("update", "share"), [("linear", 1.0), ("delta", 1 / 2), ("delta_corrected", 1.0)])
def test_one_pair_written_six_times_reads_back_halved_under_plain_delta(update, share):
    mem = build_memory(MemoryConfig(kind="compressive", update=update, segment=1), 1, 1, D).double()
    mem.memory_gate.data.fill_(50.0)
    k, v = torch.randn(2, 1, 1, 1, D, dtype=torch.float64)
    out, _ = mem(*(x.expand(-1, 7, -1, -1) for x in (k, k, v)), rope_table(1))
    assert (out[:, 6] - share * v[:, 0]).abs().max() < 1e-5


def test_the_form_is_told_once_by_layers_that_are_compiled_too(caplog):
    """On a CPU, where ``auto`` takes the eager form; that of the last call is kept."""
    why = "eager, as the tensors are on cpu, not on a CUDA device"
    backend._told.cache_clear()
    memory = MemoryConfig(segment=N)
    model = build_model(DecoderConfig(layers=2, dim=H * D, heads=H, ffn=8), memory, 50)
    assert forms(model) == []
    x = torch.randn(1, 3 * N, H * D)
    rope = model.model.rotary_emb(x, torch.arange(N)[None])
    compiled = torch.compile(MemoryDecoderLayer.body, fullgraph=True, dynamic=False, backend="aot_eager")
    with caplog.at_level("INFO"):
        for layer in model.model.layers:
            compiled(layer, x, rope, None, None)
        assert forms(model) == [why]
        for layer in model.model.layers:
            layer.body(x, rope, None, None)
    assert [record.getMessage() for record in caplog.records] == [f"form of the memory: {why}"]
