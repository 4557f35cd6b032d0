"""Two who decide at once: the status that remembers sizes is only written where it is as it was read."""

import pytest
from scaling_harness import Load, ScalingHarness

from kvasir_operator.cluster.interface import ClusterError


def test_a_decision_from_an_old_status_is_refused_and_nothing_is_carried_out() -> None:
    bounds = {"prefill": {"maxReplicas": 8}, "decode": {"maxReplicas": 8}}
    found = ScalingHarness(
        {"prefill": {"device": "cpu"}, "decode": {"device": "cpu"}, "scaling": {"mode": "Auto", "auto": bounds}}
    )
    found.run(60)
    stored = found.cluster.services["default", "llama"]
    get = found.cluster.get_service

    def beaten(namespace: str, name: str) -> object:
        read = get(namespace, name)
        stored["metadata"]["resourceVersion"] = "another's"
        return read

    found.load = Load(arrivals=20.0)
    found.cluster.get_service = beaten  # type: ignore[method-assign,assignment]
    with pytest.raises(ClusterError, match="modified"):
        found.run(60)
    assert found.size == (1, 1)
    found.cluster.get_service = get  # type: ignore[method-assign]
    found.run(60)
    assert found.size[0] == 4
