"""Every probe fails on a module with its fault and passes on one without; our own memories pass them all."""

from __future__ import annotations

import contract_toys
import pytest
import torch
from conftest import MEMORIES
from contract_toys import FAULTS, Layer, Reshaped, Toy

from infini_bench.contract.adapters import Recognised, subject_of
from infini_bench.contract.check import check
from infini_bench.contract.probes_memory import PRECISIONS, opened, tails
from infini_bench.contract.probes_use import ignored
from infini_bench.errors import UserError
from infini_bench.schema import MemoryConfig


def verdicts(subject, length=256):
    return {v.property: v for v in check(subject, length)}


def failed(found):
    return {name for name, v in found.items() if v.verdict == "FAIL"}


def test_a_sound_module_passes_every_probe_and_none_is_left_out():
    found = verdicts(Toy(), 2048)
    assert {v.verdict for v in found.values()} == {"pass"}, [v for v in found.values() if v.verdict != "pass"]
    assert set().union(*FAULTS.values(), {"head mixing"}) == set(found)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_its_probe_and_what_follows_from_it_only(fault):
    found = verdicts(Toy(fault), {"overflows": 2048, "stalls": 2048, "stalls unseen": 768}.get(fault, 64))
    assert failed(found) == FAULTS[fault]
    if fault == "stalls unseen":
        assert "6.78% by 768 tokens, of the state 0.53% and 30.42%" in found["bfloat16"].detail


def test_nothing_is_said_about_a_module_that_is_not_repeatable():
    found = [*check(Toy("carries on"), 64)]
    assert [v.verdict for v in found] == ["FAIL"] + ["not applicable"] * (len(found) - 1)


def test_a_size_that_is_not_the_live_states_is_told_with_both():
    assert verdicts(Toy("lies"), 64)["state size"].detail == "144 floats at a boundary, and it says 128"


def test_a_module_that_crashes_is_refused_once_and_with_its_line(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text(
        "import torch\nclass Broken(torch.nn.Module):\n    dim = 4\n    def forward(self, x):\n"
        "        if x.shape[1] > 20:\n            return x @ x\n        return x\n"
        "def notclass():\n    return 3\n"
    )
    with pytest.raises(UserError, match=r"nothing was checked: RuntimeError: .* \(broken\.py, line 6\)\.$"):
        [*check(subject_of(f"{file}:Broken", {}, {"dim": 4}, {}))]
    with pytest.raises(UserError, match="notclass gives an object of type int, not a torch module"):
        subject_of(f"{file}:notclass", {}, {}, {})


def test_what_is_declared_is_not_applicable():
    assert verdicts(Toy("declared"), 64)["gradient reach"].verdict == "not applicable"


def test_heads_split_by_a_bare_reshape_leak_or_see_slices():
    leaking = verdicts(Recognised(Reshaped(), {}, {}))
    sliced = verdicts(Recognised(Reshaped(per_segment=False), {}, {}))
    sound = verdicts(Recognised(Reshaped(right=True), {}, {}))
    assert leaking["causality"].verdict == "FAIL" and leaking["causality"].measured >= 8
    assert "causality" not in failed(sliced) and {"head mixing", "any length"} <= failed(sliced)
    assert sliced["head mixing"].measured < 0.6
    assert failed(sound) == {"memory is read"} and sound["head mixing"].verdict == "pass"


def test_a_layer_with_a_state_is_recognised():
    subject = Recognised(Layer(8), {}, {})
    assert (subject.dim, subject.vocab, subject.has_state) == (8, None, True)
    found = verdicts(subject, 2048)
    assert not failed(found)
    assert {n for n, v in found.items() if v.verdict == "not applicable"} == {
        "gates can learn", "padding", "new document in a row", "gradient cut", "state size", "look-ups",
        "ignored labels", "generation", "empty prompt",
    }  # fmt: skip


def test_a_model_of_the_hub_is_recognised():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.3}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))
    subject = Recognised(model, {}, {"segment": 8})
    assert (subject.vocab, subject.has_state) == (48, True)
    found = verdicts(subject, 64)
    assert {"state is a value", "state growth"} <= failed(
        found
    )  # a cache, written into, that keeps everything
    assert {found[n].verdict for n in ("generation", "padding", "ignored labels", "split invariance")} == {
        "pass"
    }
    assert found["empty prompt"].verdict == "FAIL"


