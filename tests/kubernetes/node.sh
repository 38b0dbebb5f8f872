#!/usr/bin/env bash
# A Kubernetes of one node, inside the namespaces (network, mounts, processes) that tests/kubernetes.py has made for it:
# node.sh FOLDER PROGRAMS STORE CGROUP. It runs until it is killed, and everything that it started ends with it.
# FOLDER/admin.conf is the administrator's, FOLDER/*.log what the parts say; FOLDER/started is there once all run.
# STORE keeps images from one cluster to the next; those in FOLDER/images are added to it.
set -euo pipefail
folder=$1 programs=$2 store=$3 cgroup=$4
address=10.199.0.1
cd "$folder"

start() {  # name, command...
    local name=$1
    shift
    "$@" >"$name.log" 2>&1 &
    echo $! >"$name.pid"
}

places() {
    for place in /run /var/log /var/lib/cni; do  # fixed places of containerd, the kubelet and CNI
        mkdir -p "$place"
        mount -t tmpfs tmpfs "$place"
    done
    mkdir -p /run/netns kubelet pods
    [ -e /data ] || { mkdir /data && touch made-data; }
    mount --bind data /data  # where Minikube's volumes are
    umount /sys/fs/cgroup/unified 2>/dev/null || true  # where both kinds of cgroups are, the first alone
    for controller in /sys/fs/cgroup/*/; do mkdir -p "$controller$cgroup"; done
    for file in cpuset.cpus cpuset.mems; do
        cat "/sys/fs/cgroup/cpuset/$file" >"/sys/fs/cgroup/cpuset/$cgroup/$file"
    done
    echo 8192 >"/sys/fs/cgroup/cpu/$cgroup/cpu.shares"  # all pods are one group beside the machine's others
    # The kubelet sets these for the whole machine. It finds them as it wants them, and the machine keeps its own.
    mkdir -p sysctl
    while read -r name value; do
        echo "$value" >"sysctl/${name//\//.}"
        mount --bind "sysctl/${name//\//.}" "/proc/sys/$name"
    done <<END
vm/overcommit_memory 1
kernel/panic 10
kernel/panic_on_oops 1
kernel/keys/root_maxkeys 1000000
kernel/keys/root_maxbytes 25000000
END
}

network() {  # an interface that is not loopback, which an API server must not advertise; Services need a default route
    ip link set lo up
    ip link add node0 type veth peer name node1
    ip address add $address/24 dev node0
    ip link set node0 up
    ip link set node1 up
    ip route add default dev node0
    sysctl -qw net.ipv4.ip_forward=1 net.bridge.bridge-nf-call-iptables=1
}

control_plane() {
    openssl genrsa -out accounts.key 2048 2>/dev/null
    # Who the API server is to metrics-server, which it passes requests on to.
    openssl req -x509 -newkey rsa:2048 -nodes -days 7 -subj /CN=front-proxy -keyout front.key -out front.crt 2>/dev/null
    echo "admin,admin,admin,system:masters" >tokens  # nothing outside these namespaces reaches the server
    cat >admin.conf <<END
apiVersion: v1
kind: Config
current-context: minikube
contexts: [{name: minikube, context: {cluster: here, user: admin, namespace: fraud}}]
clusters: [{name: here, cluster: {server: "https://$address:8443", insecure-skip-tls-verify: true}}]
users: [{name: admin, user: {token: admin}}]
END
    start etcd "$programs/kube" etcd --data-dir etcd --unsafe-no-fsync \
        --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
        --listen-peer-urls http://127.0.0.1:2380
    start apiserver "$programs/kube" kube-apiserver --etcd-servers http://127.0.0.1:2379 --cert-dir certificates \
        --bind-address 0.0.0.0 --advertise-address $address --secure-port 8443 --allow-privileged=true \
        --service-cluster-ip-range 10.96.0.0/16 --authorization-mode Node,RBAC --token-auth-file tokens \
        --kubelet-preferred-address-types InternalIP --service-account-issuer https://kubernetes.default.svc \
        --service-account-key-file accounts.key --service-account-signing-key-file accounts.key \
        --requestheader-client-ca-file front.crt --requestheader-allowed-names front-proxy \
        --proxy-client-cert-file front.crt --proxy-client-key-file front.key \
        --requestheader-username-headers X-Remote-User --requestheader-group-headers X-Remote-Group \
        --requestheader-extra-headers-prefix X-Remote-Extra-
    until [ "$(ask /readyz)" = ok ]; do sleep 0.1; done
    start controllers "$programs/kube" kube-controller-manager --kubeconfig admin.conf --leader-elect=false \
        --service-account-private-key-file accounts.key --root-ca-file certificates/apiserver.crt \
        --horizontal-pod-autoscaler-sync-period 5s
    start scheduler "$programs/kube" kube-scheduler --kubeconfig admin.conf --leader-elect=false
}

ask() { curl --silent --insecure --header "Authorization: Bearer admin" "https://$address:8443$1"; }

containers() {
    start containerd containerd --config containerd.toml
    until ctr version >/dev/null 2>&1; do sleep 0.1; done
}

containerd_with_images() {
    mkdir -p cni "$store/imported"
    cat >cni/10-bridge.conflist <<END
{"cniVersion": "0.4.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": "$folder/ipam", "ranges": [[{"subnet": "10.244.0.0/24"}]],
            "routes": [{"dst": "0.0.0.0/0"}]}}]}
END
    # Without CAP_SYS_RESOURCE no process may be shielded from the OOM killer, and every pod would fail on it.
    cat >containerd.toml <<END
version = 2
root = "$store"
state = "/run/containerd"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  restrict_oom_score_adj = true
  disable_apparmor = true
  disable_hugetlb_controller = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$folder/cni"
END
    # What the last cluster left goes before the kubelet's part of containerd knows it; then it is started anew.
    containers
    export CONTAINERD_NAMESPACE=k8s.io
    ctr containers list --quiet | xargs --no-run-if-empty ctr containers rm
    ctr images list --quiet | grep -E '/fraud-(api|jobs):[0-9]{14}$' | xargs --no-run-if-empty ctr images rm || true
    for archive in images/*.tar; do
        [ -e "$archive" ] || continue
        ctr images import "$archive" >>import.log 2>&1
        mark=${archive##*/} mark=${mark%.tar}
        echo "${mark##*@}" >"$store/imported/${mark%@*}"  # NAME@ID.tar
        rm "$archive"
    done
    kill "$(cat containerd.pid)"
    wait "$(cat containerd.pid)" || true
    containers
}

