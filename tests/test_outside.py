"""README's walk "Add your own memory in one file", word by word; and code that nobody named is not run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import infini_bench
from infini_bench import outside
from infini_bench.cli import main
from infini_bench.config import build_config
from infini_bench.errors import UserError
from infini_bench.memory import build_memory
from infini_bench.report.records import config_hash, read_records
from infini_bench.schema import MemoryConfig
from infini_bench.signals import StopRequest

README = Path(infini_bench.__file__).parents[1] / "README.md"


def invoke(*arguments: str):
    return CliRunner().invoke(main.app, [*arguments])


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """The folder after the walk: its files and commands taken from README, and what the commands printed."""
    section = (
        README.read_text(encoding="utf-8").split("## Add your own memory in one file\n")[1].split("\n## ")[0]
    )
    files = re.findall(r"`([\w/]+\.\w+)`:\n\n```\w+\n(.*?)```", section, re.DOTALL)
    (commands,) = re.findall(r"\n\n```\n(.*?)```", section, re.DOTALL)
    folder, printed = tmp_path_factory.mktemp("walk"), []
    for name, text in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("infini_bench.origin.PACKAGE", folder)  # without the shipped model
        patch.setattr(outside, "_named", set())
        for line in commands.splitlines():
            program, *words = shlex.split(line, comments=True)
            assert program == "infini-bench"
            result = invoke(*words)
            assert result.exit_code == 0, f"{line}\n{result.output}"
            printed.append(result.stdout)
    return folder, [name for name, _ in files], printed


@pytest.fixture
def there(walk, monkeypatch):
    """That folder, in a process where nothing has been named."""
    monkeypatch.chdir(walk[0])
    monkeypatch.setattr("infini_bench.origin.PACKAGE", walk[0])
    monkeypatch.setattr(outside, "_named", set())
    return walk[0]


def test_the_walk_does_what_it_says(walk):
    _, files, (checked, trained, evaluated) = walk
    assert files == ["ema.py", "mine/model/ema.yaml"]
    assert "20 pass, 0 fail, 1 not applicable" in checked and re.search(r"look-ups +not applicable", checked)
    assert (
        "done: ema on lm" in trained and "ema on lm" in evaluated and "bits_per_byte_memory_off" in evaluated
    )


def test_the_record_counts_the_memory_and_its_file(there):
    (record,) = [r for r in read_records("results/records") if r.kind == "train"]
    assert record.config["memory"]["kind"] == "ema.py:EmaMemory"
    assert record.config["memory"]["options"] == {"keep": 0.9}
    assert record.state_floats == 2 * 2 * 16  # layers, heads, head size
    assert record.config_hash == config_hash(record.config)
    text = Path("ema.py").read_text()
    Path("ema.py").write_text(text + "# another memory\n")
    assert record.config_hash != config_hash(record.config)
    Path("ema.py").write_text(text)


def test_a_checkpoints_code_is_not_run_unless_the_user_names_it(there, monkeypatch):
    monkeypatch.setattr(outside, "load", lambda target: pytest.fail("imported"))
    (run,) = Path("runs").iterdir()
    for words in (
        ["eval", "lm", "--checkpoint", str(run), "force=true"],
        ["train", f"resume={run}", "trainer.steps=5"],
    ):
        result = invoke(*words)
        assert result.exit_code == 2, result.output
        assert "code outside infini-bench, ema.py:EmaMemory; name it again" in result.stderr
        assert result.stderr.count("\n") == 1
    with pytest.raises(UserError, match="name it again"):
        build_memory(MemoryConfig(kind="os:system"), 2, 2, 8)


def test_a_refused_evaluation_leaves_no_record(there):
    (run,) = Path("runs").iterdir()
    before = read_records("results/records")
    for words in (["lm", "force=true"], ["lm", "memory.kind=none.py:X"], ["recall"]):
        assert invoke("eval", *words, "--checkpoint", str(run)).exit_code == 2
    assert read_records("results/records") == before


def test_named_again_it_is_evaluated_and_resumed(there):
    (run,) = Path("runs").iterdir()
    words = ["eval", "lm", "memory.kind=ema.py:EmaMemory", "--checkpoint", str(run), "force=true"]
    assert invoke(*words, "task.controls=false").exit_code == 0
    assert "was fixed when" in invoke("eval", "lm", "memory.kind=xl", "--checkpoint", str(run)).stderr
    again = invoke("train", "--config-dir", "mine", "model=ema", f"resume={run}", "trainer.steps=5")
    assert again.exit_code == 0, again.output


def test_named_again_it_is_exported_and_reads(there, tmp_path):
    Path("book.txt").write_text("A story about nothing.")
    mine = ("--config-dir", "mine")
    assert invoke("export", "ema", "--out", str(tmp_path / "out"), *mine).exit_code == 0
    for name, words in (("ema", mine), (str(tmp_path / "out"), ["memory.kind=ema.py:EmaMemory"])):
        outside._named.clear()
        read = invoke("remember", name, "book.txt", "--out", "m.safetensors", *words)
        assert read.exit_code == 0, read.output
        outside._named.clear()
        asked = ["answer", name, "--state", "m.safetensors", "--prompt", "x", "--tokens", "2"]
        assert invoke(*asked, *words).exit_code == 0
    outside._named.clear()
    assert "name it again" in invoke(*asked).stderr
    refused = invoke("export", str(tmp_path / "out"), "--out", "x", "model=full")
    assert "holds memory.kind=ema.py:EmaMemory, not full" in refused.stderr


def test_edited_code_is_not_mixed_with_old_weights(there, tmp_path):
    (run,) = Path("runs").iterdir()
    mine = ["--config-dir", "mine", "model=ema"]
    assert invoke("export", str(run), "--out", str(tmp_path / "out"), *mine).exit_code == 0
    text, before = Path("ema.py").read_text(), read_records("results/records")
    Path("ema.py").write_text(text + "# another memory\n")
    for words in (
        ["eval", "lm"],
        ["train", f"resume={run}", "trainer.steps=9"],
        ["export", str(run), "--out", "x"],
        ["remember", str(tmp_path / "out"), "ema.py"],
    ):
        refused = invoke(*words, *mine)
        assert refused.exit_code == 2, refused.output
        assert "ema.py is not what this model was trained with: the file has changed" in refused.stderr
    Path("ema.py").write_text(text)
    assert read_records("results/records") == before
    assert invoke("eval", "lm", *mine, "task.controls=false", "force=true").exit_code == 0


def test_an_interrupted_run_says_how_to_name_its_code(there, monkeypatch):
    elsewhere, words = ["runs=others", "records=others"], ["scale=smoke", "task.max_tokens=128"]
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "__enter__", lambda self: setattr(self, "requested", True) or self)
        stopped = invoke("train", "--config-dir", "mine", "model=ema", *words, *elsewhere)
    assert stopped.exit_code == 130
    (command,) = re.findall(r"go on with: infini-bench (.*)", stopped.stderr)
    outside._named.clear()
    assert "done: ema on lm, 4 steps" in invoke(*command.split(), "records=others").stdout


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("none.py:X", "none.py is no file"),
        ("wrong.py:X", "wrong.py cannot be imported: ZeroDivisionError: division by zero (wrong.py, line 2)"),
        ("plain.py:Y", 'plain.py has no "Y"'),
        ("plain.py:X", "is no subclass of infini_bench.memory.Memory"),
        ("none_such.module:X", "none_such.module cannot be imported: ModuleNotFoundError"),
        (":X", "names no code"),
    ],
)
def test_code_that_is_no_memory(kind, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(outside, "_named", {kind})
    Path("wrong.py").write_text("x = 0\ny = 1 / x\n")
    Path("plain.py").write_text("X = 3\n")
    with pytest.raises(UserError) as caught:
        build_memory(MemoryConfig(kind=kind), 2, 2, 8)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_options_belong_to_outside_memories():
    with pytest.raises(UserError, match="compressive takes none"):
        build_memory(MemoryConfig(options={"keep": 1}), 2, 2, 8)
    cfg = build_config(
        {"task": {"name": "lm"}, "memory": {"kind": "a.py:B", "options": {"keep": 1, "how": "so"}}}
    )
    assert cfg.memory.options == {"keep": 1, "how": "so"}  # and naming is not what a configuration does
    assert "a.py:B" not in outside._named


# --- the verb check ---------------------------------------------------------------------------------------


def test_check_writes_its_verdicts_and_fails_with_1(there):
    toys = Path(__file__).with_name("contract_toys.py")
    words = ["--length", "64", "--json", "out/verdicts.json"]
    result = invoke("check", f"{toys}:Toy", "--arg", "fault=grows", *words)
    assert result.exit_code == 1 and "the state grows by" in result.stdout, result.output
    found = json.loads(Path("out/verdicts.json").read_text())
    assert found["arguments"] == {"fault": "grows"} and found["length"] == 64
    assert [v["property"] for v in found["verdicts"] if v["verdict"] == "FAIL"] == [
        "state growth",
        "state size",
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("infini_dleta", 'There is no model "infini_dleta" (did you mean "infini_delta"?)'),
        ("infini_delta --arg updat=x", "A memory has no setting updat"),
        ("infini_delta --arg x", '"x" is no argument'),
        ("infini_delta --length 3Q", '"3Q" is not a length'),
        ("TOYS:Toy --segment 4", "says its own segment"),
        ("TOYS:Layer", "give its arguments as --arg NAME=VALUE"),
        (
            "ema.py:EmaMemory",
            "cannot be made (KeyError: 'keep' (ema.py, line 13)); give its arguments as --arg",
        ),
        ("TOYS:OnlyLoss", "it returns only a loss"),
        ("TOYS:Layer --arg dim=8 --dim 9", "cannot be called with token ids or vectors"),
    ],
)
def test_what_cannot_be_checked_is_one_sentence(there, words, sentence):
    toys = Path(__file__).with_name("contract_toys.py")
    result = invoke("check", *words.replace("TOYS", str(toys)).split())
    assert result.exit_code == 2, result.output
    assert sentence in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('options["keep"]', 'options["kep"]', r"KeyError: 'kep' \(wrong\.py, line 13\)"),
        ("return {", "{", r"EmaMemory\.start must return a dict of tensors \(wrong\.py, line 22\)"),
        ("self.keep * ema[-1]", "self.kepp * ema[-1]", r"AttributeError: .* \(wrong\.py, line 29\)"),
        ("def state_floats", "def floats", "wrong.py:EmaMemory lacks the method state_floats"),
        ("return self.kv", "self.kv", r"EmaMemory\.state_floats must return a whole number"),
        ("import torch\n", "import torhc\n", r"No module named 'torhc' \(wrong\.py, line 3\)\.$"),
    ],
)
def test_a_mistake_in_ones_memory_is_a_sentence_with_its_line(there, monkeypatch, old, new, words):
    Path("wrong.py").write_text(Path("ema.py").read_text().replace(old, new, 1))
    outside._file.cache_clear()
    monkeypatch.setattr(outside, "_modules", set())
    asked = ["scale=smoke", "memory.kind=wrong.py:EmaMemory", "++memory.options.keep=0.9", "records=wrong"]
    check = ["check", "wrong.py:EmaMemory", "--arg", "keep=0.9"]
    for arguments in (["train", *asked], check):
        result = invoke(*arguments)
        assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
        assert re.search(words, result.stderr.strip()), result.stderr


def test_an_error_of_this_package_stays_one(there, monkeypatch):
    monkeypatch.setattr("infini_bench.memory.base.rotate", lambda *_: 1 / 0)
    result = invoke("train", "--config-dir", "mine", "model=ema", "scale=smoke", "seed=9", "records=other")
    assert isinstance(result.exception, ZeroDivisionError) and result.exit_code == 1
