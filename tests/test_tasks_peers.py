"""`profile --vs`: real packages at tiny sizes where they are installed, made-up ones where they are not."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from report_fakes import sheet_text
from test_tasks_efficiency import CPU, PEER, asked, rows_of, told  # noqa: F401 - a machine with a fixed clock
from test_tasks_probes import pick
from typer.testing import CliRunner

from infini_bench.cli.main import app
from infini_bench.cli.tables import MATCHES
from infini_bench.config import build_config, to_dict
from infini_bench.errors import UserError
from infini_bench.memory import build_memory
from infini_bench.report.records import read_records
from infini_bench.run import run_eval
from infini_bench.tasks import build_task, efficiency_fla, efficiency_peers, peer_models
from infini_bench.tasks.efficiency import Efficiency

MEMORIZING, RECURRENT = "memorizing-transformers-pytorch", "recurrent-memory-transformer-pytorch"
FLA = "flash-linear-attention"
SHAPE = "b1-l3-w32-h4-d8-n8"


def beside(model, package, kv_heads=None, memory=None, **task):
    return asked(
        model, memory, kv_heads, **{"vs": [package], "modes": ["train", "forward"], "against": [], **task}
    )


def counted(rows, package):
    """Weights of a peer, as its rows have them."""
    (found,) = {row["extra"]["params"] for row in rows if row["extra"]["variant"] == package}
    return found


def timed_in_turns(rows, package, shape):
    for metric in ("ratio_to_peer_inference", "ratio_to_peer_train"):
        assert pick(rows, metric) == [1.0, 1.0]
    theirs = [row for row in rows if row["extra"]["variant"] == package]
    assert {row["condition"] for row in theirs} == {shape} and len(theirs) == 4 * 3 + 4
    return True


# --- real packages --------------------------------------------------------------------------------------


def test_infini_transformer_is_timed_at_equal_sizes_and_in_turns():
    cfg = beside("infini_linear", PEER)
    assert timed_in_turns(rows_of(cfg), PEER, SHAPE)
    peer = peer_models.InfiniTransformerPeer(build_task(cfg))
    attention = peer.model.layers[0][0]
    assert attention.fastweight_mem.head_gates.shape == (4,) and attention.to_qkv.weight.shape == (3 * 32, 32)
    assert len(peer.model.layers) == 3
    assert peer.model.token_emb.weight.shape == (256, 32) and peer.wrapper.segment_length == 8


def test_recurrent_memory_transformer_is_timed_at_equal_sizes_and_in_turns():
    pytest.importorskip("recurrent_memory_transformer_pytorch")
    cfg = beside("rmt", RECURRENT, memory={"tokens": 3})
    rows = rows_of(cfg)
    assert timed_in_turns(rows, RECURRENT, SHAPE)
    peer = peer_models.RecurrentMemoryPeer(build_task(cfg))
    layers = 3 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32 + 2 * 32) + 2 * (
        32 * 4
    )  # null keys; later mixes of values
    assert counted(rows, RECURRENT) == layers + 2 * 256 * 32 + 256 + 32 + 2 * 3 * 32
    assert learns(peer)
    cfg.trainer.checkpoint_segments = 1  # by its memory replay: the same gradients
    again = peer_models.RecurrentMemoryPeer(build_task(cfg))
    again.model.load_state_dict(peer.model.state_dict())
    ids, gradients = torch.randint(256, (1, 25)), []
    for each in (peer, again):
        each.model.zero_grad()
        each.learn(ids)
        gradients.append(each.model.memory_tokens.grad)
    assert gradients[0].norm() > 0
    torch.testing.assert_close(*gradients)


def test_memorizing_transformers_are_timed_at_equal_sizes_and_in_turns():
    pytest.importorskip("memorizing_transformers_pytorch")
    cfg = beside("memorizing", MEMORIZING, 1, {"entries": 64, "neighbours": 4})
    rows = rows_of(cfg)
    assert timed_in_turns(rows, MEMORIZING, "b1-l3-w32-h4-g1-d8-n8")
    peer = peer_models.MemorizingPeer(build_task(cfg))
    assert len(peer.store) == 1 and peer.store[0].max_memories == 64 and peer.model.memorizing_layers == [3]
    inner = sum(p.numel() for p in peer.model.layers[0][1].parameters() if p.dim() == 2)
    assert inner == 2 * 32 * 64, "3 * 32 * 48 is no whole multiple: the nearest is 2 widths"
    assert learns(peer)
    peer.read([8, 8, 8])
    assert peer.store[0].db_offsets.tolist() == [16], "what has left the cache is stored, once a document"
    peer.read([8, 8])
    assert peer.store[0].db_offsets.tolist() == [8]


def test_memorizing_transformers_store_exact_numbers_under_autocast():
    pytest.importorskip("memorizing_transformers_pytorch")
    cfg = beside("memorizing", MEMORIZING, 1, {"entries": 64, "neighbours": 4}, lengths=["24"])
    cfg.trainer.precision = "bf16"
    rows = rows_of(cfg)
    assert pick(rows, "ratio_to_peer_train") == [1.0] == pick(rows, "ratio_to_peer_inference")


def learns(peer):
    """A step changes weights, a document does not."""
    weight = peer.model.token_emb.weight
    peer.prepare("train")
    before = weight.detach().clone()
    peer.calls("train", 24)[0]()
    after = weight.detach().clone()
    peer.prepare("forward")
    peer.calls("forward", 24)[0]()
    return not after.equal(before) and weight.equal(after) and weight.grad is None


# --- what cannot be compared ----------------------------------------------------------------------------


def fake(monkeypatch, name, **content):
    """A package that is there."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        (
            beside("infini_linear", RECURRENT),
            "has a memory of kind rmt; model=infini_linear has one of kind comp",
        ),
        (beside("memorizing", MEMORIZING), r"has 1 KV head\(s\); set decoder.kv_heads=1\."),
        (beside("rmt", RECURRENT, 2), r"has 4 KV head\(s\); set decoder.kv_heads=null\."),
        (beside("rmt", RECURRENT, level="operator"), "level operator times compressive memories"),
        (beside("infini_linear", PEER, level="operator"), f"{PEER} is timed by profile --level model, not"),
        (beside("infini_linear", FLA), f"{FLA} is timed by profile --level operator, not"),
        (
            beside("infini_linear", "infini-transformer"),
            r'no peer infini-transformer \(did you mean "infini-t',
        ),
        (beside("infini_linear", PEER, modes=["decode"]), "--vs times forward and train; task.modes has nei"),
    ],
)
def test_what_is_not_alike_is_said_before_any_work(monkeypatch, cfg, words):
    for peer in efficiency_peers.PEERS.values():
        fake(monkeypatch, peer.module)
    with pytest.raises(UserError, match=words):
        build_task(cfg).build(CPU)


