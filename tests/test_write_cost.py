"""What writing costs in training: the price, its gradient, and every way by which it reaches the loss."""

from dataclasses import asdict, replace

import pytest
import torch
from conftest import MEMORIES
from memory_references import N, compressive, qkv, rope_table
from test_memory import make
from test_train_loss import assert_same, batch, run
from torch._dynamo.backends.registry import lookup_backend
from train_fakes import SEGMENT, fake_task, run_config

from infini_bench.cli.bridge import compose_run, compose_runs
from infini_bench.errors import UserError
from infini_bench.layer import MemoryDecoderLayer
from infini_bench.models import build_model
from infini_bench.report.records import config_hash
from infini_bench.schema import MemoryConfig, RunConfig
from infini_bench.train import loop, train
from infini_bench.train.log import curve
from infini_bench.train.loss import SequenceLoss

PAID = {"update": "delta_token", "normaliser": "none", "write_gate": True, "write_cost": 0.3}
TOKENS = 4 * N + 2


def price(mem, k):
    """Token by token: ``write_cost`` times the mean over KV heads of w, and w (B, T, G)."""
    rows = [
        [
            [torch.sigmoid(u[:-1] @ key + u[-1]) for u, key in zip(mem.memory_write, keys, strict=True)]
            for keys in row
        ]
        for row in k
    ]
    w = torch.stack([torch.stack([torch.stack(keys) for keys in row]) for row in rows])
    return mem.cfg.write_cost * w.mean(2).sum(), w


@pytest.mark.parametrize("settings", [PAID, MEMORIES["infini_all_options"] | {"write_cost": 0.3}])
@pytest.mark.parametrize("sizes", [[TOKENS], [1] * TOKENS, [N - 1, N + 3, 2 * N]])
def test_the_price_and_its_gradient_in_any_cut(settings, sizes):
    """Gradients against c' = cost / G w (1 - w) of each key and head, written out."""
    mem, (q, k, v), rope = make(**{"kind": "compressive", **settings}), qkv(TOKENS), rope_table(N)
    outs, state, paid = [], None, 0.0
    for each in zip(*(x.split(sizes, 1) for x in (q, k, v)), strict=True):
        out, state = mem(*each, rope, state)
        outs.append(out)
        paid = paid + mem.auxiliary
    expected, w = price(mem, k)
    assert paid.item() == pytest.approx(expected.item(), rel=1e-6)
    assert mem.written.item() == pytest.approx(w[:, -sizes[-1] :].mean().item(), rel=1e-6)
    assert (torch.cat(outs, 1) - compressive(mem, q, k, v)[0]).abs().max() < 2e-4  # and changes no output
    slope = (mem.cfg.write_cost / w.shape[2] * w * (1 - w)).detach()[..., None]
    u = mem.memory_write.detach()
    ours = torch.autograd.grad(paid, [k, mem.memory_write])
    theirs = [slope * u[:, :-1], (slope * torch.cat([k, torch.ones_like(slope)], -1)).sum((0, 1))]
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_only_training_pays_and_padding_is_free():
    mem, (q, k, v), rope = make(kind="compressive", **PAID), qkv(2 * N), rope_table(N)
    mask = torch.ones(2, 2 * N, dtype=torch.bool)
    mask[0, :3] = False
    mem(q, k, v, rope, None, mask)
    assert mem.auxiliary.item() == pytest.approx((0.3 * price(mem, k)[1].mean(2) * mask).sum().item())
    with torch.no_grad():
        mem(q, k, v, rope)
    assert mem.auxiliary is None
    mem(q, k, v, rope)
    assert mem.auxiliary is not None
    mem.eval()(q, k, v, rope)
    assert mem.auxiliary is None
    free = make(kind="compressive", **PAID | {"write_cost": 0.0})
    free(q, k, v, rope)
    assert free.auxiliary is None and free.written is None


