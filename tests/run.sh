#!/usr/bin/env bash
# `make test`: every test but the long ones, from quick to slow. `make test-long` calls it with --long: those alone.
# What was skipped or left out stands at the end of each part, with its reason.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/tools.sh
export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD" ORT_DISABLE_TELEMETRY=1 MLFLOW_DISABLE_TELEMETRY=true
export DO_NOT_TRACK=true DVC_NO_ANALYTICS=1 TF_CPP_MIN_LOG_LEVEL=3
export OMP_WAIT_POLICY=passive  # two tests share two cores: a thread that waits leaves its core to the other
trap 'rm -rf .nbval' EXIT

failed=0
part() {  # name, command...; a part that fails does not keep the next from running
    local name=$1 began=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    "$@" || failed=1
    printf '== %s: %s s\n' "$name" "$((SECONDS - began))"
}

notebooks() {  # folders: every cell is run, as nbdev-test would, and what it gives is compared with what is stored
    # Inside the project, so that the notebooks find it. Other packages' warnings are not ours to compare.
    python tests/numbered.py nbs .nbval
    PYTHONPATH="$PWD/tests:$PYTHONPATH" PYTHONWARNINGS=ignore pytest -q -n 3 --dist loadscope -p no:cacheprovider \
        -p kernels --nbval --nbval-kernel-startup-timeout 180 "${@/#/.nbval/}"
}

[ "${1:-}" != --long ] || NEEDED+=("${NEEDED_LONG[@]}")
need_all
if [ "${1:-}" = --long ]; then
    part "exploration" notebooks explore
    part "long tests" pytest -q --long -m long --durations 0 --durations-min 1 tests
    exit "$failed"
fi
# The longest begin. The jobs' notebooks are run by papermill, end to end; exploration is left to make test-long.
part "notebooks" notebooks train pipeline model features monitor serve store stream core data report cli index.ipynb
echo "left to make test-long: the notebooks of nbs/explore"
part "end to end" pytest -q -n 4 --dist loadfile --no-loadscope-reorder --durations 25 tests
exit "$failed"
