"""What a memory holds after a prompt, and how strongly its write gate writes."""

import numpy as np
import pytest
import torch

from infini_bench.cache import MemoryCache
from infini_bench.models import build_model
from infini_bench.schema import DataConfig, DecoderConfig, MemoryConfig, PasskeyConfig, RunConfig
from infini_bench.tasks import build_task
from infini_bench.tasks.writing import memory_norms, write_strengths

SEGMENT = 32


def test_write_strengths_are_of_the_needle_and_of_all_the_rest(tmp_path):
    torch.manual_seed(0)
    asked = PasskeyConfig(
        digits=2, trials=1, batch=1, lengths=["512"], depths=["middle"], controls=False, chunk=100
    )
    data = DataConfig(cache_dir=str(tmp_path))
    task = build_task(RunConfig(data=data, memory=MemoryConfig(segment=SEGMENT), task=asked))
    memory = MemoryConfig(segment=SEGMENT, update="delta_token", normaliser="none", write_gate=True)
    decoder = DecoderConfig(layers=2, dim=32, heads=2, ffn=32, init_std=0.5)
    model = build_model(decoder, memory, task.tokenizer.vocab_size).eval()
    (prompt,), seen = task.prompts(task.cells(SEGMENT)[0])[:1], []
    for layer in model.model.layers:
        layer.self_attn.memory.memory_write.data.normal_()
        layer.self_attn.memory.register_forward_pre_hook(
            lambda m, x: seen.append(m.strength(x[1])[0, ..., 0])
        )
    with torch.no_grad():
        model.step(torch.from_numpy(prompt.tokens().astype(np.int64))[None])
    whole, start, stop = torch.stack(seen), *prompt.needle
    rest = torch.cat([whole[:, :start], whole[:, stop:]], 1)
    found = write_strengths(model, prompt, 2 * SEGMENT)
    assert torch.allclose(found["needle"], whole[:, start:stop].mean(1), atol=1e-5)
    assert torch.allclose(found["filler"], rest.mean(1), atol=1e-5) and found["filler"].shape == (2, 2)
    rows = {row["position"]: row for row in task.evaluate(model) if row["metric"] == "write_strength"}
    assert rows["needle"]["value"] == pytest.approx(whole[:, start:stop].mean().item(), abs=1e-5)
    assert rows["filler"]["extra"]["heads"][1] == pytest.approx(rest[1].mean(0).tolist(), abs=1e-5)
    assert not write_strengths(build_model(decoder, MemoryConfig(segment=SEGMENT), 9), prompt, SEGMENT)


def test_what_a_memory_holds_is_told_by_its_norm():
    M = torch.zeros(2, 1, 3, 3)
    M[:, :, 0, 0] = torch.tensor([[3.0], [5.0]])
    held = MemoryCache.from_tensors({"0.M": M, "0.z": M[..., 0], "1.k": M})
    assert memory_norms(held) == [4.0]
