"""From what the user names to a `Subject`: our models, the peers, subjects of his own, and modules recognised
from their signature and a first trial call.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from infini_bench import outside
from infini_bench.contract.own import OwnModel
from infini_bench.contract.peers import PEERS
from infini_bench.contract.subject import Subject, UnobservableError, draw
from infini_bench.errors import UserError
from infini_bench.memory.base import Memory
from infini_bench.schema import MemoryConfig
from infini_bench.units import suggest

Values = dict[str, Any]

# What modules call these things, likeliest first.
STATES = ("state", "states", "memory", "memories", "past_memories", "mems", "mem", "past_key_values", "cache")
OUTPUTS = ("logits", "last_hidden_state", "output", "outputs", "out")
SIZES = {
    "dim": ("dim", "d_model", "hidden_size", "embed_dim", "dim_input", "input_dim", "in_features"),
    "vocab": ("vocab", "vocab_size", "num_tokens", "n_vocab", "num_embeddings"),
    "segment": ("segment", "segment_len", "segment_length", "segment_size", "chunk_size"),
}
OWN_SEGMENT = 16  # of our own models under check, unless the user says otherwise
ADAPTER = "write an adapter as infini_bench/contract/subject.py says"


def subject_of(
    target: str, settings: Values, sizes: dict[str, int], models: Mapping[str, MemoryConfig], seed: int = 0
) -> Subject:
    """The subject that ``target`` names, its weights drawn from ``seed``.

    target: a name of ``models``, of `PEERS`, or code as FILE.py:NAME or MODULE:NAME. settings: constructor
    arguments. sizes: dim, vocab and segment where the user gave them. Raises UserError in one sentence.
    """
    torch.manual_seed(seed)
    if target in models:
        return own(models[target], target, settings, sizes)
    if target in PEERS:
        return constructed(PEERS[target], target, {**settings, **sizes})
    if not outside.is_outside(target):
        known = [*models, *PEERS]
        raise UserError(
            f'There is no model "{target}"{suggest(target, known)}; write one of {", ".join(known)}, '
            "or code as FILE.py:NAME or MODULE:NAME."
        )
    thing = outside.load(target)
    if isinstance(thing, type) and issubclass(thing, Memory):
        outside.name(target)
        return own(MemoryConfig(kind=target), target, {"options": settings} if settings else {}, sizes)
    module = thing if isinstance(thing, nn.Module) else constructed(thing, target, settings)
    if isinstance(module, Subject):
        return with_sizes(module, sizes)
    if not isinstance(module, nn.Module):
        what = f"an object of type {type(module).__name__}"
        raise UserError(f"{target} gives {what}, not a torch module; {ADAPTER}.")
    return Recognised(module, settings, sizes)


def own(memory: MemoryConfig, target: str, settings: Values, sizes: dict[str, int]) -> Subject:
    """A model of ours; settings are fields of `MemoryConfig`."""
    small = {
        "segment": OWN_SEGMENT,
        **({"entries": 3 * OWN_SEGMENT, "neighbours": 4} if memory.kind == "knn" else {}),
        **({"neighbours": 4} if memory.kind == "retrieval" else {}),
    }
    unknown = [key for key in {**settings, **sizes} if not hasattr(memory, key)]
    if unknown:
        raise UserError(f"A memory has no setting {unknown[0]}; its fields are in infini_bench/schema.py.")
    return constructed(OwnModel, target, {"memory": replace(memory, **{**small, **settings, **sizes})})


def constructed(thing: Any, target: str, settings: Values) -> Any:
    """``thing(**settings)``, with what is missing or wrong told in a sentence."""
    if not callable(thing):
        raise UserError(f"{target} is no class, function or module; name the one to check.")
    try:
        return thing(**settings)
    except ImportError as error:
        raise UserError(f"{target} cannot be imported here ({error}); install it first.") from error
    except UserError:
        raise
    except Exception as error:  # a foreign constructor
        words = f"{target} cannot be made ({outside.where(error)}); give its arguments as --arg NAME=VALUE."
        raise UserError(words) from error


def with_sizes(subject: Subject, sizes: dict[str, int]) -> Subject:
    """A subject of the user's own, which says its sizes itself."""
    if sizes:
        raise UserError(f"{type(subject).__name__} says its own {', '.join(sizes)}; leave the options out.")
    if subject.vocab is None and subject.dim is None:
        raise UserError(f"{type(subject).__name__} must set vocab (its inputs are tokens) or dim (vectors).")
    return subject


