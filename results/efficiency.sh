#!/usr/bin/env bash
# The runs of results/tables/efficiency.md on a GPU, one command each. Records go to results/records; a run that
# is recorded as done is not repeated, so that the script can be started again. One part alone, each meant for
# less than ten minutes on an H200: results/efficiency.sh operator | vs | smollm | model | rivals; cpu is for two
# CPU cores. vs and cpu need: pip install infini-transformer-pytorch
part=${1:-all}
bench=${BENCH:-infini-bench}
wanted() { [[ $part == all || $part == "$1" ]]; }

# One layer at the two shapes, 131,072 tokens: eager, compiled and Triton forms of Linear and Delta beside the
# fastest local and full attention of torch.
if wanted operator; then
  $bench profile --level operator --scale paper --lengths 128K
  $bench profile --level operator --scale gpu --lengths 128K decoder.heads=16 decoder.head_dim=64
fi

# infini-transformer-pytorch at equal sizes (its feed-forward has 1365 hidden units).
if wanted vs; then
  $bench profile --scale gpu --models infini_linear,infini_delta --vs infini-transformer-pytorch \
    --lengths 8K,32K,128K decoder.layers=8 decoder.dim=512 decoder.heads=8 decoder.ffn=1368 \
    memory.segment=2048 memory.backend=triton task.seconds=20
fi

# SmolLM2-135M's body with a memory in every layer, beside the same with local attention only.
if wanted smollm; then
  $bench profile --scale gpu --models infini_linear,infini_delta --lengths 64K,1M,10M decoder.layers=30 \
    decoder.dim=576 decoder.heads=9 decoder.kv_heads=3 decoder.ffn=1536 data.vocab_size=49152 \
    memory.segment=2048 memory.backend=triton task.repeats=7
fi

# Infini-attention, local and full attention, from 1K to 10M tokens; then the other memories.
lengths=1K,10K,100K,1M,10M
if wanted model; then
  $bench profile --scale gpu --lengths $lengths --models local_block,infini_linear,infini_delta,full \
    'task.against=[]' task.repeats=5
fi
if wanted rivals; then
  for models in transformer_xl,memorizing,compressive,sink local_sliding,local_sparse,local_kernel \
    infini_delta_token,rmt,armt,autocompressor; do
    $bench profile --scale gpu --lengths $lengths --models $models 'task.against=[]' task.repeats=3 task.seconds=10
  done
fi

# The same package at its own sizes (feed-forward: 682 hidden units) on a CPU: as both are by default, then in
# bf16 with ours compiled. Seven repetitions in turns.
if wanted cpu; then
  for form in float32,false bf16,true; do
    $bench profile --scale laptop --models infini_linear --vs infini-transformer-pytorch --lengths 8K \
      'task.modes=[forward]' decoder.layers=4 decoder.dim=256 decoder.heads=8 decoder.head_dim=128 decoder.ffn=680 \
      memory.segment=2048 data.vocab_size=256 'task.against=[]' task.repeats=7 task.seconds=45 \
      trainer.precision=${form%,*} trainer.compile=${form#*,}
  done
fi

$bench report
