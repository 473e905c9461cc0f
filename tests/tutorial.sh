#!/usr/bin/env bash
# Runs docs/tutorial.md as it is written: its sh blocks, in order, in one shell, in a fresh clone of this repository.
#
#   tests/tutorial.sh [FOLDER]       where the clone goes [a temporary one, removed]
#
# Prints the seconds of each block; stops at the first that fails. It needs what the tutorial needs: apt as root or the
# libraries, and PyPI.
set -euo pipefail
case ${1:-} in
-h | --help)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit
    ;;
-*)
    echo "error[E200] tutorial.sh: unknown option $1; usage: tests/tutorial.sh [FOLDER]" >&2
    exit 2
    ;;
esac
source=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-}
if [ -z "$folder" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi
git clone -q "$source" "$folder/clone"
cd "$folder/clone"

# The blocks as one script that says which it is at.
awk '/^```sh$/ { inside = 1; n++; printf "block %d\n", n; next }
     /^```$/ { if (inside) print "end"; inside = 0; next }
     inside { print }' docs/tutorial.md >"$folder/blocks"
{
    # shellcheck disable=SC2016  # the script expands
    echo 'set -euo pipefail; begun=$SECONDS; trap '\''echo "tutorial: block $block failed" >&2'\'' ERR'
    # shellcheck disable=SC2016
    sed -e 's/^block \([0-9]*\)$/block=\1 at=$SECONDS/' \
        -e 's/^end$/echo "-- block $block: $((SECONDS - at)) s"/' "$folder/blocks"
    # shellcheck disable=SC2016
    echo 'echo "-- all: $((SECONDS - begun)) s"'
} >"$folder/script"
bash "$folder/script"
