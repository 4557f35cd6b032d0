"""The end-to-end tests: a real control plane in network namespaces, pods run as processes."""
