# Sets the project up: a virtual environment with the project and all it needs. Sourced by quickstart.sh and test.sh, which
# afterwards have its programs first on PATH and MODSQUAD_ROOT set; `bash tools/setup.sh` does the same set-up on its own.
# Once done it costs nothing; it is redone when the requirements change and after an interruption.
# MODSQUAD_VENV=FOLDER puts the environment elsewhere, for example to share it between clones.

MODSQUAD_ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"

modsquad_venv_path() {
    local path="${MODSQUAD_VENV:-$MODSQUAD_ROOT/.venv}"
    case "$path" in
        /*) printf '%s' "${path%/}" ;;
        *) printf '%s' "$PWD/${path%/}" ;;
    esac
}

# What the environment was made from; any change makes the stamp stale.
modsquad_requirements_hash() {
    cat -- "$MODSQUAD_ROOT"/{setup.cfg,pyproject.toml,tools/constraints-py311.txt} | sha256sum | cut -d' ' -f1
}

# python3.11 if it runs (a version manager's placeholder may be on PATH without running), else python3.
modsquad_find_python() {
    local candidate
    for candidate in python3.11 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "setup: neither python3.11 nor a python3 of version 3.10 or later was found on PATH; install Python 3.11" >&2
    return 1
}

# Whether environment $1 is complete, was made from requirements $2, and was not moved.
modsquad_is_ready() {
    [[ -f $1/modsquad_stamp && $(<"$1/modsquad_stamp") == "$2" && -x $1/bin/python ]] &&
        [[ ! -f $1/modsquad_made_here || $(<"$1/modsquad_made_here") == "$1" ]]
}

# Whether $1 has to be made from nothing: absent, or made here but interrupted or moved. Nobody else's folder is emptied.
modsquad_needs_making() {
    [[ ! -f $1/pyvenv.cfg ]] ||
        [[ -f $1/modsquad_made_here && (! -f $1/modsquad_stamp || $(<"$1/modsquad_made_here") != "$1") ]]
}

modsquad_create() {
    if [[ -e $1 && ! -f $1/modsquad_made_here && -n $(ls -A -- "$1") ]]; then
        echo "setup: $1 holds something else than a virtual environment; move it away or set MODSQUAD_VENV" >&2
        return 1
    fi
    local python
    python=$(modsquad_find_python) && mkdir -p -- "$1" && find "$1/" -mindepth 1 -delete || return
    # The mark comes first, so that an interruption from here on is known as one.
    printf '%s' "$1" >"$1/modsquad_made_here" || return
    if ! "$python" -m venv "$1"; then
        echo "setup: '$python -m venv' failed; on Debian and Ubuntu install the package python3-venv" >&2
        return 1
    fi
}

modsquad_install_packages() {
    # Quiet twice: errors only.
    local pip=("$1/bin/python" -m pip --disable-pip-version-check install --quiet --quiet --progress-bar off)
    if "$1/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
        pip+=(--constraint "$MODSQUAD_ROOT/tools/constraints-py311.txt")
    else
        echo "setup: $("$1/bin/python" --version) instead of 3.11: taking the newest packages, not the tested set"
    fi
    "${pip[@]}" --upgrade pip wheel 'setuptools<81' || return
    # From the root: a path in front of [extras] is parsed as a requirement, and not every path can be.
    (cd -- "$MODSQUAD_ROOT" && "${pip[@]}" --editable '.[quickstart,test]')
}

# A subshell, so that the lock ends with it. No `set -e`: bash ignores it in a function whose exit code is looked at.
modsquad_install() (
    venv=$1 wanted=$2 start=$SECONDS
    mkdir -p -- "$(dirname -- "$venv")" && exec 9>"$venv.lock" || exit
    if ! flock -n 9; then
        echo "setup: waiting for another set-up of $venv to end ..."
        flock 9 || exit
    fi
    modsquad_is_ready "$venv" "$wanted" && exit
    if modsquad_needs_making "$venv"; then
        echo "setup: installing into $venv: some minutes and about 6 GB, once ..."
        modsquad_create "$venv" || exit
    else
        echo "setup: bringing $venv up to date ..."
    fi
    rm -f -- "$venv/modsquad_stamp" || exit
    if ! modsquad_install_packages "$venv"; then
        echo "setup: the installation failed, see above; the next set-up starts over" >&2
        exit 1
    fi
    # Written last and whole: without it the next set-up starts over.
    printf '%s' "$wanted" >"$venv/modsquad_stamp.new" && mv -- "$venv/modsquad_stamp.new" "$venv/modsquad_stamp" || exit
    echo "setup: done in $((SECONDS - start)) s"
)

modsquad_setup() {
    local venv wanted
    venv=$(modsquad_venv_path) && wanted=$(modsquad_requirements_hash) || return
    modsquad_is_ready "$venv" "$wanted" || modsquad_install "$venv" "$wanted" || return
    export MODSQUAD_ROOT VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
    # This clone's code, also where the environment is shared and was installed from another clone.
    export PYTHONPATH="$MODSQUAD_ROOT${PYTHONPATH:+:$PYTHONPATH}"
}

modsquad_setup
