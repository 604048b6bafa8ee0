"""What is asked of untrained models: counts, read-back and gradients that are known by other means."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import MEMORIES

from infini_bench.config import build_config, to_dict
from infini_bench.errors import UserError
from infini_bench.memory import CompressiveMemory
from infini_bench.memory.features import FEATURES
from infini_bench.report import paper
from infini_bench.report.records import read_records
from infini_bench.run import run_eval, run_train
from infini_bench.schema import (
    CapacityConfig,
    DecoderConfig,
    FootprintConfig,
    MemoryConfig,
    ReachConfig,
    RunConfig,
)
from infini_bench.tasks import build_task
from infini_bench.tasks.capacity import read_back
from infini_bench.tasks.footprint import FORMULAS, Sizes

CPU = torch.device("cpu")


def config(model="infini_linear", memory=None, task=None, **changes) -> RunConfig:
    decoder = DecoderConfig(layers=3, dim=32, heads=4, kv_heads=2, ffn=48, init_std=0.2)
    cfg = RunConfig(model=model, decoder=decoder, task=task or FootprintConfig(after=[2, 4]))
    cfg.memory = MemoryConfig(**{"segment": 8, **MEMORIES.get(model, {}), **(memory or {})})
    cfg.data.vocab_size = 256
    return replace(cfg, **changes)


def ask(cfg: RunConfig) -> list[dict]:
    torch.manual_seed(cfg.seed)
    task = build_task(cfg)
    return task.evaluate(task.build(CPU))


def pick(rows: list[dict], metric: str, **columns) -> list:
    return [
        row["value"]
        for row in rows
        if row["metric"] == metric and all(row[key] == value for key, value in columns.items())
    ]


# --- footprint ------------------------------------------------------------------------------------------


def test_what_is_counted_is_what_the_memory_says(memory):
    """Memorizing's store of 20 entries is not full after one segment of 8, and is after four."""
    cfg = config(task=FootprintConfig(after=[1, 4]), memory={})
    cfg.memory = memory
    task = build_task(cfg)
    model = task.build(CPU)
    rows = task.evaluate(model)
    first, last = pick(rows, "state_floats")
    if memory.kind in ("full", "retrieval", "autocompressor"):
        assert (first, last) == (model.state_floats(), 4 * model.state_floats())
    else:
        assert last == model.state_floats()
        assert first == last or memory.kind == "knn"
    assert pick(rows, "state_bytes") == [4 * first, 4 * last]
    read = {"rmt": memory.tokens, "autocompressor": 4 * memory.tokens}.get(
        memory.kind, 0
    )  # in front of the segment
    assert pick(rows, "local_floats") == [0 if memory.kind == "full" else 3 * 2 * (7 + read) * 2 * 8]


def test_shapes_alone_give_the_same_counts(memory):
    cfg = config(task=FootprintConfig(after=[1, 4]), memory={})
    cfg.memory = memory
    shapes = replace(cfg, task=replace(cfg.task, shapes=True))
    if memory.kind == "full":
        with pytest.raises(UserError, match=r"set task\.shapes=false"):
            ask(shapes)
    else:
        assert ask(shapes) == ask(cfg)


PAPER = Sizes(dk=128, H=8, N=2048, l=12, d_model=1024, S=32, NS=65_000, c=2048, p=100)


def test_the_papers_arithmetic():
    found = {name: formula(PAPER) for name, formula in FORMULAS.items()}
    assert found["transformer_xl"] == 50_331_648
    assert found["memorizing"] + found["transformer_xl"] == 183_451_648  # 133.1M stored beside the cache
    assert found["rmt"] == 2_457_600 and found["infini"] == 1_585_152


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_are_the_printed_ones(name):
    letters = {**vars(PAPER), "dv": PAPER.dk, "m": PAPER.S - 1}
    letters["S"] = PAPER.NS / PAPER.N if name == "memorizing" else PAPER.S
    words = paper.TABLE1[name][0].replace("(", " ( ").replace(")", " ) ").replace("+", " + ").split()
    product = " ".join(words)
    for before, after in pairwise(words):
        if before not in "(+" and after not in ")+":
            product = product.replace(f"{before} {after}", f"{before} * {after}", 1)
    assert eval(product, {}, letters) == FORMULAS[name](PAPER)


