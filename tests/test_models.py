"""The contract of design and README, for every memory inside a whole model."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from conftest import MEMORIES, awake
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from infini_bench.cache import MemoryCache
from infini_bench.errors import UserError
from infini_bench.models import attach_memory, build_model, load_model, save_model, with_memory
from infini_bench.schema import MemoryConfig

V, N = 50, 8
T = 4 * N + 5


@pytest.fixture(scope="module", params=MEMORIES)
def model(request, decoder):
    """One of each memory for all tests: none changes it."""
    torch.manual_seed(0)
    memory = MemoryConfig(segment=N, **MEMORIES[request.param])
    model = awake(build_model(decoder, memory, V).eval())
    for mem in model.memories:
        if hasattr(mem, "memory_gate"):
            mem.memory_gate.data = torch.randn(4)
    return model


@pytest.fixture
def ids():
    return torch.randint(0, V, (2, T))


def feed(model, ids, sizes, state=None):
    logits = []
    for part in ids.split(sizes, 1):
        out, state = model.step(part, state)
        logits.append(out)
    return torch.cat(logits, 1), state


@pytest.mark.parametrize("sizes", [[1] * T, [7, 1, 9, 3, T - 20], [N] * 4 + [5], [3 * N, T - 3 * N]])
@torch.no_grad()
def test_any_cut_into_calls_gives_the_same_logits_and_state(model, ids, sizes):
    whole, end = model.step(ids)
    parts, state = feed(model, ids, sizes)
    assert (whole - parts).abs().max() < 3e-5
    for name, x in end.tensors().items():
        assert (state.tensors()[name] - x).abs().max() < 1e-4


def test_ids_and_states_that_do_not_fit(model, ids):
    with pytest.raises(ValueError, match=r"shape \(batch, tokens\), not \(37,\)"):
        model.step(ids[0])
    with pytest.raises(ValueError, match=r"shape \(batch, tokens\)"):
        model.model(ids[0])
    _, state = model.step(ids[:, : N + 1])
    assert state.batch == 2 and MemoryCache.empty(2).batch is None
    for other in (ids[:1], ids.repeat(2, 1)):
        with pytest.raises(ValueError, match=f"the state is of 2 rows, the tokens are of {len(other)}"):
            model.step(other, state)
    model.step(ids[:1, :3], state.select_rows(torch.tensor([1])))


def test_no_logit_depends_on_a_later_token_nor_on_another_row(model, ids):
    embeds = model.model.embed_tokens(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, use_cache=False).logits
    for t in (0, N - 1, N, 2 * N + 3, T - 1):
        grad = torch.autograd.grad(logits[0, t].sum(), embeds, retain_graph=True)[0].abs().sum(-1)
        assert grad[1].max() == 0
        assert t == T - 1 or grad[0, t + 1 :].max() == 0
        assert grad[0, t] > 0
        before = grad[
            0, : t // N * N
        ]  # reached through the memory; Transformer-XL's cache is not differentiated
        reached = model.memories[0].cfg.kind not in ("xl", "block", "knn", "compressed", "sparse", "kernel")
        assert not len(before) or (before.max() > 0) == reached


@torch.no_grad()
def test_rows_do_not_depend_on_their_batch(model, ids):
    alone = model.step(ids[:1])[0]
    assert (model.step(ids)[0][:1] - alone).abs().max() < 3e-5


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@torch.no_grad()
def test_padding_changes_nothing_and_is_never_written(model, ids, side):
    pad, lengths = 9, (T, T - 13)
    mask = torch.zeros(2, T + pad, dtype=torch.long)
    for row, length in enumerate(lengths):
        slots = {"left": range(T + pad - length, T + pad), "right": range(length), "holes": range(T + pad)}[
            side
        ]
        mask[row, sorted(torch.randperm(T + pad)[:length].tolist()) if side == "holes" else list(slots)] = 1
    padded = torch.randint(0, V, (2, T + pad))
    for row, length in enumerate(lengths):
        padded[row, mask[row].bool()] = ids[row, :length]
    split, cache = 11, MemoryCache.empty(3)
    logits = [
        model(padded[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits
        for a, b in ((0, split), (split, T + pad))
    ]
    for row, length in enumerate(lengths):
        plain, state = model.step(ids[row : row + 1, :length])
        assert (torch.cat(logits, 1)[row, mask[row].bool()] - plain[0]).abs().max() < 3e-5
        for name in ("M", "z", "memory", "slot_k", "slot_v", "sink_k", "sink_v"):
            if name in state.layers[-1].state:
                plain = state.layers[-1].state[name][0]
                written = cache.layers[-1].state[name][row, : len(plain)]
                assert (written - plain).abs().max() < 1e-4


@torch.no_grad()
def test_reset_clears_one_row_only(model, ids):
    _, state = model.step(ids)
    state.reset_rows(torch.tensor([True, False]))
    after = feed(model, ids, [3, T - 3], state)[0]
    assert (after[0] - model.step(ids)[0][0]).abs().max() < 1e-4
    assert (after[1] - feed(model, ids.repeat(1, 2), [T, T])[0][1, T:]).abs().max() < 1e-4


@torch.no_grad()
def test_states_are_values_and_survive_the_disk(model, ids, tmp_path):
    _, state = model.step(ids)
    expected = model.step(ids, state)[0]
    state.save(tmp_path / "state.safetensors")
    loaded = MemoryCache.load(tmp_path / "state.safetensors")
    for s in (state, loaded, MemoryCache.from_tensors(state.tensors())):
        assert torch.equal(model.step(ids, s)[0], expected)
    swapped = state.select_rows(torch.tensor([1, 0]))
    # ARMT divides by what may be small, and products of other rows are not rounded alike on every processor
    assert (model.step(ids.flip(0), swapped)[0].flip(0) - expected).abs().max() < 3e-4
    (tmp_path / "broken").write_bytes(b"nothing")
    with pytest.raises(UserError, match="broken"):
        MemoryCache.load(tmp_path / "broken")


@torch.no_grad()
def test_state_size_is_the_formula(model):
    ids = torch.randint(0, V, (3, 4 * N))
    _, state = model.step(ids)
    kind, size, groups, layers = model.config.memory["kind"], 8, 2, 3
    plain = model.config.memory["features"] == "elu1"
    cached = 2 * size * groups * N * layers * (model.config.memory["local"] == "xl")  # beside M and z
    table1 = {  # Table 1 with H replaced by G, as live floats a row at a boundary
        # dpfp is twice as wide, and has no z where nothing normalises
        "compressive": (size * (size + 1) if plain else 2 * size * size) * groups * layers + cached,
        "xl": 2 * size * groups * N * layers,
        "sliding": 2 * size * groups * 2 * N * layers,
        "block": 0,
        "full": 4 * 2 * size * groups * N * layers,
        "knn": 2 * size * groups * (N * layers + 20),
        "retrieval": 4 * 2 * size * groups * N * layers,
        "rmt": 3 * 32,  # what is carried; Table 1 counts m d l 2
        "armt": 6 * 4 * (32 + 1) * layers,
        "autocompressor": 4 * 3 * 32,
        "compressed": 2 * size * groups * (5 + N) * layers,  # keys and values, not hidden states
        "sink": 2 * size * groups * (3 + 2 * N) * layers,  # a window of 11 reaches into two segments
        "sparse": 0,
        "kernel": 0,
    }[kind]
    assert state.floats() == 3 * table1
    if kind in ("full", "retrieval", "autocompressor"):
        assert model.state_floats(3) == state.floats() / 4  # of each of the four segments
    else:
        assert model.state_floats(3) == state.floats() == model.step(ids, state)[1].floats()


@torch.no_grad()
def test_memory_off_is_local_attention(decoder, model, ids):
    with model.memory_off() if model.has_memory else nullcontext():
        off = feed(model, ids, [13, T - 13])[0]
    if model.has_memory:
        alone = [model.step(segment)[0] for segment in ids.split(N, 1)]
        assert (off - torch.cat(alone, 1)).abs().max() < 2e-5
        if model.memories[0].cfg.kind != "rmt":  # whose segments read learned vectors, even so
            block = build_model(decoder, MemoryConfig(kind="block", segment=N), V).eval()
            block.load_state_dict(model.state_dict(), strict=False)
            assert (off - block.step(ids)[0]).abs().max() < 2e-5
        assert (off - model.step(ids)[0])[:, N:].abs().max() > 1e-2
        assert (off - model.step(ids)[0])[:, :N].abs().max() < 2e-5


@torch.no_grad()
def test_generate_equals_step_by_step_decoding(model):
    for length in (1, N, 2 * N + 3):
        prompt = torch.randint(0, V, (2, length))
        made = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=N + 3,
            do_sample=False,
            pad_token_id=0,
        )
        logits, state = model.step(prompt, keep="last")
        for t in range(length, made.shape[1]):
            assert torch.equal(logits[:, -1].argmax(-1), made[:, t])
            logits, state = model.step(made[:, t : t + 1], state)


@torch.no_grad()
def test_generate_with_beams_and_left_padding_equals_no_cache(model):
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, :6] = 0
    call = dict(attention_mask=mask, max_new_tokens=12, num_beams=3, do_sample=False, pad_token_id=0)
    prompt = torch.randint(0, V, (2, 13))
    assert torch.equal(model.generate(prompt, **call), model.generate(prompt, use_cache=False, **call))


def test_losses_equal_logits_and_chunked_gradients(model, ids, monkeypatch):
    def run():
        nll, _ = model.losses(ids[:, :-1], ids[:, 1:])
        return nll, torch.autograd.grad(nll.sum(), list(model.parameters()), allow_unused=True)

    nll, grads = run()
    logits = model.step(ids[:, :-1])[0].log_softmax(-1)
    assert (nll + logits.gather(-1, ids[:, 1:, None])[..., 0]).abs().max() < 1e-5
    monkeypatch.setattr("infini_bench.decoder.LOSS_CHUNK", 7)
    for a, b in zip(grads, run()[1], strict=True):
        assert (a is None and b is None) or (a - b).abs().max() < 3e-5 * (1 + a.abs().max())


def test_first_segment_equals_stock_llama_and_closed_gates_equal_local_attention():
    config = LlamaConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, initializer_range=0.2,
    )  # fmt: skip
    stock = LlamaForCausalLM(config).eval()
    model = attach_memory(stock, MemoryConfig(segment=N, gate_start=-1e9)).eval()
    assert model.lm_head.weight.data_ptr() == stock.lm_head.weight.data_ptr()  # shared, not copied
    ids = torch.randint(0, V, (2, 3 * N))
    with torch.no_grad():
        ours = model.step(ids)[0]
        assert torch.equal(model.step(ids[:, :N])[0], stock(ids[:, :N]).logits)
        for s in range(3):
            part = slice(s * N, s * N + N)
            assert (ours[:, part] - stock(ids[:, part]).logits).abs().max() < 1e-5


def test_gate_parameters_start_as_configured_after_loading_plain_llama(tmp_path):
    config = LlamaConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = attach_memory(LlamaForCausalLM(config), MemoryConfig(segment=N, gate_start=-1.0, gate_split=0.5))
    assert torch.allclose(model.gates(), torch.sigmoid(torch.tensor([-1.5, -0.5, -1.5, -0.5])).expand(2, 4))


def test_save_and_load(model, ids, tmp_path):
    save_model(model, tmp_path / "m")
    for loaded in (load_model(tmp_path / "m"), AutoModelForCausalLM.from_pretrained(tmp_path / "m")):
        weights = dict(loaded.eval().named_parameters())
        assert all(torch.equal(weights.pop(name), p) for name, p in model.named_parameters()) and not weights
        with torch.no_grad():  # weights at other addresses: some processors' kernels round otherwise
            assert (loaded.step(ids)[0] - model.step(ids)[0]).abs().max() < 3e-4


def test_damaged_or_foreign_models_are_named(decoder, tmp_path):
    folder = tmp_path / "m"
    with pytest.raises(UserError, match="No model can be read"):
        load_model(folder)
    save_model(build_model(decoder, MemoryConfig(segment=N), V), folder)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if "memory_gate" in name)
    save_file({k: v for k, v in tensors.items() if k != name}, weights, {"format": "pt"})
    with pytest.raises(UserError, match="memory_gate"):
        load_model(folder)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        load_model(folder)
    LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                 intermediate_size=48)).save_pretrained(folder)  # fmt: skip
    with pytest.raises(UserError, match="'llama'"):
        load_model(folder)


# Share of the float32 logits, in norm, that bfloat16 may change. Memory tokens and a write gate feed what
# they say back into what is written, segment after segment.
BF16, FED_BACK = 0.04, 0.2


@torch.no_grad()
def test_bfloat16_follows_float32(model, ids):
    """Causality is exact, any cut within 1 %, and the error to float32 within BF16 or FED_BACK."""
    exact = model.step(ids)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, state = model.step(ids)
        other = torch.cat([ids[:, :20], (ids[:, 20:] + 1) % V], 1)
        assert torch.equal(model.step(other)[0][:, :20], logits[:, :20])
        parts, cut = [], None
        for part in ids.split([3, 13, 1, T - 17], 1):
            out, cut = model.step(part, cut)
            parts.append(out)
    memory = model.config.memory
    fed_back = memory["kind"] in ("rmt", "armt", "autocompressor") or memory["write_gate"]
    assert (torch.cat(parts, 1) - logits).norm() / logits.norm() < 0.01
    assert (logits - exact).norm() / exact.norm() < (FED_BACK if fed_back else BF16)
    assert all(x.dtype == torch.float32 for name, x in state.tensors().items() if name.endswith((".M", ".z")))


@torch.no_grad()
def test_other_settings_of_a_memory_keep_the_weights(decoder, model, ids):
    settings = MemoryConfig(**model.config.memory)
    changed = with_memory(model, replace(settings, entries=9, window=7))
    assert [p.data_ptr() for p in changed.parameters()] == [p.data_ptr() for p in model.parameters()]
    same = torch.equal(changed.step(ids)[0], model.step(ids)[0])
    assert same == (settings.kind not in ("knn", "sliding", "sink"))
    assert settings.entries == model.config.memory["entries"], "the model itself stays as it was"


@torch.no_grad()
def test_a_window_stands_for_full_attention_where_it_reaches(decoder, ids):
    full = build_model(decoder, MemoryConfig(kind="full", segment=N), V).eval()
    window = with_memory(full, MemoryConfig(kind="sliding", segment=N, window=64))
    torch.testing.assert_close(window.step(ids)[0], full.step(ids)[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="parameters of its own"):
        with_memory(full, MemoryConfig(kind="compressive", segment=N))
    with pytest.raises(UserError, match="an encoder-decoder is evaluated as it was trained"):
        with_memory(torch.nn.Linear(1, 1), MemoryConfig(segment=N))
