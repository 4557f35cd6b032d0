"""The objects that a role has once, whatever its revision: its account and its disruption budget."""

from kvasir_operator.api import InferenceService
from kvasir_operator.render.names import ROLES, Object, Role, labels, metadata, role_name, selector

# What the router does at the API server, and so all that its Role allows.
POD_VERBS = ["list", "watch"]
# Pods are followed to their owners by name.
OWNER_VERBS = ["get"]
OWNERS = {
    "apps": ["replicasets", "deployments", "statefulsets"],
    "leaderworkerset.x-k8s.io": ["leaderworkersets"],
}
_RBAC = "rbac.authorization.k8s.io"


def accounts(service: InferenceService) -> list[Object]:
    """An account for each role. Only the router's has rights, and only its token is mounted."""
    return [*(_account(service, role) for role in ROLES), *_watch_pods(service)]


def budgets(service: InferenceService) -> list[Object]:
    """Of each role, one pod may be evicted at a time: a worker takes long to leave, and longer to come back.

    A node can be emptied of a role's only pod, too. The bounds of rollouts are the planner's, not the budget's.
    """
    return [
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": metadata(service, role_name(service, role), labels(service, role)),
            "spec": {"maxUnavailable": 1, "selector": {"matchLabels": selector(service, role)}},
        }
        for role in ROLES
    ]


def _account(service: InferenceService, role: Role) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": metadata(service, role_name(service, role), labels(service, role)),
        "automountServiceAccountToken": False,  # the router's pods ask for theirs by themselves
    }


def _watch_pods(service: InferenceService) -> list[Object]:
    name, own_labels = role_name(service, "router"), labels(service, "router")
    return [
        {
            "apiVersion": f"{_RBAC}/v1",
            "kind": "Role",
            "metadata": metadata(service, name, own_labels),
            "rules": [
                {"apiGroups": [""], "resources": ["pods"], "verbs": POD_VERBS},
                *(
                    {"apiGroups": [group], "resources": resources, "verbs": OWNER_VERBS}
                    for group, resources in OWNERS.items()
                ),
            ],
        },
        {
            "apiVersion": f"{_RBAC}/v1",
            "kind": "RoleBinding",
            "metadata": metadata(service, name, own_labels),
            "roleRef": {"apiGroup": _RBAC, "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": service.namespace}],
        },
    ]
