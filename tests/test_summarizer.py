"""BART and LED as summarizers: reading in pieces, losses, writing, and all from training to a record."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
    LEDConfig,
    LEDForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from infini_bench import adapt
from infini_bench.cli.bridge import compose_run
from infini_bench.cli.main import app
from infini_bench.errors import UserError
from infini_bench.models import load_model, save_model
from infini_bench.pretrained import adapted_model, decoder_of
from infini_bench.run import run_eval, run_train
from infini_bench.schema import BaseConfig, DecoderConfig, MemoryConfig
from infini_bench.stream import generate, prefill

WINDOW, SEPARATOR = 32, [70, 71, 72]
ALPHABET = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
SIZES = dict(
    vocab_size=len(ALPHABET), d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40, init_std=0.3, dropout=0.0,
)  # fmt: skip
FAMILIES = {
    "bart": lambda: BartForConditionalGeneration(BartConfig(max_position_embeddings=64, **SIZES)),
    "led": lambda: LEDForConditionalGeneration(
        LEDConfig(
            max_encoder_position_embeddings=128,
            max_decoder_position_embeddings=64,
            attention_window=8,
            **SIZES,
        )
    ),
}


@pytest.fixture(params=FAMILIES)
def base(request, tmp_path) -> Path:
    """A folder with random weights and a tokenizer of bytes, whose special tokens are BART's."""
    torch.manual_seed(0)
    folder = tmp_path / request.param
    FAMILIES[request.param]().save_pretrained(folder)
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(ALPHABET)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    return folder


def made(base, kind, **settings):
    memory = MemoryConfig(**{"kind": kind, "segment": WINDOW, "neighbours": 6, "index": "torch", **settings})
    return adapted_model(BaseConfig(model=str(base)), memory, SEPARATOR).eval()


def book(tokens, rows=1):
    """A book and its separator."""
    return torch.cat([torch.randint(100, 250, (rows, tokens)), torch.tensor([SEPARATOR] * rows)], 1)


def marked(model, ids):
    """What the stock model is given for one book: its encoder's input, with LED's mark."""
    text = ids[:, : -len(SEPARATOR)]
    ids = torch.cat([torch.full((1, 1), 0), text, torch.full((1, 1), 2)], 1)
    marks = torch.zeros_like(ids)
    marks[:, 0] = 1
    return {
        "input_ids": ids,
        **({"global_attention_mask": marks} if hasattr(model.config, "attention_window") else {}),
    }


@torch.no_grad()
@pytest.mark.parametrize("kind", ["block", "retrieval"])
def test_logits_are_those_of_the_stock_model_and_so_is_the_greedy_summary(base, kind):
    model, ids, summary = made(base, kind), book(90), torch.randint(100, 250, (1, 12))
    seen = ids if kind == "retrieval" else torch.cat([ids[:, : WINDOW - 2], ids[:, -3:]], 1)
    stock = AutoModelForSeq2SeqLM.from_pretrained(base).eval() if kind == "block" else model.model
    start = torch.tensor([[2, 0]])
    theirs = stock(**marked(model, seen), decoder_input_ids=torch.cat([start, summary], 1)).logits[:, 1:]
    logits, state = model.step(ids, keep="last")
    ours, carried = [logits], state
    for token in summary.split(1, 1):
        logits, carried = model.step(token, carried, "last")
        ours.append(logits)
    assert theirs.std() > 0.5 and (torch.cat(ours, 1) - theirs).abs().max() < 1e-4
    how = {"do_sample": False, "num_beams": 1, "max_new_tokens": 9, "forced_eos_token_id": None}
    words = stock.generate(**marked(model, seen), decoder_input_ids=start, min_new_tokens=9, **how)[:, 2:]
    assert generate(model, ours[0][:, -1], state, 9).tolist() == words.tolist()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["block", "retrieval"])
