"""Streaming: any chunking gives the same losses, one state serves twice, generation ends where it should."""

import numpy as np
import pytest
import torch

from infini_bench.models import build_model
from infini_bench.stream import chunked, feed, generate, prefill, prefill_rows, sample, stream_losses


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


def test_a_cpu_reads_a_long_call_in_pieces_that_end_with_segments(model, monkeypatch):
    tokens, n, sizes = ids(2, 45), model.segment, []
    whole, _ = stream_losses(model, tokens, 64)
    monkeypatch.setattr("infini_bench.decoder.CPU_TOKENS", 2 * 2 * n + 1)  # of two rows
    model.model.register_forward_pre_hook(
        lambda _, args, given: sizes.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    _, state = stream_losses(model, tokens[:, :4], 64)
    sizes.clear()
    cut, _ = stream_losses(model, tokens[:, 3:], 64, state)
    assert np.allclose(cut, whole[:, 3:], atol=1e-4)
    looped = not model.segmentwise and None not in [memory.span for memory in model.memories]
    assert sizes == ([2 * n - 3, 2 * n, 44 - 4 * n] if looped else [41])
    sizes.clear()
    model.hidden(torch.from_numpy(tokens[:, :-1].astype(np.int64)))  # with gradients
    assert sizes == [44]


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


def test_sampling_follows_its_draws_and_keeps_to_the_nucleus():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).expand(4000, -1)
    draws = (torch.arange(4000) + 0.5) / 4000  # evenly over [0, 1), so that shares are exact
    shares = torch.bincount(sample(p.log(), 1.0, 0.9, draws).ravel(), minlength=4) / 4000
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=1e-3)
    cold = sample(p.log(), 0.5, 1.0, draws).ravel()
    assert (cold == 0).float().mean() == pytest.approx(0.25 / 0.365, abs=1e-3)
    assert set(sample(p.log(), 1.0, 1e-9, draws).ravel().tolist()) == {0}
    assert sample(p.log(), 1.0, 0.9, torch.ones(4000)).max() == 2  # rounding never leaves the nucleus


def test_sampling_wants_draws_and_rows_do_not_mix(model):
    logits, state = prefill(model, [ids(2, 9)])
    with pytest.raises(ValueError, match="its draws"):
        generate(model, logits, state, 2, greedy=False)
    options = {"greedy": False, "temperature": 0.5, "top_p": 0.95}
    draws = torch.rand(2, 8)
    both = generate(model, logits, state, 8, draws_BT=draws, **options)
    second = torch.tensor([1])
    alone = generate(model, logits[second], state.select_rows(second), 8, draws_BT=draws[second], **options)
    assert np.array_equal(alone[0], both[1])
    other = generate(model, logits, state, 8, draws_BT=torch.rand(2, 8), **options)
    assert not np.array_equal(other, both)


def test_books_of_different_lengths_go_on_side_by_side(model):
    """States at different borders, one of them a document's start, as one batch: what each gives alone."""
    borders, tails = (24, 0, 8, 40), (5, 9, 1, 3)
    books = [ids(1, border + tail) for border, tail in zip(borders, tails, strict=True)]
    states = [feed(model, chunked(b[:, :n], 16)) if n else None for b, n in zip(books, borders, strict=True)]
    rows = [book[0, border:] for book, border in zip(books, borders, strict=True)]
    logits, state = prefill_rows(model, rows, type(states[0]).stack(states))
    together = generate(model, logits, state, 12)
    for i, book in enumerate(books):
        alone, own = prefill(model, [book])
        assert torch.allclose(logits[i], alone[0], atol=1e-4)
        assert np.array_equal(generate(model, alone, own, 12)[0], together[i])
    even = [feed(model, [book[:, :24]]) for book in (books[0], books[3])]
    same, _ = prefill_rows(model, [books[0][0, 24:], books[3][0, 24:29]], type(even[0]).stack(even))
    assert torch.allclose(same[0], logits[0], atol=1e-4)
    assert type(even[0]).stack([None, None]) is None
