"""What a run prints when it is over."""

from report_fakes import passkey, row
from rich.console import Console

from infini_bench.show import show_metrics


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
    for condition in (wide, wide.upper()):
        record.metrics.append(row("exact_match", 55.0, position="end", condition=condition, n=20))
    show_metrics(record)
    lines = capsys.readouterr().out.splitlines()
    assert any(wide in line and wide.upper() in line for line in lines)


def test_on_a_narrow_terminal_each_number_has_a_line_and_is_whole(capsys, monkeypatch):
    record = passkey(on=100.0, off=0.0)
    monkeypatch.setattr("infini_bench.show.out", lambda: Console(width=200))
    show_metrics(record)
    assert any("position" in line and "metric" in line for line in capsys.readouterr().out.splitlines())
    monkeypatch.setattr("infini_bench.show.out", lambda: Console(width=60))
    show_metrics(record)
    shown = capsys.readouterr().out
    assert "100 (0 to 1)" in shown and "…" not in shown and "constant" in shown


def test_of_language_modelling_it_says_how_much_was_scored(capsys):
    record = passkey(on=100.0, off=0.0)
    record.config["task"] = {"name": "lm", "max_tokens": 4096, "joined": False}
    record.metrics = [row("bits_per_byte", 2.0, length=4096, n=2, extra={"tokens": [4095, 905]})]
    show_metrics(record)
    shown = capsys.readouterr().out
    assert "5,000 tokens scored in 2 documents, at most 4,096 read of each" in shown
    assert "length" not in shown
