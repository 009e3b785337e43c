#!/usr/bin/env bash
# The quickstart's model (runs/quickstart, by tools/quickstart.sh) taken apart and put to use; runs/modular is made anew:
# who uses which expert; each task alone with fewer experts; a fourth task, faces, learned three ways and from scratch; the same
# task added with experts of its own while all else stays as it is. Under ten minutes on two CPU cores.
# Arguments change the training recipes: bash tools/modular.sh train.steps=50
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
full=runs/quickstart out=runs/modular data=data/quickstart/shards
if [[ ! -f $full/model.safetensors ]]; then
    echo "error: $full/model.safetensors: no such file; run bash tools/quickstart.sh first" >&2
    exit 2
fi
. tools/setup.sh
export OMP_NUM_THREADS=1
modsquad() { python -m modsquad_ds "$@"; }
modsquad quickstart-data data/quickstart
modsquad evaluate "$full" --no-pictures
rm -rf -- "$out"

echo "== 1/4 who uses which expert ($out/usage)"
modsquad usage "$full" --data "$data" --out "$out/usage"

echo "== 2/4 each task alone, with at most 60 % of the expert parameters ($out/TASK)"
for task in digits scenes textures; do
    modsquad extract "$full" --task "$task" --keep-params 60% --data "$data" --sweep --out "$out/$task/model.safetensors"
    modsquad evaluate "$out/$task" --no-pictures
done
modsquad compare "$full" "$out"/{digits,scenes,textures}

echo "== 3/4 a fourth task, learned three ways and from scratch ($out/faces_*)"
learn() { # run, recipe, changes to the recipe
    local run="$out/$1" recipe="$2"
    shift 2
    echo "== ${run##*/}: $*"
    modsquad train "$recipe" "run=$run" "$@"
    modsquad evaluate "$run" --no-pictures
}
learn faces_routers_heads faces adapt.train=routers+heads "$@"
learn faces_1_expert faces adapt.train=experts adapt.experts=1 adapt.router_steps=50 "$@"
learn faces_all faces adapt.train=all "$@"
learn faces_scratch faces init_from=null "$@"

echo "== 4/4 the fourth task added with two experts of its own per layer, all else frozen ($out/grown)"
modsquad expand "$full" --task modsquad_ds/recipes/faces.yaml --new-mlp-experts 2 --new-attention-experts 2 --out "$out/grown.safetensors"
# grown.yaml, which expand left, trains the new experts, routers and head alone; the rest as in the recipe faces.
learn grown "$out/grown.yaml" parallel.ep_size=1 loss.mutual_information=0.0 train.steps=150 train.checkpoint_every=0 \
    train.optimizer.lr=1.0e-3 train.schedule.warmup=15 "$@"

modsquad compare "$out"/{faces_routers_heads,faces_1_expert,faces_all,faces_scratch,grown}
python tools/same_outputs.py "$full" "$out/grown" --data "$data"
python tools/modular_claims.py "$full" "$out"
echo "== done: $out"
