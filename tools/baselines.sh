#!/usr/bin/env bash
# The quickstart's baselines in the same number of steps: one dense ViT per task, one dense ViT for all tasks, a plain
# mixture of experts; then one table of all of them beside the quickstart. About twenty minutes on two CPU cores.
# Arguments change every recipe alike: bash tools/baselines.sh train.steps=200
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
cd -- "$MODSQUAD_ROOT"
export OMP_NUM_THREADS=1

python -m modsquad_ds quickstart-data data/quickstart
runs=()
one() { # recipe, run folder, changes to the recipe
    local recipe="$1" run="$2"
    shift 2
    echo "== $recipe $*"
    deepspeed --num_gpus 2 --master_port "$(python -m modsquad_ds free-port)" --module modsquad_ds train "$recipe" "run=$run" "$@"
    python -m modsquad_ds evaluate "$run" --no-pictures
    runs+=("$run")
}
one quickstart runs/quickstart "$@"
one quickstart_plain_moe runs/quickstart_plain_moe "$@"
one quickstart_dense runs/quickstart_dense "$@"
for task in digits scenes textures; do
    one quickstart_single "runs/quickstart_single_$task" "only=[$task]" "$@"
done
python -m modsquad_ds compare "${runs[@]}"
