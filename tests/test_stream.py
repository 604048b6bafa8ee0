"""Streaming: any chunking gives the same losses, one state serves twice, generation ends where it should."""

import numpy as np
import pytest
import torch

from infini_bench.models import build_model
from infini_bench.stream import chunked, feed, generate, prefill, sample, stream_losses


class Counter(torch.nn.Module):
    """Next token = last token + 1 modulo V, as fixed logits; the state counts tokens."""

    device = torch.device("cpu")

    def __init__(self, vocab: int = 7):
        super().__init__()
        self.vocab, self.calls = vocab, []

    def step(self, ids, state, keep="all"):
        self.calls.append((tuple(ids.shape), keep))
        state = (state or 0) + ids.shape[1]
        if keep == "none":
            return None, state
        ids = ids if keep == "all" else ids[:, -1:]
        return 10.0 * torch.nn.functional.one_hot((ids + 1) % self.vocab, self.vocab).float(), state


def ids(*shape):
    return np.random.default_rng(0).integers(0, 20, shape).astype(np.int32)


@pytest.fixture
def model(decoder, memory):
    return build_model(decoder, memory, vocab_size=20).eval()


def test_losses_do_not_depend_on_the_chunks(model):
    tokens = ids(2, 45)
    whole, _ = stream_losses(model, tokens, 64)
    assert whole.shape == (2, 44) and whole.dtype == np.float32
    assert np.allclose(stream_losses(model, tokens, 7)[0], whole, atol=1e-4)
    first, state = stream_losses(model, tokens[:, :20], 8)
    kept = {name: x.clone() for name, x in state.tensors().items()}
    for _ in range(2):  # the state that is continued stays as it is
        second, _ = stream_losses(model, tokens[:, 19:], 8, state)
        assert np.allclose(np.concatenate([first, second], 1), whole, atol=1e-4)
    assert all(torch.equal(x, kept[name]) for name, x in state.tensors().items())


def test_prefill_and_feed_end_in_the_same_place(model):
    tokens = ids(2, 41)
    logits, _ = prefill(model, chunked(tokens, 9))
    with torch.no_grad():
        wanted = model.step(torch.from_numpy(tokens.astype(np.int64)))[0][:, -1]
    assert torch.allclose(logits, wanted, atol=1e-4)
    state = feed(model, chunked(tokens[:, :40], 11))
    assert torch.allclose(prefill(model, [tokens[:, 40:]], state)[0], wanted, atol=1e-4)
    assert not logits.requires_grad


def test_only_the_last_chunk_computes_logits():
    fake = Counter()
    prefill(fake, chunked(ids(3, 10), 4))
    assert fake.calls == [((3, 4), "none"), ((3, 4), "none"), ((3, 2), "last")]
    with pytest.raises(ValueError, match="nothing to read"):
        prefill(fake, [])


def test_greedy_generation_stops_each_row_at_its_end():
    fake = Counter()
    logits, state = prefill(fake, [np.array([[1], [3]])])
    assert generate(fake, logits, state, 4).tolist() == [[2, 3, 4, 5], [4, 5, 6, 0]]
    assert generate(fake, logits, state, 9, eos_id=5).tolist() == [[2, 3, 4, 5], [4, 5, 5, 5]]
    assert fake.calls[-1] == ((2, 1), "last")


def test_generation_continues_as_one_call_would(model):
    tokens = ids(1, 30)
    logits, state = prefill(model, chunked(tokens, 8))
    new = generate(model, logits, state, 20)
    both = torch.from_numpy(np.concatenate([tokens, new], 1).astype(np.int64))
    with torch.no_grad():
        best = model.step(both)[0].argmax(-1)[:, 29:-1]
    assert best.tolist() == new.tolist()


def test_sampling_repeats_with_its_seed_and_keeps_to_the_nucleus():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    generator = torch.Generator().manual_seed(0)
    before = torch.get_rng_state()
    draws = torch.cat([sample(p.log(), 1.0, 0.9, generator) for _ in range(4000)]).ravel()
    assert torch.equal(torch.get_rng_state(), before)
    shares = torch.bincount(draws, minlength=4) / 4000
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=0.03)
    cold = torch.cat([sample(p.log(), 0.5, 1.0, generator) for _ in range(4000)]).ravel()
    assert (cold == 0).float().mean() == pytest.approx(0.25 / 0.365, abs=0.03)
    assert {int(sample(p.log(), 1.0, 1e-9, generator)) for _ in range(20)} == {0}


def test_sampling_wants_a_generator_and_repeats(model):
    logits, state = prefill(model, [ids(2, 9)])
    with pytest.raises(ValueError, match=r"torch\.Generator"):
        generate(model, logits, state, 2, greedy=False)
    options = {"greedy": False, "temperature": 0.5, "top_p": 0.95}
    runs = [
        generate(model, logits, state, 8, generator=torch.Generator().manual_seed(s), **options)
        for s in (1, 1, 2)
    ]
    assert np.array_equal(runs[0], runs[1]) and not np.array_equal(runs[0], runs[2])