def test_the_papers_body_carries_what_the_paper_says():
    body = DecoderConfig(layers=12, dim=1024, heads=8, head_dim=128, ffn=4096)
    task = FootprintConfig(after=[1], shapes=True)
    stored = {"memorizing": 2 * 128 * 8 * 2048 + 50_331_648, "infini_delta": 1_585_152}
    for model, floats in stored.items():
        rows = ask(config(model, memory={"segment": 2048, "entries": 65536}, task=task, decoder=body))
        assert pick(rows, "state_floats") == [floats]


# --- capacity -------------------------------------------------------------------------------------------


def capacity(update="linear", **task) -> list[dict]:
    body = DecoderConfig(layers=1, dim=16, heads=1)
    settings = {"ratios": [0.5], "per_segment": ["1"], "trials": 3, **task}
    return ask(config(memory={"update": update}, task=CapacityConfig(**settings), decoder=body))


@pytest.mark.parametrize("update", ["linear", "delta", "delta_corrected"])
def test_read_back_is_the_equations(update):
    """Token by token in float64, Eq. 7-9 written out; D = 6, 5 pairs, the first of them twice."""
    torch.manual_seed(1)
    k, v = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    k[:, 5] = k[:, 0]
    memory = CompressiveMemory(MemoryConfig(segment=1, update=update, gate_start=40.0), 1, 1, 6)
    with torch.no_grad():
        read = read_back(memory, k.float(), v.float(), k[:, :5].float())[0]
    sigma, M, z = FEATURES["elu1"], torch.zeros(6, 6).double(), torch.zeros(6).double()
    for key, value in zip(sigma(k[0]), v[0], strict=True):
        old = key @ M / (key @ z) if z.any() else 0.0
        grown = 1.0
        if update == "delta_corrected":
            grown = (1 - key @ z / key.square().sum()).clamp(0, 1)
        M = M + torch.outer(key, value - (0 if update == "linear" else old))
        z = z + grown * key
    q = sigma(k[0, :5])
    torch.testing.assert_close(read.double(), q @ M / (q @ z)[:, None], rtol=1e-4, atol=1e-5)


def test_one_pair_comes_back_and_delta_halves_what_is_written_twice():
    """By algebra: n writes of one pair give v under Linear, less under plain Delta."""
    single = {"ratios": [1 / 16], "keys": ["duplicated"], "copies": 4}
    assert pick(capacity("linear", **single), "gain") == [pytest.approx(1.0, abs=1e-5)]
    assert pick(capacity("delta_corrected", **single), "gain") == [pytest.approx(1.0, abs=1e-5)]
    assert pick(capacity("delta", **single), "gain") == [pytest.approx(0.5, abs=1e-5)]


def test_more_pairs_are_read_worse_and_linear_does_not_mind_the_cut():
    rows = capacity(ratios=[0.25, 1.0, 4.0], keys=["random", "zipf"], per_segment=["all", "4", "1"])
    for kind in ("random", "zipf"):
        one, four, each = (
            pick(rows, "cosine", condition=kind, protocol=cut)
            for cut in ("one segment", "4 a segment", "1 a segment")
        )
        assert one[0] > one[1] > one[2] > 0
        assert one == pytest.approx(four, abs=1e-5) and one == pytest.approx(each, abs=1e-5)
    assert {row["n"] for row in rows} == {3} and all(row["ci_low"] <= row["value"] for row in rows)


def test_how_keys_are_made():
    task = build_task(config(task=CapacityConfig(trials=200), decoder=DecoderConfig(dim=64, heads=1)))
    k = torch.nn.functional.normalize(task.pairs("collinear", 2).k_BPD, dim=-1)
    assert float((k[:, 0] * k[:, 1]).sum(-1).mean()) == pytest.approx(0.9, abs=0.01)
    zipf = task.pairs("zipf", 8)
    counts = torch.stack([row.bincount(minlength=8) for row in zipf.order_BW]).float()
    assert counts.min() == 1 and counts.sum(1).eq(32).all()
    expected = 1 + 24 / torch.arange(1, 9) / (1 / torch.arange(1, 9)).sum()
    torch.testing.assert_close(counts.mean(0), expected, rtol=0.1, atol=0.0)
    k, v = task.pairs("overwritten", 4).written()
    pairs = task.pairs("overwritten", 4)
    assert k[:, :4].equal(k[:, 4:]) and v[:, 4:].equal(pairs.v_BPD) and not v[:, :4].equal(v[:, 4:])