def test_any_cut_of_the_book_and_any_neighbour_give_the_same_logits(base, kind):
    model = made(base, kind)
    long, short = book(90), book(41)
    alone = [model.step(ids, keep="last")[0] for ids in (long, short)]
    state = None
    for part in long[:, :88].split([30, 1, 57], 1):
        before, state = state, model.step(part, state, "none")[1]
        assert before is None or before.layers[0].state["length"] < state.layers[0].state["length"]
    logits, state = model.step(long[:, 88:], state, "last")
    assert (logits - alone[0]).abs().max() < 1e-5
    summary = torch.randint(100, 250, (1, 5))
    whole, _ = model.step(summary, state, "all")
    one_by_one = [(logits, state)]
    for token in summary.split(1, 1):
        one_by_one.append(model.step(token, one_by_one[-1][1], "last"))
    assert (whole - torch.cat([x for x, _ in one_by_one[1:]], 1)).abs().max() < 1e-4
    ids = torch.cat([long, F.pad(short, (49, 0))])
    both, state = model.step(ids, keep="last", mask=torch.arange(93) >= torch.tensor([[0], [49]]))
    assert (both - torch.cat(alone)).abs().max() < 1e-5
    swapped = model.step(summary.expand(2, -1), state.select_rows(torch.tensor([1, 0])), "last")
    assert (swapped[0][1:] - whole[:, -1:]).abs().max() < 1e-4


@torch.no_grad()
def test_rows_that_were_read_to_different_places_go_on_together(base):
    model = made(base, "retrieval")
    texts = [book(90), book(41)]
    alone = torch.cat([model.step(ids, keep="last")[0] for ids in texts])
    real = torch.arange(93) >= torch.tensor([[0], [49]])
    ids = torch.cat([texts[0], F.pad(texts[1], (49, 0))])
    _, state = model.step(ids[:, :60], keep="none", mask=real[:, :60])
    assert state.layers[0].state["length"].tolist() == [60, 11]
    assert (model.step(ids[:, 60:], state, "last")[0] - alone).abs().max() < 1e-5


@torch.no_grad()
def test_memory_off_leaves_the_last_window(base):
    model, ids = made(base, "retrieval"), book(2 * WINDOW + 9)
    assert model.has_memory and not made(base, "block").has_memory
    with model.memory_off():
        off = model.step(ids, keep="last")[0]
    assert (off - model.step(ids[:, 2 * WINDOW :], keep="last")[0]).abs().max() < 1e-5
    assert (off - model.step(ids, keep="last")[0]).abs().max() > 1e-3


def row(tokens, summary, length):
    """A row of the task: book, separator, summary, end, padding."""
    found = torch.cat([book(tokens)[0], torch.randint(100, 250, (summary,)), torch.tensor([2])])
    return F.pad(found, (0, length - len(found)), value=2)


def test_losses_are_those_of_the_stock_model(base):
    model, stock = made(base, "retrieval").train(), AutoModelForSeq2SeqLM.from_pretrained(base).eval()
    tokens = torch.stack([row(50, 11, 80), row(20, 6, 80)])
    nll, _ = model.losses(tokens[:, :-1], tokens[:, 1:])
    for n, (size, summary) in enumerate([(50, 11), (20, 6)]):
        begin = size + 3
        seen = torch.cat([tokens[n, : min(size, WINDOW - 2)], tokens[n, size:begin]])[None]
        start = torch.cat([torch.tensor([2, 0]), tokens[n, begin : begin + summary]])[None]
        logits = stock(**marked(model, seen), decoder_input_ids=start).logits[0, 1:]
        expected = F.cross_entropy(logits, tokens[n, begin : begin + summary + 1], reduction="none")
        assert (nll[n, begin - 1 : begin + summary] - expected).abs().max() < 1e-4
        assert nll[n].count_nonzero() == summary + 1
    nll.mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "encoder_attn" in name)


def test_what_cannot_be_is_told(base, tmp_path):
    where = BaseConfig(model=str(base))
    for settings, words in (
        ({"kind": "compressive"}, "model=local_block or model=retrieval"),
        ({"kind": "block", "segment": 1000}, "this model's window, from 4 to"),
        ({"kind": "retrieval", "segment": 30}, "multiple of 4"),
    ):
        with pytest.raises(UserError, match=words):
            adapted_model(where, MemoryConfig(**{"segment": WINDOW, **settings}), SEPARATOR)
    with pytest.raises(UserError, match="set task=booksum"):
        adapted_model(where, MemoryConfig(kind="block", segment=WINDOW))
    with pytest.raises(UserError, match="trained whole"):
        adapted_model(BaseConfig(model=str(base), freeze=True), MemoryConfig(kind="block"), SEPARATOR)
    model = made(base, "block")
    too_long, blank = row(9, 65, 80)[None], torch.full((1, 20), 100)
    with pytest.raises(UserError, match=r"task\.train_summary_tokens to at most 62"):
        model.losses(too_long[:, :-1], too_long[:, 1:])
    with pytest.raises(UserError, match="no summary"):
        model.losses(blank[:, :-1], blank[:, 1:])
    logits, state = prefill(model, [book(9).numpy()])
    with pytest.raises(UserError, match="one call"):
        model.losses(blank, blank, state)
    with pytest.raises(UserError, match=r"task\.max_new_tokens to at most 63"), torch.no_grad():
        generate(model, logits, state, 64)
    assert generate(model, logits, state, 63).shape == (1, 63)


