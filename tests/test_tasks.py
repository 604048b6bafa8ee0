"""The table of tasks, and what all of them share."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infini_bench.errors import UserError
from infini_bench.schema import RunConfig, TaskConfig
from infini_bench.tasks import TASKS, build_task
from infini_bench.tasks.base import aligned, evaluating, mean_over_rows


def test_a_wrong_name_gets_the_nearest():
    with pytest.raises(UserError, match=r'no task "passkeys" \(did you mean "passkey"\?\)'):
        build_task(RunConfig(task=TaskConfig(name="passkeys")))


@pytest.mark.parametrize("name", TASKS)
def test_every_task_says_what_it_is(name):
    from infini_bench.config import TASKS as CONFIGS

    task = build_task(RunConfig(task=CONFIGS[name]()))
    assert task.name == name and task.version and task.score
    assert f"Protocol, version {task.version}." in sys.modules[type(task).__module__].__doc__


def test_bare_tasks_cannot_be_imported():
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", "import tasks"], cwd=root, capture_output=True, text=True)
    assert run.returncode != 0 and "import infini_bench.tasks" in run.stderr


def test_weights_and_chunks():
    weights = mean_over_rows(torch.tensor([[1.0, 1, 0], [2, 0, 0], [0, 0, 0]]))
    assert weights.tolist() == [pytest.approx([1 / 6, 1 / 6, 0]), pytest.approx([1 / 3, 0, 0]), [0, 0, 0]]
    assert [aligned(100, 32), aligned(10, 32), aligned(100, 32, 2)] == [96, 32, 32]


def test_evaluation_mode_is_put_back_also_after_an_error():
    model = torch.nn.Linear(1, 1).train()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not model.training
        raise RuntimeError
    assert model.training
