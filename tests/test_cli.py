"""The verbs: what they print, how they fail, and that help is quick because nothing heavy is imported."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from report_fakes import record
from typer.testing import CliRunner

from infini_bench import __version__
from infini_bench.cli import main as cli
from infini_bench.cli.doctor import EXTRAS, Finding, examine
from infini_bench.cli.listing import describe, list_options
from infini_bench.report.records import write_record

HEAVY = ("torch", "transformers", "datasets", "hydra", "omegaconf", "pandas", "numpy")


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, [*arguments])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """An empty folder, and a package without shipped models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("infini_bench.origin.PACKAGE", tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["eval", "--help"],
        ["profile", "--help"],
        ["check", "--help"],
        ["--version"],
        ["ls", "models"],
        ["ls"],
    ],
)
def test_nothing_heavy_is_imported_before_work_begins(arguments):
    program = (
        "import sys\nfrom infini_bench.cli.main import main\n"
        f"sys.argv = ['infini-bench', *{arguments!r}]\n"
        "try: main()\n"
        f"except SystemExit as e: print([m for m in {HEAVY!r} if m in sys.modules], e.code, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.strip() == "[] 0"


def test_the_hub_is_silent_about_its_retries(monkeypatch):
    monkeypatch.delenv("HF_HUB_VERBOSITY", raising=False)  # the other tests' commands have set it
    program = (
        "import logging, sys\nfrom infini_bench.cli.main import main\n"
        "sys.argv = ['infini-bench', 'ls', 'data']\n"
        "try: main()\nexcept SystemExit: import huggingface_hub.utils.logging\n"
        "print(logging.getLogger('huggingface_hub.utils._http').getEffectiveLevel(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.strip() == "40"


def test_bars_of_other_libraries_are_off(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)  # the other tests' commands have set it
    program = (
        "import sys\nfrom infini_bench.cli.main import main\n"
        "sys.argv = ['infini-bench', 'ls', 'data']\n"
        "try: main()\nexcept SystemExit: from tqdm.auto import tqdm\n"
        "print(tqdm(range(3)).disable, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.strip() == "True"


def test_version_and_help():
    assert invoke("--version").stdout == f"infini-bench {__version__}\n"
    text = invoke("--help").stdout
    assert all(verb in text for verb in ("train", "eval", "reproduce", "report", "ls", "doctor"))


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "infini_bench", "--version"], capture_output=True, text=True)
    assert done.stdout == f"infini-bench {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("train model=infini_linera", 'There is no model "infini_linera" (did you mean "infini_linear"?)'),
        ("train trainer.setps=5", 'There is no setting "trainer.setps" (did you mean "trainer.steps"?)'),
        ("train modle=full", 'There is no setting "modle" (did you mean "model"?)'),
        ("train lr=3", 'There is no setting "lr" (did you mean "trainer.lr"?)'),
        ("train +foo=1", 'There is no setting "foo"'),
        ("train trainer.steps=abc", 'trainer.steps must be a whole number, not "abc"'),
        ("train trainer.steps=[1", 'The value in "trainer.steps=[1" cannot be read; close or quote it'),
        ("train data.path=it's", 'The value in "data.path=it\'s" cannot be read; close or quote it'),
        ("train =3", '"=3" is no setting; write key=value'),
        ("train trainer={stpes:3}", 'There is no setting "trainer.stpes" (did you mean "trainer.steps"?)'),
        ("train ~trainer.steps", '"~trainer.steps" leaves out what every run has'),
        ("train ~model", '"~model" leaves out what every run has'),
        ("train model=[full,local_block]", '"model=[full,local_block]" mixes several; name one'),
        ("train -m model=glob(none_such*)", '"model=glob(none_such*)" matches nothing'),
        ("train -m trainer.lr=interval(0,1)", '"trainer.lr=interval(0,1)" needs a sweeper of its own'),
        ("train --cfg jobs", "--cfg shows job, hydra, all, not jobs"),
        ("train --cfg job -m seed=0,1", "--cfg shows one run; leave out -m"),
        ("eval lm task=passkey", '"task=passkey" is another task than eval lm'),
        ("reproduce demo seed=3", '"seed=3": what a plan runs is said by --seeds'),
        ("reproduce demo model=full", '"model=full": what a plan runs is said by --models'),
        ("train trainer.steps", '"trainer.steps" is no setting; write key=value'),
        ("train memory.gradient_depth=0", "memory.gradient_depth must be 1 or more segments"),
        ("train trainer=5", "trainer must be a group of settings"),
        ("train model=full,local_block", '"model=full,local_block" has several values: train and eval'),
        ("train task.trials=3", "task.trials belongs to task=passkey, needles, recall, mqar"),
        (
            "eval footprint ++task.memory.segment=8",
            "task.memory belongs to task=lm, passkey, needles, booksum, recall, mqar; leave it out.",
        ),
        ("train data=local", "data.path is not set"),
        ("train data.filter.lang=en", "added with a plus sign: +data.filter.COLUMN=VALUE"),
        ("train experiment=none_such", 'There is no experiment "none_such"'),
        ("train hydra.verbose=true", '"hydra.verbose=true" is for several runs; add -m, or leave it out.'),
        ("train hydra/launcher=none_such", 'There is no hydra/launcher "none_such"'),
        ("train -m seed=0,1 model=infini_linear,ful", 'There is no model "ful" (did you mean "full"?)'),
        ("train --config-dir none_such", "--config-dir none_such is no folder"),
        ("train resume=none_such", "resume=none_such"),
        ("eval passky", 'There is no task "passky" (did you mean "passkey"?)'),
        ("eval passkey --length 1Mb", '"1Mb" is not a length'),
        ("eval passkey --length 0", "at least 1 token"),
        ("eval passkey --depths 120", 'The depth "120" lies outside 0-100 %'),
        ("eval passkey --trials 0", "task.trials must be above 0"),
        ("eval lm --trials 3", "--trials belongs to eval passkey, needles, recall, mqar, not to eval lm"),
        ("eval recall --depths 0", "--depths belongs to eval passkey and needles, not to eval recall"),
        ("eval passkey --segments 4", "--segments belongs to eval recall and mqar, not to eval passkey"),
        ("eval recall --segments 4,1", "task.segments_after must be numbers of segments in rising order"),
        ("eval recall --length 4K", "eval recall counts segments, not tokens: give --segments"),
        ("train task=mqar scale=paper", "Task mqar has no scale=paper: choose one of gpu, laptop, smoke"),
        ("eval lm --length 1K,2K", "one --length"),
        ("eval lm --baseline lead", "--baseline belongs to eval booksum, not to eval lm"),
        (
            "eval reach --length 4K",
            "--length belongs to eval lm, passkey, needles, booksum, not to eval reach",
        ),
        ("eval reach --checkpoint x", "eval reach asks random weights; leave --checkpoint out"),
        ("train task=footprint", "The task footprint trains nothing"),
        ("eval lm", "There is no finished run to evaluate; run `infini-bench train task=lm` first"),
        ("eval lm --checkpoint none_such", 'The checkpoint "none_such" is neither a folder nor a model'),
        (
            "eval passkey --checkpoint rmt",
            "rmt has no finished run: train it first, `infini-bench train",
        ),
        ("eval recall --checkpoint rmt", "rmt has no finished run on recall: train it first"),
        ("export none_such --out x", 'The checkpoint "none_such" is neither a folder nor a model'),
        ("export rmt --out x seed=3", "seed cannot be set here, only model, memory.kind, runs, records"),
        ("ls modles", 'There are no "modles" to list (did you mean "models"?)'),
        ("reproduce table22", '"table22"'),
        ("reproduce table2 --seeds 0,a", '"0,a" is no list of seeds'),
        ("reproduce table2 --scale gpu --data . --seeds 7 --missing", "no run of table2 at scale=gpu with"),
        ("reproduce table2 --scale gpu --data . --seeds 7 --next 1", "no run of table2 at scale=gpu with"),
        ("report --format docx", 'unknown format "docx"'),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, sentence):
    result = invoke(*arguments.split())
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert sentence in result.stderr


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["train", "--nonsense"], ["eval", "passkey", "--trials", "x"], ["eval"]]
)
def test_usage_errors_are_exit_code_2(arguments):
    assert invoke(*arguments).exit_code == 2


