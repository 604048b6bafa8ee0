"""Memories in tokens against their slow float64 references, and what only they promise."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import MEMORIES
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from infini_bench.cache import MemoryCache
from infini_bench.errors import UserError
from infini_bench.memory import TOKENS, build_tokens, reference_tokens
from infini_bench.memory.tokens import Association, dpfp
from infini_bench.models import attach_memory, build_model
from infini_bench.schema import MemoryConfig, TrainerConfig
from infini_bench.train.optim import parameter_groups

V, N, M = 30, 6, 3
KINDS = [name for name, settings in MEMORIES.items() if settings["kind"] in TOKENS]


@pytest.fixture(autouse=True)
def float64_norms(monkeypatch):
    """Llama's norm rounds to float32 whatever the dtype; here nothing may."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def make(decoder, name, **settings):
    model = build_model(decoder, MemoryConfig(segment=N, **MEMORIES[name], **settings), V).double().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "association" in parameter_name:
                parameter.normal_(std=0.3)
    return model


def slow(model, embeds):
    """Outputs (B, T, D) and states of the reference, and its parameters by the model's names."""
    config = LlamaConfig.from_dict({**model.config.to_dict(), "model_type": "llama"})
    stock = LlamaModel(config).double().eval()
    stock.load_state_dict(model.model.state_dict(), strict=False)
    own = {
        n: p.detach().clone().requires_grad_()
        for n, p in model.model.named_parameters()
        if n not in dict(stock.named_parameters())
    }
    learned, kind = own["recurrence.vectors.weight"], model.config.memory["kind"]
    arguments = [learned, N]
    if kind == "armt":
        names = {"query": "query.weight", "key": "key.weight", "value": "value.weight",
                 "strength": "strength.weight", "bias": "strength.bias"}  # fmt: skip
        arguments.append(
            [
                {k: own[f"layers.{i}.association.{n}"] for k, n in names.items()}
                for i in range(len(stock.layers))
            ]
        )
        arguments.append(model.config.memory["normaliser"])
    rows = [getattr(reference_tokens, kind)(stock, x, *arguments) for x in embeds]
    return [torch.stack(x) for x in zip(*rows, strict=True)], {**dict(stock.named_parameters()), **own}


