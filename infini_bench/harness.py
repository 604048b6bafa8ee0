"""Our models in EleutherAI's lm-evaluation-harness: each request is one document, read once with its memory.

Nothing is truncated and no window slides: a context of any length is streamed, the state carried from its
first token to its last. Requests share nothing but the state of a common context, and states are values.
Needs the package lm-eval: pip install 'infini-bench[lmeval]'.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from infini_bench.cache import MemoryCache
from infini_bench.data import Tokenizer
from infini_bench.errors import UserError
from infini_bench.models import MemoryLlamaForCausalLM
from infini_bench.remember import CHUNK, open_model
from infini_bench.stream import chunked, feed, generate, prefill, stream_losses

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UserError("lm-eval is not installed: pip install 'infini-bench[lmeval]'.") from error

NEW_TOKENS = 256  # of an answer, where a task does not say
READABLE = ("bpe", "pretrained")  # tokenizers that Hugging Face's classes can read, too


class MemoryLM(LM):
    """A model of ours as the harness calls one. Documents begin with the end-of-text token."""

    def __init__(self, model: MemoryLlamaForCausalLM, tokenizer: Tokenizer, chunk: int = CHUNK):
        super().__init__()
        self.model, self.text = model, tokenizer
        self.size = max(chunk // model.segment, 1) * model.segment
        self._last: tuple[bytes, MemoryCache | None] = (b"", None)

    def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        """Of each (context, continuation): log-likelihood in nats, and whether greedy decoding says it."""
        return [self._scored(*request.args) for request in requests]

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
        """Log-likelihood of each text, whole, in nats."""
        documents = (self._ids(request.args[0]) for request in requests)
        return [
            -float(stream_losses(self.model, ids, self.size)[0].sum(dtype=np.float64)) for ids in documents
        ]

    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        """What follows each context, up to the first of the strings ``until``, which is left out."""
        return [self._generated(*request.args) for request in requests]

    def _ids(self, text: str) -> np.ndarray:
        return np.concatenate([[self.text.eos_id], self.text.encode(text)])[None]

    def _scored(self, context: str, continuation: str) -> tuple[float, bool]:
        spaces = len(context) - len(context.rstrip())
        if spaces:  # they belong to the continuation's first token
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        ids, border = self._ids(context + continuation), self._ids(context).shape[1]
        with torch.no_grad():
            inputs = torch.from_numpy(ids[:, border - 1 : -1].astype(np.int64)).to(self.model.device)
            logits, _ = self.model.step(inputs, self._state(ids[:, : border - 1]))
        assert logits is not None
        targets = torch.from_numpy(ids[0, border:].astype(np.int64)).to(logits.device)
        nats = logits[0].log_softmax(-1).gather(-1, targets[:, None]).double().sum()
        return float(nats), bool((logits[0].argmax(-1) == targets).all())

    def _state(self, ids: np.ndarray) -> MemoryCache | None:
        """The state after a context; of the last one it is kept, as choices of a question share it."""
        if ids.tobytes() != self._last[0]:
            self._last = ids.tobytes(), feed(self.model, chunked(ids, self.size))
        return self._last[1]

    def _generated(self, context: str, settings: dict[str, Any]) -> str:
        stops = settings.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        temperature = float(settings.get("temperature") or 0)
        sampled = bool(settings.get("do_sample")) and temperature > 0
        logits, state = prefill(self.model, chunked(self._ids(context), self.size))
        longest = int(settings.get("max_gen_toks") or NEW_TOKENS)
        said = generate(
            self.model,
            logits,
            state,
            longest,
            eos_id=self.text.eos_id,
            greedy=not sampled,
            temperature=temperature or 1.0,
            top_p=float(settings.get("top_p") or 1.0),
            draws_BT=torch.rand(1, longest, generator=torch.Generator().manual_seed(0)) if sampled else None,
        )
        text = self.text.decode(said[0])
        return text[
            : min([place for stop in stops if stop and (place := text.find(stop)) >= 0], default=len(text))
        ]


def run_harness(
    name: str,
    tasks: Sequence[str],
    lengths: Sequence[int] = (),
    limit: int | None = None,
    include: Path | None = None,
    device: str = "auto",
) -> dict[str, dict[str, Any]]:
    """The harness's own results of ``name`` (see `open_model`): task -> metric -> value.

    lengths: of RULER's tasks, in tokens. limit: documents a task. include: a folder with tasks of one's own.
    Raises UserError for a task that is not there, or whose data is not, and for RULER's of a model of bytes.
    """
    model, tokenizer = open_model(name, device)
    with TemporaryDirectory() as folder:  # RULER measures its prompts with the model's tokenizer
        tokenizer.save(Path(folder))
        metadata: dict[str, Any] = {"max_seq_lengths": [*lengths]} if lengths else {}
        if tokenizer.kind in READABLE:
            metadata["tokenizer"] = folder
        manager = _manager(tasks, include, metadata)
        try:
            found = simple_evaluate(
                MemoryLM(model, tokenizer),
                tasks=[*tasks],
                limit=limit,
                task_manager=manager,
                bootstrap_iters=0,
                log_samples=False,
            )
        except (OSError, LookupError, ImportError, AssertionError, ValueError) as error:  # what tasks raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            want = "data, a package or the model's tokenizer is missing, or a length too short"
            raise UserError(f"{', '.join(tasks)}: {want} ({reason.rstrip('.')}).") from error
    assert found is not None
    return found["results"]


def _manager(tasks: Sequence[str], include: Path | None, metadata: dict[str, Any]) -> TaskManager:
    """Who knows all ``tasks`` and hands ``metadata`` to those that make their prompts themselves.

    Tasks that come with the harness take a while to list, so only if needed.
    """
    if include is not None:
        own = TaskManager(include_path=str(include), include_defaults=False, metadata=metadata)
        if all(task in own.all_tasks for task in tasks):
            return own
    manager = TaskManager(include_path=str(include) if include else None, metadata=metadata)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UserError(f'lm-eval has no task "{unknown[0]}"; `lm-eval ls tasks` lists them.')
    return manager
