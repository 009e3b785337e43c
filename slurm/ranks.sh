# What the batch scripts share: a job's address and numbers, and the start of its ranks. Sourced by them in the job, with `script`
# (their name) and `root` (the project's folder) set; nothing here differs between clusters.

. "$root/slurm/surroundings.sh"

# A plain `sbatch slurm/train.sbatch` asks for no number of tasks: one per node.
export SLURM_NTASKS="${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES}"
# One process per GPU: more would share one, fewer would leave some idle.
if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
    tasks=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
    if ((tasks != SLURM_GPUS_ON_NODE)); then
        fail "$tasks task(s) per node but $SLURM_GPUS_ON_NODE GPU(s); ask for as many: --ntasks-per-node=N --gpus-per-node=N"
    fi
fi

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
if [[ -n ${MODSQUAD_INTERFACE:-} ]]; then
    export NCCL_SOCKET_IFNAME="$MODSQUAD_INTERFACE" GLOO_SOCKET_IFNAME="$MODSQUAD_INTERFACE"
fi
# srun does not take this over from sbatch.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
fi

# Folder of the ranks' logs, beside the job's own log and new for each start of the job.
rank_logs() {
    local log
    log="$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdOut=//p')"
    [[ -f $log ]] || log="$SLURM_SUBMIT_DIR/modsquad-$SLURM_JOB_ID.log"
    printf '%s' "${log%.log}.ranks/start-${SLURM_RESTART_COUNT:-0}"
}

# A signal to this shell goes on to all ranks; `told` is its name. Slurm's before the time limit reaches the shell alone. Its
# SIGTERM (preemption, scancel, a node that failed) reaches the ranks too, and would make srun kill them: they get USR1.
told=""
step=""
hand_on_signals() {
    trap 'hand_on USR1' USR1
    trap 'hand_on TERM' TERM
}
hand_on() {
    told="$1"
    echo "$script: SIG$1: the ranks are told to stop"
    [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null || true
}

# run_ranks COMMAND...: start it on every rank. Each writes to a log of its own; here appear the first rank's lines and, if the ranks
# fail, what the others say of it. Afterwards `code` is the exit code of the rank that ended first by itself, and `cut_off` is
# whether a signal ended any: the ranks that are left are killed as soon as one fails.
run_ranks() {
    local logs echo first
    logs="$(rank_logs)"
    mkdir -p -- "$logs"
    : >"$logs/srun.log" >>"$logs/rank-0.log"  # tail wants to see them
    srun --kill-on-bad-exit=1 --output="$logs/rank-%t.log" --open-mode=append "${container[@]}" "$@" 2>>"$logs/srun.log" &
    step=$!
    [[ -z $told ]] || hand_on "$told"
    tail --quiet --lines=+1 --follow --sleep-interval=0.5 --pid="$step" -- "$logs/rank-0.log" "$logs/srun.log" &
    echo=$!
    # `wait` also returns when a trap has run; bash remembers how the step ended.
    while kill -0 "$step" 2>/dev/null; do
        wait "$step" || true
    done
    code=0
    wait "$step" || code=$?
    wait "$echo" || true
    cut_off=$((code > 128))
    first="$(sed -n 's/.*: Exited with exit code \([0-9]*\)$/\1/p' "$logs/srun.log" | head -n 1)"
    code="${first:-$code}"
    ((code == 0 || code == 75)) || tell_errors "$logs"
}

# Why ranks other than the first failed: their lines `rank N: error: ...`, or the last line of a traceback.
tell_errors() {
    local log
    for log in "$1"/rank-*.log; do
        if [[ $log == */rank-0.log ]]; then
            continue
        elif ! grep -E '^rank [0-9]+: error: ' -- "$log" && grep -q 'Traceback' -- "$log"; then
            echo "$(basename -- "$log" .log): $(tail -n 1 -- "$log")"
        fi
    done | head -n 20
    echo "$script: exit code $code; the ranks' logs are in $1"
}
