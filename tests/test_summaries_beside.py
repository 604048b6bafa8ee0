"""`infini-bench summaries`: what was generated beside its references, whole, from a record and its data."""

import json
import re

import pytest
from typer.testing import CliRunner

from infini_bench.cli.bridge import compose_run
from infini_bench.cli.main import app
from infini_bench.run import run_eval

TEXT = (
    "The king rode out. It rained on the road. The queen stayed at home. Nobody came back. The end was near."
)
PLOT = {"source": "plot", "text": "The king rode out.\n\n# He rode far"}
NOTE = {"source": "note", "text": "The king rode out. It rained."}


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """A function: the verb's outcome on the record of ``lead`` over four books."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "books"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        kinds = [[PLOT], [PLOT, NOTE], [NOTE], [PLOT]]
        rows = [{"id": f"{split}{i}", "text": f"{TEXT} {i}.", "summaries": k} for i, k in enumerate(kinds)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["task=booksum", "data=local", f"data.path={folder}", "data.id_column=id"]
    words += ["data.summary_column=summaries", "task.baseline=lead", "task.sentences=[2]", "scale=smoke"]
    record = run_eval(compose_run(words), given={"data", "task.baseline"})
    return record, lambda *options: CliRunner().invoke(app, ["summaries", record.id[:-3], *options])


def test_summaries_stand_whole_beside_their_references(shown, tmp_path):
    record, ask = shown
    text = ask("--books", "3").stdout
    assert re.findall("^## .*", text, re.M) == [f"## test{i} (test{i})" for i in range(3)]
    assert text.count("> The king rode out.\n>\n> # He rode far\n") == 2  # quoted, no heading
    assert text.count("> The king rode out.\n>\n> It rained on the road.\n") == 3
    assert "3 of 4 books" in text and record.id in text
    row = next(r for r in record.metrics if (r["metric"], r["position"]) == ("overall", None))
    wanted = [" / ".join(f"{score:.1f}" for score in scores) for scores in row["extra"]["scores"][:3]]
    assert [line.partition(",")[0] for line in re.findall("of the book: (.*)", text)] == wanted
    assert ask("--out", "out.md").exit_code == 0
    assert (tmp_path / "out.md").read_text().count("\n## ") == 4
    noted = ask("--kind", "note").stdout
    assert re.findall(r"^## \w+", noted, re.M) == ["## test1", "## test2"] and "He rode far" not in noted


def test_what_cannot_be_shown_is_one_sentence(shown, tmp_path):
    _, ask = shown

    def error(*options):
        done = ask(*options)
        assert done.exit_code == 2 and done.stderr.count("\n") == 1
        return done.stderr

    assert "there are: note, plot." in error("--kind", "prose")
    assert "there are: pairwise." in error("--condition", "memory_off")
    assert "there are: whole." in error("--length", "16K")
    assert "does not exist" in error("--data", "elsewhere")
    (tmp_path / "other").mkdir()
    for path in (tmp_path / "books").iterdir():
        (tmp_path / "other" / path.name).write_text(path.read_text().replace("rained", "snowed"))
    assert "has other books or summaries than" in error("--data", "other")
    done = CliRunner().invoke(app, ["summaries", "nothing"])
    assert '0 records in results/records are called "nothing"' in done.stderr
    (path,) = (tmp_path / "results" / "records").glob("*.jsonl")
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "metrics": []}))
    assert "has no file of summaries; name a finished `eval booksum`" in error()
