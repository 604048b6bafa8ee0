"""Where the settings of an evaluation and of a continued run come from."""

from __future__ import annotations

import dataclasses

import pytest

from infini_bench.cli.bridge import compose_run
from infini_bench.config import to_dict
from infini_bench.errors import UserError
from infini_bench.origin import continued_config, evaluated_config


def test_an_evaluation_of_another_task_takes_its_own_recipe():
    trained = compose_run(["task=lm", "scale=gpu", "data=pg19", "model=full"])
    asked = compose_run(["task=passkey", "scale=gpu", "task.trials=3"])
    cfg = evaluated_config(asked, trained, {"task.trials"})
    assert cfg.task == asked.task and (cfg.data, cfg.decoder, cfg.model) == (
        trained.data,
        trained.decoder,
        "full",
    )


def test_an_evaluation_of_the_same_task_changes_only_what_was_given():
    trained = compose_run(["task=passkey", "scale=gpu", "task.digits=4", "seed=2"])
    asked = compose_run(["task=passkey", "task.trials=3", "data=local", "data.path=/x", "data.cache_dir=/c"])
    cfg = evaluated_config(asked, trained, {"task.trials"})
    assert cfg.task == dataclasses.replace(trained.task, trials=3)
    assert cfg.data == dataclasses.replace(trained.data, cache_dir="/c") and cfg.seed == 2
    cfg = evaluated_config(asked, trained, {"data", "data.path", "scale", "seed"})
    assert (cfg.data.path, cfg.data.vocab_size) == ("/x", trained.data.vocab_size)
    assert (cfg.task, cfg.scale, cfg.seed) == (asked.task, "gpu", 0)
    cfg = evaluated_config(asked, trained, None)
    assert (cfg.task, cfg.data.path, cfg.memory) == (asked.task, "/x", trained.memory)


def test_a_continued_run_changes_only_what_may_change():
    before = compose_run(["model=full", "seed=1"])
    asked = compose_run(["trainer.steps=999", "records=r", "resume=x"])
    cfg = continued_config(asked, before, {"trainer.steps", "records", "resume"})
    expected = {**to_dict(before), "records": "r", "resume": "x"}
    assert to_dict(cfg) == {**expected, "trainer": {**expected["trainer"], "steps": 999}}
    continued_config(
        compose_run(["model=full", "seed=1"]), before, {"model", "seed", "task", "data"}
    )  # as it was
    for key in ("model", "seed", "experiment"):
        with pytest.raises(UserError, match=f"{key} cannot change"):
            continued_config(asked, before, {key})
