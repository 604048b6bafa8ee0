import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_fakes import fake_task, run_config

from infini_bench.errors import UserError
from infini_bench.origin import continued_run
from infini_bench.train import checkpoint, load_checkpoint_model, loop, train
from infini_bench.train.checkpoint import Checkpoints, find_checkpoint, verify


def write(folder: Path) -> None:
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text(folder.name)


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(p.name for p in checkpoints.folder.iterdir() if p.is_dir())


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 7):
        checkpoints.save(step, write, best=step == 2)
    assert names(checkpoints) == ["step-000002", "step-000005", "step-000006"]
    kept = ["step-000002", "step-000005", "step-000006"]
    assert checkpoints.index() == {"last": "step-000006", "best": "step-000002", "kept": kept}
    checkpoints.save(7, write, best=True)
    assert names(checkpoints) == ["step-000006", "step-000007"]


def test_rewinding_drops_what_came_later_and_what_a_crash_left(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, write, best=step == 3)
    (checkpoints.folder / ".step-000004.draft").mkdir()
    (checkpoints.folder / ".index.json.abc").touch()
    checkpoints.rewind("step-000002")
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == [
        "index.json",
        "step-000001",
        "step-000002",
    ]
    assert checkpoints.index() == {
        "last": "step-000002",
        "best": None,
        "kept": ["step-000001", "step-000002"],
    }
    checkpoints.rewind(None)
    assert names(checkpoints) == []


def test_a_lost_index_is_made_again_from_the_folders(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2):
        checkpoints.save(step, write, best=False)
    (checkpoints.folder / "index.json").unlink()
    assert checkpoints.index()["last"] == "step-000002"


@pytest.mark.parametrize("where", ["write", "fsync", "rename"])
def test_a_full_disk_costs_nothing_that_was_saved(tmp_path, monkeypatch, where):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, write, best=True)

    def full(*_):
        raise OSError(28, "No space left on device")

    if where != "write":
        monkeypatch.setattr(os, where, full)
    with pytest.raises(UserError, match=r"No space left on device.*intact|disk is full"):
        checkpoints.save(2, full if where == "write" else write, best=True)
    monkeypatch.undo()
    assert names(checkpoints) == ["step-000001"]
    assert checkpoints.index()["last"] == "step-000001"
    verify(checkpoints.folder / "step-000001")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match=str(tmp_path)):
        Checkpoints(tmp_path, keep=2).save(1, write, best=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps with two checkpoints."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_task", fake_task)
        return train(run_config(steps=4), folder)


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy of it that a test may break."""
    monkeypatch.setattr(loop, "build_task", fake_task)
    shutil.copytree(finished.folder, tmp_path / "run")
    return tmp_path / "run"


def test_layout_of_a_run_folder(run):
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.json", "metrics.jsonl"]
    files = {p.name for p in (run / "checkpoints" / "step-000004").iterdir()}
    data = {"optimizer.safetensors", "state.json", "config.json", "checksums.json"}
    assert files == {"model", "tokenizer", *data}
    assert not [p for p in run.rglob("*") if p.suffix in (".pt", ".pth", ".bin", ".pkl")]


def test_model_tokenizer_and_config_come_back(run, finished):
    expected, _, _ = load_checkpoint_model(finished.folder)
    for path in (run, run / "checkpoints" / "step-000004"):
        model, tokenizer, cfg = load_checkpoint_model(path)
        assert cfg == run_config(steps=4)
        assert tokenizer.fingerprint == finished.tokenizer_fingerprint
        ids = torch.arange(20)[None] % 8
        assert torch.equal(model.step(ids)[0], expected.step(ids)[0])


def test_a_checkpoint_without_optimizer_loads_for_evaluation(run):
    folder = run / "checkpoints" / "step-000004"
    (folder / "optimizer.safetensors").unlink()
    (folder / "state.json").unlink()
    shipped = shutil.copytree(folder, run.parent / "shipped")
    assert load_checkpoint_model(shipped)[2].model == "infini_linear"


FILES = ["model/model.safetensors", "model/config.json", "config.json", "checksums.json"]
STATE = ["optimizer.safetensors", "state.json"]


@pytest.mark.parametrize("name", FILES + STATE)
@pytest.mark.parametrize("damage", ["cut", "flip", "missing"])
def test_damage_is_named_and_nothing_is_loaded_or_lost(run, name, damage):
    checkpoints = run / "checkpoints"
    path = checkpoints / "step-000004" / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    cfg = run_config(steps=6)
    cfg.resume = str(run)
    with pytest.raises(UserError, match="step-000004") as caught:
        train(cfg, run)
    assert str(caught.value).endswith(f"an earlier one can be resumed: resume={checkpoints / 'step-000002'}.")
    if name in FILES:
        with pytest.raises(UserError, match="step-000004"):
            load_checkpoint_model(run / "checkpoints" / "step-000004")
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


def test_a_damaged_last_checkpoint_leaves_the_one_before(run):
    (run / "checkpoints" / "step-000004" / "state.json").unlink()
    whole = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    with pytest.raises(UserError, match=r"state.json is missing; .* resume=.*step-000002"):
        continued_run(replace(run_config(steps=6), resume=str(run)), None)
    cfg = run_config(steps=4)
    cfg.resume = str(run / "checkpoints" / "step-000002")
    assert train(cfg, run).steps == 4
    assert [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()] == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cfg: setattr(cfg.decoder, "dim", 32), "decoder.dim=16, not 32"),
        (lambda cfg: setattr(cfg.memory, "update", "delta"), 'memory.update="linear", not "delta"'),
        (lambda cfg: setattr(cfg.trainer, "lr", 1.0), "trainer.lr=0.003, not 1.0"),
        (lambda cfg: setattr(cfg, "seed", 1), "seed=0, not 1"),
    ],
)
def test_another_run_is_not_continued(run, change, message):
    cfg = run_config(steps=6)
    cfg.resume = str(run)
    change(cfg)
    with pytest.raises(UserError, match=message):
        train(cfg, run)


def test_changed_data_is_not_continued(run, monkeypatch):
    def changed(*args):
        task = fake_task(*args)
        task.fingerprint = "other"
        return task

    monkeypatch.setattr(loop, "build_task", changed)
    cfg = run_config(steps=6)
    cfg.resume = str(run)
    with pytest.raises(UserError, match=r"data.*changed"):
        train(cfg, run)


def test_a_model_of_another_architecture_is_refused(run):
    folder = run / "checkpoints" / "step-000004"
    settings = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps({**settings, "model_type": "gpt2"}))
    checkpoint.seal(folder)
    with pytest.raises(UserError, match="gpt2"):
        load_checkpoint_model(run)


def test_paths_that_are_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        find_checkpoint(tmp_path / "nothing")
    with pytest.raises(UserError, match="no finished checkpoint"):
        find_checkpoint(tmp_path)
    cfg = run_config()
    cfg.resume = str(tmp_path)
    with pytest.raises(UserError, match=r"config\.json"):
        train(cfg, tmp_path)
