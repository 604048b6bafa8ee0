"""Every YAML file composes with every other, and becomes a checked RunConfig."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import infini_bench
from infini_bench.cli.bridge import compose_run
from infini_bench.cli.listing import list_options
from infini_bench.config import TASKS, build_config, known_keys, to_dict
from infini_bench.errors import UserError
from infini_bench.schema import LMConfig, PasskeyConfig, RunConfig
from infini_bench.units import parse_length

SCALES = ("smoke", "laptop", "gpu", "paper")
MODELS = [name for name, _ in list_options("models")]
ROOT = Path(infini_bench.__file__).parents[1]


def plain(**sections):
    return {**to_dict(RunConfig(task=LMConfig())), **sections}


RECIPES = [
    (t, s)
    for t, s in itertools.product(TASKS, SCALES)
    if s != "paper" or t not in ("recall", "mqar", "needles")
]


@pytest.mark.parametrize(("task", "scale"), RECIPES)
def test_every_recipe_composes(task, scale):
    cfg = compose_run([f"task={task}", f"scale={scale}"])
    assert (cfg.task.name, cfg.scale, type(cfg.task)) == (task, scale, TASKS[task])
    assert build_config(to_dict(cfg)) == cfg


@pytest.mark.parametrize("model", MODELS)
def test_every_model_composes_and_shares_the_budget(model):
    cfg, other = compose_run([f"model={model}"]), compose_run([])
    assert cfg.model == model
    assert (cfg.decoder, cfg.trainer, cfg.memory.segment) == (
        other.decoder,
        other.trainer,
        other.memory.segment,
    )


@pytest.mark.parametrize("data", [name for name, _ in list_options("data")])
def test_every_data_set_composes(data):
    path = ["data.path=/x"] if "local" in data else []
    cfg = compose_run([f"data={data}", *path])
    assert cfg.data.name != "???" and cfg.data.vocab_size == 2048  # the recipe's


@pytest.mark.parametrize("experiment", [name for name, _ in list_options("experiments")])
def test_every_experiment_composes(experiment):
    compose_run([f"experiment={experiment}", "data.path=/x", "model=transformer_xl", "scale=smoke"])


def test_all_files_are_described_and_reached():
    for kind in ("models", "tasks", "data", "experiments", "plans"):
        assert all(text for _, text in list_options(kind)), kind
    folder = ROOT / "conf"
    groups = {path.parent.name for path in folder.rglob("*.yaml")} - {"conf"}
    assert groups == {"model", "task", "data", "scale", "recipe", "experiment", "plan", "rebuild"}
    assert {path.stem for path in (folder / "scale").glob("*.yaml")} == set(SCALES)
    recipes = {f"{task}_{scale}" for task, scale in RECIPES}
    assert {path.stem for path in (folder / "recipe").glob("*.yaml")} == recipes


def test_the_default_run():
    cfg = compose_run([])
    assert (cfg.model, cfg.task.name, cfg.data.source, cfg.scale) == (
        "infini_linear",
        "lm",
        "embedded",
        "laptop",
    )


@pytest.mark.parametrize("scale", SCALES)
def test_passkey_recipes_train_at_the_length_they_name(scale):
    cfg = compose_run(["task=passkey", f"scale={scale}"])
    assert isinstance(cfg.task, PasskeyConfig)
    assert cfg.trainer.curriculum[-1:] in ([], [cfg.task.segments])
    assert max(parse_length(length) for length in cfg.task.lengths) > cfg.task.segments * cfg.memory.segment


@pytest.mark.parametrize("task", ["passkey", "recall", "mqar", "needles"])
def test_a_length_beside_another_curriculum_is_refused_not_ignored(task):
    last = compose_run([f"task={task}"]).trainer.curriculum[-1]
    words = f"task.segments=2, but trainer.curriculum ends at {last}: set both, e.g. trainer.curriculum="
    with pytest.raises(UserError, match=re.escape(words)):
        compose_run([f"task={task}", "task.segments=2"])
    with pytest.raises(UserError, match=f"task.segments={last}, but trainer.curriculum ends at 2"):
        compose_run([f"task={task}", "trainer.curriculum=[1,2]"])
    for curriculum in ("[1,2]", "[]"):
        cfg = compose_run([f"task={task}", "task.segments=2", f"trainer.curriculum={curriculum}"])
        assert cfg.task.segments == 2 and build_config(to_dict(cfg)) == cfg
    build_config({**to_dict(cfg), "trainer": {"curriculum": [4]}})  # as recorded before


@pytest.mark.parametrize("task", ["recall", "mqar", "needles"])
def test_the_paper_has_no_such_experiment(task):
    with pytest.raises(UserError, match=f"Task {task} has no scale=paper: choose one of gpu, laptop, smoke"):
        compose_run([f"task={task}", "scale=paper"])


def test_the_configuration_package_has_one_name():
    program = "import conf"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "infini_bench.conf" in done.stderr


# --- the strict conversion ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sead": 1}, 'no setting "sead" (did you mean "seed"?)'),
        ({"trainer": {"setps": 1}}, 'no setting "trainer.setps" (did you mean "trainer.steps"?)'),
        ({"trainer": {"steps": "abc"}}, 'trainer.steps must be a whole number, not "abc"'),
        ({"trainer": {"steps": 1.5}}, "trainer.steps must be a whole number"),
        ({"trainer": {"steps": 0}}, "trainer.steps must be above 0"),
        ({"trainer": {"lr": float("nan")}}, "trainer.lr must be above 0"),
        ({"trainer": {"compile": "perhaps"}}, "trainer.compile must be true or false"),
        ({"trainer": {"curriculum": 5}}, "trainer.curriculum must be a list such as [2,4]"),
        ({"trainer": {"curriculum": [4, 2]}}, "rising order"),
        ({"trainer": {"optimizer": "sgd"}}, "one of adamw, adafactor"),
        ({"trainer": None}, "trainer must be a group of settings"),
        ({"memory": {"kind": "infini"}}, "one of compressive, xl, block, sliding, full"),
        ({"memory": {"update": "gated"}}, "one of linear, delta"),
        ({"decoder": {"dim": 65}}, "decoder.dim=65 is not a multiple of decoder.heads=4"),
        ({"decoder": {"dim": 12}}, "must be even"),
        ({"decoder": {"kv_heads": 3}}, "not a multiple of decoder.kv_heads=3"),
        ({"data": {"source": "local"}}, "data.path is not set"),
        ({"data": {"source": "hub"}}, "data.hub_id is not set"),
        ({"data": {"source": "web"}}, "one of embedded, local, hub"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda"),
        ({"task": {"name": "pass"}}, 'no task "pass" (did you mean "passkey"?)'),
        ({"task": {"name": "lm", "trials": 3}}, "task.trials belongs to task=passkey"),
        ({"task": {"name": "lm", "split": "dev"}}, "one of train, validation, test"),
        ({"task": {"name": "passkey", "lengths": "4K"}}, "task.lengths must be a list such as [4K,1M]"),
        ({"task": {"name": "passkey", "lengths": ["1Mb"]}}, '"1Mb" is not a length'),
        ({"task": {"name": "passkey", "depths": ["120"]}}, "outside 0-100 %"),
        ({"task": {"name": "booksum", "temperature": 0}}, "task.temperature must be above 0"),
        (
            {"task": {"name": "recall", "fillers": ["prose"]}},
            "task.fillers must be one or more of constant, text",
        ),
        ({"task": {"name": "recall", "train_fillers": []}}, "task.train_fillers must be one or more of"),
        (
            {"task": {"name": "recall", "segments_after": [4, 1]}},
            "numbers of segments in rising order, from 0",
        ),
        ({"task": {"name": "recall", "symbols": 1}}, "task.symbols must be 2 or more"),
        ({"task": {"name": "mqar", "pairs": [0, 2]}}, "numbers of pairs in rising order, from 1"),
        (
            {"task": {"name": "mqar", "vocabulary": 16}},
            "task.vocabulary=16 has 8 keys: too few for 256 pairs",
        ),
    ],
)
def test_bad_values_are_told_in_one_sentence(overrides, message):
    sections = {
        k: {**plain()[k], **v} if isinstance(v, dict) and k != "task" else v for k, v in overrides.items()
    }
    with pytest.raises(UserError) as error:
        build_config(plain(**sections))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_values_become_canonical():
    task = {"name": "passkey", "lengths": [1024, "2048"], "depths": ["50%", 25]}
    cfg = build_config({"task": task, "trainer": {"steps": 1e3, "lr": 1}, "data": {"path": 2024}})
    assert (cfg.task.lengths, cfg.task.depths) == (["1K", "2K"], ["50", "25"])
    assert (cfg.trainer.steps, cfg.trainer.lr, cfg.data.path) == (1000, 1.0, "2024")
    assert [type(v) for v in (cfg.trainer.steps, cfg.trainer.lr)] == [int, float]


def test_known_keys_differ_by_task():
    assert "task.trials" in known_keys("passkey") and "task.trials" not in known_keys("lm")
    assert {"trainer", "trainer.steps", "seed"} <= set(known_keys("lm"))


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from([k for task in TASKS for k in known_keys(task) if "." in k]),
    json,
    st.sampled_from([*TASKS]),
)
def test_any_value_gives_a_run_or_a_user_error(key, value, task):
    section, leaf = key.split(".")
    start = to_dict(RunConfig(task=TASKS[task]()))
    try:
        cfg = build_config({**start, section: {**start[section], leaf: value}})
    except UserError:
        return
    assert build_config(to_dict(cfg)) == cfg


def test_the_schema_itself_is_valid():
    for task in TASKS.values():
        cfg = RunConfig(task=task())
        assert build_config(to_dict(cfg)) == cfg