def test_capacity_needs_a_compressive_memory_and_whole_segments():
    with pytest.raises(UserError, match="model=transformer_xl has none"):
        ask(config("transformer_xl", task=CapacityConfig()))
    with pytest.raises(UserError, match=r"task\.per_segment=3 does not divide 8 writes"):
        capacity(per_segment=["3"])


# --- reach ----------------------------------------------------------------------------------------------


def reach(model="infini_linear", distances=(1, 2, 4), **memory) -> list[float]:
    task = ReachConfig(distances=[*distances], between=["random"], trials=2)
    return pick(ask(config(model, memory, task)), "gradient_norm")


@pytest.mark.parametrize("model", ["infini_linear", "infini_delta", "full"])
def test_gradients_reach_through_memories_that_are_differentiated(model):
    near, _, far = reach(model)
    assert near > far > 0


@pytest.mark.parametrize("model", ["local_block", "transformer_xl", "memorizing"])
def test_no_gradient_crosses_what_is_cut_off(model):
    assert reach(model) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("model", ["infini_linear", "infini_delta", "infini_delta_corrected"])
def test_gradient_depth_is_where_it_ends(model):
    one, two, three, four = reach(model, (1, 2, 3, 4), gradient_depth=3)
    assert one > 0 and two > 0 and three == four == 0.0
    assert min(reach(model, (1, 2, 3, 4))) > 0


def test_the_norm_is_that_of_finite_differences():
    """Moving an embedding of segment 0 changes the loss by the gradient times the move."""
    cfg = config(task=ReachConfig(distances=[2], between=["random"], trials=1))
    torch.manual_seed(0)
    task = build_task(cfg)
    model = task.build(CPU).double()
    for each in model.memories:  # memory sums stay float32: a large step makes up for it
        each.memory_gate.data.fill_(1.0)
    ids, n = task.texts("random", 2, 8), 8
    table = model.get_input_embeddings().weight.detach()

    moves = 1e-2 * torch.eye(n * 32, dtype=torch.float64).view(-1, n, 32)
    embedded = table[ids[:, :-1]].repeat(2 * len(moves), 1, 1)
    embedded[:, :n] += torch.cat([moves, -moves])
    value = pick(task.evaluate(model), "gradient_norm")[0]
    hook = model.get_input_embeddings().register_forward_hook(lambda *_: embedded)
    with hook, torch.no_grad():
        hidden, _ = model.hidden(ids[:, :-1])
        targets = ids[0, -n:].repeat(len(embedded))
        up, down = model.nll(hidden[:, -n:].flatten(0, 1), targets).view(2, -1, n).double().mean(2)
    assert value == pytest.approx(float((up - down).norm() / 2e-2), rel=0.02)


# --- runs -----------------------------------------------------------------------------------------------


def test_an_untrained_evaluation_is_an_ordinary_record(tmp_path):
    cfg = config(records=str(tmp_path / "records"), runs=str(tmp_path / "runs"), seed=3)
    record = run_eval(cfg, command=["x"])
    (kept,) = read_records(cfg.records)
    assert kept.id == record.id and kept.status == "done" and kept.train == {} and kept.seed == 3
    assert kept.state_floats == 3 * 2 * 8 * 9 and kept.params > 0 and kept.tokenizer_fingerprint is None
    assert kept.data_fingerprint == "footprint-1" and kept.metrics[0]["dataset"] == "synthetic"
    assert run_eval(cfg, command=["x"]).id == record.id, "done already"
    assert run_eval(replace(cfg, seed=4), command=["x"]).id != record.id


def test_a_checkpoint_or_a_training_is_refused(tmp_path):
    cfg = config(records=str(tmp_path / "records"))
    with pytest.raises(UserError, match="leave --checkpoint out"):
        run_eval(replace(cfg, checkpoint="infini_linear"))
    with pytest.raises(UserError, match="trains nothing; run `infini-bench eval footprint"):
        run_train(cfg)
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("footprint", "after", [4, 2]),
        ("capacity", "keys", ["randm"]),
        ("capacity", "per_segment", ["0"]),
        ("reach", "between", []),
        ("reach", "distances", [0]),
    ],
)
def test_settings_are_checked(name, key, value):
    with pytest.raises(UserError, match=rf"task\.{key} must be"):
        build_config({**to_dict(config()), "task": {"name": name, key: value}})