node() {
    : >resolv.conf
    cat >kubelet.yaml <<END
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
cgroupRoot: /$cgroup
failCgroupV1: false
failSwapOn: false
clusterDNS: [10.96.0.10]
clusterDomain: cluster.local
resolvConf: $folder/resolv.conf
evictionHard: {memory.available: 100Mi}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
podLogsDir: $folder/pods
volumePluginDir: $folder/plugins
syncFrequency: 10s
nodeStatusUpdateFrequency: 5s
END
    start kubelet "$programs/kube" kubelet --config kubelet.yaml --kubeconfig admin.conf --root-dir "$folder/kubelet" \
        --node-ip $address --hostname-override minikube
    cat >kube-proxy.yaml <<END
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: iptables
clientConnection: {kubeconfig: $folder/admin.conf}
clusterCIDR: 10.244.0.0/24
hostnameOverride: minikube
conntrack: {maxPerCore: 0}
END
    start kube-proxy "$programs/kube" kube-proxy --config kube-proxy.yaml
    until ask /api/v1/nodes/minikube | grep -q '"kind": "Node"'; do sleep 0.2; done
    start netpol "$programs/netpol" --kubeconfig admin.conf --hostname-override minikube \
        --service-cluster-ip-range 10.96.0.0/16
}

places
network
control_plane
containerd_with_images
node
touch started
wait