def test_beside_a_peer_that_is_alike_the_other_is_a_row_that_says_so(monkeypatch):
    fake(monkeypatch, peer_models.MemorizingPeer.module)
    rows = rows_of(beside("infini_linear", PEER, vs=[PEER, MEMORIZING], lengths=["16"], modes=["forward"]))
    (row,) = [row for row in rows if row["extra"]["variant"] == MEMORIZING]
    assert row["value"] is None and row["extra"]["failed"].startswith("has a memory of kind knn")
    assert pick(rows, "ratio_to_peer_inference") == [1.0, None]


def test_the_command_line_knows_the_packages_that_can_be_timed():
    assert {*MATCHES} == {*efficiency_peers.PEERS, FLA}


@pytest.mark.parametrize(
    ("package", "command"),
    [
        (PEER, f"pip install {PEER}"),
        (RECURRENT, f"pip install {RECURRENT}"),
        (MEMORIZING, "pip install --no-deps memorizing-transformers-pytorch faiss-cpu einops"),
    ],
)
def test_a_package_that_is_not_there_or_broken(monkeypatch, package, command):
    monkeypatch.setattr(efficiency_peers, "find_spec", lambda name: None)
    cfg = beside(MATCHES[package], package, 1 if package == MEMORIZING else None)
    with pytest.raises(UserError, match=f"is not installed; run `{command}"):
        build_task(cfg).build(CPU)
    monkeypatch.setattr(efficiency_peers, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, efficiency_peers.PEERS[package].module, None)
    with pytest.raises(UserError, match=r"is installed but cannot be imported \(import of .* halted"):
        build_task(cfg).build(CPU)


