#!/usr/bin/env bash
# `make coverage`: the lines of the package that a command runs, in its own process, in those that it starts and in the
# kernels of notebooks. The command is `make test`'s unless another is given. What ends by SIGKILL leaves no record.
set -uo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# The package `coverage` brings a .pth file that measures every Python which finds COVERAGE_PROCESS_START.
mkdir -p "$folder/ipython/profile_default/startup"
cp tests/cells.py "$folder/ipython/profile_default/startup/"
COVERAGE_PROCESS_START="$PWD/pyproject.toml" COVERAGE_FILE="$folder/.coverage" IPYTHONDIR="$folder/ipython" \
    bash -c '"$@"' - "${@:-tests/run.sh}"
status=$?
coverage combine --quiet --data-file .coverage "$folder"
coverage report --data-file .coverage
exit "$status"
