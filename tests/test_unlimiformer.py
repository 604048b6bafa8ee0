"""Unlimiformer around small random BARTs and LEDs: exact with a k that covers all, else a slow reference."""

import copy
from functools import cache

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LEDConfig,
    LEDForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from infini_bench.errors import UserError
from infini_bench.memory import reference_retrieval
from infini_bench.unlimiformer import StateIndex, chunks, unlimiformer

WINDOW, V = 32, 60
SIZES = dict(
    vocab_size=V, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40, init_std=0.3, dropout=0.0,
)  # fmt: skip


@cache
def stock(family):
    """A float64 model whose biases are not 0."""
    torch.manual_seed(0)
    if family == "bart":
        model = BartForConditionalGeneration(BartConfig(max_position_embeddings=WINDOW, **SIZES))
    else:
        ends = {"max_encoder_position_embeddings": WINDOW, "max_decoder_position_embeddings": WINDOW}
        model = LEDForConditionalGeneration(LEDConfig(attention_window=8, **ends, **SIZES))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_(std=0.2)
    return model.double().eval()


@pytest.fixture(params=["bart", "led"])
def model(request):
    return stock(request.param)


def wrapped(model, k, **settings):
    return unlimiformer(copy.deepcopy(model), k, index=settings.pop("index", "torch"), **settings)


def asked(model, tokens, lengths=None):
    """Inputs of the encoder: right-padded rows; LED's first token has global attention."""
    ids = torch.randint(4, V, (2, tokens))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths or [tokens, tokens]):
        mask[row, length:] = 0
    marks = torch.zeros_like(ids)
    marks[:, 0] = 1
    more = {"global_attention_mask": marks} if isinstance(model, LEDForConditionalGeneration) else {}
    return {"input_ids": ids, "attention_mask": mask, **more}


@torch.no_grad()
def test_within_the_window_it_is_the_stock_model(model):
    inputs, decoder = asked(model, WINDOW, [WINDOW, 21]), torch.randint(4, V, (2, 9))
    ours = wrapped(model, WINDOW)(**inputs, decoder_input_ids=decoder).logits
    theirs = model(**inputs, decoder_input_ids=decoder).logits
    assert theirs.std() > 0.5 and (ours - theirs).abs().max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("k", [101, 500])
def test_where_k_covers_a_long_input_it_is_full_cross_attention(model, k):
    inputs, decoder = asked(model, 101, [101, 77]), torch.randint(4, V, (2, 9))
    model_k = wrapped(model, k)
    states = model_k.get_encoder()(**inputs)
    ours = model_k(**inputs, decoder_input_ids=decoder).logits
    mask = inputs["attention_mask"]
    theirs = model(encoder_outputs=states, attention_mask=mask, decoder_input_ids=decoder).logits
    assert states.last_hidden_state.shape == (2, 101, 32) and (ours - theirs).abs().max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("slices", [False, True])
def test_each_head_and_query_sees_its_best_k_states(model, slices, monkeypatch):
    if slices:
        monkeypatch.setattr("infini_bench.unlimiformer.FLOATS", 2 * 4 * 90 * 2)  # two queries at a time
    k, lengths = 7, [90, 5]
    attention = wrapped(model, k).get_decoder().layers[1].encoder_attn
    x, states = torch.randn(2, 5, 32, dtype=torch.float64), torch.randn(2, 90, 32, dtype=torch.float64)
    mask = (torch.arange(90) < torch.tensor(lengths)[:, None])[:, None, None]
    ours = attention(hidden_states=x, key_value_states=states, attention_mask=mask)[0]
    added = attention(x, states, attention_mask=torch.where(mask, 0.0, -1e30).expand(-1, 1, 5, -1))[0]
    for row, length in enumerate(lengths):  # the second has fewer states than k
        expected = reference_retrieval.cross(attention, x[row], states[row, :length], k)
        assert (ours[row] - expected).abs().max() < 1e-12
    assert torch.equal(ours, added)
    everything = reference_retrieval.cross(attention, x[0], states[0], 90)
    assert (ours[0] - everything).abs().max() > 1e-3


def test_every_token_is_encoded_once_in_the_middle_of_its_chunk():
    for tokens in (1, 15, 16, 17, 24, 25, 90, 1000):
        plan = chunks(tokens, 16)
        kept = [t for _, first, end in plan for t in range(first, end)]
        assert kept == list(range(tokens))
        for begin, first, end in plan:
            assert first - begin >= 4 or first == 0
            assert begin + 16 - end >= 4 or end == tokens
            assert begin == 0 or begin + 16 <= tokens
    assert chunks(90, 16)[:3] == [(0, 0, 12), (8, 12, 20), (16, 20, 28)]


