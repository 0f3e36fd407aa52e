# Sourced by the other scripts: an environment with the pinned packages, made once and reused.
# Uses the active virtual environment, otherwise .venv in the repository's root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "$*" >&2; exit 1; }

if [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then
    if [[ ! -x .venv/bin/python ]]; then
        "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
            fail "Python 3.10 or newer is needed; name one with PYTHON=/path/to/python3"
        echo "Creating .venv"
        "${PYTHON:-python3}" -m venv .venv || fail "The venv module failed; on Debian: apt install python3-venv"
    fi
    source .venv/bin/activate
fi

# A stamp holds what was installed; a change of the pins or of pyproject.toml installs anew.
wanted="$(cat pyproject.toml scripts/constraints.txt | cksum) $PWD"
stamp="$(python -c 'import sys; print(sys.prefix)')/.preference-matching-rlhf"
if [[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]]; then
    command -v g++ >/dev/null || fail "g++ is needed (DeepSpeed compiles a small extension); on Debian: apt install g++"
    echo "Installing the pinned packages (a few minutes, once)"
    # torch by its exact version, first: a range would bring a much larger build of a newer one.
    python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' scripts/constraints.txt)"
    PYTHONWARNINGS=ignore python -m pip install --quiet --disable-pip-version-check --constraint scripts/constraints.txt \
        --editable ".[plots,lora,tracking,test]"
    if ! command -v nvidia-smi >/dev/null; then
        # DeepSpeed compiles its communication between CPU processes when it is first used.
        echo "Compiling DeepSpeed's CPU communication (a minute, once)"
        DS_ACCELERATOR=cpu python -c "from deepspeed.comm.torch import build_shm_op; build_shm_op()" >/dev/null
    fi
    echo "$wanted" >"$stamp"
fi
