# shellcheck shell=bash
# What the tests need beside .venv: `need_all` lists what is missing, and installs it where that is allowed.
# Sourced by tests/run.sh; the rows are: program, Debian package, what for.
NEEDED=(
    "java openjdk-17-jre-headless the Spark engine"
    "redis-server redis-server the shared store"
    "psql postgresql the registry's database"
    "mvn maven the Kafka broker of the tests"
    "shellcheck shellcheck the check of scripts"
    "jq jq the check of the scheduled workflow"
    "promtool prometheus the test of the alerts"
    "amtool prometheus-alertmanager the test of who is told"
    "prometheus-pushgateway prometheus-pushgateway the figures of jobs"
    "chromium chromium the tests in a browser"
    "buildah buildah the test of the image"
    "podman podman the test of the image"
    "crun crun the test of the image"
    "debootstrap debootstrap the test of the image"
)
# Beside it, what only the long tests need: the node of a Kubernetes, which also takes a Go of 1.21 or newer and kubectl,
# and npm.
NEEDED_LONG=(
    "containerd containerd the test on Kubernetes"
    "runc runc the test on Kubernetes"
    "/usr/lib/cni/bridge containernetworking-plugins the test on Kubernetes"
    "iptables iptables the test on Kubernetes"
    "ipset ipset the test on Kubernetes"
    "npm npm the site of the docs"
)
[ "${CI:-}" != true ] || NEEDED+=("go golang-go the check of workflows")

need_all() {
    local row program package purpose packages=()
    for row in "${NEEDED[@]}"; do
        read -r program package purpose <<<"$row"
        if command -v "$program" >/dev/null || { [ "$program" = java ] && [ -n "${JAVA_HOME:-}" ]; }; then continue; fi
        [ "${#packages[@]}" -gt 0 ] || echo "missing here:"
        printf '  %-24s for %s (Debian package %s)\n' "$program" "$purpose" "$package"
        packages+=("$package")
    done
    if [ "${#packages[@]}" -eq 0 ]; then return; fi
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "error: install all of it with: sudo apt-get install --no-install-recommends ${packages[*]}" >&2
        exit 1
    fi
    echo "installing: ${packages[*]}"
    # Without init scripts: the tests start their own servers, on ports of their own.
    apt-get update -qq
    RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
}