class Recognised(Subject):
    """A module whose call is recognised: which inputs, which outputs, which argument is the state.

    Inputs are token ids if it has an embedding and takes them, else vectors. Outputs are the tensor
    (B, T, ...) that it returns: alone, first in a tuple, or under one of `OUTPUTS`. The state is the argument
    named as in `STATES`, and what comes back under the same name, or second. Padding, labels and generation
    are known for Hugging Face's causal models only.
    """

    def __init__(self, module: nn.Module, settings: Values, sizes: dict[str, int]):
        super().__init__()
        self.module = module.eval()
        self.accepts = [*inspect.signature(module.forward).parameters]
        self.state_name = next((name for name in STATES if name in self.accepts[1:]), None)
        self.fixed: Values = {"use_cache": True} if self.state_name and "use_cache" in self.accepts else {}
        self.segment = size_of(module, {**settings, **sizes}, "segment") or Subject.segment
        self.is_hub_model = isinstance(module, GenerationMixin)
        self.only_loss = False
        self.settle(settings, sizes)

    @torch.no_grad()
    def settle(self, settings: Values, sizes: dict[str, int]) -> None:
        """Find out by trial calls whether inputs are ids or vectors, and whether a state comes back."""
        tables = [m.num_embeddings for m in self.module.modules() if isinstance(m, nn.Embedding)]
        layers = [m.in_features for m in self.module.modules() if isinstance(m, nn.Linear)]
        settings = {**settings, **sizes}
        vocab = size_of(self.module, settings, "vocab") or next(iter(tables), None)
        dim = size_of(self.module, settings, "dim") or next(iter(layers), None)
        trials = [("vocab", vocab)] * (bool(tables) and "dim" not in sizes) + [("dim", dim)] * (
            "vocab" not in sizes
        )
        errors = []
        for kind, number in trials:
            if number is None:
                continue
            self.vocab, self.dim = (number, None) if kind == "vocab" else (None, number)
            try:
                self.trial()
            except Exception as error:  # the module says no in its own way
                errors.append(outside.where(error))
            else:
                return
        why = f" ({errors[-1]})" if errors else "; give --dim or --vocab"
        raise UserError(
            f"{type(self.module).__name__} cannot be called with token ids or vectors{why}; {ADAPTER}."
        )

    def trial(self) -> None:
        """Two calls, the second with the state of the first. Raises whatever the module raises."""
        x = draw(self, 2, self.segment, 0)
        result = self.module(x, **self.fixed)
        self.only_loss = isinstance(result, Tensor) and result.dim() == 0
        self.has_state = False
        if self.only_loss:
            return
        y, state = self.parts(result)
        if y.shape[:2] != x.shape[:2]:
            raise ValueError(f"inputs {(*x.shape,)} give outputs {(*y.shape,)}")
        self.has_state = self.state_name is not None and state is not None
        if self.has_state:
            self.forward(x, state)

    def parts(self, result: Any) -> tuple[Tensor, Any]:
        """Outputs and state in what the module returned."""
        if isinstance(result, Tensor):
            return result, None
        fields = result._asdict() if hasattr(result, "_asdict") else result
        if isinstance(fields, Mapping):
            name = next((n for n in OUTPUTS if isinstance(fields.get(n), Tensor)), next(iter(fields)))
            return fields[name], fields.get(self.state_name or "")
        return result[0], result[1] if len(result) > 1 else None

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        if self.only_loss:
            raise UnobservableError("it returns only a loss")
        given = {} if state is None or self.state_name is None else {self.state_name: state}
        return self.parts(self.module(x, **self.fixed, **given))

    def padded(self, x: Tensor, mask: Tensor) -> Tensor:
        if not self.is_hub_model:
            return super().padded(x, mask)
        places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if "position_ids" in self.accepts else {}
        return self.module(x, attention_mask=mask.long(), **places).logits

    def generate(self, prompt: Tensor, tokens: int) -> Tensor:
        if not self.is_hub_model:
            return super().generate(prompt, tokens)
        out: Any = self.module.generate(prompt, max_new_tokens=tokens, do_sample=False)  # type: ignore[operator]
        return out[:, prompt.shape[1] :]

    def loss(self, ids: Tensor, kept: Tensor) -> Tensor:
        if not self.is_hub_model:
            return super().loss(ids, kept)
        return self.module(ids, labels=ids.masked_fill(~kept, -100)).loss


def size_of(module: nn.Module, settings: Values, name: str) -> int | None:
    """A size by what it is called in the user's settings, in the module or in its ``config``."""
    for source in (settings, vars(module), vars(getattr(module, "config", None) or object)):
        found = [source[alias] for alias in SIZES[name] if isinstance(source.get(alias), int)]
        if found:
            return found[0]
    return None
