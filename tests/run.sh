#!/usr/bin/env bash
# `make test`: every test but the long ones, from quick to slow. `make test-long` calls it with --long: those alone.
# What was skipped or left out stands at the end of each part, with its reason.
set -euo pipefail
cd "$(dirname "$0")/.."
. tests/tools.sh
export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD" ORT_DISABLE_TELEMETRY=1 MLFLOW_DISABLE_TELEMETRY=true
export DO_NOT_TRACK=true DVC_NO_ANALYTICS=1 TF_CPP_MIN_LOG_LEVEL=3
export OMP_WAIT_POLICY=passive  # two tests share two cores: a thread that waits leaves its core to the other
scratch=$(mktemp -d)
trap 'rm -rf "$scratch" .nbval' EXIT

part() {  # name, command...
    local name=$1 began=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    "$@"
    printf '== %s: %s s\n' "$name" "$((SECONDS - began))"
}

notebooks() {  # every cell is run, as nbdev-test would, and what it gives is compared with what is stored
    python tests/numbered.py nbs .nbval  # inside the project, so that the notebooks find it
    # Other packages' warnings are not ours to compare. The longest notebooks begin.
    PYTHONWARNINGS=ignore pytest -q -n 2 --dist loadscope -p no:cacheprovider --nbval .nbval
}

job_notebooks() {  # every job notebook in the order of the pipeline, on a small simulation in a folder of its own
    FRAUD_PATHS_DATA=$scratch/data FRAUD_PATHS_MODELS=$scratch/models FRAUD_PATHS_REPORTS=$scratch/reports \
    FRAUD_REGISTRY_TRACKING_URI=sqlite:///$scratch/mlflow.db FRAUD_REGISTRY_ARTIFACTS=$scratch/mlartifacts \
    FRAUD_SIMULATE_ROWS=40000 FRAUD_SIMULATE_DAYS=60 FRAUD_SIMULATE_FRAUD_RATE=0.01 FRAUD_FEATURES_ENGINE=local \
    FRAUD_TENSORFLOW_EPOCHS=2 FRAUD_XGBOOST_ROUNDS=50 FRAUD_EVALUATE_RESAMPLES=50 \
    FRAUD_GATE_MIN_AVERAGE_PRECISION=0 \
        pytest -q -p no:cacheprovider --nbval-lax \
        jobs/{acquire,features,train_xgboost,train_tensorflow,promote,monitor,report}.ipynb
}

need_all
if [ "${1:-}" = --long ]; then
    part "long tests" pytest -q --long -m long --durations 0 --durations-min 1 tests
    exit
fi
part "notebooks" notebooks
part "job notebooks" job_notebooks
part "end to end" pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 25 tests
