# shellcheck shell=bash
# Sourced by the other scripts: makes an environment with the pinned packages once, and reuses it.
# It uses the active virtual environment or, without one, .venv in the repository's root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "$*" >&2; exit 1; }

recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

# Conda's base environment is active in every shell and not meant for a project's packages.
if [[ -z "${VIRTUAL_ENV:-}" && ( -z "${CONDA_PREFIX:-}" || "${CONDA_DEFAULT_ENV:-}" == base ) ]]; then
    if [[ ! -x .venv/bin/python ]]; then
        recent "${PYTHON:-python3}" ||
            fail "Python 3.10 or newer is needed; name one with PYTHON=/path/to/python3"
        echo "Creating .venv"
        "${PYTHON:-python3}" -m venv .venv || fail "The venv module failed; on Debian: apt install python3-venv"
    fi
    # shellcheck source=/dev/null
    source .venv/bin/activate
fi
recent python || fail "The active environment's python is not 3.10 or newer; deactivate it or use another"
gpus="$({ nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU ' || true)"
if [[ "$gpus" != 0 && -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then
    gpus="$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)"
fi
[[ "$gpus" != 0 ]] || export DS_ACCELERATOR=cpu

# DeepSpeed's compiled extensions lie in the environment that they were compiled for: environments
# that shared one place would compile them again and again.
prefix="$(python -c 'import sys; print(sys.prefix)')"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$prefix/torch_extensions}"

# A stamp says what was installed; a change of the pins or of pyproject.toml installs again.
wanted="$(cat pyproject.toml scripts/constraints.txt | cksum) $PWD"
stamp="$prefix/.preference-matching-rlhf"
if [[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]]; then
    command -v g++ >/dev/null || fail "g++ is needed (DeepSpeed compiles a small extension); on Debian: apt install g++"
    echo "Installing the pinned packages (a few minutes, once)"
    # torch first and by its exact version: a range would bring a newer, much larger build.
    python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' scripts/constraints.txt)"
    PYTHONWARNINGS=ignore python -m pip install --quiet --disable-pip-version-check --constraint scripts/constraints.txt \
        --editable ".[gguf,plots,tracking,test]"
    if [[ "$gpus" == 0 ]]; then
        # DeepSpeed compiles its communication between CPU processes on first use.
        echo "Compiling DeepSpeed's CPU communication (a minute, once)"
        python -c "from training.runtime.extensions import load_extension; load_extension('ShareMemCommBuilder')" >/dev/null
    fi
    echo "$wanted" >"$stamp"
fi
