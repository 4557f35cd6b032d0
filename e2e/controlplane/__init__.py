"""etcd, kube-apiserver, kube-controller-manager and kube-scheduler: found or built, and run in a network namespace."""
