#!/usr/bin/env bash
# The runs of results/tables/efficiency.md on a GPU, one command each. Records go to results/records; a run that
# is recorded as done is not repeated, so that the script can be started again. One part alone, each meant for
# less than ten minutes on an H200: results/efficiency.sh operator | fla | vs | memorizing | rmt | smollm | long |
# model | rivals; cpu is for two CPU cores. What the peers need:
#   vs, cpu     pip install infini-transformer-pytorch
#   rmt         pip install recurrent-memory-transformer-pytorch
#   memorizing  pip install --no-deps memorizing-transformers-pytorch faiss-cpu einops einops-exts joblib filelock
#   fla         pip install flash-linear-attention
part=${1:-all}
bench=${BENCH:-infini-bench}
wanted() { [[ $part == all || $part == "$1" ]]; }

# One layer at the two shapes, 131,072 tokens: eager, compiled and Triton forms of Linear and Delta beside the
# fastest local and full attention of torch.
if wanted operator; then
  $bench profile --level operator --scale paper --lengths 128K
  $bench profile --level operator --scale gpu --lengths 128K decoder.heads=16 decoder.head_dim=64
fi

# The same layers beside flash-linear-attention's nearest operators.
if wanted fla; then
  for shape in 'memory.segment=2048 decoder.heads=8 decoder.head_dim=128' \
    'memory.segment=512 decoder.heads=16 decoder.head_dim=64'; do
    $bench profile --level operator --vs flash-linear-attention --scale gpu --lengths 128K \
      'task.forms=[triton]' $shape
  done
fi

# infini-transformer-pytorch at equal sizes (its feed-forward has 1365 hidden units).
if wanted vs; then
  $bench profile --scale gpu --models infini_linear,infini_delta --vs infini-transformer-pytorch \
    --lengths 8K,32K,128K decoder.layers=8 decoder.dim=512 decoder.heads=8 decoder.ffn=1368 \
    memory.segment=2048 memory.backend=triton task.repeats=7 task.seconds=20
  # The package keeps activations of two segments, ours of all: once as many, then eight with layers compiled.
  for form in '2 task.modes=[train]' '8 trainer.compile=true'; do
    $bench profile --scale gpu --models infini_linear,infini_delta --vs infini-transformer-pytorch \
      --lengths 8K,32K,128K decoder.layers=8 decoder.dim=512 decoder.heads=8 decoder.ffn=1368 \
      memory.segment=2048 memory.backend=triton task.repeats=7 task.seconds=20 \
      ${form#* } trainer.checkpoint_segments=${form% *}
  done
fi

# The packages of the other two rivals at the same sizes. One searches on the CPU: short documents.
if wanted memorizing; then
  $bench profile --scale gpu --models memorizing --vs memorizing-transformers-pytorch --lengths 4K,8K,16K \
    decoder.layers=8 decoder.dim=512 decoder.heads=8 decoder.kv_heads=1 decoder.ffn=2048 memory.segment=512 \
    decoder.tie_embeddings=false task.repeats=7 task.seconds=30
fi
if wanted rmt; then
  $bench profile --scale gpu --models rmt --vs recurrent-memory-transformer-pytorch --lengths 8K,32K \
    decoder.layers=8 decoder.dim=512 decoder.heads=8 decoder.ffn=2048 memory.segment=512 \
    decoder.tie_embeddings=false task.repeats=7 task.seconds=20
fi

# SmolLM2-135M's body with a memory in every layer, beside the same with local attention only. Compiled it is
# read 262,144 tokens a call, so that a layer takes the GPU longer than Python takes to launch it, on a busy host too.
if wanted smollm; then
  for form in false,65536 true,262144; do
    $bench profile --scale gpu --models infini_linear,infini_delta --lengths 64K,1M,10M decoder.layers=30 \
      decoder.dim=576 decoder.heads=9 decoder.kv_heads=3 decoder.ffn=1536 data.vocab_size=49152 \
      memory.segment=2048 memory.backend=triton task.repeats=7 trainer.compile=${form%,*} task.chunk=${form#*,}
  done
fi

# Training on 1M tokens: activations of 16K tokens at a time, recomputed; else they do not fit.
if wanted long; then
  $bench profile --scale gpu --models infini_linear,infini_delta --lengths 64K,1M decoder.layers=30 \
    decoder.dim=576 decoder.heads=9 decoder.kv_heads=3 decoder.ffn=1536 data.vocab_size=49152 \
    memory.segment=2048 memory.backend=triton task.repeats=3 'task.modes=[train]' trainer.checkpoint_segments=8
  for models in local_block,infini_linear,infini_delta transformer_xl,compressive,sink,local_sliding \
    infini_delta_corrected,infini_linear_xl,infini_delta_xl rmt,armt; do
    $bench profile --scale gpu --models $models --lengths 100K,1M 'task.against=[]' 'task.modes=[train]' \
      task.repeats=3 trainer.checkpoint_segments=32
  done
fi

# Infini-attention, local and full attention, from 1K to 10M tokens; then the other memories.
lengths=1K,10K,100K,1M,10M
if wanted model; then
  $bench profile --scale gpu --lengths $lengths --models local_block,infini_linear,infini_delta,full \
    'task.against=[]' task.repeats=5
fi
if wanted rivals; then
  for models in transformer_xl,memorizing,compressive,sink local_sliding,local_sparse,local_kernel \
    infini_delta_token,rmt,armt,autocompressor infini_delta_corrected,infini_linear_xl,infini_delta_xl \
    retrieval; do
    $bench profile --scale gpu --lengths $lengths --models $models 'task.against=[]' task.repeats=3 task.seconds=10
  done
fi

# The same package at its own sizes (feed-forward: 682 hidden units) on a CPU: as both are by default, then in
# bf16 with ours compiled. Seven repetitions in turns.
if wanted cpu; then
  for form in float32,false float32,true bf16,true; do
    $bench profile --scale laptop --models infini_linear --vs infini-transformer-pytorch --lengths 8K \
      'task.modes=[forward]' decoder.layers=4 decoder.dim=256 decoder.heads=8 decoder.head_dim=128 decoder.ffn=680 \
      memory.segment=2048 data.vocab_size=256 'task.against=[]' task.repeats=7 task.seconds=45 \
      trainer.precision=${form%,*} trainer.compile=${form#*,}
  done
fi

$bench report
