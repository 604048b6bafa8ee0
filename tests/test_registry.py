"""``import infini_bench`` alone teaches the Auto classes our models, and loads nothing for it."""

import subprocess
import sys

import pytest

from infini_bench.models import build_model, save_model
from infini_bench.schema import DecoderConfig, MemoryConfig

LOAD = """
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
assert type(model).__module__ == "infini_bench.decoder" and not info["missing_keys"], type(model)
assert model.segment == 8 and model.step(torch.zeros(1, 20, dtype=torch.long))[0].shape == (1, 20, 50)
"""
ORDERS = {
    "package first": "import infini_bench; from transformers import AutoModelForCausalLM" + LOAD,
    "transformers first": "from transformers import AutoModelForCausalLM; import infini_bench" + LOAD,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_model(build_model(DecoderConfig(dim=16, heads=2), MemoryConfig(segment=8), 50), path)
    return path


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_restore_a_folder(folder, order):
    program = f"import torch; folder = {str(folder)!r}\n{ORDERS[order]}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_loads_nothing():
    program = "import sys; before = set(sys.modules); import infini_bench; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert not {"torch", "transformers", "numpy", "typer"} & loaded and len(loaded) < 60, loaded
