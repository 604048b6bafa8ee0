"""Bits per byte of a pretrained model as it is, beside what adaptation made of them."""

import math
from copy import deepcopy

import pytest
import torch
from report_fakes import CONFIG, booksum, lm, passkey, record, row, sheet_text
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from infini_bench.cli.main import app
from infini_bench.data import Tokenizer, build_tokenizer, load_documents
from infini_bench.data.tokenizers import PretrainedTokenizer
from infini_bench.report.records import read_records
from infini_bench.report.tidy import tidy
from infini_bench.schema import DataConfig

BASE = "bases/smol.gguf"
BLOCK = {"memory": {"kind": "block", "segment": 32}}


def language(run=None, bits=2.0, base=BASE, split="validation", **changes):
    """An evaluation on text of the run ``run``, or of the base itself."""
    nats = bits * 100 * math.log(2)
    memory = {} if run else deepcopy(BLOCK)
    config = {**memory, "task": {"name": "lm", "split": split}, "base": {"model": base}}
    name = "infini_linear" if run else "local_block"
    found = lm(name, nats=(nats, nats), config=config, data_fingerprint="books", **changes)
    found.train = {"id": run, "tokens": 5} if run else {}
    return found


def chain(seed=0, after=2.125):
    """Two stages of training from the base, the last one asked for keys and for text."""
    first, second = f"first{seed}", f"second{seed}"
    stages = [
        record(kind="train", id=first, seed=seed, config={"base": {"model": BASE}}),
        record(kind="train", id=second, seed=seed, config={"base": {"model": f"runs/{first}"}}),
    ]
    keys = passkey(seed=seed, config={"base": {"model": f"runs/{first}"}}, id=f"keys{seed}")
    keys.train = {"id": second, "tokens": 5, "seed": seed}
    text = language(second, after, f"runs/{first}", seed=seed, id=f"text{seed}")
    return [*stages, keys, text]


def test_bits_per_byte_before_and_after_stand_in_the_row_of_the_keys():
    records = [*chain(), *chain(1, 2.375), language(bits=2.0, id="base")]
    records.append(language(bits=9.0, id="other", base="bases/other.gguf"))
    records.append(language(bits=8.0, id="test", split="test"))
    titles, sheet = sheet_text(records, "table3_passkey")
    row = dict(zip(titles, sheet.rows[0], strict=True))
    assert row["bits/byte, before"].startswith("2.000") and row["bits/byte, after"].startswith("2.250")
    assert row["512*"].startswith("100/100/100") and row["seeds"] == "2"
    assert {"base", "text0", "text1", "keys0", "keys1"} <= set(sheet.records)
    assert "Bits/byte of embedded (validation): before, of the pretrained" in sheet.caption


def test_text_read_with_another_memory_stands_beside_keys_asked_with_it():
    *stages, keys, text = chain()
    others = [deepcopy(keys), language("second0", 2.5, "runs/first0")]
    for found in others:
        found.config["task"]["memory"] = {"segment": 64}
        found.id = found.config_hash = f"other {found.task}"
    for read, bits in (([text, others[1]], ["2.125", "2.500"]), ([text], ["2.125", "—"])):
        titles, sheet = sheet_text([*stages, keys, others[0], *read], "table3_passkey")
        place = titles.index("bits/byte, after")
        assert [row[place].split("\n")[0] for row in sheet.rows] == bits


