#!/usr/bin/env bash
# SmolLM2's rows of results/tables/table3_passkey.md on a GPU, trained on haystacks of 1 to 64 segments, half of them
# in book text: results/table3.sh MODEL BOOKS ROW [SEED], where MODEL is SmolLM2-135M-Instruct.Q4_1.gguf or a hub id,
# BOOKS a folder with {train,validation}.jsonl.xz. One row takes some 20 minutes on an H200. What is recorded as done
# is not repeated, so that the script can be started again. ROW:
#   floor    infini_delta_token, a gate of writing with a rate of its own, and weak keys left out when asked
#   cost     the same, and training pays for what is written
#   linear   the paper's memory, at a lower rate and with less text, so that it comes through the curriculum
#   delta    the same with the delta rule
#   local    no memory: what adaptation alone does to the language model
# SHORT=1 leaves out 2M, 4M and 10M; MORE="task.segments=4 ..." adds settings to the training.
set -euo pipefail
if (($# < 3)); then
  echo "error: give a model, a folder of books and a row: results/table3.sh MODEL BOOKS ROW [SEED]" >&2
  exit 2
fi
model=$1 books=$2 row=$3 seed=${4:-0}
bench=${BENCH:-infini-bench} runs=${RUNS:-runs/table3_${row}_$seed}
token="model=infini_delta_token memory.features=relu2 memory.write_gate=true memory.write_floor=0.05 trainer.write_lr=3e-3"
less="task.text_share=0.25 task.lm_weight=0.25 trainer.lr=1e-4 trainer.steps=500"
case $row in
  floor) memory="$token trainer.steps=300" ;;
  cost) memory="$token trainer.steps=300 memory.write_cost=5e-3" ;;
  linear) memory="model=infini_linear $less" ;;
  delta) memory="model=infini_delta $less" ;;
  local) memory="model=local_block trainer.steps=300" ;;
  *) echo "error: $row is no row: floor, cost, linear, delta or local." >&2; exit 2 ;;
esac
text="data=books_local data.path=$books data.max_documents=60"
$bench adapt "$model" --stages passkey scale=gpu $text seed=$seed $memory trainer.checkpoint_segments=null \
  trainer.compile=true trainer.save_every=null runs=$runs ${MORE:-}
run=$(ls -d "$runs"/*-train-passkey-* | tail -1)

ask() { # lengths, trials a depth, settings
  $bench eval passkey --checkpoint "$run" --length $1 --trials $2 task.batch=$2 task.chunk=131072 precision=bf16 \
    runs=$runs "${@:3}"
}
ask ${LENGTH:-1M} 40
$bench eval lm --checkpoint "$run" $text task.split=validation task.max_documents=8 task.max_tokens=65536 \
  task.controls=false precision=bf16 runs=$runs
ask 32K,128K 40
ask 512K 40
ask 256K 40
ask 32K,128K,1M 10 task.depths=[end]
if [[ -z ${SHORT:-} ]]; then ask 10M 8; fi
if [[ $row == floor && $seed == 0 ]]; then ask 1M 20 ++task.memory.write_floor=0; fi
if [[ -z ${SHORT:-} ]]; then ask 2M,4M 10; fi
