"""Where models come from: built from a config, attached to a pretrained one, or read from a folder.

All are the decoder of `infini_bench.decoder`.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
)

from infini_bench.decoder import MemoryLlamaConfig, MemoryLlamaForCausalLM
from infini_bench.errors import UserError
from infini_bench.memory import Memory
from infini_bench.schema import DecoderConfig, MemoryConfig

FAMILIES = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM)
ADDED = (".memory.", ".association.", ".recurrence.")  # in the names of parameters that a memory adds


def build_model(decoder: DecoderConfig, memory: MemoryConfig, vocab_size: int) -> MemoryLlamaForCausalLM:
    """A Llama with memory, random weights from torch's global generator, float32."""
    head_dim = decoder.head_dim or decoder.dim // decoder.heads
    config = MemoryLlamaConfig(
        memory=asdict(memory),
        vocab_size=vocab_size,
        hidden_size=decoder.dim,
        num_hidden_layers=decoder.layers,
        num_attention_heads=decoder.heads,
        num_key_value_heads=decoder.kv_heads or decoder.heads,
        head_dim=head_dim,
        intermediate_size=decoder.ffn or 4 * decoder.dim,
        rope_parameters={"rope_type": "default", "rope_theta": decoder.rope_theta},
        tie_word_embeddings=decoder.tie_embeddings,
        initializer_range=decoder.init_std,
        bos_token_id=None,
        eos_token_id=None,
    )
    return MemoryLlamaForCausalLM(config)


def attach_memory(model: Any, memory: MemoryConfig) -> MemoryLlamaForCausalLM:
    """The same weights, with a memory in every attention layer; parameters are shared, not copied.

    model: LlamaForCausalLM, MistralForCausalLM or Qwen2ForCausalLM. A window of its own attention gives way
    to the memory's segments. Raises UserError for another architecture.
    """
    if isinstance(model, MemoryLlamaForCausalLM):
        raise UserError(
            "The model has a memory already; attach another one to the model that it was made from."
        )
    if not isinstance(model, FAMILIES):
        known = ", ".join(family.__name__ for family in FAMILIES)
        raise UserError(f"Memory can be attached to {known}, not to {type(model).__name__}.")
    known_keys = LlamaConfig().to_dict().keys() - {"model_type", "architectures"}
    settings = {key: value for key, value in model.config.to_dict().items() if key in known_keys}
    settings["qkv_bias"] = isinstance(model, Qwen2ForCausalLM)
    with torch.device("meta"):
        new = MemoryLlamaForCausalLM(MemoryLlamaConfig(memory=asdict(memory), **settings))
    new.model.rotary_emb.inner = model.model.rotary_emb
    loaded = new.load_state_dict(model.state_dict(), strict=False, assign=True)
    assert not loaded.unexpected_keys
    start_parameters(new, model.model.embed_tokens.weight)
    new.tie_weights()
    new.generation_config = model.generation_config
    return new


def with_memory(model: MemoryLlamaForCausalLM, memory: MemoryConfig) -> MemoryLlamaForCausalLM:
    """The same weights under other settings of their memory, which must have the same parameters.

    Raises UserError where it has not, and for an encoder-decoder.
    """
    if not isinstance(model, MemoryLlamaForCausalLM):
        raise UserError("task.memory is for decoders; an encoder-decoder is evaluated as it was trained.")
    config = copy.deepcopy(model.config)
    config.memory = asdict(memory)
    with torch.device("meta"):
        new = MemoryLlamaForCausalLM(config)
    new.model.rotary_emb.inner = model.model.rotary_emb.inner
    shapes = {name: p.shape for name, p in model.named_parameters()}
    if shapes != {name: p.shape for name, p in new.named_parameters()}:
        raise UserError(
            "task.memory asks for a memory with parameters of its own; change only what needs no training."
        )
    new.load_state_dict(model.state_dict(), strict=False, assign=True)
    new.tie_weights()
    return new.train(model.training)


@torch.no_grad()
def start_parameters(model: MemoryLlamaForCausalLM, embeddings: Tensor) -> None:
    """Gives every parameter that is still on the meta device, being the memory's, its start."""
    for module in model.modules():
        missing = {n: p for n, p in module.named_parameters(recurse=False) if p.is_meta}
        for name, p in missing.items():
            dtype = p.dtype if isinstance(module, Memory) else embeddings.dtype  # gates stay float32
            start = torch.empty(p.shape, dtype=dtype, device=embeddings.device)
            setattr(module, name, nn.Parameter(start))
        if missing:
            model._init_weights(module)
    if model.segmentwise:  # memory tokens are as large as the embeddings that they stand beside
        nn.init.normal_(model.model.recurrence.vectors.weight, std=embeddings.float().std().item())


def save_model(model: MemoryLlamaForCausalLM, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """A Hugging Face folder: config.json and safetensors. weights: unset = the model's own."""
    model.save_pretrained(folder, state_dict=weights)


def load_model(folder: Path) -> MemoryLlamaForCausalLM:
    """The model of a folder written by ``save_model`` or ``pretrained.save_changes``, float32.

    Raises UserError when the folder is missing, damaged, or holds another architecture.
    """
    if (folder / "base.json").exists():
        from infini_bench.pretrained import load_changes

        return load_changes(folder)
    try:
        settings = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"No model can be read from {folder}: {error}.") from error
    own = settings.get("infini_bench")  # a `Summarizer`'s
    if own is None and settings.get("model_type") != MemoryLlamaConfig.model_type:
        found = settings.get("model_type", "nothing")
        raise UserError(f"{folder} holds a model of type '{found}', not one of infini-bench's.")
    kind: Any = MemoryLlamaForCausalLM if own is None else AutoModelForSeq2SeqLM
    try:
        loaded: Any = kind.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    except UserError:  # the memory is code that the user has not named
        raise
    except Exception as error:  # transformers and safetensors raise many kinds for damaged files
        raise UserError(f"The model in {folder} is damaged: {str(error).splitlines()[0]}") from error
    model, info = loaded
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *(key[0] for key in info["mismatched_keys"])]
    if wrong:
        raise UserError(
            f"The model in {folder} is damaged: weight {sorted(wrong)[0]} does not fit its config."
        )
    if own is None:
        return model
    from infini_bench.summarizer import Summarizer

    return Summarizer(model, MemoryConfig(**own["memory"]), own["separator"])  # type: ignore[return-value]