# --- flash-linear-attention -----------------------------------------------------------------------------


def chunk_linear_attn(q, k, v, scale=None, initial_state=None, output_final_state=False, normalize=True):
    """What 0.6.0's computes, token by token: sum_s<=t (q k_s) v_s over sum_s<=t (q k_s)."""
    scores = torch.einsum("bthf,bshf->bhts", q, k).tril()
    out = torch.einsum("bhts,bshd->bthd", scores, v)
    return (out / scores.sum(-1).mT[..., None] if normalize else out), None


def chunk_delta_rule(q, k, v, beta, scale=None, initial_state=None, output_final_state=False):
    """M <- M + beta k (v - k M), read by q after each write."""
    assert q.dtype != torch.float32 and beta.shape == k.shape[:3] == v.shape[:3]
    M, outs = torch.zeros(*k.shape[:1], *k.shape[2:], v.shape[-1]), []
    for q_t, k_t, v_t, b_t in zip(*(x.float().unbind(1) for x in (q, k, v, beta)), strict=True):
        error = v_t - torch.einsum("bhf,bhfd->bhd", k_t, M)
        M = M + torch.einsum("bhf,bhd,bh->bhfd", k_t, error, b_t)
        outs.append(torch.einsum("bhf,bhfd->bhd", q_t, M))
    return torch.stack(outs, 1).to(v.dtype), None


@pytest.fixture
def fla(monkeypatch):
    """flash-linear-attention's signatures, on a GPU that is a CPU."""
    fake(monkeypatch, "fla", __path__=[])
    fake(monkeypatch, "fla.ops", chunk_linear_attn=chunk_linear_attn, chunk_delta_rule=chunk_delta_rule)
    check = efficiency_fla.check

    def on_a_gpu(task):
        with monkeypatch.context() as patch:
            patch.setattr(task, "device", torch.device("cuda"), raising=False)
            check(task)

    monkeypatch.setattr(efficiency_fla, "check", on_a_gpu)


OPERATOR = {"level": "operator", "forms": ["eager", "triton"], "lengths": ["16"]}


def operator(model, memory=None, kv_heads=2):
    cfg = beside(model, FLA, kv_heads, memory, **OPERATOR)
    cfg.trainer.precision = "bf16"
    return cfg


@pytest.mark.parametrize(
    ("model", "memory", "name"),
    [
        ("infini_linear", None, "chunk_linear_attn"),
        ("infini_delta_token", {"update": "delta_token", "normaliser": "none"}, "chunk_delta_rule"),
    ],
)
def test_operators_are_rows_under_their_names(fla, tmp_path, model, memory, name):
    cfg = operator(model, memory)
    run_eval(build_config({**to_dict(cfg), "records": str(tmp_path)}), command=["x"])
    (record,) = read_records(tmp_path)
    rows = record.metrics
    for mode in ("forward", "train"):
        assert pick(rows, f"{mode}_ms", condition=name) == [2.0]
    for metric in ("ratio_to_peer_inference", "ratio_to_peer_train"):
        assert pick(rows, metric, condition="eager") == [1.0]
        assert pick(rows, metric, condition="triton") == [None], "the kernels do not run here, and say so"
    assert {row["extra"]["peer"] for row in rows if row["metric"].startswith("ratio_to_peer")} == {name}
    titles, sheet = sheet_text([record], "efficiency")
    lines = {line[titles.index("form")]: dict(zip(titles, line, strict=True)) for line in sheet.rows}
    assert f"{name}\n({FLA})" in lines
    eager = next(line for form, line in lines.items() if form.startswith("eager"))
    assert eager["peer / this, forward"].startswith("1\n[") and eager["peer / this, train"].startswith("1\n[")


