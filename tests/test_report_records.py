"""Records: what is written comes back, what is broken is named, and the hash knows what matters."""

from __future__ import annotations

import json
import lzma
import math
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from report_fakes import CONFIG, record, row

from infini_bench.config import TASKS
from infini_bench.errors import UserError
from infini_bench.report.record_files import record_files
from infini_bench.report.records import (
    Record,
    add_plan,
    config_hash,
    current,
    device_name,
    find_done,
    git_state,
    new_id,
    pack_records,
    read_records,
    versions,
    write_record,
)
from infini_bench.schema import RunConfig


def test_a_record_comes_back_as_it_was(tmp_path):
    written = record(metrics=[row("token_ppl", 20.5, {"documents": ["a"]}, n=1)])
    path = write_record(tmp_path / "records", written)
    assert path.name == f"{written.id}.jsonl"
    assert path.read_text().count("\n") == 1
    assert read_records(tmp_path / "records") == [written]


def test_writing_again_replaces_the_line(tmp_path):
    first = record(status="failed")
    write_record(tmp_path, first)
    first.status = "done"
    write_record(tmp_path, first)
    assert [r.status for r in read_records(tmp_path)] == ["done"]


def test_no_folder_means_no_records(tmp_path):
    assert read_records(tmp_path / "absent") == []


def test_several_lines_a_file_are_read_in_order(tmp_path):
    lines = [record(seed=seed).to_json() for seed in (0, 1)]
    (tmp_path / "sweep.jsonl").write_text("\n".join([*lines, ""]) + "\n")
    assert [r.seed for r in read_records(tmp_path)] == [0, 1]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"id": "cut', "Unterminated string"),
        ("[1]", "not a JSON object"),
        ('{"schema": 2}', "schema 2"),
        ("{}", "schema None"),
        ('{"schema": 1, "id": "x"}', "missing"),
        (json.dumps({**json.loads(record().to_json()), "colour": 1}), "unknown field 'colour'"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, says):
    (tmp_path / "a.jsonl").write_text(record().to_json() + "\n" + line + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 2, is no readable record") as caught:
        read_records(tmp_path)
    assert says in str(caught.value)


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"b\.jsonl is not UTF-8"):
        read_records(tmp_path)


def test_packed_records_are_read_as_plain_ones(tmp_path):
    runs = [record(id=name, seed=seed) for seed, name in enumerate("abc")]
    plain = {name: write_record(tmp_path, run).read_bytes() for name, run in zip("abc", runs, strict=True)}
    write_record(tmp_path, record(id="d", status="failed"))
    before = read_records(tmp_path)
    packed = pack_records(tmp_path)
    assert [path.name for path in packed] == ["a.jsonl.xz", "b.jsonl.xz", "c.jsonl.xz"]
    assert [lzma.decompress(path.read_bytes()) for path in packed] == [*plain.values()]
    assert [path.name for path in record_files(tmp_path)] == [path.name for path in packed] + ["d.jsonl"]
    assert read_records(tmp_path) == before and pack_records(tmp_path) == []
    assert find_done(tmp_path, "eval", runs[1].config_hash) == runs[1]
    add_plan(tmp_path, runs[1], "table2")
    assert [r.plans for r in read_records(tmp_path)] == [[], ["table2"], [], []]
    assert [path.name for path in record_files(tmp_path)] == [path.name for path in packed] + ["d.jsonl"]


def test_a_packed_file_that_is_cut_or_there_twice_is_named(tmp_path):
    write_record(tmp_path, record(id="a"))
    (path,) = pack_records(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"a\.jsonl\.xz is broken or cut; delete the file or restore it"):
        read_records(tmp_path)
    path.write_bytes(whole)
    write_record(tmp_path, record(id="a"))
    with pytest.raises(UserError, match=r"a\.jsonl is there plain and packed; delete one of the two, as"):
        read_records(tmp_path)
    with pytest.raises(UserError, match=r"no folder of records at .*absent"):
        pack_records(tmp_path / "absent")


