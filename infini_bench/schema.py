"""Typed configuration of a run. Imports neither torch nor Hydra, so that it loads in milliseconds.

Every key of ``conf/`` is a field here; ``None`` means "not set", never a magic number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SPLITS = ("train", "validation", "test")
MEMORY_KINDS = (
    *("compressive", "xl", "block", "sliding", "full", "knn", "compressed", "sink", "sparse", "kernel"),
    *("retrieval", "rmt", "armt", "autocompressor"),
)
LOCALS = ("block", "sliding", "xl", "sparse", "kernel")
UPDATES = ("linear", "delta", "delta_corrected", "delta_token")
FEATURES = ("elu1", "relu", "relu2", "exp", "dpfp", "gelu", "softmax")
NORMALISERS = ("sum", "mean", "max", "none", "norm")
BACKENDS = ("auto", "eager", "triton")
COMPRESSIONS = ("conv", "mean", "max")
INDEXES = ("auto", "torch", "faiss")
KEYS = ("random", "collinear", "duplicated", "overwritten", "zipf")
BETWEEN = ("constant", "random")
SOURCES = ("embedded", "local", "hub")
OPTIMIZERS = ("adamw", "adafactor")
PRECISIONS = ("auto", "float32", "bf16")
PARALLELS = ("ddp", "fsdp")
SAVES = ("full", "changes")
DEVICES = ("auto", "cpu", "cuda")
FILLERS = ("constant", "text")
NEEDLES = ("number", "uuid", "multikey", "multivalue")
PASSKEY_KINDS = ("own_segment", "crossing", "straddling")  # of training rows, by the settings of their shares
ANY_ALIGNMENT = "any alignment"  # of the protocol of passkey rows with task.any_alignment
QUESTIONS = ("after", "before")
PROTOCOLS = ("prefix", "whole_book")
EXTRACTIVE = ("lead", "random", "lexrank", "oracle")  # summaries of a book's own sentences, by no model
BASELINES = (*EXTRACTIVE, "map_reduce")
LEVELS = ("model", "operator")
MODES = ("forward", "train", "decode")
FORMS = ("eager", "compiled", "triton")
AGAINST = ("local", "full")


def _of(*kinds: str, default: Any = None) -> Any:
    """A field that only memories of these kinds read; see `infini_bench.unread`."""
    return field(default=default, metadata={"kinds": kinds})


@dataclass
class MemoryConfig:
    """What an attention layer remembers beyond the tokens of its own segment.

    kind: ``compressive`` (Infini-attention), ``xl`` (one cached segment), ``block`` (nothing),
    ``sliding`` (the last ``window`` tokens), ``full`` (everything), ``knn`` (Memorizing Transformers),
    ``compressed`` (Compressive Transformer), ``sink`` (the first ``sinks`` tokens and the last ``window``),
    ``retrieval`` (two segments, and the best ``neighbours`` of all older keys; of BART or LED, Unlimiformer);
    inside the own segment only: ``sparse``, ``kernel`` (linear attention);
    a whole model's memory in tokens: ``rmt``, ``armt`` or ``autocompressor``;
    or a subclass of ``Memory`` outside this package, as FILE.py:CLASS or MODULE:CLASS.
    """

    kind: str = "compressive"
    segment: int = 128  # N, tokens
    # linear (Eq. 8) | delta (Eq. 9) | delta_corrected | delta_token
    update: str = _of("compressive", default="linear")
    features: str = _of("compressive", default="elu1")  # sigma of Eq. 7-9
    # what a read is divided by: sum (Eq. 7) | mean | max | none | norm; armt: sum | max
    normaliser: str = _of("compressive", "armt", default="sum")
    decay: float | None = _of("compressive")  # share kept at a boundary, learned from here; unset = all
    write_gate: bool = _of("compressive", default=False)  # each key's write strength depends on the key
    # its bias at the start, before the sigmoid; and what every second KV head has more, the others less
    write_start: float = _of("compressive", default=2.0)
    write_split: float = _of("compressive", default=0.0)
    # added to the training loss a token and layer, times the mean strength: what is written has to pay
    write_cost: float = _of("compressive", default=0.0)
    # outside training, keys with less strength are not written at all
    write_floor: float = _of("compressive", default=0.0)
    floor_trained: bool = _of("compressive", default=False)  # nor in training
    # beta at the start, before the sigmoid of Eq. 10
    gate_start: float = _of("compressive", "knn", default=0.0)
    # added to beta of every second head, subtracted from the others
    gate_split: float = _of("compressive", default=0.0)
    gate_input: bool = _of("compressive", default=False)  # beta also depends on the query
    gate_frozen: float | None = _of("compressive")  # g of all heads, 0 to 1, not trained; unset = learned
    # attention beside the memory: block | sliding | xl | sparse | kernel
    local: str = _of("compressive", default="block")
    window: int | None = _of("sliding", "sink")  # tokens a query sees, itself included; unset = 2N
    sinks: int = _of("sink", default=4)  # first tokens of the document that stay visible; at most N
    # a query sees the last so many keys of its segment, and each so-many-th before
    stride: int = _of("sparse", default=16)
    compressed: int | None = _of("compressed")  # slots, oldest first out; unset = N
    rate: int = _of("compressed", default=4)  # tokens a slot; divides N
    # conv (learns by reconstructing attention) | mean | max
    compression: str = _of("compressed", default="conv")
    entries: int = _of("knn", default=65536)  # keys and values stored, oldest first out
    # of them that a query attends to; retrieval: of all older keys
    neighbours: int = _of("knn", "retrieval", default=32)
    # who finds them: torch | faiss (CPU) | auto (faiss if it is there, on the CPU)
    index: str = _of("knn", "retrieval", default="auto")
    layer: int | None = _of("knn")  # from 0; unset = at three quarters of the depth
    tokens: int = _of("rmt", "armt", "autocompressor", default=16)  # memory tokens m that a segment writes
    # of a query or key before its features, which are 6 times as many
    key_size: int = _of("armt", default=16)
    layers: list[int] | None = None  # attention layers with this memory, from 0; others: block. Unset = all
    # the document is cut into blocks of so many segments, and no gradient leaves its block: 1 = none crosses
    # a border; unset = one block
    gradient_depth: int | None = _of("compressive", "rmt", "armt", "autocompressor")
    # of a memory outside this package, which may read every other field too
    options: dict[str, Any] = field(default_factory=dict, metadata={"kinds": ()})
    # eager | triton (an error where it cannot run) | auto (where it can)
    backend: str = _of("compressive", default="auto")


@dataclass
class DecoderConfig:
    """Hugging Face Llama, from scratch."""

    layers: int = 2
    dim: int = 64
    heads: int = 4
    kv_heads: int | None = None  # unset = heads
    head_dim: int | None = None  # unset = dim / heads
    ffn: int | None = None  # unset = 4 dim
    rope_theta: float = 10000.0
    tie_embeddings: bool = True
    init_std: float = 0.02


@dataclass
class BaseConfig:
    """A pretrained model to which the memory is attached; its architecture then replaces ``decoder``."""

    model: str | None = None  # hub id, folder or GGUF file of a Llama, Mistral or Qwen2; unset = from scratch
    freeze: bool = False  # train the memory's own parameters only (and LoRA)
    lora: int | None = None  # rank of LoRA on every linear layer of the decoder; implies freeze
    save: str = "full"  # full (a Hugging Face folder) | changes (what was trained, on top of ``model``)


@dataclass
class DataConfig:
    """Where documents come from and how they become tokens."""

    name: str = "embedded"  # the dataset's name in tables
    source: str = "embedded"  # embedded | local | hub
    path: str | None = None  # local: a file or folder
    hub_id: str | None = None  # hub: e.g. emozilla/pg19
    hub_config: str | None = None  # hub: configuration name, if the set has several
    hub_revision: str | None = None  # hub: branch or commit; refs/convert/parquet: a script's rows
    text_column: str = "text"
    id_column: str | None = None  # unset = running number
    title_column: str | None = None
    summary_column: str | None = None  # a string, or a list of {source, text}
    filter: dict[str, str] = field(
        default_factory=dict
    )  # keep rows where column (dots reach into JSON) equals value
    max_documents: int | None = None  # per split
    tokenizer: str = "bpe"  # bytes | bpe (trained on the train split) | a hub id or local folder
    vocab_size: int = 2048  # bpe
    cache_dir: str = ".cache/infini_bench"


@dataclass
class TaskConfig:
    """Base of the tasks; ``name`` picks the module in ``tasks/``."""

    name: str = "???"
    untrained = False  # no field: a task that asks random weights has no checkpoint, and trains nothing
    weightless = False  # no field: what is asked has no weights at all


@dataclass
class TrainedConfig(TaskConfig):
    """Base of the tasks that ask a trained model."""

    # memory settings that only the evaluation has; given to a training, they are those of its evaluations
    memory: dict[str, Any] = field(default_factory=dict)


@dataclass
class LMConfig(TrainedConfig):
    name: str = "lm"
    sequence: int = 512  # training tokens a sequence
    split: str = "test"
    max_documents: int | None = None  # of the evaluated split
    max_tokens: int | None = None  # of each evaluated document, from its start
    joined: bool = False  # read all documents as one stream; max_tokens is then its length
    chunk: int = 8192  # tokens fed a call when streaming; a CPU goes through them in pieces of about 2,048
    batch: int = 16  # documents whose memories are exchanged side by side
    controls: bool = True  # memory off, and another document's memory


@dataclass
class PasskeyConfig(TrainedConfig):
    name: str = "passkey"
    digits: int = 5
    segments: int = 4  # training length, in segments of the model
    own_segment: float = 0.0  # training: share of rows with the needle in the question's own segment
    text_share: float = 0.0  # training: share of rows with documents' text as filler
    train_any_alignment: bool = False  # training: questions start at any place of a segment, evenly
    crossing: float = 0.0  # training: share of rows whose question and answer lie in two segments
    straddling: float = 0.0  # training: share of rows whose needle lies in two segments
    lm_weight: float = 0.1  # of the haystack's own loss beside the answer's
    lengths: list[str] = field(default_factory=lambda: ["4K"])
    depths: list[str] = field(default_factory=lambda: ["start", "middle", "end_outside"])
    trials: int = 10
    batch: int = 10  # trials run side by side
    chunk: int = 8192
    any_alignment: bool = False  # trials up to a segment shorter: questions at any place of it, evenly
    controls: bool = True  # memory off
    protocol: str = "curriculum"  # the name of the training protocol in the table


@dataclass
class NeedlesConfig(TrainedConfig):
    name: str = "needles"
    digits: int = 10  # of a number
    distractors: int = 3  # multikey: needles of other keys
    values: int = 4  # multivalue: needles of one key
    segments: int = 16  # training length, in segments of the model
    own_segment: float = 0.2  # training: share of rows with the needle in the question's own segment
    lm_weight: float = 0.1  # of the text's own loss beside the answer's
    train_kinds: list[str] = field(default_factory=lambda: [*NEEDLES])
    train_fillers: list[str] = field(default_factory=lambda: ["text"])
    train_questions: list[str] = field(default_factory=lambda: [*QUESTIONS])
    kinds: list[str] = field(default_factory=lambda: [*NEEDLES])  # evaluated; the others with the first
    fillers: list[str] = field(default_factory=lambda: ["text", "constant"])
    questions: list[str] = field(default_factory=lambda: [*QUESTIONS])
    split: str = "test"  # whose documents are the text
    lengths: list[str] = field(default_factory=lambda: ["4K"])
    depths: list[str] = field(default_factory=lambda: ["start", "25", "middle", "75", "100"])
    trials: int = 10  # of each condition, length and depth
    batch: int = 10  # trials run side by side
    chunk: int = 8192
    controls: bool = True  # memory off
    protocol: str = "curriculum"


@dataclass
class BooksumConfig(TrainedConfig):
    name: str = "booksum"
    split: str = "test"
    protocol: str = "prefix"  # of training: prefix | whole_book
    train_input_tokens: int = 1024  # prefix: of the book, from its start
    gradient_segments: int = 8  # whole_book: the last so many, behind a book that is read without gradient
    train_summary_tokens: int = 256  # longer summaries are cut, and have no end
    train_kind: str | None = None  # of the summaries trained on, as the data name it (wikipedia); unset = all
    lm_weight: float = 0.1  # of the book's own loss beside the summary's
    baseline: str | None = None  # evaluated instead: lead | random | lexrank | oracle | map_reduce
    sentences: list[int] = field(default_factory=lambda: [5, 10, 20, 40, 80, 160])  # tried on validation
    map_tokens: int = 4096  # map_reduce: of a part that is summarised by itself
    map_new_tokens: int = 256  # map_reduce: of its summary, at most; at most half of the above
    input_tokens: int | None = None  # of the book, from its start; unset = all
    lengths: list[str] = field(default_factory=list)  # inputs evaluated, rising; empty = input_tokens alone
    kind: str | None = None  # of the references asked for, with the books that have one; unset = all
    max_books: int | None = None
    max_new_tokens: int = 1024
    temperature: float = 0.5
    top_p: float = 0.95
    greedy: bool = False
    samples: int = 1  # summaries a book
    batch: int = 8  # books whose summaries are written side by side, at all lengths and controls at once
    compile: bool = False  # compile the steps that write: pays for long summaries on a GPU
    chunk: int = 8192
    controls: bool = True  # memory off, another book's memory, the book's segments shuffled
    gates: list[float] = field(default_factory=list)  # controls with all gates at this value, 0 to 1

    @property
    def weightless(self) -> bool:  # type: ignore[override]
        """Whether what is evaluated is no model."""
        return self.baseline in EXTRACTIVE


@dataclass
class RecallConfig(TrainedConfig):
    name: str = "recall"
    symbols: int = 16  # that a key's or a value's symbol is drawn from, each from its own
    key: int = 2  # symbols of the key
    value: int = 2  # symbols of the value: chance is symbols ** -value
    segments: int = 4  # training length, in segments of the model
    train_fillers: list[str] = field(default_factory=lambda: list(FILLERS))  # constant | text, row by row
    lm_weight: float = 0.1  # of the filler's own loss beside the answer's
    fillers: list[str] = field(default_factory=lambda: list(FILLERS))  # evaluated; controls with the first
    segments_after: list[int] = field(default_factory=lambda: [2**n for n in range(13)])  # fact to question
    split: str = "test"  # whose documents are the text
    trials: int = 400
    batch: int = 400  # trials run side by side
    chunk: int = 8192
    controls: bool = True  # memory off, and another trial's memory
    protocol: str = "curriculum"


@dataclass
class MQARConfig(TrainedConfig):
    name: str = "mqar"
    vocabulary: int = 8192  # keys are its lower half, values its upper half
    power: float = 0.01  # of the law of the places of the questions: near ones are likelier below 1
    train_pairs: list[int] = field(default_factory=lambda: [4, 8, 16, 32, 64])  # one of these a row
    segments: int = 4  # training length, in segments of the model
    pairs: list[int] = field(default_factory=lambda: [4, 8, 16, 32, 64, 128, 256])
    segments_after: list[int] = field(default_factory=lambda: [0, 1, 4, 16, 64])  # pairs to questions
    trials: int = 100
    batch: int = 100  # trials run side by side
    chunk: int = 8192
    controls: bool = True  # memory off
    protocol: str = "curriculum"


@dataclass
class FootprintConfig(TaskConfig):
    name: str = "footprint"
    untrained = True
    after: list[int] = field(default_factory=lambda: [4, 16, 64])  # segments read when the state is counted
    shapes: bool = False  # tensors without values, for bodies too large to run here


@dataclass
class CapacityConfig(TaskConfig):
    name: str = "capacity"
    untrained = True
    keys: list[str] = field(default_factory=lambda: [*KEYS])
    ratios: list[float] = field(default_factory=lambda: [0.125, 0.25, 0.5, 1.0, 2.0, 4.0])  # pairs / D
    per_segment: list[str] = field(
        default_factory=lambda: ["all", "16", "1"]
    )  # writes; memory.segment: unused
    copies: int = 4  # duplicated, zipf: writes for each distinct pair
    cosine: float = 0.9  # collinear: of two keys, expected
    trials: int = 16  # memories filled with keys and values of their own


@dataclass
class ReachConfig(TaskConfig):
    name: str = "reach"
    untrained = True
    distances: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64, 128, 256])  # segments
    between: list[str] = field(default_factory=lambda: [*BETWEEN])  # what is read between write and loss
    trials: int = 2  # texts


@dataclass
class EfficiencyConfig(TaskConfig):
    name: str = "efficiency"
    untrained = True
    level: str = "model"  # model | operator (one layer's memory)
    lengths: list[str] = field(default_factory=lambda: ["1K", "4K", "16K"])
    modes: list[str] = field(default_factory=lambda: [*MODES])  # model: what is timed
    forms: list[str] = field(default_factory=lambda: ["eager"])  # operator: eager | compiled | triton
    against: list[str] = field(default_factory=lambda: ["local"])  # model: timed beside it: local | full
    vs: list[str] = field(default_factory=list)  # installed packages timed beside it
    batch: int = 1  # documents side by side
    chunk: int = 8192  # tokens fed a call
    decode: int = 16  # tokens decoded
    repeats: int = 5  # of a call, at most
    seconds: float = 10.0  # of all repetitions; a call that takes longer is not made


@dataclass
class TrainerConfig:
    steps: int = 200
    batch: int = 8  # sequences a micro-batch on one process, at the longest level of the curriculum
    accumulate: int = 1  # micro-batches a step
    optimizer: str = "adamw"  # adamw | adafactor
    lr: float = 3e-3
    min_lr: float = 0.1  # share of lr at the end of the cosine
    warmup: int = 20
    gate_lr: float | None = 0.03  # unset = lr
    write_lr: float | None = None  # of a write gate (u and c of its strengths); unset = lr
    weight_decay: float = 0.1  # never on gates, norms or embeddings
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    precision: str = "auto"  # auto (bf16 on GPU, float32 on CPU) | float32 | bf16
    checkpoint_segments: int | None = None  # recompute activations every so many segments; unset = keep all
    compile: bool = False
    parallel: str = "ddp"  # several processes: ddp (each has the whole model) | fsdp (each has a share)
    # Numbers of segments, in rising order; empty = the task's length. At a shorter level a micro-batch has
    # batch * longest // level sequences, so that a step keeps its tokens; with checkpoint_segments they are
    # read in parts, so that no level keeps more activations than the longest.
    curriculum: list[int] = field(default_factory=list)
    curriculum_loss: float = 0.1  # go on to the next number when the smoothed task loss is below
    log_every: int = 10
    validate_every: int | None = None  # unset = at the end only
    validate_rows: int = 8
    best: bool = False  # a run stands for its checkpoint of lowest validation loss, not for its last
    save_every: int | None = None  # unset = at the end only
    keep: int = 2  # last checkpoints kept, beside the best


@dataclass
class RunConfig:
    """The whole of a run: what ``infini-bench train`` and ``eval`` resolve and every record stores."""

    model: str = "infini_linear"  # the memory's name in the tables
    scale: str = "laptop"
    seed: int = 0
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    resume: str | None = None  # a run folder to continue
    checkpoint: str | None = None  # eval: a run or checkpoint folder
    runs: str = "runs"  # where run folders go
    records: str = "results/records"
    device: str = "auto"  # auto | cpu | cuda
    precision: str = "float32"  # of an evaluation: float32 | bf16 (but a memory's sums)
    force: bool = False  # run again even if the same run is recorded as done
