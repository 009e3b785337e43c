# What differs between clusters, brought into effect: modules and environment, `python` first on PATH. Sourced by the batch scripts
# (most through ranks.sh) with `script` (their name) and `root` (the project's folder) set.

fail() {
    echo "$script: error: $*" >&2
    exit 2
}

cd -- "$root"
site="${MODSQUAD_CLUSTER_ENV:-slurm/cluster.env}"
[[ -r $site ]] || fail "$site cannot be read; correct or unset MODSQUAD_CLUSTER_ENV"
. "$site"
if [[ -n ${MODSQUAD_MODULES:-} ]]; then
    # Several modules are several words.
    # shellcheck disable=SC2086
    module load $MODSQUAD_MODULES
fi
container=()
if [[ -n ${MODSQUAD_CONTAINER:-} ]]; then
    read -r -a container <<<"$MODSQUAD_CONTAINER"
else
    venv="${MODSQUAD_VENV:-$root/.venv}"
    [[ -x $venv/bin/python ]] || fail "no environment at $venv; run tools/setup.sh or set MODSQUAD_VENV in $site"
    export PATH="$venv/bin:$PATH"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
