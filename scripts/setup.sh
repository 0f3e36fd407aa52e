# shellcheck shell=bash
# Sourced by the other scripts: makes an environment with the pinned packages once, and reuses it.
# It uses the active virtual environment or, without one, .venv in the repository's root ($root).
# The directory stays the user's, whose paths are relative to it.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." >/dev/null && pwd)"
export PYTHONUTF8=1 # whatever LANG says

fail() { echo "$*" >&2; exit 1; }

recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

# In containers there may be no home and no name for the user; caches need the one, torch the other.
if [[ ! -d "${HOME:-}" || ! -w "${HOME:-}" ]]; then
    export HOME="${TMPDIR:-/tmp}/home-$UID"
    mkdir -p "$HOME"
    echo "There is no home directory that can be written to: caches go to $HOME" >&2
fi
id -un >/dev/null 2>&1 || export USER="${USER:-user-$UID}" LOGNAME="${LOGNAME:-user-$UID}"

# Conda's base environment is active in every shell and not meant for a project's packages.
if [[ -z "${VIRTUAL_ENV:-}" && ( -z "${CONDA_PREFIX:-}" || "${CONDA_DEFAULT_ENV:-}" == base ) ]]; then
    if [[ ! -x "$root/.venv/bin/python" ]]; then
        recent "${PYTHON:-python3}" ||
            fail "Python 3.10 or newer is needed; name one with PYTHON=/path/to/python3"
        echo "Creating .venv"
        "${PYTHON:-python3}" -m venv "$root/.venv" || fail "The venv module failed; on Debian: apt install python3-venv"
    fi
    # shellcheck source=/dev/null
    source "$root/.venv/bin/activate"
fi
prefix="$(python -I -c 'import sys; sys.exit(1) if sys.version_info < (3, 10) else print(sys.prefix)')" ||
    fail "The active environment's python is not 3.10 or newer; deactivate it or use another"

# This clone's code is used, even if the environment was set up by another one; and a module of the
# user's directory does not stand in for one of ours.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1

# The GPUs to use, as in 0,1: those that CUDA_VISIBLE_DEVICES names, as CUDA understands it (numbers,
# GPU-… and MIG-…; what follows one that is none, such as -1, does not count), or all.
visible_gpus() {
    local count gpu found=()
    count="$({ nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU ' || true)"
    ((count > 0)) || return 0
    [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]] || { seq -s, 0 $((count - 1)); return; }
    for gpu in ${CUDA_VISIBLE_DEVICES//,/ }; do
        [[ "$gpu" =~ ^(GPU|MIG)- || "$gpu" =~ ^[0-9]+$ && "$gpu" -lt "$count" ]] || break
        found+=("$gpu")
    done
    (IFS=,; echo "${found[*]}")
}
visible="$(visible_gpus)"
gpus="$(tr ',' '\n' <<<"$visible" | grep -c . || true)"
if ((gpus > 0)); then
    # Batches of changing size would leave the memory in pieces.
    [[ -n "${PYTORCH_CUDA_ALLOC_CONF:-}" ]] || export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
else
    export DS_ACCELERATOR=cpu
fi
# Minutes that a process waits for the others, of which one may encode the data or save a model.
export DEEPSPEED_TIMEOUT="${DEEPSPEED_TIMEOUT:-60}"

# A stamp says what was installed; a change of the pins or of pyproject.toml installs again.
wanted="$(cat "$root/pyproject.toml" "$root/scripts/constraints.txt" | cksum)"
stamp="$prefix/.preference-matching-rlhf"
installed="$(cut -d' ' -f1-2 "$stamp" 2>/dev/null || true)" # earlier versions wrote a path behind it
if [[ "$installed" != "$wanted" ]]; then
    [[ -w "$prefix" ]] ||
        fail "The environment $prefix lacks the pinned packages, and you may not write to it: let its owner run scripts/setup.sh, or use another environment"
    command -v g++ >/dev/null || fail "g++ is needed (DeepSpeed compiles a small extension); on Debian: apt install g++"
    headers="$(python -c 'import sysconfig; print(sysconfig.get_path("include"))')"
    [[ -f "$headers/Python.h" ]] ||
        fail "Python's headers are needed (DeepSpeed compiles a small extension), and $headers/Python.h is missing; on Debian: apt install python3-dev"
fi

# DeepSpeed's compiled extensions lie in the environment that they were compiled for: environments
# that shared one place would compile them again and again. Whoever may not write there compiles his
# own.
if [[ -z "${TORCH_EXTENSIONS_DIR:-}" ]]; then
    TORCH_EXTENSIONS_DIR="$prefix/torch_extensions"
    mkdir -p "$TORCH_EXTENSIONS_DIR" 2>/dev/null || true
    [[ -w "$TORCH_EXTENSIONS_DIR" ]] ||
        TORCH_EXTENSIONS_DIR="${XDG_CACHE_HOME:-$HOME/.cache}/torch_extensions-$(cksum <<<"$prefix" | cut -d' ' -f1)"
    export TORCH_EXTENSIONS_DIR
fi

if [[ "$installed" != "$wanted" ]]; then
    echo "Installing the pinned packages (a few minutes, once)"
    # torch first and by its exact version: a range would bring a newer, much larger build.
    python -m pip install --quiet --quiet --disable-pip-version-check "$(grep '^torch==' "$root/scripts/constraints.txt")"
    PYTHONWARNINGS=ignore python -m pip install --quiet --quiet --disable-pip-version-check \
        --constraint "$root/scripts/constraints.txt" --editable "$root[gguf,plots,tracking,test]"
    if ((gpus == 0)); then
        # DeepSpeed compiles its communication between CPU processes on first use.
        echo "Compiling DeepSpeed's CPU communication (a minute, once)"
        python -c "from training.runtime.extensions import load_extension; load_extension('ShareMemCommBuilder')" >/dev/null
    fi
    echo "$wanted" >"$stamp"
fi
