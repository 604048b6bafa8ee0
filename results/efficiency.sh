#!/usr/bin/env bash
# The GPU runs behind results/tables/efficiency.md, one command each; about 25 minutes on one H200. Records go
# to results/records; a run that is recorded as done is not repeated, so that the script can be started again.
# For peers: pip install infini-transformer-pytorch. One part alone: results/efficiency.sh operator
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

# Every memory and full attention, from 1K to 10M tokens.
if wanted model; then
  $bench profile --scale gpu --lengths 1K,10K,100K,1M,10M 'task.against=[]' task.repeats=5 task.seconds=15 \
    --models local_block,infini_linear,infini_delta,infini_delta_token,transformer_xl,full,memorizing,compressive,local_sliding,local_sparse,local_kernel,sink,rmt,armt,autocompressor
fi

$bench report
