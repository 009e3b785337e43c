#!/usr/bin/env bash
# Many labels per image on real pixels: scikit-image's photographs with labels computed by Taskonomy's definitions, in its layout
# (eleven of the 13 tasks) -> shards -> a sparse model with mutual information, a dense one for all tasks, and a dense one per task,
# all in the same number of steps -> one table of every metric with delta-m; maps of tasks by experts; pictures; two tasks taken
# out of the sparse model. Under fifteen minutes on two CPU cores once the environment is there. All of it is in runs/multilabel;
# started again, it goes on with what is missing.
# Arguments change every model alike, which starts anew: bash tools/multilabel.sh train.steps=50. SEEDS='0 1 2' is the default.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
cd -- "$MODSQUAD_ROOT"
export OMP_NUM_THREADS=1
out=runs/multilabel data=data/photo_scenes start=$SECONDS
read -ra seeds <<<"${SEEDS:-0 1 2}"
tasks=(depth_euclidean depth_zbuffer edge_occlusion edge_texture keypoints2d keypoints3d normal principal_curvature reshading
    segment_unsup2d segment_unsup25d)
changes=("$@")
modsquad() { python -m modsquad_ds "$@"; }
minutes() { echo "== $(((SECONDS - start) / 60)) min $(((SECONDS - start) % 60)) s: $*"; }

minutes "1/5 labels from pixels, in Taskonomy's layout, then shards ($data)"
modsquad photo-scenes "$data"
for split in train val; do
    [[ -f $data/shards/scenes/$split/index.json ]] || modsquad shards taskonomy "$data/sources" "$data/shards/scenes" \
        --split "$split" --split-list "$data/sources/split.csv" --targets "$(IFS=,; echo "${tasks[*]}")" --samples-per-shard 64
done
if [[ -d $out && "${changes[*]}" != "$(<"$out/changes.txt")" ]]; then rm -rf -- "$out"; fi
mkdir -p -- "$out"
printf '%s' "${changes[*]}" >"$out/changes.txt"

learn() { # run, changes to the recipe
    local run="$out/$1"
    shift
    if [[ ! -f $run/evaluation.json ]]; then
        modsquad train photo_scenes "run=$run" "$@" "${changes[@]}" >"$run.log" 2>&1 &&
            modsquad evaluate "$run" --no-pictures >>"$run.log" 2>&1 || { tail -n 3 "$run.log" >&2; return 1; }
    fi
    minutes "${run##*/} is there"
}
# The same, while another one runs: one process per core. Each is a process group, so that an interruption ends its programs too.
beside() {
    while (($(jobs -rp | wc -l) >= 2)); do wait -n || { wait; exit 1; }; done
    set -m
    learn "$@" &
    set +m
}
trap 'for job in $(jobs -rp); do kill -- "-$job"; done; exit 130' INT TERM

minutes "2/5 one model for all tasks, sparse and dense, and one dense model per task ($out)"
both() {
    beside "sparse-$1" "seed=$1"
    beside "dense-$1" variant=dense "seed=$1"
}
both "${seeds[0]}"
for task in "${tasks[@]}"; do
    beside "single-$task" variant=dense "only=[$task]" "seed=${seeds[0]}"
done
minutes "3/5 other seeds: ${seeds[*]:1}"
for seed in "${seeds[@]:1}"; do both "$seed"; done
while (($(jobs -rp | wc -l))); do wait -n || { wait; exit 1; }; done

minutes "4/5 who uses which expert; pictures; two tasks taken out of the sparse model"
sparse="$out/sparse-${seeds[0]}"
modsquad usage "$sparse" --out "$out/usage"
modsquad evaluate "$sparse"
for task in normal depth_zbuffer; do
    modsquad extract "$sparse" --task "$task" --keep-params 60% --data "$data/shards" --overwrite --out "$out/$task/model.safetensors"
done

minutes "5/5 every metric, and delta-m against the models of one task"
python tools/multilabel_table.py "$out"
minutes "done: $out/table.md, $out/usage, $sparse/pictures"