@torch.no_grad()
def test_states_are_those_of_the_chunks_and_rows_ignore_their_padding(model):
    inputs = asked(model, 90, [90, 41])
    encoder = wrapped(model, 8).get_encoder()
    states = encoder(**inputs)[0]
    alone = {name: x[1:, :41] for name, x in inputs.items()}
    assert (states[1, :41] - encoder(**alone)[0][0]).abs().max() < 1e-12 and states[1, 41:].abs().max() == 0
    begin, first, end = chunks(90, WINDOW)[2]
    piece = {name: x[:1, begin : begin + WINDOW] for name, x in inputs.items()}
    if "global_attention_mask" in piece:
        piece["global_attention_mask"] = torch.eye(WINDOW, dtype=torch.long)[:1]
    own = model.get_encoder()(**piece)[0][0]
    assert (states[0, first:end] - own[first - begin : end - begin]).abs().max() < 1e-12


GENERATION = [{"do_sample": False}, {"do_sample": True}, {"do_sample": False, "num_beams": 3}]


@torch.no_grad()
@pytest.mark.parametrize("how", GENERATION, ids=["greedy", "sampled", "beams"])
def test_generation_with_full_k_is_that_of_the_stock_model(model, how):
    how = {**how, "max_new_tokens": 9, "min_new_tokens": 9, "no_repeat_ngram_size": 1}
    inputs, model_k = asked(model, 90, [90, 60]), wrapped(model, 200)
    torch.manual_seed(1)
    ours = model_k.generate(**inputs, **how)
    torch.manual_seed(1)  # some versions of LED's encoder draw numbers that they do not use
    states, mask = model_k.get_encoder()(**inputs), inputs["attention_mask"]
    theirs = model.generate(encoder_outputs=states, attention_mask=mask, **how)
    assert ours.shape == (2, 10) and torch.equal(ours, theirs)


@torch.no_grad()
def test_generation_with_few_states_is_what_the_logits_say(model):
    inputs, model_k = asked(model, 90), wrapped(model, 3)
    made = model_k.generate(**inputs, do_sample=False, max_new_tokens=9, min_new_tokens=9)
    logits = model_k(**inputs, decoder_input_ids=made[:, :-1]).logits
    logits[..., model.config.eos_token_id] = -torch.inf  # forbidden before min_new_tokens
    best = logits.argmax(-1)
    best[:, 0] = made[:, 1] if model.generation_config.forced_bos_token_id is not None else best[:, 0]
    assert torch.equal(best[:, :-1], made[:, 1:-1])


def test_training_is_the_stock_models_and_evaluation_is_differentiable(model):
    model_k, inputs = wrapped(model, 5), asked(model, WINDOW)
    labels = torch.randint(4, V, (2, 9))
    ours = model_k.train()(**inputs, labels=labels).loss
    assert torch.equal(ours, copy.deepcopy(model).train()(**inputs, labels=labels).loss)
    assert model_k.state_dict().keys() == model.state_dict().keys()
    model_k.eval()(**asked(model, 90), labels=labels).loss.backward()
    grads = [layer.encoder_attn.k_proj.weight.grad for layer in model_k.get_decoder().layers]
    assert all(grad.abs().max() > 0 for grad in grads)


@torch.no_grad()
def test_faiss_finds_what_torch_finds_with_one_index_a_document(model, monkeypatch):
    pytest.importorskip("faiss", reason="needs faiss-cpu")
    built = []
    build = StateIndex.build
    monkeypatch.setattr(StateIndex, "build", staticmethod(lambda *call: built.append(1) or build(*call)))
    inputs, how = asked(model, 90, [90, 4]), {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    made = [wrapped(model, 6, index=index).generate(**inputs, **how) for index in ("torch", "faiss")]
    assert torch.equal(*made) and len(built) == 1
    query, states = torch.randn(2, 4, 3, 32), torch.randn(2, 90, 32)
    live = torch.arange(90) < torch.tensor([[90], [4]])
    reads = [StateIndex(6, index).read(query, states, live) for index in ("torch", "faiss")]
    assert (reads[0] - reads[1]).abs().max() < 1e-5


def test_what_cannot_be_wrapped_is_told():
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(UserError, match="not for T5"):
        unlimiformer(t5, 4)
    for window in (WINDOW + 4, 30):
        with pytest.raises(UserError, match="multiple of 4 tokens, at most 32"):
            unlimiformer(copy.deepcopy(stock("bart")), 4, window)
