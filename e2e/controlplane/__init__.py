"""etcd, kube-apiserver, kube-controller-manager and kube-scheduler: found or built, run in a namespace."""
