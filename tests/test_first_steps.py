"""The three first experiments: their jobs, and readings that say what the records and logs hold."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from report_fakes import lm, passkey, record
from test_report_probes import capacity

from infini_bench import first_steps, reproduce, standing
from infini_bench.progress import NullProgress
from infini_bench.report.records import read_records, write_record

LOG = [
    {"step": 10, "loss": 7.0, "gates": {"mean": [0.5, 0.5], "min": [0.4, 0.5], "max": [0.6, 0.5]}},
    {"step": 90, "loss": 3.0, "gates": {"mean": [0.6, 0.2], "min": [0.3, 0.1], "max": [0.9, 0.4]}},
]


@pytest.fixture
def found(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
    training = record(kind="train", config_hash="abc", train={"folder": str(tmp_path)})
    trained = {"config_hash": "abc"}
    return [training, capacity("infini_delta"), passkey(train=trained), lm(train=trained)]


def test_readings_hold_the_numbers(found):
    text = "\n".join(first_steps.reading(found))
    assert all(title in text for title in first_steps.TITLES)
    assert (
        "written 16 a segment" in text and "cosine 0.40 from 0.5 D pairs (D = 16) and 0.20 from 2 D" in text
    )
    assert "layer 1 from 0.50 to 0.30 ... 0.90 (mean 0.60); layer 2 from 0.50 to 0.10 ... 0.40" in text
    assert "found in 100 % of trials, 10 % with the memory off (chance 11 %)" in text
    assert "from 7.00 (step 10) to 3.00 nats (step 90)" in text
    assert "4.30 bits a token, 8.50 for a unigram model" in text and "(+0.500)" in text


def test_what_is_missing_is_not_made_up(found):
    assert first_steps.reading([]) == []
    assert "of overwritten ones nan" in "\n".join(first_steps.reading(found[1:2]))
    failed = [passkey(status="failed", error="x")]
    assert first_steps.reading(failed) == []
    assert "log is gone" in "\n".join(first_steps.reading([passkey()]))


def test_the_plan_trains_two_models_on_two_tasks_and_asks_the_memory_itself(tmp_path, monkeypatch, capsys):
    calls = []

    def run_train(cfg, *, command, progress):
        calls.append(("train", cfg.task.name, cfg.model))
        return SimpleNamespace(status="done", started="", train={"folder": str(tmp_path)})

    def run_eval(cfg, *, command, progress):
        calls.append(("eval", cfg.task.name, cfg.model))
        if cfg.task.name == "capacity":
            assert cfg.checkpoint is None and command[:3] == ["infini-bench", "eval", "capacity"]
            write_record(cfg.records, capacity(cfg.model, config_hash=cfg.model))
        return SimpleNamespace(status="done", started="")

    fake = SimpleNamespace(run_train=run_train, run_eval=run_eval)
    monkeypatch.setitem(sys.modules, "infini_bench.run", fake)
    monkeypatch.setattr(standing, "config_hash", lambda config: config["model"])
    code = reproduce.reproduce("first-steps", "smoke", tmp_path, 1, progress=NullProgress())
    assert code == 0 and len(calls) == 2 * (2 + 2 + 1)
    assert calls[:2] == [("train", "passkey", "infini_linear"), ("eval", "passkey", "infini_linear")]
    assert ("train", "capacity", "infini_linear") not in calls
    shown = capsys.readouterr().out
    assert shown.count("a value comes back with cosine") == 2 and "6 jobs" in shown
    assert len(read_records(tmp_path / "records")) == 2 and (tmp_path / "tables" / "diag_memory.md").exists()