def test_under_autocast_strengths_are_float32():
    mem, rope = make(kind="compressive", **PAID).float(), rope_table(N, dtype=torch.bfloat16)
    q, k, v = (x.detach().bfloat16() for x in qkv(TOKENS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mem(q, k, v, rope)
    expected = price(mem, k.float())[0]
    assert mem.auxiliary.dtype == torch.float32
    assert mem.auxiliary.item() == pytest.approx(expected.item(), rel=1e-6)
    ours, theirs = (torch.autograd.grad(x, [mem.memory_write])[0] for x in (mem.auxiliary, expected))
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.fixture
def model(decoder):
    model = build_model(decoder, MemoryConfig(segment=8, features="relu2", **PAID), 13)
    for memory in model.memories:
        memory.memory_write.data.normal_()
    run.batch = batch()
    return model


@pytest.mark.parametrize("segments", [None, 1, 2])
def test_the_loss_has_it_as_a_mean_over_tokens_and_what_is_reported_has_not(model, decoder, segments):
    """Checkpointed calls are computed twice and charged once, and leave no graph behind."""
    free = build_model(decoder, replace(model.memories[0].cfg, write_cost=0.0), 13)
    free.load_state_dict(model.state_dict())
    paid, plain = run(model, segments), run(free, segments)
    torch.testing.assert_close(paid[1], plain[1])
    assert all(memory.auxiliary is None for memory in model.memories)
    tokens, weights, _ = run.batch
    model.zero_grad()
    nll, _ = model.losses(tokens[:, :-1], tokens[:, 1:])
    written = [memory.written.item() for memory in model.memories]
    extra = model.take_auxiliary() / weights.numel()
    assert extra.item() == pytest.approx(0.3 * sum(written), rel=1e-5)
    loss = (weights * nll).sum() + extra
    loss.backward()
    assert_same(paid, (loss.detach(), paid[1], {n: p.grad for n, p in model.named_parameters()}))
    leaf = "model.layers.0.self_attn.memory.memory_write"
    assert (paid[2][leaf] - plain[2][leaf]).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize(("segments", "graphs"), [(None, 1), (2, 3)])
def test_compiled_layers_pay_the_same_in_as_many_graphs_as_without_a_price(
    model, segments, graphs, monkeypatch
):
    plain, compiler, made = run(model, None), torch.compile, []

    def count(graph, inputs):
        made.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    def compile(function, **given):
        backend = count if function is MemoryDecoderLayer.body else "aot_eager"
        return compiler(function, backend=backend, fullgraph=True, **given)

    monkeypatch.setattr(torch, "compile", compile)
    loss = SequenceLoss(model, segments, compiled=True)
    for _ in range(3):  # what a call leaves behind makes no later one compile again
        model.zero_grad()
        value, sums = loss(*run.batch)
        value.backward()
        assert_same(plain, (value.detach(), sums, {n: p.grad for n, p in model.named_parameters()}))
        assert len(made) == graphs
        assert all(memory.auxiliary is None for memory in model.memories)


def test_a_trainings_log_and_curve_have_the_strengths_of_its_layers(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "build_task", fake_task)  # whose rows need no memory
    for name, memory in (("paid", PAID), ("free", PAID | {"write_cost": 0.0})):
        cfg = run_config(steps=60, log_every=20, save_every=None, lr=0.03)
        cfg.memory = MemoryConfig(segment=SEGMENT, **memory)
        train(cfg, tmp_path / name)
    paid, free = (curve(tmp_path / name / "metrics.jsonl") for name in ("paid", "free"))
    assert [len(line["write"]) for line in paid] == [2, 2, 2]  # of two layers
    assert min(paid[-1]["write"]) > 0 and max(paid[-1]["write"]) < 0.01  # from 0.88
    assert not any("write" in line for line in free)


def test_outside_training_keys_below_the_floor_are_not_written():
    """The memory is that of the keys above it alone, in any cut; training knows no floor."""
    settings = {"kind": "compressive", **PAID, "features": "relu2"}
    cut, (q, k, v), rope = make(**settings, write_floor=0.6), qkv(TOKENS), rope_table(N)
    soft = make(**settings)
    soft.load_state_dict(cut.state_dict())
    low = price(soft, k)[1] < 0.6
    assert 0.3 < low.float().mean() < 0.7
    assert torch.equal(cut(q, k, v, rope)[0], soft(q, k, v, rope)[0])  # in training, all are
    kept = k.detach() * ~low[..., None]  # ReLU^2 of zeros writes nothing
    out, state = cut.eval()(q, k, v, rope)
    M = compressive(soft, q, kept, v)[1]
    assert (state["M"] - M).abs().max() < 1e-5
    assert (state["M"] - soft(q, k, v, rope)[1]["M"]).abs().max() > 1e-2
    again, _ = cut(q[:, -2:], k[:, -2:], v[:, -2:], rope, cut(q[:, :-2], k[:, :-2], v[:, :-2], rope)[1])
    assert (again - out[:, -2:]).abs().max() < 1e-5


def test_a_floor_in_training_leaves_the_same_keys_out_and_gives_them_no_gradient():
    settings = {"kind": "compressive", **PAID, "features": "relu2", "write_floor": 0.6, "floor_trained": True}
    mem, (q, k, v), rope = make(**settings), qkv(TOKENS), rope_table(N)
    k.requires_grad_()
    out, state = mem(q, k, v, rope)
    low = price(mem, k)[1] < 0.6
    (slope,) = torch.autograd.grad(state["M"].square().sum(), k)
    written = len(k[0]) // N * N
    assert (slope[:, :written][low[:, :written]] == 0).all()
    assert (slope[:, :written][~low[:, :written]].abs().amax(-1) > 0).float().mean() > 0.9
    asked = mem.eval()(q, k, v, rope)
    assert torch.equal(asked[0], out) and torch.equal(asked[1]["M"], state["M"])
    with pytest.raises(UserError, match=r"floor_trained=true needs a floor"):
        compose_run(["model=infini_delta_token", "memory.write_gate=true", "memory.floor_trained=true"])


def test_a_price_of_nothing_is_refused():
    for name in ("write_cost", "write_floor"):
        sentence = rf"^memory\.{name}=0\.1 is .* with memory\.write_gate=true has; leave it out, or .*\.$"
        with pytest.raises(UserError, match=sentence):
            compose_run(["model=infini_delta_token", f"memory.{name}=0.1"])
    with pytest.raises(UserError, match=r"memory\.write_cost must be 0 or more, not -1"):
        compose_run(["model=infini_delta_token", "memory.write_gate=true", "memory.write_cost=-1"])
    with pytest.raises(UserError, match=r"memory\.write_cost is read by memory\.kind=compressive, not by xl"):
        compose_runs("train", ["model=transformer_xl", "memory.write_cost=0.1"], False)


def test_runs_that_were_recorded_before_are_still_known():
    config = asdict(RunConfig())
    younger = [("memory", name) for name in ("write_cost", "write_floor", "floor_trained")]
    for section, name in (*younger, ("trainer", "write_lr")):
        others = {key: value for key, value in config[section].items() if key != name}
        assert config_hash({**config, section: others}) == config_hash(config)
        assert config_hash({**config, section: {**others, name: 0.1}}) != config_hash(config)
