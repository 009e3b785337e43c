# Sets up a job for its ranks: modules, environment, address of the first node. Read by train.sbatch and bench.sbatch in the job,
# with `root` and `script` set; nothing here differs between clusters.

cd -- "$root"
. slurm/cluster.env
if [[ -n ${MODSQUAD_MODULES:-} ]]; then
    # Several modules are several words.
    # shellcheck disable=SC2086
    module load $MODSQUAD_MODULES
fi
venv="${MODSQUAD_VENV:-$root/.venv}"
if [[ ! -x $venv/bin/python ]]; then
    echo "$script: no environment at $venv; run tools/setup.sh or set MODSQUAD_VENV in slurm/cluster.env" >&2
    exit 2
fi
export PATH="$venv/bin:$PATH" PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

# The address of the first node. A Slurm name need not be a name that the network knows.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if [[ -n ${MODSQUAD_MASTER_ADDR:-} ]]; then
    MASTER_ADDR="$MODSQUAD_MASTER_ADDR"
elif getent hosts "${nodes[0]}" >/dev/null; then
    MASTER_ADDR="${nodes[0]}"
else
    MASTER_ADDR="$(scontrol show node "${nodes[0]}" -o | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')"
fi
# From the job's number: two jobs on one node do not meet.
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS
# srun does not take this over from sbatch.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
fi
