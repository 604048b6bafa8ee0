"""What the values of a configuration must be, alone and beside one another; told in one sentence each.

Imports neither torch nor Hydra. `infini_bench.config` asks all of it of every run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from infini_bench import schema
from infini_bench.errors import UserError
from infini_bench.outside import is_outside
from infini_bench.schema import (
    BooksumConfig,
    MemoryConfig,
    MQARConfig,
    NeedlesConfig,
    PasskeyConfig,
    RunConfig,
)
from infini_bench.units import parse_length

Rule = tuple[Callable[[Any], bool], str]  # what must hold, and how to say so after "must be"


def _one_of(options: tuple[str, ...]) -> Rule:
    return lambda value: value in options, f"one of {', '.join(options)}"


def _some_of(options: tuple[str, ...]) -> Rule:
    names = f"one or more of {', '.join(options)}, each once"
    return lambda value: bool(value) and set(value) <= {*options} and len({*value}) == len(value), names


def _rising(least: int, words: str) -> Rule:
    """At least one whole number, each larger than the one before."""
    return (
        lambda value: bool(value) and value[0] >= least and value == sorted(set(value)),
        f"{words} in rising order, from {least} on",
    )


_NOT_NEGATIVE: Rule = (lambda value: value >= 0, "0 or more")
_POSITIVE: Rule = (lambda value: value > 0, "above 0")
_SHARE: Rule = (lambda value: 0 <= value <= 1, "between 0 and 1")
_DECAY: Rule = (lambda value: 0 <= value < 1, "at least 0 and below 1")
_ANY: Rule = (lambda value: True, "")
_RULES: dict[str, Rule] = {
    "seed": _NOT_NEGATIVE,
    "device": (lambda value: value.split(":")[0] in schema.DEVICES, f"one of {', '.join(schema.DEVICES)}"),
    "decoder.init_std": _POSITIVE,
    "decoder.rope_theta": _POSITIVE,
    "memory.kind": (
        lambda value: value in schema.MEMORY_KINDS or is_outside(value),
        f"one of {', '.join(schema.MEMORY_KINDS)}, or FILE.py:CLASS",
    ),
    "memory.update": _one_of(schema.UPDATES),
    "memory.features": _one_of(schema.FEATURES),
    "memory.normaliser": _one_of(schema.NORMALISERS),
    "memory.decay": (lambda value: 0 < value < 1, "above 0 and below 1, or null"),
    "memory.gate_frozen": _SHARE,
    "memory.local": _one_of(schema.LOCALS),
    "memory.compression": _one_of(schema.COMPRESSIONS),
    "memory.index": _one_of(schema.INDEXES),
    "memory.layers": _rising(0, "layer numbers"),
    "base.save": _one_of(schema.SAVES),
    "memory.backend": _one_of(schema.BACKENDS),
    "memory.gate_start": _ANY,
    "memory.gate_split": _ANY,
    "memory.write_start": _ANY,
    "memory.write_split": _ANY,
    "memory.write_cost": _NOT_NEGATIVE,
    "memory.write_floor": _SHARE,
    "memory.gradient_depth": (
        lambda value: value >= 1,
        "1 or more segments (1: no gradient crosses a border), or null for all",
    ),
    "data.source": _one_of(schema.SOURCES),
    "data.vocab_size": (lambda value: value >= 256, "at least 256, the number of bytes"),
    "task.split": _one_of(schema.SPLITS),
    "task.max_tokens": (lambda value: value >= 2, "2 or more (--length; a first token is read, not scored)"),
    "task.digits": (lambda value: 1 <= value <= 18, "between 1 and 18"),
    "task.depths": (bool, "at least one depth"),
    "task.lm_weight": _NOT_NEGATIVE,
    "task.own_segment": _SHARE,
    "task.text_share": _SHARE,
    "task.crossing": _SHARE,
    "task.straddling": _SHARE,
    "task.symbols": (lambda value: value >= 2, "2 or more"),
    "task.fillers": _some_of(schema.FILLERS),
    "task.train_fillers": _some_of(schema.FILLERS),
    "task.kinds": _some_of(schema.NEEDLES),
    "task.train_kinds": _some_of(schema.NEEDLES),
    "task.questions": _some_of(schema.QUESTIONS),
    "task.train_questions": _some_of(schema.QUESTIONS),
    "task.values": (lambda value: value >= 2, "2 or more"),
    "task.distractors": (lambda value: 1 <= value <= 100, "between 1 and 100"),
    "task.segments_after": _rising(0, "numbers of segments"),
    "task.pairs": _rising(1, "numbers of pairs"),
    "task.train_pairs": _rising(1, "numbers of pairs"),
    "task.temperature": (lambda value: value > 0, "above 0 (task.greedy=true takes the likeliest token)"),
    "task.top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "task.baseline": _one_of(schema.BASELINES),
    "task.sentences": _rising(1, "numbers of sentences"),
    "task.gates": (lambda value: all(0 <= g <= 1 for g in value), "numbers between 0 and 1"),
    "task.after": _rising(1, "numbers of segments"),
    "task.ratios": (
        lambda value: bool(value) and value[0] > 0 and value == sorted(set(value)),
        "numbers above 0 in rising order",
    ),
    "task.distances": _rising(1, "numbers of segments"),
    "task.keys": _some_of(schema.KEYS),
    "task.between": _some_of(schema.BETWEEN),
    "task.cosine": _SHARE,
    "task.level": _one_of(schema.LEVELS),
    "task.modes": _some_of(schema.MODES),
    "task.forms": _some_of(schema.FORMS),
    "task.against": (
        lambda value: not value or _some_of(schema.AGAINST)[0](value),
        f"some of {', '.join(schema.AGAINST)}, each once",
    ),
    "task.per_segment": (
        lambda value: bool(value) and all(n == "all" or (n.isdecimal() and int(n)) for n in value),
        'numbers of writes, or "all"',
    ),
    "trainer.optimizer": _one_of(schema.OPTIMIZERS),
    "trainer.precision": _one_of(schema.PRECISIONS),
    "precision": _one_of(schema.PRECISIONS[1:]),
    "trainer.parallel": _one_of(schema.PARALLELS),
    "trainer.warmup": _NOT_NEGATIVE,
    "trainer.min_lr": _SHARE,
    "trainer.weight_decay": _NOT_NEGATIVE,
    "trainer.beta1": _DECAY,
    "trainer.beta2": _DECAY,
    "trainer.keep": _POSITIVE,
    "trainer.curriculum": (
        lambda value: all(n > 0 for n in value) and value == sorted(set(value)),
        "numbers of segments in rising order",
    ),
}


def check_value(key: str, value: Any) -> None:
    """Numbers are positive unless `_RULES` says otherwise; None means "not set" and is always fine."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    holds, words = _RULES.get(key, _POSITIVE if numeric else _ANY)
    finite = not numeric or abs(value) < float("inf")
    if value is not None and not (finite and holds(value)):
        raise UserError(f"{key} must be {words or 'a finite number'}, not {value}.")


