#!/usr/bin/env bash
# SmolLM2's rows of results/tables/table3_passkey.md on a GPU: results/table3.sh MODEL BOOKS ROW [SEED], where MODEL is
# SmolLM2-135M-Instruct.Q4_1.gguf or a hub id, BOOKS a folder with {train,validation}.jsonl.xz. What is recorded as
# done is not repeated, so that the script can be started again. ROW, trained on haystacks of 1 to 64 segments, half
# of them in book text, and asked 40 times a depth (some 20 minutes on an H200):
#   floor    infini_delta_token, a gate of writing with a rate of its own, and weak keys left out when asked
#   cost     the same, and training pays for what is written
#   border   as floor, and in a tenth of the rows a border of segments cuts the key, as it does in the middle of
#            every length that is a power of two
#   linear   the paper's memory, longer and with less text, so that it comes through the curriculum; border's rows
#   delta    the same with the delta rule
#   local    no memory: what adaptation alone does to the language model; asked for keys at 32K only, as it can find
#            none behind its segment
# Beside them, asked 20 times a depth:
#   paper_linear, paper_delta   the paper's protocol scaled down: 20M tokens of books in inputs of 4K, then keys in 5K
#   zero_linear, zero_delta     its memory attached and nothing trained
#   before                      no keys: bits per byte of the pretrained model inside each segment length used above
# SHORT=1 leaves out 2M, 4M and 10M; LENGTH=4K asks at that length and no other; MORE="task.segments=4 ..." adds
# settings to the training, or to the evaluations of what is not trained.
set -euo pipefail
if (($# < 3)); then
  echo "error: give a model, a folder of books and a row: results/table3.sh MODEL BOOKS ROW [SEED]" >&2
  exit 2
fi
model=$1 books=$2 row=$3 seed=${4:-0}
bench=${BENCH:-infini-bench}
# with MORE a folder of its own: what is asked is the newest training there
runs=${RUNS:-runs/table3_${row}_$seed${MORE:+_$(cksum <<<"$MORE" | cut -d' ' -f1)}}
text="data=books_local data.path=$books data.max_documents=60"
token="model=infini_delta_token memory.features=relu2 memory.write_gate=true memory.write_floor=0.05 trainer.write_lr=3e-3"
cut="task.straddling=0.1" less="task.text_share=0.25 task.lm_weight=0.25 trainer.steps=1500"
case $row in
  floor) memory="$token trainer.steps=300" ;;
  cost) memory="$token trainer.steps=300 memory.write_cost=5e-3" ;;
  border) memory="$token trainer.steps=300 $cut" ;;
  linear | delta) memory="model=infini_$row $less $cut" ;;
  local) memory="model=local_block trainer.steps=300" ;;
  paper_linear | paper_delta | zero_linear | zero_delta) memory="model=infini_${row#*_}" ;;
  before) memory="model=local_block" ;;
  *)
    echo "error: $row is no row: floor, cost, border, linear, delta, local, paper_linear, paper_delta, zero_linear," \
      "zero_delta or before." >&2
    exit 2
    ;;
esac

language() { # a model and settings
  $bench eval lm "$@" $text task.split=validation task.max_documents=8 task.max_tokens=65536 task.controls=false \
    precision=bf16 runs=$runs
}
train() { # stages, settings
  $bench adapt "$model" --stages $1 scale=gpu seed=$seed "${@:2}" $memory trainer.compile=true trainer.save_every=null \
    runs=$runs ${MORE:-}
  asked=(--checkpoint "$(ls -d "$runs"/*-train-passkey-* | tail -1)")
}
ask() { # lengths, trials a depth, settings
  $bench eval passkey "${asked[@]}" --length ${LENGTH:-$1} --trials $2 task.batch=$2 task.chunk=131072 precision=bf16 \
    runs=$runs "${@:3}"
}

all=32K,128K,256K,512K,1M end='task.depths=[end]'
case $row in
  before)
    for segment in 1024 2048; do
      language --base "$model" $memory scale=gpu memory.segment=$segment ${MORE:-}
    done
    ;;
  zero_*)
    asked=(--base "$model" $memory scale=gpu data=books_local "data.path=$books" memory.segment=2048 task.digits=5
      seed=$seed ${MORE:-})
    ask $all 20
    ask $all 20 "$end"
    ;;
  paper_*)
    train pretrain_paper,passkey_paper "data.path=$books" memory.backend=eager
    ask $all 20
    ask $all 20 "$end"
    language "${asked[@]}"
    ;;
  local)
    train passkey $text trainer.checkpoint_segments=null
    language "${asked[@]}"
    ask 32K 40
    ask 32K 10 "$end"
    ;;
  *)
    train passkey $text trainer.checkpoint_segments=null
    ask 1M 40
    language "${asked[@]}"
    for lengths in 32K,128K 512K 256K; do ask $lengths 40; done
    ask $all 10 "$end"
    if [[ -z ${SHORT:-} ]]; then ask 10M 8; fi
    if [[ $row == floor || $row == border ]]; then ask 1M 20 ++task.memory.write_floor=0; fi
    ask 1M 20 'task.depths=["45"]' # the middle, beside the border
    if [[ -z ${SHORT:-} ]]; then ask 2M,4M 10; fi
    ;;
esac
