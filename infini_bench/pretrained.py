"""A pretrained decoder as the base of a memory: where it comes from, what of it is trained, what is saved.

Llama, Mistral and Qwen2 compute the same decoder, up to biases on the query, key and value projections; their
weights have the same names. So each becomes a `MemoryLlamaForCausalLM`, without a fork of its code. A BART or
LED becomes a `Summarizer`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from infini_bench.errors import UserError
from infini_bench.files import read_json, write_json
from infini_bench.models import ADDED, MemoryLlamaForCausalLM, attach_memory
from infini_bench.origin import trained_config
from infini_bench.outside import check_same
from infini_bench.schema import BaseConfig, DecoderConfig, MemoryConfig

SHARD = "15MB"  # below what most code hosts take in a file
BASE_FILE = "base.json"
PATTERN = "changes{suffix}.safetensors"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_pretrained(name: str) -> Any:
    """The stock model of a hub id, a folder or a GGUF file, float32, on the CPU.

    Raises UserError when it cannot be had. Remote code is never run.
    """
    gguf = {"gguf_file": Path(name).name} if name.endswith(".gguf") else {}
    with told(name):
        return AutoModelForCausalLM.from_pretrained(
            str(Path(name).parent) if gguf else name, dtype=torch.float32, trust_remote_code=False, **gguf
        )


@contextmanager
def told(name: str) -> Iterator[None]:
    """What transformers and its file readers raise for a model that is not there, as one sentence."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, AttributeError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f'The model "{name}" cannot be loaded ({reason}); give a hub id, a folder or a .gguf file of a '
            "Llama, Mistral or Qwen2, or a BART or LED."
        ) from error


def adapted_model(base: BaseConfig, memory: MemoryConfig, separator: Sequence[int] | None = None) -> Any:
    """``base.model`` with ``memory``; frozen and with LoRA as ``base`` says. LoRA starts as no change.

    A run or checkpoint folder of infini-bench is a base too, for the next stage; its memory must be this one.
    separator: between a book and its summary; None = the task has none, and no encoder-decoder can learn it.
    """
    assert base.model is not None
    if is_own(base.model):
        from infini_bench.train.checkpoint import load_checkpoint_model

        model: Any
        model, _, trained = load_checkpoint_model(Path(base.model))
        if trained.memory != memory:
            raise UserError(f"{base.model} was trained with another memory; leave memory.* as it was there.")
        merge_lora(model)
    elif is_encoder_decoder(hub_config(base.model)):
        model = summarizer(base, memory, separator)
    else:
        model = attach_memory(load_pretrained(base.model), memory)
    if base.freeze or base.lora:
        freeze(model, base.lora)
    return model


def summarizer(base: BaseConfig, memory: MemoryConfig, separator: Sequence[int] | None) -> nn.Module:
    """The encoder-decoder ``base.model``, all of it trained. Raises UserError for what it cannot do."""
    from infini_bench.summarizer import read_weights

    assert base.model is not None
    if separator is None:
        raise UserError(f'"{base.model}" is an encoder-decoder, which writes summaries: set task=booksum.')
    if base.freeze or base.lora:
        raise UserError("An encoder-decoder is trained whole; leave base.freeze and base.lora out.")
    with told(base.model):
        return read_weights(base.model, memory, separator)


def hub_config(name: str) -> Any:
    """The stock configuration of a hub id, a folder or a GGUF file."""
    gguf = {"gguf_file": Path(name).name} if name.endswith(".gguf") else {}
    with told(name):
        return AutoConfig.from_pretrained(str(Path(name).parent) if gguf else name, **gguf)


def is_encoder_decoder(config: Any) -> bool:
    """Whether a stock configuration is of a model that encodes its input."""
    return bool(getattr(config, "is_encoder_decoder", False))


def is_own(name: str) -> bool:
    """Whether ``name`` is a run or checkpoint folder of infini-bench."""
    return any((Path(name) / part).exists() for part in ("checkpoints", "checksums.json"))


def looks_local(name: str) -> bool:
    """Whether ``name`` can only be a place on this machine; a hub id is OWNER/NAME, and OWNER no folder."""
    return (
        name.startswith((".", "/", "~"))
        or name.endswith(".gguf")
        or name.count("/") > 1
        or ("/" in name and Path(name).parent.is_dir())
    )


