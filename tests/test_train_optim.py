import math

import pytest
import torch
from torch import nn

from infini_bench.errors import UserError
from infini_bench.models import build_model
from infini_bench.schema import DecoderConfig, MemoryConfig, TrainerConfig
from infini_bench.train.optim import (
    build_optimizer,
    load_state_tensors,
    lr_factor,
    parameter_groups,
    set_lr,
    state_tensors,
)


def model(tied: bool = True) -> nn.Module:
    decoder = DecoderConfig(layers=2, dim=16, heads=2, ffn=16, tie_embeddings=tied)
    return build_model(decoder, MemoryConfig(segment=8), vocab_size=11)


def count(groups: list[dict], name: str) -> int:
    return sum(p.numel() for g in groups if g["name"] == name for p in g["params"])


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_one_group_with_its_own_rules(tied):
    net = model(tied)
    groups = parameter_groups(net, TrainerConfig(lr=1e-3, gate_lr=0.02, weight_decay=0.1))
    assert {g["name"]: (g["base_lr"], g["weight_decay"]) for g in groups} == {
        "gates": (0.02, 0.0),
        "no_decay": (1e-3, 0.0),
        "decay": (1e-3, 0.1),
    }
    assert count(groups, "gates") == 2 * 2  # layers x heads
    assert count(groups, "no_decay") == 11 * 16 + 5 * 16  # embeddings, and two norms a layer and the last
    linear = 2 * (4 * 16 * 16 + 3 * 16 * 16) + (0 if tied else 11 * 16)
    assert count(groups, "decay") == linear
    everything = [p for g in groups for p in g["params"]]
    assert len(everything) == len({id(p) for p in everything}) == len(list(net.parameters()))


def test_gates_follow_the_common_rate_when_they_have_none_of_their_own():
    groups = parameter_groups(model(), TrainerConfig(lr=1e-3, gate_lr=None))
    assert [g["base_lr"] for g in groups] == [1e-3] * 3


@pytest.mark.parametrize("rate", [None, 0.005])
def test_a_write_gate_follows_the_common_rate_or_its_own(rate):
    memory = MemoryConfig(segment=8, write_gate=True)
    net = build_model(DecoderConfig(layers=2, dim=16, heads=2, ffn=16), memory, 11)
    groups = parameter_groups(net, TrainerConfig(lr=1e-3, gate_lr=0.02, write_lr=rate))
    (own,) = (g for g in groups if any(p is net.memories[0].memory_write for p in g["params"]))
    assert (own["base_lr"], own["weight_decay"]) == (rate or 1e-3, 0.0)
    assert own["name"] == ("writes" if rate else "no_decay")
    assert count(groups, "writes") == (2 * 2 * 9 if rate else 0)  # layers, KV heads, u and c


def test_schedule_warms_up_linearly_and_ends_at_the_minimum():
    cfg = TrainerConfig(steps=110, warmup=10, min_lr=0.1)
    assert [lr_factor(u, cfg) for u in (1, 5, 10)] == [0.1, 0.5, 1.0]
    assert lr_factor(60, cfg) == pytest.approx(0.55)  # half way down
    assert lr_factor(35, cfg) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert lr_factor(110, cfg) == pytest.approx(0.1)
    assert lr_factor(1, TrainerConfig(steps=1, warmup=0)) == pytest.approx(0.1)
    assert lr_factor(5, TrainerConfig(steps=5, warmup=20)) == 0.25


def test_each_group_is_scaled_from_its_own_rate():
    cfg = TrainerConfig(steps=100, warmup=10, lr=1e-3, gate_lr=0.02)
    optimizer = build_optimizer(model(), cfg)
    assert set_lr(optimizer, 5, cfg) == pytest.approx({"gates": 0.01, "no_decay": 5e-4, "decay": 5e-4})
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.01, 5e-4, 5e-4])


def one_step(optimizer: torch.optim.Optimizer, net: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def test_decay_shrinks_only_what_is_decayed():
    net = model()
    cfg = TrainerConfig(lr=0.01, gate_lr=0.01, weight_decay=1.0)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    build_optimizer(net, cfg).step()
    after = dict(net.named_parameters())
    decayed = {n for n in before if not torch.equal(before[n], after[n])}
    assert decayed == {n for n in before if "proj" in n}
    torch.testing.assert_close(
        after["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"] * 0.99
    )


def test_adafactor_moves_gates_that_start_at_zero_by_their_rate():
    net = model()
    optimizer = build_optimizer(net, TrainerConfig(optimizer="adafactor", lr=0.01, gate_lr=0.03))
    gate = net.model.layers[0].self_attn.memory.memory_gate
    assert torch.equal(gate, torch.zeros(2))
    for p in net.parameters():
        p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    torch.testing.assert_close(gate.detach(), torch.full((2,), -0.03))


def test_unknown_optimizer_is_named():
    with pytest.raises(UserError, match='not "sgd"'):
        build_optimizer(model(), TrainerConfig(optimizer="sgd"))


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_state_goes_through_flat_tensors_bit_for_bit(name):
    cfg = TrainerConfig(optimizer=name)
    net, other = model(), model()
    optimizer, second = build_optimizer(net, cfg), build_optimizer(other, cfg)
    for seed in range(3):
        one_step(optimizer, net, seed)
    other.load_state_dict(net.state_dict())
    tensors = {key: value.clone() for key, value in state_tensors(net, optimizer).items()}
    load_state_tensors(other, second, tensors)
    for seed in range(3, 5):
        one_step(optimizer, net, seed)
        one_step(second, other, seed)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
