// Enforces network policies with iptables and ipset: kube-router's controller for that, and nothing else of it.
package main

import (
	"os"
	"sync"

	"github.com/cloudnativelabs/kube-router/v2/pkg/controllers/netpol"
	"github.com/cloudnativelabs/kube-router/v2/pkg/healthcheck"
	"github.com/cloudnativelabs/kube-router/v2/pkg/options"
	"github.com/spf13/pflag"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
)

func must[T any](value T, err error) T {
	if err != nil {
		klog.Fatal(err)
	}
	return value
}

func main() {
	config := options.NewKubeRouterConfig()
	config.AddFlags(pflag.CommandLine)
	pflag.Parse()
	config.EnableIPv4, config.EnableIPv6 = true, false
	client := must(kubernetes.NewForConfig(must(clientcmd.BuildConfigFromFlags("", config.Kubeconfig))))
	factory := informers.NewSharedInformerFactory(client, 0)
	pods := factory.Core().V1().Pods().Informer()
	spaces := factory.Core().V1().Namespaces().Informer()
	policies := factory.Networking().V1().NetworkPolicies().Informer()
	stop := make(chan struct{})
	factory.Start(stop)
	factory.WaitForCacheSync(stop)
	tables, sets, err := netpol.NewIPTablesHandlers(config)
	if err != nil {
		klog.Fatal(err)
	}
	var mutex sync.Mutex
	controller := must(netpol.NewNetworkPolicyController(
		client, config, pods, policies, spaces, &mutex, tables, sets))
	for informer, handler := range map[cache.SharedIndexInformer]cache.ResourceEventHandler{
		pods:     controller.PodEventHandler,
		spaces:   controller.NamespaceEventHandler,
		policies: controller.NetworkPolicyEventHandler,
	} {
		must(informer.AddEventHandler(handler))
	}
	beats := make(chan *healthcheck.ControllerHeartbeat, 10)
	go func() { // nobody asks whether it is alive
		for range beats {
		}
	}()
	var wait sync.WaitGroup
	wait.Add(1)
	go controller.Run(beats, stop, &wait)
	wait.Wait()
	os.Exit(0)
}
