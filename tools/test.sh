#!/usr/bin/env bash
# Set-up, lint, types and tests. Arguments go to pytest: bash tools/test.sh -k order
# All three checks run; the exit code is that of the first one that failed.
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/setup.sh"
cd -- "$MODSQUAD_ROOT"
export OMP_NUM_THREADS=1

first_failure=0
check() {
    echo "== $*"
    local code=0
    "$@" || code=$?
    if ((code != 0)); then
        echo "== $1 failed (exit code $code)"
        ((first_failure != 0)) || first_failure=$code
    fi
}

check ruff check .
check mypy
check python -m pytest "$@"
((first_failure == 0)) && echo "== all checks passed"
exit "$first_failure"