def test_an_operator_that_breaks_leaves_ours(fla, monkeypatch):
    def broken(*_, **__):
        raise AssertionError("no such head size\nat all")

    monkeypatch.setattr(sys.modules["fla.ops"], "chunk_linear_attn", broken)
    rows = rows_of(operator("infini_linear"))
    assert pick(rows, "forward_ms", condition="eager") == [2.0]
    failed = [row["extra"].get("failed") for row in rows if row["metric"] == "ratio_to_peer_train"]
    assert failed == ["AssertionError: no such head size"] * 2


def test_an_operator_is_given_what_our_memory_computes_with(fla):
    """Of a document whose every token is a segment, its last read and ours are of the same sum."""
    memory = build_memory(operator("infini_linear").memory, 4, 2, 8)
    raw = [torch.randn(1, 16, heads, 8) for heads in (4, 2, 2)]
    given = efficiency_fla.inputs(memory, *raw)
    out = efficiency_fla.Operator(memory)(*given)
    q, k = (F.elu(x) + 1 for x in raw[:2])
    k, v = (x.repeat_interleave(2, 2) for x in (k, raw[2]))
    M, z = torch.einsum("bthf,bthd->bhfd", k, v), k.sum(1)
    last = torch.einsum("bhf,bhfd->bhd", q[:, -1], M) / torch.einsum("bhf,bhf->bh", q[:, -1], z)[..., None]
    torch.testing.assert_close(out[:, -1], last)
    assert all(x.is_leaf and x.requires_grad for x in given)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("cfg", "made_up"),
    [
        (operator("infini_linear"), chunk_linear_attn),
        (operator("infini_delta_token", {"update": "delta_token", "normaliser": "none"}), chunk_delta_rule),
    ],
)
def test_the_package_computes_what_is_made_up_here(cfg, made_up):
    pytest.importorskip("fla.ops")
    memory = build_memory(cfg.memory, 4, 4, 64).cuda()
    raw = [torch.randn(1, 128, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    q, k, v = efficiency_fla.inputs(memory, *raw)
    out = efficiency_fla.Operator(memory)(q, k, v)
    scale = 1 if made_up is chunk_linear_attn else 64**-0.5
    extra = () if made_up is chunk_linear_attn else (k.new_ones(k.shape[:3]),)
    wanted = made_up(*(x.cpu() for x in (q, k, v, *extra)))[0] * scale
    torch.testing.assert_close(out.float().cpu(), wanted.float(), atol=0.03, rtol=0.03)


def test_where_no_operator_can_run(monkeypatch):
    with pytest.raises(
        UserError, match="flash-linear-attention is not installed; run `pip install flash-lin"
    ):
        build_task(operator("infini_linear")).build(CPU)
    fake(monkeypatch, "fla", __path__=[])
    fake(monkeypatch, "fla.ops")
    with pytest.raises(UserError, match="operators need a CUDA GPU; the device here is cpu"):
        build_task(operator("infini_linear")).build(CPU)
    with pytest.raises(UserError, match=r"no operator near memory.update=delta; it has chunk_linear_attn"):
        build_task(operator("infini_delta", {"update": "delta"})).build(CPU)
    monkeypatch.setattr(Efficiency, "device", torch.device("cuda"))
    cfg = operator("infini_linear")
    cfg.trainer.precision = "float32"
    with pytest.raises(UserError, match=r"chunk_delta_rule has no float32; set trainer.precision=bf16"):
        build_task(cfg).build(CPU)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--level", "operator", "--vs", PEER], f"{PEER} is timed by profile --level model"),
        (["--level", "operator", "--vs", FLA], "flash-linear-attention"),
        (["--level", "model", "--vs", FLA], f"{FLA} is timed by profile --level operator"),
        (["--models", "infini_linear", "--vs", RECURRENT], RECURRENT),
    ],
)
def test_the_command_ends_in_a_sentence(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["profile", *words, "--scale", "smoke", f"records={tmp_path}"])
    assert done.exit_code == 2 and said in done.output, done.output


def test_a_package_chooses_the_models_that_are_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["profile", "--vs", RECURRENT, "--cfg", "job"])
    assert done.exit_code == 0 and "\nmodel: rmt\n" in f"\n{done.stdout}"