def test_unexpected_errors_show_their_traceback(monkeypatch):
    monkeypatch.setattr(cli.tables, "list_runs", lambda records: 1 / 0)
    assert isinstance(invoke("ls", "runs").exception, ZeroDivisionError)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_is_exit_code_130(monkeypatch, number):
    def interrupt(records):
        os.kill(os.getpid(), number)

    monkeypatch.setattr(cli.tables, "list_runs", interrupt)
    result = invoke("ls", "runs")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_options_of_eval_become_overrides(monkeypatch):
    seen = []
    monkeypatch.setattr(cli.models, "launch", lambda verb, overrides, *rest: seen.append((verb, overrides)))
    invoke("eval", "passkey", "--length", "4K,1M", "--depths", "0,50%,end", "--trials", "3", "seed=1")
    invoke("eval", "lm", "--length", "4K", "--checkpoint", "runs/it's")
    invoke("eval", "booksum", "--length", "16K,512K", "--baseline", "map_reduce")
    invoke("eval", "recall", "--segments", "1,64", "--trials", "9")
    passkey = [
        "task=passkey",
        "task.lengths=[4096,1048576]",
        "task.depths=[0,50,end]",
        "task.trials=3",
        "seed=1",
    ]
    assert seen == [
        ("eval", passkey),
        ("eval", ["task=lm", "task.max_tokens=4096", r"checkpoint='runs/it\'s'"]),
        ("eval", ["task=booksum", "task.lengths=[16384,524288]", "task.baseline=map_reduce"]),
        ("eval", ["task=recall", "task.segments_after=[1,64]", "task.trials=9"]),
    ]


