"""An evaluator of NetworkPolicies: whether a connection between two pods, or to an address outside, is let through.

Semantics of networking.k8s.io/v1: a direction of a pod that some policy selects is closed but for what the rules of
any such policy allow; a connection needs both its ends' consent. Named ports are not resolved: none is used.
"""

from dataclasses import dataclass, field
from typing import Any

Object = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod with its labels, its namespace and that namespace's labels."""

    labels: dict[str, str]
    namespace: str = "default"
    namespace_labels: dict[str, str] = field(default_factory=dict)


OUTSIDE = None  # an address that is no pod's
Peer = Pod | None


def matches(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector takes these labels; the empty one takes all."""
    if not set(selector) <= {"matchLabels", "matchExpressions"}:
        raise AssertionError(f"not a label selector: {selector}")
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for expression in selector.get("matchExpressions", []):
        value = labels.get(expression["key"])
        match expression["operator"]:
            case "In" if value not in expression["values"]:
                return False
            case "NotIn" if value in expression["values"]:
                return False
            case "Exists" if value is None:
                return False
            case "DoesNotExist" if value is not None:
                return False
            case "In" | "NotIn" | "Exists" | "DoesNotExist":
                pass
            case other:
                raise AssertionError(other)
    return True


def _is(peer: Object, pod: Peer, home: str) -> bool:
    if not set(peer) <= {"podSelector", "namespaceSelector"} or not peer:
        raise AssertionError(f"not evaluated here: {peer}")
    if pod is None:
        return False
    if "namespaceSelector" in peer:
        if not matches(peer["namespaceSelector"], pod.namespace_labels):
            return False
    elif pod.namespace != home:
        return False
    return matches(peer.get("podSelector", {}), pod.labels)


def _rule_allows(rule: Object, side: str, other: Peer, home: str, port: int, protocol: str) -> bool:
    peers, ports = rule.get(side), rule.get("ports")
    if peers and not any(_is(peer, other, home) for peer in peers):
        return False
    return not ports or any(p.get("protocol", "TCP") == protocol and p["port"] == port for p in ports)


def _one_side(policies: list[Object], direction: str, pod: Peer, other: Peer, port: int, protocol: str) -> bool:
    if pod is None:
        return True
    chosen = [
        policy
        for policy in policies
        if policy["metadata"]["namespace"] == pod.namespace
        and direction in policy["spec"]["policyTypes"]
        and matches(policy["spec"]["podSelector"], pod.labels)
    ]
    side = "from" if direction == "Ingress" else "to"
    return not chosen or any(
        _rule_allows(rule, side, other, pod.namespace, port, protocol)
        for policy in chosen
        for rule in policy["spec"].get(direction.lower(), [])
    )


def allowed(policies: list[Object], source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether `source` can connect to `target` at `port`."""
    return _one_side(policies, "Egress", source, target, port, protocol) and _one_side(
        policies, "Ingress", target, source, port, protocol
    )
