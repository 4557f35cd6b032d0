"""Who a pod is, as its certificate says it."""


def identity(namespace: str, name: str, role: str) -> str:
    """The URI of a role of the InferenceService `name`."""
    return f"spiffe://kvasir/ns/{namespace}/inferenceservice/{name}/role/{role}"
