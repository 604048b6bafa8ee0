"""Fixtures of all tests: fixed seeds, one thread, and small models of every kind."""

import gc
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when it is imported, which many a package does

from infini_bench.schema import DecoderConfig, MemoryConfig

MEMORIES = {
    "infini_linear": {"kind": "compressive", "update": "linear"},
    "infini_delta": {"kind": "compressive", "update": "delta"},
    "infini_delta_corrected": {"kind": "compressive", "update": "delta_corrected"},
    "infini_all_options": {
        "kind": "compressive",
        "update": "delta_token",
        "features": "dpfp",
        "normaliser": "norm",
        "decay": 0.9,
        "write_gate": True,
        "gate_input": True,
    },
    "transformer_xl": {"kind": "xl"},
    "local_block": {"kind": "block"},
    "local_sliding": {"kind": "sliding"},
    "full": {"kind": "full"},
    "memorizing": {"kind": "knn", "entries": 20, "neighbours": 5},
    "retrieval": {"kind": "retrieval", "neighbours": 5},
    "infini_linear_xl": {"kind": "compressive", "update": "linear", "local": "xl"},
    "infini_delta_xl": {"kind": "compressive", "update": "delta", "local": "xl"},
    "compressive": {"kind": "compressed", "rate": 2, "compressed": 5},
    "sink": {"kind": "sink", "window": 11, "sinks": 3},
    "local_sparse": {"kind": "sparse", "stride": 3},
    "local_kernel": {"kind": "kernel"},
    "rmt": {"kind": "rmt", "tokens": 3},
    "armt": {"kind": "armt", "tokens": 3, "key_size": 4},
    "armt_max": {"kind": "armt", "tokens": 3, "key_size": 4, "normaliser": "max"},
    "autocompressor": {"kind": "autocompressor", "tokens": 3},
}


def awake(model):
    """The model with ARMT's values moved off the 0 at which they start and nothing is read; in place."""
    for name, parameter in model.named_parameters():
        if "association.value" in name:
            parameter.data = 0.05 * torch.randn_like(parameter)
    return model


def pytest_collection_finish():
    gc.freeze()  # what is imported by then stays: each search for garbage would go through all of it


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(params=MEMORIES)
def memory(request) -> MemoryConfig:
    """Each memory in turn, segments of 8 tokens."""
    return MemoryConfig(segment=8, **MEMORIES[request.param])


@pytest.fixture(scope="session")
def decoder() -> DecoderConfig:
    """Three layers with grouped keys, and weights large enough that logits differ visibly."""
    return DecoderConfig(layers=3, dim=32, heads=4, kv_heads=2, ffn=48, init_std=0.2)