def decoder_of(name: str, start: DecoderConfig) -> DecoderConfig:
    """The architecture of a base, for the record; what only a fresh start uses is ``start``'s."""
    if is_own(name):
        return trained_config(Path(name)).decoder
    c = hub_config(name)
    if is_encoder_decoder(c):
        shape = {"layers": c.decoder_layers, "heads": c.decoder_attention_heads, "ffn": c.decoder_ffn_dim}
        return DecoderConfig(dim=c.d_model, tie_embeddings=True, init_std=start.init_std, **shape)
    heads = c.num_attention_heads
    return DecoderConfig(
        layers=c.num_hidden_layers,
        dim=c.hidden_size,
        heads=heads,
        kv_heads=getattr(c, "num_key_value_heads", heads),
        head_dim=getattr(c, "head_dim", None) or c.hidden_size // heads,
        ffn=c.intermediate_size,
        rope_theta=c.rope_parameters["rope_theta"],
        tie_embeddings=c.tie_word_embeddings,
        init_std=start.init_std,
    )


def freeze(model: MemoryLlamaForCausalLM, rank: int | None = None) -> None:
    """From here on only the memory's parameters are trained, and with ``rank`` LoRA (arXiv 2106.09685).

    LoRA is on every linear layer of the decoder, scaled by 2 (alpha = 2 rank). Raises UserError without peft.
    """
    own = [p for name, p in model.named_parameters() if is_added(name) and p.requires_grad]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if rank:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise UserError("base.lora needs the package peft: pip install 'infini-bench[adapt]'.") from error
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR), model)
    for parameter in own:
        parameter.requires_grad_(True)


def is_added(name: str) -> bool:
    """Whether a parameter of this name is the memory's, not the pretrained decoder's."""
    return any(part in name for part in ADDED)


def merge_lora(model: nn.Module) -> None:
    """Adds LoRA's product to the weights that it changes, and takes it away; nothing where there is none."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):
            module.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.get_base_layer())
    if hasattr(model, "peft_config"):  # else the next stage's LoRA counts as a second adapter
        del model.peft_config


def changes(model: nn.Module) -> dict[str, Tensor]:
    """What may differ from the base: all that is trained, and the memory's frozen parameters."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad or is_added(name)}


def save_changes(model: MemoryLlamaForCausalLM, base: BaseConfig, folder: Path) -> None:
    """Config, `changes` in shards of at most 15 MB, and the name and fingerprint of the base."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    save_torch_state_dict(
        {name: x.contiguous().cpu() for name, x in changes(model).items()},
        folder,
        filename_pattern=PATTERN,
        max_shard_size=SHARD,
    )
    about = {"model": _seen_from(folder, str(base.model)), "lora": base.lora}
    write_json(folder / BASE_FILE, about | {"fingerprint": fingerprint(model)})


def _seen_from(folder: Path, name: str) -> str:
    """A base's name in the changes of ``folder``: of a run, or a place said from the working directory, the
    way from there, beginning with "..", so that it is found from any directory and after both were moved.
    """
    if Path(name).exists() and (is_own(name) or not Path(name).is_absolute()):
        return os.path.relpath(os.path.abspath(name), folder.resolve())
    return name


def load_changes(folder: Path) -> MemoryLlamaForCausalLM:
    """The model that `save_changes` wrote. Raises UserError if its base is gone or is another one."""
    about = read_json(folder / BASE_FILE)
    settings = json.loads((folder / "config.json").read_text())
    check_same(settings["memory"]["kind"], settings.get("memory_code"))
    name = str(folder / about["model"]) if about["model"].startswith("..") else about["model"]
    if looks_local(name) and not Path(name).exists():
        raise UserError(
            f"{folder} holds changes on top of {os.path.normpath(name)}, which is missing; put it back there."
        )
    base = BaseConfig(model=name, freeze=True, lora=about["lora"])
    model = adapted_model(base, MemoryConfig(**settings["memory"]))
    if fingerprint(model) != about["fingerprint"]:
        raise UserError(
            f'{folder} was trained on another "{os.path.normpath(name)}" than the one that is there now.'
        )
    saved: dict[str, Tensor] = {}
    for path in sorted(folder.glob("changes*.safetensors")):
        saved |= load_file(path)
    own = changes(model)
    if own.keys() != saved.keys() or any(own[name].shape != x.shape for name, x in saved.items()):
        raise UserError(f"{folder} is damaged: its weights are not those that its base takes.")
    model.load_state_dict(saved, strict=False)
    return model


def fingerprint(model: nn.Module) -> str:
    """Hash of the frozen weights' names, shapes and first values, whatever adapters hang on them."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if p.requires_grad or is_added(name):
            continue
        head = p.detach().flatten()[:64].float().cpu().numpy().tobytes()
        digest.update(f"{name.replace('.base_layer', '')} {tuple(p.shape)}".encode() + head)
    return digest.hexdigest()[:16]
