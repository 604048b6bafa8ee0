"""A pretrained model gets a memory: families, what is trained, what is saved, stages, export."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from infini_bench import adapt
from infini_bench.cli.bridge import compose_run
from infini_bench.data.tokenizers import build_tokenizer
from infini_bench.errors import UserError
from infini_bench.models import load_model
from infini_bench.pretrained import adapted_model, changes, freeze, merge_lora, save_changes
from infini_bench.run import run_eval, run_train
from infini_bench.schema import BaseConfig, DataConfig, MemoryConfig
from infini_bench.train import load_checkpoint_model

SIZES = dict(
    vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, initializer_range=0.2,
)  # fmt: skip
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=7)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
}


@pytest.fixture(params=FAMILIES)
def base(request, tmp_path) -> Path:
    """A folder with random weights (biases included) and a byte-level tokenizer."""
    torch.manual_seed(0)
    model = FAMILIES[request.param]()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_()
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    ours = build_tokenizer(
        DataConfig(vocab_size=280, cache_dir=str(tmp_path)), lambda: ["a book about a key"] * 9
    )
    backend = ours._backend  # type: ignore[attr-defined]
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>").save_pretrained(folder)
    return folder


def only(base, **settings):
    return BaseConfig(model=str(base), **settings)


@torch.no_grad()
def test_closed_gates_give_the_originals_local_attention(base):
    stock = AutoModelForCausalLM.from_pretrained(base).eval()
    model = adapted_model(only(base), MemoryConfig(segment=8, gate_start=-1e9)).eval()
    ids = torch.randint(0, 280, (2, 24))
    ours = model.step(ids)[0]
    for s in range(3):
        part = slice(8 * s, 8 * s + (7 if "Mistral" in type(stock).__name__ else 8))  # its own window is 7
        assert (ours[:, part] - stock(ids[:, part]).logits).abs().max() < 1e-5


@torch.no_grad()
def test_chosen_layers_only(base):
    model = adapted_model(only(base), MemoryConfig(segment=8, layers=[1], update="delta")).eval()
    assert [m.has_memory for m in model.memories] == [False, True]
    assert model.state_floats() == 8 * 9 * 2 and model.has_memory
    with pytest.raises(UserError, match="the last of the 2 layers is 1"):
        adapted_model(only(base), MemoryConfig(layers=[2]))


@pytest.mark.parametrize("rank", [None, 2])
def test_changes_alone_restore_the_model_and_lora_merges(base, rank, tmp_path):
    pytest.importorskip("peft")
    settings = only(base, freeze=True, lora=rank, save="changes")
    model = adapted_model(settings, MemoryConfig(segment=8)).eval()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("memory_gate" in name or "lora_" in name for name in trained)
    assert len(trained) == 2 + (2 * 7 * 2 if rank else 0)
    for p in changes(model).values():
        p.normal_(std=0.1)
    save_changes(model, settings, tmp_path / "saved")
    assert sum(f.stat().st_size for f in (tmp_path / "saved").glob("*.safetensors")) < 30_000
    ids = torch.randint(0, 280, (1, 20))
    loaded = load_model(tmp_path / "saved").eval()
    with torch.no_grad():
        expected = model.step(ids)[0]
        assert torch.equal(loaded.step(ids)[0], expected)
        merge_lora(loaded)
        assert not any("lora" in name for name, _ in loaded.named_parameters())
        assert (loaded.step(ids)[0] - expected).abs().max() < 1e-4
    stock = AutoModelForCausalLM.from_pretrained(base)
    stock.model.norm.weight.data += 1
    stock.save_pretrained(base)
    with pytest.raises(UserError, match="another"):
        load_model(tmp_path / "saved")


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_changes_are_cut_into_small_shards(base, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr("infini_bench.pretrained.SHARD", "10KB")
    settings = only(base, freeze=True, lora=8, save="changes")
    model = adapted_model(settings, MemoryConfig(segment=8)).eval()
    for p in changes(model).values():
        p.normal_(std=0.1)
    save_changes(model, settings, tmp_path / "saved")
    shards = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert [path.name for path in shards] == [f"changes-{n:05}-of-00004.safetensors" for n in range(1, 5)]
    assert all(path.stat().st_size < 12_000 for path in shards)  # header included
    loaded = changes(load_model(tmp_path / "saved"))
    assert all(torch.equal(loaded[name], p) for name, p in changes(model).items())
    shards[2].unlink()
    with pytest.raises(UserError, match="is damaged"):
        load_model(tmp_path / "saved")


NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk", "model.embed_tokens": "token_embd", "model.norm": "output_norm",
    "lm_head": "output",
}  # fmt: skip


@torch.no_grad()
def test_a_quantized_gguf_file_is_the_model_of_its_dequantized_weights(tmp_path):
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "intermediate_size": 64})).eval()
    c, path = model.config, tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(c.vocab_size)
    heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}
    for name, p in model.named_parameters():
        short = name
        for long, new in NAMES.items():
            short = short.replace(long, new)
        rows = torch.arange(len(p))
        for part, count in heads.items():
            if part in name:  # llama.cpp rotates neighbours, Hugging Face halves
                rows = rows.view(count, 2, -1).transpose(1, 2).flatten()
        kind = gguf.GGMLQuantizationType.Q4_1 if p.dim() == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(p[rows].numpy(), kind)
        writer.add_tensor(short, packed, raw_dtype=kind)
        p[rows] = torch.from_numpy(gguf.quants.dequantize(packed, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ids = torch.randint(0, 300, (2, 8))
    ours = adapted_model(only(path), MemoryConfig(segment=8)).eval().step(ids)[0]
    assert (ours - model(ids).logits).abs().max() < 1e-5


LORA, FROZEN = ["base.lora=2", "base.save=changes"], ["base.freeze=true"]


@pytest.mark.parametrize(
    ("base", "how"),
    [("llama", []), ("llama", LORA), ("llama", FROZEN), ("mistral", []), ("qwen2", LORA)],
    indirect=["base"],
)
def test_stages_build_on_each_other_and_export_is_a_plain_folder(base, tmp_path, how):
    if how:
        pytest.importorskip("peft")
    places = [f"runs={tmp_path}/runs", f"records={tmp_path}/records", f"data.cache_dir={tmp_path}/cache"]
    small = ["data=embedded", "memory.segment=32", "trainer.steps=2", "trainer.batch=2", "device=cpu"]
    small += ["trainer.save_every=null", "data.max_documents=2", "trainer.validate_rows=2", *how]
    first = adapt.adapt(str(base), ["pretrain"], [*small, *places, "task.sequence=64"])[0]
    assert first.config["decoder"]["dim"] == 32 and first.train["memory_parameters"] == 8
    second = adapt.adapt(
        first.train["folder"], ["pretrain"], [*small, *places, "task.sequence=64", "seed=1"]
    )[0]
    assert second.config["base"]["model"] == first.train["folder"] and "bytes a sequence" in adapt.added(
        second
    )
    if "base.lora=2" in how:  # which a decoder with another memory is built without
        words = ["task=lm", f"checkpoint={second.train['folder']}", "++task.memory.segment=16", *places]
        words += ["task.max_tokens=32", "task.max_documents=1", "task.controls=false"]
        asked = {word.partition("=")[0].strip("+") for word in words[2:]}
        assert run_eval(compose_run(words), given=asked, command=[]).status == "done"
    adapt.export(Path(second.train["folder"]), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    trained, _, _ = load_checkpoint_model(Path(second.train["folder"]))
    ids = torch.randint(0, 280, (1, 70))
    with torch.no_grad():
        assert (model.step(ids)[0] - trained.eval().step(ids)[0]).abs().max() < 1e-4
        begun = AutoModelForCausalLM.from_pretrained(base).eval()
        assert (model.step(ids[:, :30])[0] - begun(ids[:, :30]).logits).abs().max() > 1e-4 or "freeze" in str(
            how
        )
    with pytest.raises(UserError, match="not empty"):
        adapt.export(Path(second.train["folder"]), tmp_path / "out")
    with pytest.raises(UserError, match="another memory"):
        adapt.adapt(first.train["folder"], ["pretrain"], [*small, *places, "memory.update=delta"])


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_changes_find_the_run_below_them_from_any_directory(base, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    small = ["data=embedded", "memory.segment=32", "trainer.steps=1", "trainer.batch=1", "device=cpu"]
    small += ["data.max_documents=2", "trainer.validate_rows=1", "trainer.warmup=0", "task.sequence=64"]
    changed = [*small, "base.freeze=true", "base.save=changes", "trainer.save_every=null"]
    first = adapt.adapt("../base", ["pretrain"], changed)[0].train["folder"]
    second = adapt.adapt(first, ["pretrain"], [*changed, "seed=1"])[0].train["folder"]
    assert first.startswith("runs/") and not Path(second).is_absolute()
    ids = torch.randint(0, 280, (1, 40))
    with torch.no_grad():
        expected = load_checkpoint_model(Path(second))[0].eval().step(ids)[0]
        monkeypatch.chdir(tmp_path)
        assert torch.equal(load_checkpoint_model(Path("work", second))[0].eval().step(ids)[0], expected)
        Path("work").rename("moved")
        assert torch.equal(load_checkpoint_model(Path("moved", second))[0].eval().step(ids)[0], expected)
    Path("moved", first).rename("moved/elsewhere")
    with pytest.raises(UserError, match=rf"on top of moved/{first}, which is missing"):
        load_checkpoint_model(Path("moved", second))
    monkeypatch.chdir(tmp_path / "moved")
    with pytest.raises(UserError, match=f"{first} is no folder or file"):
        adapt.adapt(first, ["pretrain"], changed)  # OWNER/NAME, were there no folder runs


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_overrides_for_one_stage_and_tokens_of_all_stages(base, tmp_path):
    places = [f"{name}={tmp_path / name}" for name in ("runs", "records", "data.cache_dir")]
    small = ["data=embedded", "data.max_documents=2", "memory.segment=32", "trainer.steps=2", "device=cpu"]
    small += ["trainer.batch=2", "trainer.save_every=null", "trainer.validate_rows=1", "trainer.warmup=1"]
    own = ["pretrain.task.sequence=64", "booksum.task.train_input_tokens=64", "booksum.trainer.batch=1"]
    own += ["booksum.task.train_summary_tokens=40"]
    first, second = adapt.adapt(str(base), ["pretrain", "booksum"], [*own, *small, *places])
    assert [r.config["trainer"]["batch"] for r in (first, second)] == [2, 1]
    assert first.config["task"]["sequence"] == 64 and first.tokens == 2 * 2 * 64
    assert (first.train["tokens_before"], second.train["tokens_before"]) == (0, first.tokens)
    words = adapt.added(second)
    assert words.startswith(f"{base}: ") and f"{first.tokens + second.tokens:,} tokens of training" in words
    asked = [f"checkpoint={second.train['folder']}", "task.max_new_tokens=4", "task.max_books=1"]
    asked += ["task.lengths=[]", "task.input_tokens=64", "task.samples=1", "data.max_documents=2"]
    cfg = compose_run(["task=booksum", *asked, *places])
    found = run_eval(cfg, given={word.partition("=")[0] for word in asked}, command=[])
    assert (found.train["tokens"], found.train["tokens_before"]) == (second.tokens, first.tokens)
    with pytest.raises(UserError, match="stage booksum, which is not among"):
        adapt.adapt(str(base), ["pretrain"], [*own, *small, *places])
    elsewhere = [f"{name}={tmp_path / 'none'}" for name in ("runs", "records")]
    wrong = [*own, *small, *places, *elsewhere, "booksum.task.train_kind=prose"]
    with pytest.raises(UserError, match=r"no summary of task\.train_kind=prose"):
        adapt.adapt(str(base), ["pretrain", "booksum"], wrong)
    assert not (tmp_path / "none").exists()  # the first stage has not begun


def test_the_papers_protocol_scaled_down():
    """20M tokens of text at 4K, then 400 steps on prompts of 4K to 6K, segments of 2K, labelled so."""
    text, keys = (
        compose_run([f"experiment=adapt_{s}_paper", "data.path=x"]) for s in ("pretrain", "passkey")
    )
    assert text.trainer.steps * text.trainer.batch * text.task.sequence == pytest.approx(20e6, rel=0.01)
    assert (text.task.sequence, keys.trainer.steps, keys.task.segments) == (4096, 400, 3)
    assert text.memory == keys.memory and keys.memory.segment == 2048 and not keys.trainer.curriculum
    assert keys.task.protocol == "paper, scaled down" and keys.task.trials == 20 and not keys.task.text_share


def test_keys_over_256_segments_go_on_from_64():
    near, far = (compose_run([f"experiment=adapt_{s}", "data.path=x"]) for s in ("passkey", "passkey_far"))
    assert (near.task.segments, near.trainer.curriculum[-1]) == (64, 64) and far.task.segments == 256
    assert far.memory == near.memory and replace(far.task, segments=64) == near.task
    assert not far.trainer.curriculum and far.trainer.lr < near.trainer.lr


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_what_cannot_be_loaded_is_told(tmp_path, base):
    for name in (str(tmp_path / "nothing"), str(tmp_path / "nothing.gguf")):
        with pytest.raises(UserError, match="cannot be loaded"):
            adapted_model(BaseConfig(model=name), MemoryConfig())
    with pytest.raises(UserError, match="no stage"):
        adapt.adapt(str(base), ["pretrian"])
    model = adapted_model(only(base), MemoryConfig())
    freeze(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        f"model.layers.{i}.self_attn.memory.memory_gate" for i in range(2)
    ]


@pytest.mark.parametrize("base", ["llama"], indirect=True)
@pytest.mark.parametrize("control", ["1k", "1k_sliding", "1k_unlimiformer", "full"])
def test_the_controls_of_table_4_run_from_their_configurations(base, control, tmp_path):
    """With the sizes of a small model; nothing else is another."""
    sizes = {"1k": 256, "1k_sliding": 32, "1k_unlimiformer": 16, "full": 32}
    small = [
        f"memory.segment={sizes[control]}", "task.train_input_tokens=64", "task.train_summary_tokens=40",
        f"task.input_tokens={300 if 'unlim' in control else 64}", "task.max_new_tokens=8", "task.max_books=2",
        "data=embedded", "data.source=embedded", "data.path=null", "data.max_documents=3", "trainer.steps=2",
        "task.train_kind=chronicle",
        "trainer.warmup=1", "trainer.validate_rows=1", "device=cpu",
    ]  # fmt: skip
    if "sliding" in control:
        small.append("memory.window=32")
    places = [f"{name}={tmp_path / name}" for name in ("runs", "records", "data.cache_dir")]
    words = [f"experiment=table4_smollm2_{control}", f"base.model={base}", *small, *places]
    trained = run_train(compose_run(words), command=[])
    assert (trained.status, trained.config["model"]) == ("done", f"smollm2_{control}")
    asked = compose_run(["task=booksum", f"checkpoint={trained.train['folder']}", *places])
    found = run_eval(asked, given=set(), command=[])
    (overall,) = [r for r in found.metrics if (r["metric"], r["condition"]) == ("overall", "pairwise")]
    assert overall["value"] is not None and overall["length"] == (300 if "unlim" in control else 64)
    assert found.train["train_kind"] == "chronicle"
    off = any(r["condition"] == "memory_off" for r in found.metrics)
    assert off == (control in ("1k_sliding", "1k_unlimiformer"))  # what leaves a window can be switched off


def test_the_next_call_goes_on_with_an_interrupted_stage(base, tmp_path, monkeypatch):
    from infini_bench.train.step import Stepper

    words = [
        "scale=smoke", "data=embedded", "model=infini_linear", "memory.segment=32", "task.sequence=64",
        "trainer.steps=4", "trainer.batch=1", "trainer.warmup=1", "trainer.save_every=null", "device=cpu",
        f"data.cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip

    def places(name):
        return [f"runs={tmp_path / name}", f"records={tmp_path / name / 'records'}"]

    step = Stepper.step

    def asked_to_stop(self, state, curriculum, stop):
        stats = step(self, state, curriculum, stop)
        return replace(stats, stop=state.step == 2)

    (whole,) = adapt.adapt(str(base), ["pretrain"], [*words, *places("whole")])
    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", asked_to_stop)
        (cut,) = adapt.adapt(str(base), ["pretrain"], [*words, *places("cut")])
    (last,) = adapt.adapt(str(base), ["pretrain"], [*words, *places("cut")])
    assert cut.status == "interrupted" and cut.train["steps"] == 2
    assert last.status == "done" and last.train["folder"] == cut.train["folder"]
    assert last.train["final_loss"] == whole.train["final_loss"]
