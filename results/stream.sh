#!/usr/bin/env bash
# Books joined to one stream of 10M tokens, which no training has seen, read by trained language models:
# results/stream.sh FOLDER RUN..., where FOLDER holds booksum, and each RUN is a training on books: of infini_linear,
# infini_delta, transformer_xl, memorizing, sink or local_block, as `infini-bench reproduce table2 --scale gpu` leaves
# them. Records go to results/records; what is recorded as done is not repeated, so that the script can be started
# again. LENGTH=1M asks for another length; MORE="task.controls=false ..." adds settings.
set -euo pipefail
if (($# < 2)); then
  echo "error: give a folder that holds booksum, and the runs to be asked" >&2
  exit 2
fi
folder=$1 bench=${BENCH:-infini-bench}
if [[ ! -d $folder/booksum ]]; then
  echo "error: $folder holds no booksum" >&2
  exit 2
fi
for run in "${@:2}"; do
  $bench eval lm --checkpoint "$run" --length "${LENGTH:-10M}" task.joined=true data=booksum_local \
    data.path="$folder/booksum" task.split=train ${MORE:-}
done
