"""lm-evaluation-harness: what it is told of a document is what reading the document whole gives."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'infini-bench[lmeval]'")

from infini_bench.data import build_tokenizer
from infini_bench.errors import UserError
from infini_bench.harness import MemoryLM, run_harness
from infini_bench.models import build_model, save_model
from infini_bench.schema import DataConfig, DecoderConfig, MemoryConfig

STORY = "Once there was a key of brass that nobody wanted, and it was forgotten. " * 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    tokenizer = build_tokenizer(DataConfig(tokenizer="bytes"), lambda: [])
    memory = MemoryConfig(segment=16, update="delta")
    path = tmp_path_factory.mktemp("model")
    save_model(build_model(DecoderConfig(dim=32, init_std=0.3), memory, tokenizer.vocab_size), path)
    tokenizer.save(path)
    return path


@pytest.fixture(scope="module")
def lm(folder):
    from infini_bench.remember import open_model

    return MemoryLM(*open_model(str(folder), "cpu"), chunk=40)


def asked(*pairs):
    return [SimpleNamespace(args=pair) for pair in pairs]


def whole(lm, text):
    """Log-probabilities of every byte of a text that one call reads, (T, V), and the bytes."""
    ids = torch.tensor([[lm.text.eos_id, *text.encode()]])
    with torch.no_grad():
        return lm.model.step(ids[:, :-1])[0][0].log_softmax(-1), ids[0, 1:]


def test_likelihoods_are_those_of_one_pass_whatever_was_asked_before(lm):
    choices = asked(
        (STORY, "The key"), (STORY, "A door"), ("", "The key"), (STORY[:50] + " ", "x"), (STORY, "The key")
    )
    found = lm.loglikelihood(choices)
    for (nats, greedy), request in zip(found, choices, strict=True):
        context, continuation = request.args
        logp, ids = whole(lm, context + continuation)
        size = len(continuation) + len(context) - len(context.rstrip())
        picked = logp[-size:].gather(-1, ids[-size:, None])
        assert nats == pytest.approx(picked.sum().item(), abs=1e-3)
        assert greedy == bool((logp[-size:].argmax(-1) == ids[-size:]).all())
    assert found[0] == found[4] and abs(found[0][0] - found[2][0]) > 0.1
    with lm.model.memory_off():
        lm._last = (b"", None)
        assert abs(lm.loglikelihood(choices[:1])[0][0] - found[0][0]) > 1e-3
    lm._last = (b"", None)


def test_what_greedy_decoding_says_is_greedy_and_ends_at_a_stop(lm):
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    (said,) = lm.generate_until(asked((STORY, settings)))
    logp, _ = whole(lm, STORY + "?")
    first = int(logp[len(STORY)].argmax())
    assert said.encode()[:1] == bytes([first]) or "\ufffd" in said or first == lm.text.eos_id
    stop = said[3:5]
    (short,) = lm.generate_until(asked((STORY, {**settings, "until": [stop]})))
    assert short == said[: said.find(stop)]
    sampled = [
        lm.generate_until(asked((STORY, {**settings, "do_sample": True, "temperature": 1.0}))) for _ in "ab"
    ]
    assert sampled[0] == sampled[1]


def test_rolling_reads_a_document_once_with_its_memory(lm):
    found = lm.loglikelihood_rolling(asked((STORY,), (STORY[:30],)))
    for nats, text in zip(found, (STORY, STORY[:30]), strict=True):
        logp, ids = whole(lm, text)
        assert nats == pytest.approx(logp.gather(-1, ids[:, None]).sum().item(), rel=1e-4)
    with lm.model.memory_off():
        assert abs(lm.loglikelihood_rolling(asked((STORY,)))[0] - found[0]) > 0.1


def test_a_local_task_runs_by_name(folder, tmp_path):
    lines = [{"text": STORY, "choices": ["brass", "wood"], "gold": 0} for _ in range(3)]
    (tmp_path / "keys.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "keys.yaml").write_text(
        "task: local_keys\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path}/keys.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{text}} It was of'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: gold\nmetric_list: [{metric: acc}]\n"
    )
    found = run_harness(str(folder), ["local_keys"], limit=2, include=tmp_path, device="cpu")
    assert found["local_keys"]["acc,none"] in (0.0, 1.0) and np.isfinite(found["local_keys"]["acc,none"])


MADE = """
from datasets import Dataset
from transformers import AutoTokenizer

def prompts(max_seq_lengths=(), tokenizer=None, **kwargs):
    assert tokenizer, "No tokenizer or pretrained provided."
    text = AutoTokenizer.from_pretrained(tokenizer)
    rows = [{"input": "The key is 7. " * 40, "size": size} for size in max_seq_lengths]
    for row in rows:
        row["input"] = text.decode(text(row["input"])["input_ids"][: row["size"]])
    return {"test": Dataset.from_list(rows)}

def score(doc, results):
    return {"tokens": len(doc["input"])}
"""


def test_a_task_that_makes_its_prompts_is_told_tokenizer_and_lengths(folder, tmp_path):
    (tmp_path / "made.py").write_text(MADE)
    (tmp_path / "made.yaml").write_text(
        "task: made\ndataset_path: ''\ndataset_name: ''\ncustom_dataset: !function made.prompts\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{input}}'\ndoc_to_target: ''\n"
        "process_results: !function made.score\nmetric_list: [{metric: tokens, aggregation: mean}]\n"
        "generation_kwargs: {until: [], max_gen_toks: 2, do_sample: false}\n"
    )
    data = DataConfig(tokenizer="bpe", vocab_size=257, cache_dir=str(tmp_path / "cache"))
    tokenizer = build_tokenizer(data, lambda: [STORY])  # as many ids as bytes and eos have: nothing is merged
    model = tmp_path / "bpe"
    save_model(build_model(DecoderConfig(dim=32), MemoryConfig(segment=16), tokenizer.vocab_size), model)
    tokenizer.save(model)
    found = run_harness(str(model), ["made"], [40, 80], include=tmp_path, device="cpu")
    assert found["made"]["tokens,none"] == 60.0
    with pytest.raises(UserError, match="tokenizer is missing"):
        run_harness(str(folder), ["made"], [40], include=tmp_path, device="cpu")