@pytest.mark.parametrize("tokens", [N - 1, N, 3 * N + 2])
@pytest.mark.parametrize("name", KINDS)
def test_outputs_states_and_gradients_equal_the_reference(decoder, name, tokens):
    model = make(decoder, name)
    embeds = torch.randn(2, tokens, decoder.dim, dtype=torch.float64, requires_grad=True)
    cache = MemoryCache.empty(3)
    fast = [model.model(inputs_embeds=embeds, past_key_values=cache).last_hidden_state]
    carried = ("M", "z") if MEMORIES[name]["kind"] == "armt" else ("memory",)
    fast += [cache.layers[-1].state[key] for key in carried]
    (expected, theirs) = slow(model, embeds)
    if tokens < N and name == "rmt":  # nothing has crossed a border: the state is not read yet
        fast, expected = fast[:1], expected[:1]
    for ours, wanted in zip(fast, expected, strict=True):
        assert ours.shape == wanted.shape
        assert not len(wanted.flatten()) or (
            ours - wanted
        ).abs().max() < 1e-10 * wanted.abs().max().clamp_min(1)
    weights = [torch.randn_like(x) for x in fast]
    mine = dict(model.model.named_parameters()) | {"embeds": embeds}
    mine.pop("embed_tokens.weight")
    theirs = {n: theirs[n] for n in mine if n != "embeds"} | {"embeds": embeds}
    grads = [
        torch.autograd.grad(
            sum((x * w).sum() for x, w in zip(xs, weights, strict=True)), p.values(), allow_unused=True
        )
        for xs, p in ((fast, mine), (expected, theirs))
    ]
    for parameter_name, a, b in zip(mine, *grads, strict=True):
        a, b = (torch.zeros(()) if g is None else g for g in (a, b))
        assert (a - b).abs().max() < 1e-9 * b.abs().max().clamp_min(1), parameter_name
    if tokens > N:
        assert all(g is not None and g.abs().max() > 0 for g in grads[0])  # all is learned


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_gradient_depth_truncates_and_keeps_values(decoder, name, depth):
    full, cut = make(decoder, name), make(decoder, name, gradient_depth=depth)
    cut.load_state_dict(full.state_dict())
    embeds = torch.randn(1, 6 * N, decoder.dim, dtype=torch.float64, requires_grad=True)

    def reach(model, sizes):
        """The segments that the loss of the last one has a gradient for."""
        cache, out = MemoryCache.empty(3), []
        for part in embeds.split(sizes, 1):
            out.append(model.model(inputs_embeds=part, past_key_values=cache).last_hidden_state)
        out = torch.cat(out, 1)
        grad = torch.autograd.grad(out[:, 5 * N :].square().sum(), embeds)[0]
        return out, (grad.abs().sum(-1).view(6, N).sum(1) > 0).tolist()

    whole, everything = reach(full, [6 * N])
    assert everything == [True] * 6
    for sizes in ([6 * N], [2 * N + 1, N, 3 * N - 1]):  # segments of the document, not of the call
        out, reached = reach(cut, sizes)
        assert (out - whole).abs().max() < 1e-10
        assert reached == [s >= 5 // depth * depth for s in range(6)]


def test_gradient_depth_wants_rows_that_agree(decoder):
    model = make(decoder, "rmt", gradient_depth=2)
    ids, mask = torch.zeros(2, N, dtype=torch.long), torch.tensor([[1] * N, [0] * 2 + [1] * (N - 2)])
    with pytest.raises(ValueError, match="without padding"):
        model(ids, attention_mask=mask)


@pytest.mark.parametrize("name", ["rmt", "armt"])
@torch.no_grad()
def test_rows_out_of_phase_keep_the_caches_as_wide_as_a_segment(decoder, name):
    model = make(decoder, name)
    _, state = model.step(torch.randint(0, V, (3, N + 2)))
    state.reset_rows(torch.tensor([False, True, False]))
    for t in range(5 * N):
        state.reset_rows(torch.tensor([False, False, t == 3]))
        _, state = model.step(torch.randint(0, V, (3, 1)), state)
        width = max((layer.state or {"seen": 0})["seen"] for layer in state.layers[:-1])
        assert width < M + N
        assert state.floats() == model.state_floats(3)  # the unfinished segment is not counted


@torch.no_grad()
def test_a_full_segment_is_one_pass_and_leaves_no_keys(decoder):
    model = make(decoder, "rmt")
    widths = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, x: widths.append(x[0].shape[1]))
    _, state = model.step(torch.randint(0, V, (2, 3 * N)))
    handle.remove()
    assert widths == [M + N + M] * 3
    assert [layer.state for layer in state.layers[:-1]] == [None] * 3
    assert state.get_seq_length() == 3 * N


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_pretrained_llama_gets_the_memory_and_shares_its_weights(name):
    config = LlamaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                         intermediate_size=48, initializer_range=0.2)  # fmt: skip
    stock = LlamaForCausalLM(config).eval()
    model = attach_memory(stock, MemoryConfig(segment=N, **{**MEMORIES[name], "tokens": 100})).eval()
    assert model.segmentwise and model.lm_head.weight.data_ptr() == stock.lm_head.weight.data_ptr()
    std = model.model.recurrence.vectors.weight.std()
    assert (std / stock.model.embed_tokens.weight.std() - 1).abs() < 0.1
    ids = torch.randint(0, V, (2, 3 * N))
    ours = model.step(ids)[0]
    if MEMORIES[name]["kind"] == "armt":  # reads nothing before it is trained
        plain = torch.cat([stock(part).logits for part in ids.split(N, 1)], 1)
        assert (ours - plain).abs().max() < 1e-5
    elif name == "autocompressor":
        assert (ours[:, :N] - stock(ids[:, :N]).logits).abs().max() < 1e-5
    assert ours.isfinite().all()


def test_memory_tokens_are_not_decayed(decoder):
    model = make(decoder, "armt")
    groups = parameter_groups(model, TrainerConfig())
    names = {id(p): g["name"] for g in groups for p in g["params"]}
    layer = model.model.layers[0].association
    assert names[id(model.model.recurrence.vectors.weight)] == names[id(layer.strength.bias)] == "no_decay"
    assert names[id(layer.value.weight)] == names[id(layer.query.weight)] == "decay"


