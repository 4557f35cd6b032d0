"""The certificates of a local run: an authority, whose key is never written to disk, and a certificate per role.

Pods get them as Secrets, which the supervisor writes to its state folder and removes when the run ends.
"""

from datetime import UTC, datetime, timedelta

from kvasir_operator.api import InferenceService
from kvasir_operator.certificates import files, identity, new_authority, new_leaf
from kvasir_operator.render.names import ROLES, tls_secret_name

# As long as a run may last: nothing renews them, and nobody else believes them.
LIFETIME = timedelta(days=3650)


def pod_certificates(service: InferenceService) -> dict[str, dict[str, bytes]]:
    """The data of each role's Secret by name; empty if encryption is off."""
    if service.spec.transfer.encryption == "Off":
        return {}
    now = datetime.now(UTC)
    authority = new_authority(now, LIFETIME)
    found = {}
    for role in ROLES:
        leaf = new_leaf(authority, identity(service.namespace, service.name, role), now, LIFETIME)
        found[tls_secret_name(service, role)] = files(leaf, [authority])
    return found