def test_they_stand_in_every_line_of_needles_and_of_summaries():
    (first, second, _, text), before = chain(), language(bits=2.0, id="base")
    columns = {"length": 4096, "n": 10, "protocol": "curriculum", "split": "test", "position": "start"}
    found = [row("exact_match", 90.0, condition=name, **columns) for name in ("number", "uuid")]
    task = {"name": "needles", "digits": 10, "distractors": 3, "values": 4, "segments": 16, "depths": ["0"]}
    asked = {"task": task, "base": {"model": "runs/first0"}}
    summaries = booksum(config={"base": {"model": "runs/first0"}}, id="books")
    for metric in [*summaries.metrics]:
        summaries.metrics.append({**metric, "position": "wikipedia"})
    for table, shown in (
        ("table3_hard", record(metrics=found, config=asked)),
        ("table4_booksum", summaries),
    ):
        shown.train = {"id": "second0", "tokens": 5}
        titles, sheet = sheet_text([first, second, shown, text, before], table)
        lines = [dict(zip(titles, cells, strict=True)) for cells in sheet.rows]
        assert len(lines) == 2 and "Bits/byte of embedded (validation)" in sheet.caption
        for line in lines:
            assert line["bits/byte, before"].startswith("2.000")
            assert line["bits/byte, after"].startswith("2.125")
        assert "bits/byte, after" not in sheet_text([booksum()], "table4_booksum")[0]


def test_tokens_of_training_are_those_of_all_stages():
    keys = chain()[2]
    keys.train |= {"tokens": 1_773, "tokens_before": 3_000}
    titles, sheet = sheet_text([keys], "table3_passkey")
    assert sheet.rows[0][titles.index("train tokens")] == "4,773"


def test_a_row_names_the_stages_before_its_training_and_what_of_them_differs():
    def variants(*runs):
        return [r["variant"] for r in tidy([*runs]) if r["metric"] == "exact_match" and r["length"] == 512]

    assert {*variants(*chain(), *chain(1))} == {None}, "seeds share a row"
    once = passkey(id="once", config={"base": {"model": BASE}})
    once.train = {"id": "x", "tokens": 5}
    once.config["data"]["tokenizer"] = BASE
    assert {*variants(*chain(), once)} == {"trained.before=lm on embedded", "trained.before=nothing"}
    long = chain(1)
    long[0].config["trainer"]["steps"] = 99
    long[0].config["data"]["path"] = "/tmp/some/books"
    assert {*variants(*chain(), *long)} == {
        "before.data.path=null before.trainer.steps=10 trained.before=lm on embedded",
        "before.data.path=books before.trainer.steps=99 trained.before=lm on books",
    }
    first, second, keys, _ = chain()
    third = record(kind="train", id="third", config={"base": {"model": "runs/second0"}})
    third.config["task"]["name"] = "passkey"
    again = passkey(id="again", config={"base": {"model": "runs/third"}})
    again.train = {"id": "fourth", "tokens": 5}
    told = variants(first, second, third, keys, again)
    assert {text.partition("trained.before=")[2] for text in told} == {
        "lm on embedded",
        "lm on embedded, then lm on embedded, then passkey on embedded",
    }
    resumed = record(
        kind="train", id="later", train={"folder": "runs/first0"}, config={"base": {"model": BASE}}
    )
    (row, *_) = [r for r in tidy([resumed, second, keys]) if r["metric"] == "exact_match"]
    assert row["base"] == "smol.gguf", "known by its folder"


def test_text_cut_to_a_length_makes_no_column_of_that_length():
    records = chain()
    for metric in records[-1].metrics:
        metric["length"] = 65536
    titles, sheet = sheet_text(records, "table3_passkey")
    assert "64K" not in titles and "bits/byte, after" in titles and "needle at start/middle" in sheet.caption


def test_models_from_scratch_have_no_such_columns_and_a_zero_shot_has_no_after():
    titles, _ = sheet_text([passkey(), language(bits=2.0)], "table3_passkey")
    assert not [title for title in titles if "bits/byte" in title]
    zero = passkey(config={"base": {"model": BASE}})
    zero.train = {}
    titles, sheet = sheet_text([zero, language(bits=2.0)], "table3_passkey")
    assert [title for title in titles if "bits/byte" in title] == ["bits/byte, before"]
    assert sheet.rows[0][titles.index("bits/byte, before")].startswith("2.000")
    assert "512" in titles and sheet.rows[0][titles.index("trained at")] == "—"
    zero.config["trainer"]["lr"] = 0.1  # of a training that there was not
    names = {r["variant"] for r in tidy([zero, *chain()]) if r["table"] == "table3_passkey"}
    assert names == {"data.tokenizer=bpe", "data.tokenizer=smol.gguf"}
    asis, tuned = (booksum(config={"base": {"model": BASE}}, id=name) for name in ("asis", "tuned"))
    asis.train, tuned.train, asis.config_hash = {}, {"id": "x", "task": "booksum", "tokens": 5}, "other"
    names = {r["variant"] for r in tidy([asis, tuned]) if r["table"] == "table4_booksum"}
    assert names == {"trained.task=null", "trained.task=booksum"}, "they never share a row"