def test_features_have_six_times_the_size_and_length_one():
    phi = dpfp(torch.randn(5, 4))
    assert phi.shape == (5, 24) and phi.min() == 0
    torch.testing.assert_close(phi.norm(dim=-1), torch.ones(5))


def test_a_pair_written_again_does_not_move_the_normaliser():
    association = Association(MemoryConfig(kind="armt", key_size=4), 8).double()
    x = torch.randn(1, 1, 8, dtype=torch.float64)
    association.value.weight.data.normal_()
    M, z = association.write(x, torch.zeros(1, 24, 8).double(), torch.zeros(1, 24).double())
    _, again = association.write(x, M, z)
    torch.testing.assert_close(again, z, rtol=0, atol=1e-12)


@torch.no_grad()
def test_like_keys_of_a_segment_do_not_make_what_is_stored_grow():
    """Nothing new is written (W_v is 0): 16 keys of one direction, which drifts, correct what M has."""
    grown = {}
    for normaliser in ("sum", "max"):
        torch.manual_seed(0)
        cfg = MemoryConfig(kind="armt", normaliser=normaliser)
        association = Association(cfg, 16).double()
        association.key.weight.copy_(torch.eye(16))
        M, z = torch.randn(1, 96, 16).double(), torch.zeros(1, 96).double()
        size, centre, steps = M.norm(), torch.randn(16), []
        for _ in range(64):
            centre = 0.9 * centre + 0.19**0.5 * torch.randn(16)
            M, z = association.write((centre + 0.1 * torch.randn(1, 16, 16)).double(), M, z)
            steps.append(M.norm())
        grown[normaliser] = steps[-1] / size
        if normaliser == "max":
            assert all(after <= before * (1 + 1e-12) for before, after in pairwise([size, *steps]))
    assert grown["sum"] > 1e4 and grown["max"] > 0.5


@torch.no_grad()
def test_a_read_is_no_longer_than_what_was_written():
    """sum divides by what little a query shares with z, which does not grow for a key that shares enough with
    it, though M does on all of the key's features."""
    longest = {}
    for normaliser in ("sum", "max"):
        torch.manual_seed(0)
        association = Association(MemoryConfig(kind="armt", normaliser=normaliser), 16).double()
        for projection in (association.query, association.key, association.value):
            projection.weight.copy_(torch.eye(16))
        M, z = torch.zeros(1, 96, 16).double(), torch.zeros(1, 96).double()
        segments = torch.randn(2, 1, 16).double() + 0.1 * torch.randn(2, 16, 16).double()
        for x in segments:
            M, z = association.write(x[None], M, z)
        found = association.read(torch.randn(1, 999, 16).double(), M, z)
        longest[normaliser] = found.norm(dim=-1).max() / segments.norm(dim=-1).max()  # values are the tokens
    assert longest["max"] < 1 and longest["sum"] > 1e3


def test_sums_stay_float32_under_autocast(decoder):
    model = build_model(decoder, MemoryConfig(segment=N, **MEMORIES["armt"]), V)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        _, state = model.step(torch.randint(0, V, (2, 2 * N)))
    assert state.layers[-1].state["M"].dtype == state.layers[-1].state["z"].dtype == torch.float32


def test_a_normaliser_that_it_has_not_is_refused(decoder):
    with pytest.raises(UserError, match=r"memory\.normaliser=sum or max, not mean"):
        build_model(decoder, MemoryConfig(kind="armt", normaliser="mean"), V)


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"key_size": 0}])
def test_sizes_that_cannot_be_are_named(wrong):
    with pytest.raises(UserError, match=f"memory.{next(iter(wrong))}"):
        build_tokens(replace(MemoryConfig(kind="armt"), **wrong), 8, 2)


def test_what_a_run_in_rounds_cannot_give_is_refused(decoder):
    model = build_model(decoder, MemoryConfig(segment=N, **MEMORIES["rmt"]), V)
    ids = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(UserError, match="no output_hidden_states"):
        model(ids, output_hidden_states=True)
    model.gradient_checkpointing_enable()
    with pytest.raises(UserError, match=r"use trainer\.checkpoint_segments"):
        model.train()(ids)
    grows = build_model(decoder, MemoryConfig(segment=N, **MEMORIES["autocompressor"]), V)
    with pytest.raises(UserError, match=r"trainer\.compile"):
        grows.compile_layers()
