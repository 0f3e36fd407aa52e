# shellcheck shell=bash
# Sourced by scripts that read options of their own, in the user's directory: $called_from then names
# it, and the directory is the repository's root.
called_from="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { # MESSAGE: a mistake in the arguments
    echo "$1; bash scripts/${0##*/} --help explains" >&2
    exit 2
}

# PATH: absolute, if it is one outside the repository's root, where the user stands.
from_there() {
    if [[ -z "$1" || "$1" == /* || "$called_from" == "$PWD" ]]; then echo "$1"; else echo "$called_from/$1"; fi
}