def test_another_segment_or_corpus_is_no_before():
    other = language(bits=2.0, id="base")
    other.config["memory"]["segment"] = 64
    longer = language(bits=2.0, id="base")
    for found in longer.metrics:
        found["extra"] = {**found["extra"], "bytes": [200, 200]}
    for records in ([*chain(), other], [*chain(), longer]):
        titles, sheet = sheet_text(records, "table3_passkey")
        shown = {title: cell for title, cell in zip(titles, sheet.rows[0], strict=True) if "bits" in title}
        assert len(shown) == 1
    assert CONFIG["memory"]["segment"] == 32


def test_the_same_documents_are_the_same_text_whatever_else_there_was():
    more = language(bits=2.0, id="base")
    more.data_fingerprint = "these books and others"
    titles, _ = sheet_text([*chain(), more], "table3_passkey")
    assert "bits/byte, before" in titles


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, initializer_range=0.3, **sizes)).save_pretrained("base")
    ours = build_tokenizer(DataConfig(vocab_size=280), lambda: ["a book about a key"] * 9)
    backend = ours._backend  # type: ignore[attr-defined]
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>").save_pretrained("base")
    return tmp_path / "base"


def test_a_base_is_evaluated_as_it_is(folder):
    small = ["data.max_documents=1", "task.max_tokens=300", "task.split=validation", "device=cpu"]
    words = ["eval", "lm", "--base", "base", "model=local_block", "memory.segment=64", *small]
    run = CliRunner().invoke(app, words)
    assert run.exit_code == 0, run.output
    (found,) = read_records("results/records")
    assert (found.config["base"]["model"], found.config["decoder"]["dim"], found.train) == ("base", 32, {})
    row = next(r for r in found.metrics if r["metric"] == "bits_per_token")
    (document,) = load_documents(DataConfig(max_documents=1), "validation")
    tokenizer: Tokenizer = PretrainedTokenizer(PreTrainedTokenizerFast.from_pretrained("base"), "base")
    ids = torch.from_numpy(tokenizer.encode(document.text)[:300]).long()
    stock = AutoModelForCausalLM.from_pretrained("base").eval()
    nats = 0.0
    with torch.no_grad():
        for start in range(0, 299, 64):
            part = ids[start : start + 64]
            targets = ids[start + 1 : start + 65]
            logits = stock(part[None]).logits[0, : len(targets)]
            nats += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    assert row["value"] == pytest.approx(nats / math.log(2) / 299, rel=1e-5)


def test_zero_shot_keys_and_what_is_no_base(folder):
    words = ["--length", "512", "--trials", "1", "memory.segment=64", "task.digits=1", "device=cpu"]
    run = CliRunner().invoke(app, ["eval", "passkey", "--base", "base", *words])
    assert run.exit_code == 0, run.output
    (found,) = read_records("results/records")
    assert {row["protocol"] for row in found.metrics} == {"zero_shot"} and "0 of 3 found" in run.output
    run = CliRunner().invoke(app, ["eval", "lm", "--base", "base", "--checkpoint", "x"])
    assert run.exit_code == 2 and "give one of them" in run.stderr
    run = CliRunner().invoke(app, ["eval", "lm", "--base", "nowhere/x.gguf"])
    assert run.exit_code == 2 and "is no folder or file" in run.stderr