@pytest.mark.parametrize("name", MEMORIES)
def test_our_own_memories_keep_the_contract(name):
    found = verdicts(subject_of(name, {}, {"segment": 8}, {name: MemoryConfig(**MEMORIES[name])}))
    assert not failed(found), [found[n] for n in failed(found)]
    assert sum(v.verdict == "pass" for v in found.values()) >= 14
    if name == "memorizing":
        assert found["look-ups"].verdict == "pass"


def test_the_faults_of_infini_transformer_pytorch_are_found():
    found = verdicts(subject_of("infini-transformer-pytorch", {}, {}, {}))
    assert failed(found) == {
        "gates can learn", "memory is read", "gradient cut", "ignored labels", "generation", "empty prompt",
    }  # fmt: skip
    assert found["memory is read"].measured < 1e-4 and found["gates can learn"].measured < 1e-3
    assert found["generation"].measured < 0.5 and "IndexError" in found["empty prompt"].detail
    assert "IndexError" in found["ignored labels"].detail, "its own index of ignored labels, -1, is no token"
    marked = subject_of("infini-transformer-pytorch", {"ignore_index": 63}, {}, {})
    assert ignored(marked).detail == "loss nan where only the last of 3 segments' labels count"


def test_its_learned_write_strength_and_its_float16_are_found():
    options = {"use_mem_delta_rule": True, "learned_delta_update": True}
    strength = verdicts(subject_of("infini-transformer-pytorch", options, {}, {}), 64)["split invariance"]
    assert strength.verdict == "FAIL" and strength.measured > 1e-3
    wide = {"dim_head": 64, "depth": 1}
    subject = subject_of("infini-transformer-pytorch", wide, {"segment": 64}, {}).eval()
    with opened(subject):
        overflow = PRECISIONS[0](subject, 32768, dict)
    assert overflow.verdict == "FAIL" and "not finite" in overflow.detail


def test_its_state_in_bfloat16_is_found_although_its_outputs_hide_it():
    subject = subject_of("infini-transformer-pytorch", {}, {}, {}).eval()
    with opened(subject):
        exact = tails(subject, 16384, torch.float32)
        stalled = PRECISIONS[1](subject, 16384, lambda: exact)
    assert stalled.verdict == "FAIL" and 0.3 < stalled.measured < 0.8 and "of the state" in stalled.detail


def test_the_faults_of_memorizing_transformers_pytorch_are_found():
    pytest.importorskip("memorizing_transformers_pytorch", reason="needs it, faiss-cpu and einops-exts")
    found = verdicts(subject_of("memorizing-transformers-pytorch", {}, {}, {}))
    assert {"look-ups", "new document in a row"} <= failed(found)
    assert found["look-ups"].measured == 0.0 and "100% are found" in found["look-ups"].detail


@pytest.mark.parametrize(
    ("module", "settings", "sentence"),
    [
        ("Layer", {}, "give its arguments as --arg NAME=VALUE"),
        ("V", {}, "is no class, function or module"),
        ("Nothing", {}, 'has no "Nothing"'),
    ],
)
def test_what_cannot_be_made_is_told_in_a_sentence(module, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        subject_of(f"{contract_toys.__file__}:{module}", settings, {}, {})


def test_a_user_names_a_subject_or_a_layer_in_a_file():
    assert isinstance(subject_of(f"{contract_toys.__file__}:Layer", {"dim": 8}, {}, {}), Recognised)
    assert type(subject_of(f"{contract_toys.__file__}:Toy", {}, {}, {})).__name__ == "Toy"
