"""Progress on a terminal, beside one, and nested."""

import io

from rich.console import Console

from infini_bench.progress import NullProgress, Progress


def test_a_line_a_minute_where_there_is_no_terminal():
    now = [0.0]
    out = io.StringIO()
    progress = Progress(Console(file=out), clock=lambda: now[0])
    with progress, progress.task("reading", 100) as outer, progress.task("inner", 10) as inner:
        for _ in range(50):
            now[0] += 6
            outer.advance()
            inner.advance(0)
    lines = out.getvalue().splitlines()
    assert lines[0] == "reading: 10 of 100 (10%), 9:00 left"
    assert len(lines) == 5  # 300 seconds


def test_nested_bars_share_one_display():
    out = io.StringIO()
    progress = Progress(Console(file=out, force_terminal=True, width=100))
    with progress:
        with progress, progress.task("outer", 4) as outer:
            outer.advance(3)
            with progress.task("inner", 2) as inner:
                inner.advance(2)
                inner.close()
        assert progress._bars is not None
    assert progress._bars is None
    assert "outer" in out.getvalue() and "left" in out.getvalue()


def test_a_task_works_without_the_block_and_closes_the_display():
    progress = Progress(Console(file=io.StringIO(), force_terminal=True))
    bar = progress.task("alone", 1)
    bar.advance()
    assert progress._bars is not None
    bar.close()
    assert progress._bars is None


def test_null_is_silent(capsys):
    with NullProgress() as progress, progress.task("nothing", 1) as bar:
        bar.advance()
    assert capsys.readouterr() == ("", "")
