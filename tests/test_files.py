"""files.py: whole files or clear errors, never halves."""

import errno
import json
import os
from threading import Thread

import pytest

from infini_bench.errors import UserError
from infini_bench.files import alone, atomic_folder, atomic_write, read_json, write_json


def test_write_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b.txt"
    atomic_write(path, "one")
    atomic_write(path, b"tw\xc3\xb6")
    assert path.read_text(encoding="utf-8") == "twö"
    assert os.listdir(path.parent) == ["b.txt"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_disk_trouble_names_the_path_and_keeps_the_old_file(tmp_path, monkeypatch, code):
    path = tmp_path / "b.txt"
    atomic_write(path, "old")

    def fail(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"cannot write .*b\.txt"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["b.txt"]


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        atomic_write(tmp_path / "a" / "b.txt", "new")


def test_other_errors_are_not_hidden(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="broken disk"):
        atomic_write(tmp_path / "b.txt", "new")


def test_json_goes_and_comes_back(tmp_path):
    value = {"a": [1, 2.5, None], "ö": "ß"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == value


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe{}"])
def test_broken_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json is broken"):
        read_json(tmp_path / "a.json")


def test_missing_json_is_named(tmp_path):
    with pytest.raises(UserError, match=r"a\.json is missing"):
        read_json(tmp_path / "a.json")


def test_folder_is_there_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "x") as temporary:
        (temporary / "a").write_text("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    with atomic_folder(tmp_path / "x") as temporary:
        (temporary / "a").write_text("whole")
    assert (tmp_path / "x" / "a").read_text() == "whole"
    assert os.listdir(tmp_path) == ["x"]


def test_the_first_of_two_folders_stays(tmp_path):
    with atomic_folder(tmp_path / "x") as slow:
        (slow / "a").write_text("slow")
        with atomic_folder(tmp_path / "x") as fast:
            (fast / "a").write_text("fast")
    assert (tmp_path / "x" / "a").read_text() == "fast"
    assert os.listdir(tmp_path) == ["x"]


def test_one_at_a_time_of_those_that_name_a_file(tmp_path):
    told, path = [], tmp_path / "runs" / ".lock"

    def other():
        with alone(path):
            told.append("second")

    with alone(path):
        thread = Thread(target=other)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        told.append("first")
    thread.join(10)
    assert told == ["first", "second"]