def test_a_model_comes_back_as_it_was_saved(base, tmp_path):
    model, ids = made(base, "retrieval", neighbours=9), book(90)
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved").eval()
    assert again.memory == model.memory and again.separator == SEPARATOR
    assert torch.equal(again.step(ids, keep="last")[0], model.step(ids, keep="last")[0])
    stock = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved")
    assert stock.state_dict().keys() == AutoModelForSeq2SeqLM.from_pretrained(base).state_dict().keys()
    (tmp_path / "saved" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="damaged"):
        load_model(tmp_path / "saved")
    body = decoder_of(str(base), DecoderConfig())
    assert (body.layers, body.dim, body.heads, body.ffn) == (3, 32, 4, 40)


@pytest.mark.parametrize("experiment", ["table4_{}", "table4_{}_unlimiformer"])
def test_from_training_to_a_record(base, experiment, tmp_path, monkeypatch):
    """Table 4's configurations with the sizes of small models; nothing else is another."""
    name = experiment.format({"bart": "bart", "led": "primera"}[base.name])
    small = [
        "memory.segment=32", "task.train_input_tokens=30", "task.train_summary_tokens=40",
        "task.input_tokens=300", "task.max_new_tokens=20", "task.max_books=2", "task.train_kind=null",
        "data=embedded", "data.max_documents=4", "trainer.steps=4", "trainer.lr=0.003", "trainer.warmup=1",
        "trainer.validate_rows=2", "device=cpu", f"runs={tmp_path / 'runs'}",
        f"records={tmp_path / 'records'}", f"data.cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    words = [f"experiment={name}", f"base.model={base}", *small]
    cfg = compose_run(["data.source=embedded", "data.path=null", *words])
    trained = run_train(cfg, command=[])
    assert trained.status == "done" and trained.config["model"] == name.removeprefix("table4_")
    assert trained.train["final_loss"] < 6 and trained.tokens > 0
    asked = compose_run(["task=booksum", f"checkpoint={trained.train['folder']}", *small[-3:]])
    found = run_eval(asked, given=set(), command=[])
    conditions = {r["condition"] for r in found.metrics if r["metric"] == "overall"}
    off = {"memory_off", "other_memory"} if "unlimiformer" in name else set()
    assert found.status == "done" and {"pairwise", "best"} | off <= conditions
    lengths = [r["value"] for r in found.metrics if r["metric"] == "summary_tokens"]
    assert lengths and all(0 < n <= 20 for n in lengths)
    adapt.export(Path(trained.train["folder"]), tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").is_encoder_decoder


def test_a_base_writes_summaries_as_it_is(base, tmp_path):
    words = [
        "task=booksum", "model=local_block", "memory.segment=32",
        f"base.model={base}", f"data.tokenizer={base}",
        "task.input_tokens=300", "task.max_new_tokens=20", "task.max_books=2", "device=cpu",
        f"records={tmp_path / 'records'}", f"data.cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    found = run_eval(compose_run(words), command=[])
    (tokens,) = [r for r in found.metrics if r["metric"] == "summary_tokens"]
    assert (tokens["n"], found.config["decoder"]["layers"]) == (2, 3) and 0 < tokens["value"] <= 20


def test_weights_that_cannot_be_had_are_one_sentence(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def offline(*_, **__):
        raise OSError("We couldn't connect to the hub.\nMore lines.")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", offline)
    done = CliRunner().invoke(app, ["train", "experiment=table4_bart", "data.path=x"])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert 'The model "facebook/bart-base" cannot be loaded (We couldn\'t connect to the hub)' in done.stderr
    assert not (tmp_path / "results").exists()