def test_of_a_record_that_is_there_twice_the_plain_file_goes(tmp_path):
    runs = [record(id=name) for name in "abc"]
    for run in runs[:2]:
        write_record(tmp_path, run)
    pack_records(tmp_path)
    for run in (runs[0], replace(runs[1], seed=9), runs[2]):
        write_record(tmp_path, run)
    names = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match=r"b\.jsonl and b\.jsonl\.xz differ; delete the one that is wrong"):
        pack_records(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    write_record(tmp_path, runs[1])
    assert sorted(path.name for path in pack_records(tmp_path)) == [f"{name}.jsonl.xz" for name in "abc"]
    assert read_records(tmp_path) == runs and len([*tmp_path.iterdir()]) == 3


def test_numbers_that_are_not_finite_become_null():
    line = record(metrics=[row("token_ppl", math.nan, {"all": [math.inf, 1.0]})]).to_json()
    metric = Record.from_json(line).metrics[0]
    assert metric["value"] is None
    assert metric["extra"] == {"all": [None, 1.0]}


def test_the_hash_ignores_places_and_knows_the_rest():
    moved = {
        "runs": "elsewhere",
        "records": "x",
        "force": True,
        "device": "cuda",
        "resume": "r",
        "checkpoint": "c",
    }
    assert config_hash(CONFIG | moved) == config_hash(CONFIG)
    assert config_hash(CONFIG | {"data": CONFIG["data"] | {"cache_dir": "x"}}) == config_hash(CONFIG)
    paths = ("data/books", "./data//books/", "data/../books", "books")
    own, same, *others = (config_hash(CONFIG | {"data": CONFIG["data"] | {"path": path}}) for path in paths)
    assert own == same and len({own, *others}) == 3
    others = [{"seed": 1}, {"trained": "0123"}, {"data": CONFIG["data"] | {"name": "books"}}]
    hashes = {config_hash(CONFIG | other) for other in [{}, *others]}
    assert len(hashes) == 4
    assert all(len(digest) == 16 for digest in hashes)


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if not task.untrained])
def test_a_memory_as_it_was_trained_is_what_was_recorded(task):
    """Language models' records have had the setting from the first."""
    config = asdict(RunConfig(task=TASKS[task]()))
    before = {**config, "task": {key: value for key, value in config["task"].items() if key != "memory"}}
    changed = {**config, "task": {**config["task"], "memory": {"write_floor": 0.0}}}
    assert (config_hash(before) == config_hash(config)) == (task != "lm")
    assert config_hash(changed) != config_hash(config)


def test_find_done_gives_the_newest_finished_run(tmp_path):
    runs = [
        record(id="a", started="2026-01-01"),
        record(id="b", started="2026-01-02"),
        record(id="c", started="2026-01-03", status="failed"),
        record(id="d", started="2026-01-04", kind="train"),
    ]
    for run in runs:
        write_record(tmp_path, run)
    digest = runs[0].config_hash
    found = find_done(tmp_path, "eval", digest)
    assert found is not None and found.id == "b"
    assert find_done(tmp_path, "eval", "0" * 16) is None
    assert [r.id for r in current(runs)] == ["b", "d"]


def test_a_timing_on_another_machine_is_another_run(tmp_path):
    for task, runs in (("efficiency", ["a", "b"]), ("lm", ["b"])):
        made = [
            record(id=name, device=f"{name} GPU", started=name, config={"task": {"name": task}})
            for name in "ab"
        ]
        assert [r.id for r in current(made)] == runs
    write_record(tmp_path, made[0])
    assert find_done(tmp_path, "eval", made[0].config_hash) == made[0]
    timed = record(id="t", device="a GPU", config={"task": {"name": "efficiency"}})
    write_record(tmp_path, timed)
    found = [find_done(tmp_path, "eval", timed.config_hash, device) for device in ("a GPU", "b GPU")]
    assert found == [timed, None]


def test_a_failure_counts_until_the_run_is_done():
    failed = record(id="a", status="failed", started="2026-01-02")
    assert current([failed]) == [failed]
    assert [r.id for r in current([failed, record(id="b", started="2026-01-01")])] == ["b"]


def test_ids_are_unique_and_tell_the_run():
    ids = {new_id("train", CONFIG) for _ in range(50)}
    assert len(ids) == 50
    assert all("train-lm-infini_linear-laptop-seed0" in each for each in ids)


def test_provenance():
    commit, dirty = git_state()
    assert (commit is None) == (dirty is None)
    assert commit is None or len(commit) == 40
    assert {"python", "torch", "infini-bench"} <= versions().keys()
    assert device_name("cpu").startswith("CPU ") and device_name("cpu").endswith("cores")


def test_records_need_the_standard_library_only():
    code = "import sys, infini_bench.report.records; print({'numpy', 'torch', 'rich'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
