"""The end-to-end tests: a real control plane in network namespaces, and a node agent that runs pods as processes."""
