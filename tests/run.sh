#!/usr/bin/env bash
# Every test, from quick to slow. `make test` sets up and calls this; it ends with pytest's closing line.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" PYTHONPATH="$PWD" ORT_DISABLE_TELEMETRY=1 MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true DVC_NO_ANALYTICS=1 TF_CPP_MIN_LOG_LEVEL=3
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
    PYTHONWARNINGS=ignore pytest -q -n 2 --dist loadscope -p no:cacheprovider --nbval .nbval/explore .nbval/*/*.ipynb .nbval/*.ipynb  # the longest begin; other packages' warnings are not ours to compare
}

job_notebooks() {  # every job notebook in the order of the pipeline, on a small simulation in a folder of its own
    FRAUD_PATHS_DATA=$scratch/data FRAUD_PATHS_MODELS=$scratch/models FRAUD_PATHS_REPORTS=$scratch/reports \
    FRAUD_REGISTRY_TRACKING_URI=sqlite:///$scratch/mlflow.db FRAUD_REGISTRY_ARTIFACTS=$scratch/mlartifacts \
    FRAUD_SIMULATE_ROWS=40000 FRAUD_SIMULATE_DAYS=60 FRAUD_SIMULATE_FRAUD_RATE=0.01 FRAUD_FEATURES_ENGINE=local \
    FRAUD_TENSORFLOW_EPOCHS=2 FRAUD_XGBOOST_ROUNDS=50 FRAUD_EVALUATE_RESAMPLES=50 FRAUD_GATE_MIN_AVERAGE_PRECISION=0 \
        pytest -q -p no:cacheprovider --nbval-lax jobs/{acquire,features,train_xgboost,train_tensorflow,promote,monitor,report}.ipynb
}

need() {  # program, Debian package, what for: installed where that is allowed
    if command -v "$1" >/dev/null; then return; fi
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "error: $3 needs $1; install it with: sudo apt-get install $2" >&2
        exit 1
    fi
    # Without init scripts: the tests start their own servers, on ports of their own.
    apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$2"
}

[ -n "${JAVA_HOME:-}" ] || need java openjdk-17-jre-headless "the Spark engine"
need redis-server redis-server "the shared store"
need psql postgresql "the registry's database"
need mvn maven "the Kafka broker of the tests"
need shellcheck shellcheck "the check of scripts"
need jq jq "the check of the scheduled workflow"
need promtool prometheus "the test of the alerts"
need amtool prometheus-alertmanager "the test of who is told"
need prometheus-pushgateway prometheus-pushgateway "the figures of jobs"
need chromium chromium "the tests in a browser"
[ "${CI:-}" != true ] || need go golang-go "the check of workflows"
for name in buildah podman crun debootstrap; do need "$name" "$name" "the test of the image"; done
part "notebooks" notebooks
part "job notebooks" job_notebooks
part "end to end" pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 15 tests
