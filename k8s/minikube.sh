#!/usr/bin/env bash
# The service, the stream and the queue of cases in Minikube, with the champion of the last run: builds the image, brings the champion, applies the overlay, waits, and sends a first transaction.
# `make minikube` calls this. Doing it again brings what has changed; keys, the store and what is in Kafka stay as they are.
set -euo pipefail
cd "$(dirname "$0")/.."
profile=${MINIKUBE_PROFILE:-minikube}
champion=${FRAUD_SERVE_BUNDLE:-models/champion}
node_models=/data/fraud-models  # as in k8s/overlays/minikube/models.yaml
transaction='{"transaction_id": "a-1001", "step": 2000, "type": "TRANSFER", "amount": 1520.5, "sender": "C1001", "sender_balance": 1600.0, "receiver": "C2002", "receiver_balance": 0.0}'

fail() { echo "error: $*" >&2; exit 1; }
say() { printf '\n== %s\n' "$*"; }
need() { command -v "$1" >/dev/null || fail "$1 is not installed; how to install it: $2"; }
in_minikube() { minikube --profile "$profile" "$@" </dev/null; }
kube() { kubectl --context "$profile" "$@"; }  # never another cluster, whatever the current context is
random() { head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n'; }

check() {
    need minikube https://minikube.sigs.k8s.io/docs/start
    need kubectl https://kubernetes.io/docs/tasks/tools
    need curl "sudo apt-get install curl"
    [ -f "$champion/manifest.json" ] || fail "$champion holds no champion (manifest.json); make one with: make run"
}

start() {
    if in_minikube status >/dev/null 2>&1; then
        in_minikube addons enable metrics-server  # the autoscaler reads it
        return
    fi
    if [ -z "${MINIKUBE_DRIVER:-$(minikube config get driver 2>/dev/null || true)}" ]; then  # Minikube's own choice is Docker
        need docker https://docs.docker.com/engine/install
        docker info >/dev/null 2>&1 || fail "the Docker daemon does not answer; start it, or name another driver with MINIKUBE_DRIVER"
    fi
    in_minikube start --cni=calico --addons=metrics-server  # Calico, because it enforces the network policies
}

build() {  # image, Dockerfile; under a name of its own, so that a build that failed (which Minikube does not report) cannot pass for an older image
    in_minikube image build --tag "$1" --file "$2" .
    [[ $(in_minikube image ls) == *"$1"* ]] || fail "the image was not built; what went wrong stands above"
}

has() { [[ $(kubectl kustomize k8s/overlays/minikube) == *"$1"* ]]; }  # what components have brought

bring() {  # files beside the old champion, then its name: the service finds the one or the other, whole; the folder belongs to the jobs' user, who brings champions too
    in_minikube ssh -- "sudo rm -rf $node_models/new && sudo mkdir -p $node_models/new"
    for file in "$champion"/*; do
        in_minikube cp "$file" "$node_models/new/${file##*/}"
    done
    in_minikube ssh -- "cd $node_models && sudo chown -R 10001:10001 . && sudo chmod -R a+rX . && sudo rm -rf old && { [ ! -e champion ] || sudo mv champion old; } && sudo mv new champion"
}

secret() {  # namespace, name, "key: 'value'"...: made once
    local namespace=$1 name=$2
    shift 2
    if kube --namespace "$namespace" get secret "$name" >/dev/null 2>&1; then return; fi
    printf '%s\n' "apiVersion: v1" "kind: Secret" "metadata: {name: $name}" "stringData:" "${@/#/  }" | kube --namespace "$namespace" create --filename -
}

apply() {
    cp settings.ini k8s/base/settings.ini
    kubectl kustomize k8s/overlays/minikube | sed "s|image: fraud-api:.*|image: $image|; s|image: fraud-jobs:.*|image: $jobs_image|" | kube apply --filename -
}

wait_until_ready() {
    for name in statefulset/fraud-redis statefulset/fraud-kafka statefulset/fraud-postgres deployment/fraud-api deployment/fraud-stream deployment/fraud-stream-labels deployment/fraud-stream-cases; do
        kube --namespace fraud rollout status "$name" --timeout=300s || fail "$name is not ready after five minutes; see why with: kubectl --context $profile --namespace fraud get pods,events"
    done
}

send() {
    local address key
    exec 3< <(exec kubectl --context "$profile" --namespace fraud port-forward service/fraud-api :80)
    forwarding=$!
    trap 'kill "$forwarding" 2>/dev/null || true' EXIT
    read -r -t 30 -u 3 _ _ address _ || fail "kubectl port-forward did not start"
    key=$(kube --namespace fraud get secret fraud-api-keys --output "go-template={{index .data \"api-keys\" | base64decode}}" | sed -nE '/^[^#:]+:/{s/^[^:]+:([^,]*).*/\1/p;q;}')
    # The key goes in by standard input: arguments can be read by every process of this machine.
    curl --silent --show-error --fail-with-body --max-time 30 --header @- --data "$transaction" "http://$address/predict" <<<"X-API-Key: $key"
    echo
}

check
say "Minikube, profile $profile"
start
now=$(date -u +%Y%m%d%H%M%S)
image=fraud-api:$now
jobs_image=fraud-jobs:$now
say "image $image"
build "$image" Dockerfile
if has "image: fraud-jobs:"; then  # components/jobs
    say "image $jobs_image"
    build "$jobs_image" Dockerfile.jobs
fi
say "champion $champion"
bring
say "namespaces, Secrets, overlay"
kube apply --filename k8s/base/namespaces.yaml
secret fraud fraud-api-keys "api-keys: 'minikube@write:$(random)'"
password=$(random)
secret fraud fraud-store "password: '$password'" "url: 'redis://:$password@fraud-redis:6379/0'"
password=$(random)
secret fraud fraud-cases "password: '$password'" "url: 'postgresql+psycopg://fraud@fraud-postgres:5432/fraud'"
if has "claimName: fraud-mlflow"; then  # components/mlflow
    secret fraud-jobs fraud-mlflow "admin: '$(random)'" "jobs: '$(random)'" "forms: '$(random)'"
fi
apply
wait_until_ready
say "a first transaction"
send
cat <<END

Again, and from your own programs:

  kubectl --context $profile --namespace fraud port-forward service/fraud-api 8000:80 &
  key=\$(kubectl --context $profile --namespace fraud get secret fraud-api-keys --output 'go-template={{index .data "api-keys" | base64decode}}' | cut -d: -f2)
  curl --header "X-API-Key: \$key" --data '$transaction' http://127.0.0.1:8000/predict

The stream, with a thousand transactions of [data] source:

  kubectl --context $profile --namespace fraud port-forward pod/fraud-kafka-0 9092:9092 &
  fraud stream produce --limit 1000
  fraud stream sink --until-end
END
