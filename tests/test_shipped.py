"""The model that ships finds a passkey far beyond its window, and does not without its memory."""

from dataclasses import replace

from infini_bench.origin import find_origin, trained_config
from infini_bench.schema import PasskeyConfig, RunConfig
from infini_bench.tasks import build_task
from infini_bench.train import load_checkpoint_model


def test_the_shipped_model_finds_keys_255_segments_back_and_only_through_its_memory():
    path, words = find_origin(RunConfig(task=PasskeyConfig()), None)
    assert "shipped" in words
    cfg = trained_config(path)
    cfg = replace(
        cfg, task=replace(cfg.task, lengths=["32K"], depths=["start", "end_outside"], trials=5, batch=5)
    )
    model, tokenizer, _ = load_checkpoint_model(path)
    assert sum(p.numel() for p in model.parameters()) == 475_912
    rows = [r for r in build_task(cfg, tokenizer).evaluate(model) if r["metric"] == "exact_match"]
    found = {(r["position"], r["condition"]): r["value"] for r in rows}
    assert found == {
        ("start", "constant"): 100, ("start", "memory_off"): 0,
        ("end_outside", "constant"): 100, ("end_outside", "memory_off"): 0,
    }  # fmt: skip
