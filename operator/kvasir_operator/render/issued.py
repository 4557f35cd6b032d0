"""Certificates that cert-manager issues, where the operator is told of an issuer: who a pod is, and for how long.

The Secrets are those that the operator would write, so pods mount the same. Facts are of cert-manager's API,
cert-manager.io/v1.
"""

from kvasir_operator.api import InferenceService
from kvasir_operator.certificates import identity
from kvasir_operator.certificates.authority import LEAF_LIFETIME
from kvasir_operator.certificates.renewal import RENEW_AFTER
from kvasir_operator.render.names import ROLES, Object, Role, labels, metadata, tls_secret_name
from kvasir_operator.render.options import Issuer

API_VERSION, KIND = "cert-manager.io/v1", "Certificate"
_HOUR = 3600


def issued_certificates(service: InferenceService, issuer: Issuer) -> list[Object]:
    """One for each role; none where encryption is off."""
    if service.spec.transfer.encryption == "Off":
        return []
    return [_certificate(service, role, issuer) for role in ROLES]


def _certificate(service: InferenceService, role: Role, issuer: Issuer) -> Object:
    name, own_labels = tls_secret_name(service, role), labels(service, role)
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": metadata(service, name, own_labels),
        "spec": {
            "secretName": name,
            "secretTemplate": {"labels": own_labels},
            "uris": [identity(service.namespace, service.name, role)],
            "duration": f"{LEAF_LIFETIME.total_seconds() // _HOUR:.0f}h",
            "renewBefore": f"{(LEAF_LIFETIME - RENEW_AFTER).total_seconds() // _HOUR:.0f}h",
            "privateKey": {"algorithm": "ECDSA", "size": 256, "rotationPolicy": "Always"},
            "usages": ["digital signature", "server auth", "client auth"],
            "issuerRef": {"name": issuer.name, "kind": issuer.kind, "group": issuer.group},
        },
    }
