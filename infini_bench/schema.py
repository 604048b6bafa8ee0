"""Typed configuration of a run. Imports neither torch nor Hydra, so that it loads in milliseconds.

Every key of ``conf/`` is a field here; ``None`` means "not set", never a magic number.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SPLITS = ("train", "validation", "test")
MEMORY_KINDS = ("compressive", "xl", "block", "sliding", "full", "knn")
UPDATES = ("linear", "delta", "delta_corrected")
FEATURES = ("elu1", "relu2", "exp")
BACKENDS = ("auto", "eager", "triton")
SOURCES = ("embedded", "local", "hub")
OPTIMIZERS = ("adamw", "adafactor")
PRECISIONS = ("auto", "float32", "bf16")
DEVICES = ("auto", "cpu", "cuda")


@dataclass
class MemoryConfig:
    """What an attention layer remembers beyond the tokens of its own segment.

    kind: ``compressive`` (Infini-attention), ``xl`` (one cached segment), ``block`` (nothing),
    ``sliding`` (the last ``window`` tokens), ``full`` (everything) or ``knn`` (Memorizing Transformers).
    """

    kind: str = "compressive"
    segment: int = 128  # N, tokens
    update: str = "linear"  # compressive: linear (Eq. 8) | delta (Eq. 9) | delta_corrected
    features: str = "elu1"  # compressive: sigma of Eq. 7-9
    gate_start: float = 0.0  # beta at the start, before the sigmoid of Eq. 10
    gate_split: float = 0.0  # added to beta of every second head, subtracted from the others
    window: int | None = None  # sliding: tokens a query sees, itself included; unset = 2N
    entries: int = 65536  # knn: keys and values stored, oldest first out
    neighbours: int = 32  # knn: of them that a query attends to
    layer: int | None = None  # knn: the layer, from 0; unset = at three quarters of the depth
    gradient_depth: int | None = None  # segments that a gradient may cross; unset = all
    backend: str = "auto"  # compressive: eager | triton (an error where it cannot run) | auto (where it can)


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
    """Base of the three tasks; ``name`` picks the module in ``tasks/``."""

    name: str = "???"


@dataclass
class LMConfig(TaskConfig):
    name: str = "lm"
    sequence: int = 512  # training tokens a sequence
    split: str = "test"
    max_documents: int | None = None  # of the evaluated split
    max_tokens: int | None = None  # of each evaluated document, from its start
    chunk: int = 8192  # tokens fed a call when streaming
    controls: bool = True  # memory off, and another document's memory


@dataclass
class PasskeyConfig(TaskConfig):
    name: str = "passkey"
    digits: int = 5
    segments: int = 4  # training length, in segments of the model
    lm_weight: float = 0.1  # of the haystack's own loss beside the answer's
    lengths: list[str] = field(default_factory=lambda: ["4K"])
    depths: list[str] = field(default_factory=lambda: ["start", "middle", "end_outside"])
    trials: int = 10
    batch: int = 10  # trials run side by side
    chunk: int = 8192
    controls: bool = True  # memory off
    protocol: str = "curriculum"  # the name of the training protocol in the table


@dataclass
class BooksumConfig(TaskConfig):
    name: str = "booksum"
    split: str = "test"
    input_tokens: int | None = None  # of the book, from its start; unset = all
    train_input_tokens: int = 1024
    train_summary_tokens: int = 256
    lm_weight: float = 0.1  # of the book's own loss beside the summary's
    max_books: int | None = None
    max_new_tokens: int = 1024
    temperature: float = 0.5
    top_p: float = 0.95
    greedy: bool = False
    samples: int = 1  # summaries a book
    chunk: int = 8192
    controls: bool = True  # memory off, and another book's memory


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
    weight_decay: float = 0.1  # never on gates, norms or embeddings
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    precision: str = "auto"  # auto (bf16 on GPU, float32 on CPU) | float32 | bf16
    checkpoint_segments: int | None = None  # recompute activations every so many segments; unset = keep all
    compile: bool = False
    # Numbers of segments, in rising order; empty = the task's length. At a shorter level a micro-batch has
    # batch * longest // level sequences, so that a step keeps its tokens.
    curriculum: list[int] = field(default_factory=list)
    curriculum_loss: float = 0.1  # go on to the next number when the smoothed task loss is below
    log_every: int = 10
    validate_every: int | None = None  # unset = at the end only
    validate_rows: int = 8
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
    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    resume: str | None = None  # a run folder to continue
    checkpoint: str | None = None  # eval: a run or checkpoint folder
    runs: str = "runs"  # where run folders go
    records: str = "results/records"
    device: str = "auto"  # auto | cpu | cuda
    force: bool = False  # run again even if the same run is recorded as done
