"""What every node of a cluster brings: an agent that runs pods (kubelet) and a Service proxy (kube-proxy)."""