def test_ls_says_something_about_each_thing():
    text = invoke("ls").stdout
    assert "infini_delta" in text and "Eq. 9" in text and "runs: none yet" in text
    assert describe("# @package _global_\n# What it is\nkey: 1\n") == "What it is"


def test_cfg_prints_the_settings():
    text = invoke("train", "--cfg", "job", "task=passkey", "trainer.steps=7").stdout
    assert "steps: 7" in text and "name: passkey" in text and "hydra" not in text


def test_report_without_records_leaves_the_tables_that_there_are(tmp_path):
    assert invoke("report", "--out", "tables").exit_code == 2
    (tmp_path / "results" / "records").mkdir(parents=True)
    assert invoke("report", "--out", "tables", "--format", "csv").exit_code == 2
    assert not (tmp_path / "tables").exists()
    write_record(tmp_path / "results" / "records", record())
    assert invoke("report", "--out", "tables", "--format", "csv").exit_code == 0
    assert (tmp_path / "tables" / "table3_passkey.csv").exists()
    before = {*tmp_path.iterdir()}
    assert invoke("report", "--out", "page.html", "--format", "html").exit_code == 0
    assert {*tmp_path.iterdir()} - before == {tmp_path / "page.html"}


def test_next_limits_what_is_listed(tmp_path):
    words = ["reproduce", "table2", "--scale", "smoke", "--models", "full,rmt,sink"]
    for option in ("--missing", "--list"):
        text = invoke(*words, option, "--next", "2").stdout
        assert re.findall(r"lm (\w+) seed", text) == ["full", "rmt"] and "0 of 3 runs are done" in text
    assert len(invoke(*words, "--missing", "--json", "--next", "1").stdout.splitlines()) == 1


def test_pack_compresses_the_records_of_finished_runs(tmp_path):
    assert invoke("pack").exit_code == 2
    path = write_record(tmp_path / "results" / "records", record())
    assert invoke("pack").stdout == "packed 1 files of results/records\n"
    assert [each.name for each in path.parent.iterdir()] == [f"{path.name}.xz"]


def test_doctor_is_content_here(monkeypatch):
    findings = {finding.name: finding for finding in examine(offline=True)}
    assert findings["torch"].ok and findings["runs"].ok and findings["memory"].detail.endswith("GiB")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = invoke("doctor", "--offline")
    assert result.exit_code == 0 and "extra [dev]" in result.stdout


def test_doctor_names_every_extra_and_what_it_is_for(monkeypatch):
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert list(EXTRAS) == list(project["optional-dependencies"])
    monkeypatch.setattr("infini_bench.cli.doctor._importable", lambda module: False)
    lines = invoke("doctor", "--offline").stdout.splitlines()
    (sweep,) = [line.split() for line in lines if " [sweep] " in line]
    assert sweep[:5] == ["optional", "extra", "[sweep]", "not", "installed;"]
    assert [line.strip() for line in lines].count("if wanted: pip install 'infini-bench[sweep]'") == 1
    assert max(map(len, lines)) <= 100


def test_a_description_is_the_first_sentence_whole():
    assert (
        describe("# @package _global_\n# A set (Eq. 5), of\n# the hub. More\nx: 1\n# no")
        == "A set (Eq. 5), of the hub"
    )
    assert describe("# Does it? One line\n") == "Does it?"
    for name, text in list_options("data"):
        assert not text.endswith((" of", ".")), name


def test_doctor_fails_if_something_essential_is_broken(monkeypatch):
    broken = Finding("torch", False, "not installed", "pip install torch", essential=True)
    monkeypatch.setattr("infini_bench.cli.doctor.examine", lambda offline: iter([broken]))
    result = invoke("doctor")
    assert result.exit_code == 1 and "pip install torch" in result.stdout


def test_records_are_listed(tmp_path):
    from infini_bench.config import to_dict
    from infini_bench.report.records import Record, write_record
    from infini_bench.schema import LMConfig, RunConfig

    config = to_dict(RunConfig(task=LMConfig()))
    record = Record(
        "id-1", "train", "failed", [], config, "0", 0, "cpu", "2026-01-01", error="no luck\nat all"
    )
    write_record(tmp_path / "r", record)
    assert (
        "id-1  train failed: infini_linear on lm (no luck)" in invoke("ls", "runs", "--records", "r").stdout
    )
    (tmp_path / "r" / "x.jsonl").write_text(json.dumps({}) + "\n")
    assert invoke("ls", "runs", "--records", "r").exit_code == 2