def check_decoder(cfg: RunConfig) -> None:
    d = cfg.decoder
    if d.head_dim is None and d.dim % d.heads:
        raise UserError(f"decoder.dim={d.dim} is not a multiple of decoder.heads={d.heads}; change one.")
    if (d.head_dim or d.dim // d.heads) % 2:
        raise UserError(
            "The head size (decoder.head_dim, or dim / heads) must be even for the rotary embedding."
        )
    if d.heads % (d.kv_heads or d.heads):
        raise UserError(
            f"decoder.heads={d.heads} is not a multiple of decoder.kv_heads={d.kv_heads}; change one."
        )


def check_memory(memory: MemoryConfig) -> None:
    """Raises UserError for settings of a memory that do not fit one another."""
    n = memory.segment
    if memory.kind == "compressed" and (memory.rate < 1 or n % memory.rate):
        raise UserError(f"memory.segment={n} is not a multiple of memory.rate={memory.rate}; change one.")
    if memory.kind == "sink" and memory.sinks > n:
        raise UserError(f"memory.sinks={memory.sinks} is more than memory.segment={n}; change one.")
    if memory.window == 1 and {memory.kind, memory.local} & {"sliding", "sink"}:
        raise UserError("memory.window=1 shows a token nothing but itself; set 2 or more.")
    normalised = memory.normaliser not in ("none", "norm")
    if memory.update == "delta_token" and normalised:
        raise UserError("memory.update=delta_token keeps no z; add memory.normaliser=none or norm.")
    if memory.update in ("delta", "delta_corrected") and not normalised:
        raise UserError(
            f"memory.update={memory.update} needs memory.normaliser=sum, mean or max; "
            "without one take memory.update=delta_token."
        )
    if memory.kind == "armt" and memory.normaliser not in ("sum", "max"):
        raise UserError(f"memory.kind=armt has memory.normaliser=sum or max, not {memory.normaliser}.")
    for name in ("write_cost", "write_floor"):
        if memory.kind == "compressive" and getattr(memory, name) and not memory.write_gate:
            raise UserError(
                f"memory.{name}={getattr(memory, name)} is about write strengths, which only a memory "
                "trained with memory.write_gate=true has; leave it out, or train one."
            )
    if memory.floor_trained and not memory.write_floor:
        raise UserError("memory.floor_trained=true needs a floor; add memory.write_floor=0.05, for example.")
    if memory.stride < 1:
        raise UserError(f"memory.stride={memory.stride} is no number of keys; set 1 or more.")


def check_trainer(cfg: RunConfig) -> None:
    """Nothing set would be ignored: a task's length beside a curriculum, the best of one checkpoint."""
    if cfg.trainer.best and not cfg.trainer.validate_every:
        raise UserError(
            "trainer.best=true chooses among several validations; add trainer.validate_every=20, for example."
        )
    segments, levels = getattr(cfg.task, "segments", None), cfg.trainer.curriculum
    if segments is not None and levels and levels[-1] != segments:
        fitting = [*(str(level) for level in levels if level < segments), str(segments)]
        raise UserError(
            f"task.segments={segments}, but trainer.curriculum ends at {levels[-1]}: set both, "
            f"e.g. trainer.curriculum=[{','.join(fitting)}]."
        )


def check_pairs(task: MQARConfig) -> None:
    most = max(*task.pairs, *task.train_pairs)
    if task.vocabulary // 2 < most:
        raise UserError(
            f"task.vocabulary={task.vocabulary} has {task.vocabulary // 2} keys: too few for {most} pairs."
        )


def check_passkey(task: PasskeyConfig) -> None:
    shares = {name: getattr(task, name) for name in schema.PASSKEY_KINDS}
    if sum(shares.values()) > 1:
        named = " and ".join(f"task.{name}={share}" for name, share in shares.items() if share)
        raise UserError(f"{named} are shares of the same rows; together they must be at most 1.")


def check_needles(task: NeedlesConfig) -> None:
    if named := [depth for depth in task.depths if depth.startswith("end")]:
        raise UserError(f"The depth {named[0]} belongs to task=passkey; give start, middle or percent.")


def check_booksum(task: BooksumConfig) -> None:
    if task.protocol not in schema.PROTOCOLS:
        there = f"one of {', '.join(schema.PROTOCOLS)}"
        raise UserError(f"task.protocol must be {there}, not {task.protocol}.")
    lengths = [parse_length(length) for length in task.lengths]
    if lengths != sorted({*lengths}):
        raise UserError(f"task.lengths must rise, each once, not [{','.join(task.lengths)}].")
    if 2 * task.map_new_tokens > task.map_tokens:
        raise UserError(
            f"task.map_new_tokens={task.map_new_tokens} is more than half of task.map_tokens="
            f"{task.map_tokens}: summaries of parts would not get shorter; change one."
        )


def check_sources(cfg: RunConfig) -> None:
    if cfg.data.source == "local" and not cfg.data.path:
        raise UserError("data.path is not set; write data.path=FILE_OR_FOLDER.")
    if cfg.data.source == "hub" and not cfg.data.hub_id:
        raise UserError("data.hub_id is not set; write data.hub_id=OWNER/NAME.")


def check_base(cfg: RunConfig) -> None:
    b = cfg.base
    if b.model is None and (b.freeze or b.lora is not None or b.save != "full"):
        raise UserError("base.freeze, base.lora and base.save are for a pretrained model; set base.model.")
    if b.lora and b.save == "full":
        raise UserError("LoRA is saved as changes: add base.save=changes; `infini-bench export` merges it.")
    if b.save == "changes" and not (b.freeze or b.lora):
        raise UserError("base.save=changes needs frozen weights; add base.freeze=true or base.lora=RANK.")
