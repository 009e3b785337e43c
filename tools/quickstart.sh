#!/usr/bin/env bash
# The main job on a fresh machine, set-up included: three small datasets -> shards -> one sparse ViT trained on two ranks with
# expert parallelism -> held-out metrics and pictures. About six minutes on two CPU cores once the environment is there.
# Arguments change the recipe: bash tools/quickstart.sh train.steps=200 run=runs/short
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
cd -- "$MODSQUAD_ROOT"
export OMP_NUM_THREADS=1

run=runs/quickstart
for argument in "$@"; do
    case "$argument" in run=*) run="${argument#run=}" ;; esac
done

echo "== 1/3 data: real pixels in ImageNet, COCO and ADE20K layout, then shards (data/quickstart)"
python -m modsquad_ds quickstart-data data/quickstart
echo "== 2/3 training on 2 ranks: expert parallelism 2, ZeRO-2 ($run)"
deepspeed --num_gpus 2 --master_port "$(python -m modsquad_ds free-port)" --module modsquad_ds train quickstart "$@"
echo "== 3/3 held-out metrics and pictures"
python -m modsquad_ds evaluate "$run"
echo "== done: $run/evaluation.json, $run/pictures"
