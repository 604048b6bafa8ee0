"""Installed peers, timed in the same run as our model at equal sizes (``task.vs``, ``--vs``).

* inference: segment by segment with its state passed on, without gradient. A peer computes logits of every
  token, so for the ratio ours are computed for every token, too, in calls of ``task.chunk``.
* training: its loss over a document and the backward pass, then the optimizer's update.

bf16 on a GPU through autocast, with float32 weights; ``extra["params"]`` counts them. What is particular to
each package stands at its class in `peer_models`. flash-linear-attention has operators, no model:
`efficiency_fla`.
"""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from infini_bench.errors import UserError
from infini_bench.units import suggest

from . import efficiency_fla as fla
from .base import Row
from .efficiency_model import Subject, in_turns
from .peer_models import PEERS

log = logging.getLogger(__name__)


def weights(subject: Subject) -> int:
    return sum(p.numel() for p in subject.model.parameters())


def check_peers(task: Any) -> None:
    """Raises UserError, before any work, for a peer that cannot be timed here beside this model."""
    known = (*PEERS, fla.NAME)
    for name in task.task.vs:
        if name not in known:
            raise UserError(f"There is no peer {name}{suggest(name, known)}; --vs knows {', '.join(known)}.")
        level = "operator" if name == fla.NAME else "model"
        if task.task.level != level:
            raise UserError(f"{name} is timed by profile --level {level}, not --level {task.task.level}.")
    if task.task.level == "model" and task.task.vs:
        unlike = {name: PEERS[name].unlike(task.cfg) for name in task.task.vs}
        if all(unlike.values()):
            raise UserError("; ".join(f"{name} {why}" for name, why in unlike.items()) + ".")
        if "train" not in task.task.modes and "forward" not in task.task.modes:
            raise UserError("--vs times forward and train; task.modes has neither.")
    for name in task.task.vs:  # last, since what is wrong anyway is no reason to install anything
        if name == fla.NAME:
            installed(name, fla.MODULE, name)
            fla.check(task)
        else:
            installed(name, PEERS[name].module, PEERS[name].install)


def installed(name: str, module: str, install: str) -> Any:
    """The package's module. Raises UserError if it is missing or cannot be imported."""
    if find_spec(module.partition(".")[0]) is None:
        raise UserError(f"{name} is not installed; run `pip install {install}`, or leave it out of --vs.")
    try:
        return import_module(module)
    except Exception as error:  # whatever somebody else's code raises
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{name} is installed but cannot be imported ({why}); leave it out of --vs."
        ) from error


def measure_peers(own: Subject) -> list[Row]:
    """Rows of each peer alone, ours out of the way, and the ratios in turns: its time over ours."""
    task, rows = own.task, []
    modes: list[str] = [mode for mode in ("train", "forward") if mode in own.modes]
    for name in task.task.vs:
        columns: dict[str, Any] = {"condition": task.shape, "extra": {"variant": name}}
        if why := PEERS[name].unlike(task.cfg):  # beside another one that is like it
            rows.append(task.missing("ratio_to_peer_inference", why, length=task.lengths[0], **columns))
            continue
        own.model.to("cpu")
        peer = PEERS[name](task)
        peer.modes = modes
        columns["extra"]["params"] = weights(peer)
        log.info(
            "%s has %s parameters, %s %s", name, f"{weights(peer):,}", task.cfg.model, f"{weights(own):,}"
        )
        for mode, by_length in peer.climb().items():
            for tokens, times in by_length.items():
                rows += task.timed(mode, times, tokens, None, length=tokens, **columns)
        own.model.to(task.device)
        mine = Subject(task, own.model, every=True)
        for mode, tokens, pair in in_turns(mine, peer, modes):
            metric = f"ratio_to_peer_{'inference' if mode == 'forward' else mode}"
            found = pair if isinstance(pair, str) else pair[::-1]
            rows += task.ratio(metric, found, length=tokens, **columns)
    return rows
