"""Authorities and the certificates that they sign: ECDSA on P-256, X.509 as RFC 5280 has it.

A pod has no host name that lasts: who it is stands in the URI of its certificate alone.
"""

import hashlib
from datetime import datetime, timedelta

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_LIFETIME = timedelta(days=365)
LEAF_LIFETIME = timedelta(days=30)
# Clocks of nodes that are behind: what was just signed is valid for them too.
SKEW = timedelta(hours=1)
_FINGERPRINT_LENGTH = 16


class Authority(msgspec.Struct, frozen=True):
    """A self-signed certificate and its key, both PEM."""

    certificate: bytes
    key: bytes

    @property
    def name(self) -> str:
        """The authority's name: part of its certificate's SHA-256, in hex."""
        parsed = x509.load_pem_x509_certificate(self.certificate)
        return hashlib.sha256(parsed.public_bytes(serialization.Encoding.DER)).hexdigest()[:_FINGERPRINT_LENGTH]

    @property
    def begins(self) -> datetime:
        """When it was created."""
        return x509.load_pem_x509_certificate(self.certificate).not_valid_before_utc + SKEW

    @property
    def ends(self) -> datetime:
        """When it expires."""
        return x509.load_pem_x509_certificate(self.certificate).not_valid_after_utc

    def check(self) -> None:
        """Raise ValueError where it cannot sign certificates that peers accept."""
        parsed = x509.load_pem_x509_certificate(self.certificate)
        key = _signing_key(self)
        if parsed.public_key() != key.public_key():
            raise ValueError("the key is not the certificate's")
        try:
            signs = parsed.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
            parsed.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
        except x509.ExtensionNotFound as error:
            raise ValueError(str(error)) from None
        if not signs:
            raise ValueError("the certificate is none of an authority")


class Leaf(msgspec.Struct, frozen=True):
    """A pod's certificate and its key, both PEM."""

    certificate: bytes
    key: bytes


def new_authority(now: datetime, lifetime: timedelta = AUTHORITY_LIFETIME) -> Authority:
    """An authority that signs certificates of pods and no other authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    serial = x509.random_serial_number()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"kvasir {serial:x}"[:24])])
    usage = _usage(key_cert_sign=True, crl_sign=True)
    made = (
        _builder(name, name, key.public_key(), serial, now, now + lifetime)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(made.public_bytes(serialization.Encoding.PEM), _pem(key))


def new_leaf(authority: Authority, uri: str, now: datetime, lifetime: timedelta = LEAF_LIFETIME) -> Leaf:
    """The certificate of the pod whose identity is `uri`, for both ends of a connection. It expires no later than
    its authority."""
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    signing = _signing_key(authority)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kvasir")])
    ends = min(now + lifetime, authority.ends)
    known = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    made = (
        _builder(name, issuer.subject, key.public_key(), x509.random_serial_number(), now, ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(both, critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(known),
            critical=False,
        )
        .sign(signing, hashes.SHA256())
    )
    return Leaf(made.public_bytes(serialization.Encoding.PEM), _pem(key))


def _signing_key(authority: Authority) -> ec.EllipticCurvePrivateKey:
    """Raises ValueError."""
    found = serialization.load_pem_private_key(authority.key, None)
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise ValueError("the key is none of an elliptic curve")
    return found


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    serial: int,
    now: datetime,
    ends: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(now - SKEW)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
