#!/usr/bin/env bash
# `make check`: what is worth knowing before a commit, in under three minutes: formatting, lint, types, generated files
# in sync, and the notebooks and quick tests that the change touches. BASE=REVISION names what the change is against.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD" ORT_DISABLE_TELEMETRY=1 MLFLOW_DISABLE_TELEMETRY=true
export DO_NOT_TRACK=true DVC_NO_ANALYTICS=1 TF_CPP_MIN_LOG_LEVEL=3
trap 'rm -rf .nbval' EXIT
failed=()

part() {  # name, command...: all parts run, whatever the others find
    local name=$1 began=$SECONDS
    shift
    if "$@"; then printf 'ok      %-16s %3s s\n' "$name" "$((SECONDS - began))"
    else
        printf 'FAILED  %-16s %3s s\n' "$name" "$((SECONDS - began))"
        failed+=("$name")
    fi
}

touched_notebooks() {
    [ "${#notebooks[@]}" -gt 0 ] || return 0
    python tests/numbered.py nbs .nbval
    PYTHONWARNINGS=ignore pytest -q -n 2 --dist loadscope -p no:cacheprovider --nbval "${notebooks[@]/#nbs/.nbval}"
}

touched_tests() {
    [ "${#tests[@]}" -gt 0 ] || return 0
    pytest -q "${tests[@]}"
}

read -r -a notebooks <<<"$(python tests/touched.py notebooks ${BASE:+"$BASE"})"
read -r -a tests <<<"$(python tests/touched.py tests ${BASE:+"$BASE"})"
part formatting ruff format --quiet --check --diff .
part lint ruff check --quiet .
part types ty check --quiet
part "generated files" pytest -q tests/test_generated.py
part notebooks touched_notebooks
part tests touched_tests
echo "looked at: ${notebooks[*]:-no notebook} ${tests[*]:-no test}; everything else: make test"
[ "${#failed[@]}" -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
