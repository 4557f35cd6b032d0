"""PURE: the certificates by which a service's pods know each other, and when which of them is due.

A folder with them has the files of a `kubernetes.io/tls` Secret: `ca.crt`, `tls.crt`, `tls.key`.
"""

from kvasir_operator.certificates.authority import Authority, Leaf, new_authority, new_leaf
from kvasir_operator.certificates.identity import identity
from kvasir_operator.certificates.renewal import IssuedCertificates, TrustedAuthority, due, overdue

__all__ = [
    "Authority",
    "IssuedCertificates",
    "Leaf",
    "TrustedAuthority",
    "due",
    "files",
    "identity",
    "new_authority",
    "new_leaf",
    "overdue",
]


def files(leaf: Leaf, trusted: list[Authority]) -> dict[str, bytes]:
    """The files of a pod: its certificate and key, and all authorities that it trusts."""
    return {
        "ca.crt": b"".join(each.certificate for each in trusted),
        "tls.crt": leaf.certificate,
        "tls.key": leaf.key,
    }
