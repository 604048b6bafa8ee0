"""What a run prints when it is over."""

import logging
import re

from report_fakes import passkey, row
from report_fakes import record as fake_record
from rich.console import Console

from infini_bench.show import show_metrics, tell_choices


def test_a_picture_says_k_of_n_by_depth_and_length(capsys):
    record = passkey(on=100.0, off=0.0, lengths=(4096, 1 << 20))
    record.metrics.append(
        row("exact_match", 55.0, length=1 << 20, position="end", condition="constant", n=20)
    )
    show_metrics(record)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    (title,) = [line for line in lines if line[-1:] == ["found"]]
    assert title == ["constant:", "131", "of", "140", "found"]
    picture = lines[lines.index(title) + 1 :]
    assert picture[0] == ["depth", "4K", "1M"]
    assert picture[1] == ["start", "████", "20/20", "████", "20/20"]
    assert picture[4] == ["end", "▒▒▒▒", "11/20"]


def test_a_row_of_a_file_is_one_line(capsys):
    record = passkey(on=100.0, off=0.0)
    wide = (
        "a condition with a name that is longer than a column of a narrow page would be, and then some more"
    )
    record.metrics.append(row("exact_match", 55.0, position="end", condition=wide, n=20))
    show_metrics(record)
    lines = capsys.readouterr().out.splitlines()
    assert any("position" in line and "metric" in line and wide in line for line in lines)


def test_conditions_stand_side_by_side_as_far_as_they_fit_each_left_of_its_control(capsys, monkeypatch):
    record = passkey(on=0.0, off=0.0)
    names = ["number", "multikey", "number, constant filler"]
    share = {"position": "middle", "ci_low": 40.123, "ci_high": 85.321}
    record.metrics = [
        row(metric, 200 / 3, length=length, condition=name + control, n=n, **share)
        for length in (4096, 1 << 20)
        for name in names
        for control in ("", ", memory_off")
        for metric, n in (("exact_match", 100), ("token_accuracy", 1000))
    ]
    heads, lines = _heads(record, capsys)
    assert heads == [[name, "memory_off"] for name in names] and max(map(len, lines)) <= 100
    assert sum(line.count("66.67 (40.12 to 85.32)") for line in lines) == len(record.metrics)
    _on_terminal(monkeypatch, 150)
    heads, _ = _heads(record, capsys)
    assert heads == [["number", "memory_off", "multikey", "memory_off"], [names[2], "memory_off"]]


def _heads(record, capsys):
    """Conditions by table, and all that is printed."""
    show_metrics(record)
    lines = capsys.readouterr().out.splitlines()
    heads = [re.split(" {2,}", line.strip()) for line in lines if "metric" in line]
    return [head[head.index("n") + 1 :] for head in heads], lines


def test_on_a_narrow_terminal_no_value_is_cut(capsys, monkeypatch):
    record = passkey(on=100.0, off=0.0)
    _on_terminal(monkeypatch, 60)
    show_metrics(record)
    shown = capsys.readouterr().out
    assert "100 (0 to 1)" in shown and "constant" in shown
    _on_terminal(monkeypatch, 40)
    show_metrics(record)
    shown = capsys.readouterr().out
    assert "…" not in shown and max(map(len, shown.splitlines()[1:])) == 40


def _on_terminal(monkeypatch, width):
    console = Console(width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr("infini_bench.show.out", lambda: console)


def test_of_language_modelling_it_says_how_much_was_scored(capsys):
    record = passkey(on=100.0, off=0.0)
    record.config["task"] = {"name": "lm", "max_tokens": 4096, "joined": False}
    record.metrics = [row("bits_per_byte", 2.0, length=4096, n=2, extra={"tokens": [4095, 905]})]
    show_metrics(record)
    shown = capsys.readouterr().out
    assert "5,000 tokens scored in 2 documents, at most 4,096 read of each" in shown
    assert "length" not in shown


def test_what_the_package_decides_is_shown_once(capsys):
    tell_choices()
    tell_choices()
    logging.getLogger("infini_bench.memory.knn").info("neighbours on %s are found by %s", "cpu", "faiss")
    assert capsys.readouterr().err == "neighbours on cpu are found by faiss\n"


def test_a_number_that_there_is_not_says_why(capsys):
    record = passkey(on=100.0, off=0.0)
    why = {"not_finite": "nan", "failed": "8192 tokens take at least 9 s, more than 5 s"}
    record.metrics = [
        row("forward_ms", 2.0, length=4096),
        row("forward_ms", None, length=8192, extra=why),
        row("token_ppl", None, extra={"not_finite": "inf"}),
    ]
    show_metrics(record)
    lines = [re.split(" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert ["8192", "forward_ms", why["failed"]] in lines and ["token_ppl", "inf"] in lines


def timed(metric, value, length=1024, condition=None, protocol="model", **more):
    extra = {"variant": "b1-n8", "peak_tflops": 812.3, "copy_gb_per_s": 4210.0, **more.pop("extra", {})}
    return row(metric, value, length=length, condition=condition, protocol=protocol, extra=extra, **more)


def test_a_profile_is_a_line_for_each_call(capsys):
    peer = {"condition": "b1-n8", "extra": {"variant": "their-package"}}
    rows = [
        timed("forward_ms", 1234.5, extra={"bound_ms": 12.25}, ci_low=1200.0, ci_high=1300.0),
        timed("tokens_per_s", 2.5e6, position="forward"),
        timed("peak_bytes", 3 << 30, position="forward"),
        timed("decode_ms", None, extra={"failed": "out of memory"}),
        timed("state_bytes", 1 << 20),
        timed("ratio_to_local_forward", 1.0625, ci_low=1.0, ci_high=1.125),
        timed("forward_ms", 5000.0, **peer),
        timed("ratio_to_peer_inference", 4.0, **peer),
    ]
    config = {"task": {"name": "efficiency"}, "model": "infini_delta"}
    show_metrics(fake_record(metrics=rows, config=config))
    title, rates, _, *lines = capsys.readouterr().out.splitlines()
    assert title == "infini_delta on efficiency, b1-n8"
    assert "product's 812 TFLOP/s and a copy's 4,210 GB/s" in rates
    cells = [re.split(r" {2,}", line.strip()) for line in lines if line.strip()]
    head = [
        "call",
        "tokens",
        "ms",
        "bound, ms",
        "tokens/s",
        "peak, MiB",
        "state, MiB",
        "x local",
        "peer / this",
    ]
    assert cells[0] == head
    ours = ["1,234 [1,200, 1,300]", "12.2", "2,500,000", "3,072", "1", "1.06 [1, 1.12]"]
    assert cells[2:] == [
        ["infini_delta", "forward", "1K", *ours],
        ["infini_delta", "decode", "1K", "—", "1"],
        ["their-package", "forward", "1K", "5,000", "4"],
        ["— out of memory"],
    ]


def test_the_backend_of_a_layers_reference_is_named(capsys):
    rows = [timed("train_ms", 2.0, condition="local", protocol="operator", extra={"backend": "flash"})]
    rows += [timed("train_ms", 3.0, condition="full", protocol="operator", extra={"backend": "cudnn"})]
    config = {"task": {"name": "efficiency"}, "model": "infini_delta"}
    show_metrics(fake_record(metrics=rows, config=config))
    shown = capsys.readouterr().out
    assert (
        "  local (flash)   train   1K       2   " in shown
        and "  full (cudnn)    train   1K       3   " in shown
    )
