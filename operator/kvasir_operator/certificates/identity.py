"""A pod's identity in its certificate."""


def identity(namespace: str, name: str, role: str) -> str:
    """The URI of a role of the InferenceService `name`."""
    return f"spiffe://kvasir/ns/{namespace}/inferenceservice/{name}/role/{role}"
